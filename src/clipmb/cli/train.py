"""``clipmb train``: contrastive training and fine-tuning."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from clipmb.cli import common
from clipmb.common.training.recipe import DISTRIBUTED, LOSSES, PRECISIONS, TOWERS, Recipe


def run(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Images with captions: a table (.csv, .tsv, .jsonl, .parquet), a folder, or .tar shards.",
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Folder for the trained model.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="Folder or Hub id to start from; not needed with --resume."
        ),
    ] = None,
    backend: common.Trainer = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Passes over the data; or use --steps.")] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Optimizer steps; or use --epochs.")] = None,
    from_scratch: Annotated[
        bool,
        typer.Option("--from-scratch", help="Take only config, tokenizer and image processor from --model."),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in --out, with any backend.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start over even if --out already contains a checkpoint.")
    ] = False,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Pairs per step, over all devices.")] = Recipe.batch_size,
    chunk_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Pairs to encode at once: the same result in less memory.",
            show_default="the full batch",
        ),
    ] = Recipe.chunk_size,
    loss: Annotated[str, common.choice(values=LOSSES, help="Contrastive loss")] = Recipe.loss,
    local_loss: Annotated[
        bool, typer.Option("--local-loss", help="Compute on each device only the loss of its own pairs.")
    ] = Recipe.local_loss,
    learning_rate: Annotated[
        float, typer.Option("--lr", metavar="X", help="Peak learning rate.")
    ] = Recipe.learning_rate,
    warmup_steps: Annotated[int, typer.Option(metavar="N", help="Linear warm-up steps.")] = Recipe.warmup_steps,
    weight_decay: Annotated[float, typer.Option(metavar="X", help="AdamW weight decay.")] = Recipe.weight_decay,
    beta1: Annotated[float, typer.Option(metavar="X", help="AdamW beta1.")] = Recipe.betas[0],
    beta2: Annotated[float, typer.Option(metavar="X", help="AdamW beta2.")] = Recipe.betas[1],
    eps: Annotated[float, typer.Option(metavar="X", help="AdamW epsilon.")] = Recipe.eps,
    clip_norm: Annotated[
        float | None, typer.Option(metavar="X", help="Largest gradient norm; 0 disables clipping.")
    ] = Recipe.clip_norm,
    precision: Annotated[
        str, common.choice(values=PRECISIONS, help="Floating-point type of the towers")
    ] = Recipe.precision,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations instead of keeping them.")
    ] = Recipe.gradient_checkpointing,
    freeze: Annotated[str | None, common.choice(values=TOWERS, help="Tower to keep unchanged")] = None,
    distributed: Annotated[
        str, common.choice(values=DISTRIBUTED, help="Parallelism over several devices")
    ] = Recipe.distributed,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Random seed for data order, augmentation and dropout.")
    ] = Recipe.seed,
    augment: Annotated[str | None, typer.Option(metavar="crop", help="Augment images by random resized crops.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Threads that decode images.", show_default="processors, at most 8"),
    ] = None,
    image_column: common.ImageColumn = None,
    caption_column: common.CaptionColumn = None,
    label_column: common.LabelColumn = None,
    separator: common.Separator = None,
    image_root: common.ImageRoot = None,
    evaluation_data: Annotated[
        str | None, typer.Option("--eval", metavar="DATA", help="Held-out images with labels or captions.")
    ] = None,
    evaluate_every: Annotated[
        int | None,
        typer.Option("--eval-every", metavar="N", help="Evaluate every N steps.", show_default="at the end only"),
    ] = None,
    template: common.Template = None,
    save_every: Annotated[int, typer.Option(metavar="N", help="Save every N steps.")] = 1000,
    device: common.Device = None,
    as_json: common.Json = False,
) -> None:
    """Train a CLIP model on image-text pairs."""
    if evaluation_data is None:
        common.refuse(context, {"evaluate_every", "template"}, "has no effect without --eval.")
    common.load_framework(backend)
    from clipmb.training import train

    logging.getLogger("clipmb").setLevel(logging.INFO)
    result = train(
        data,
        model,
        out,
        backend=backend,
        epochs=epochs,
        steps=steps,
        from_scratch=from_scratch,
        resume=resume,
        overwrite=overwrite,
        evaluation_data=evaluation_data,
        evaluate_every=evaluate_every,
        templates=common.templates(template),
        save_every=save_every,
        augment=augment,
        workers=workers,
        device=device,
        progress=True,
        columns={
            "image_column": image_column,
            "caption_column": caption_column,
            "label_column": label_column,
            "separator": separator,
            "image_root": image_root,
        },
        **_recipe(context),
    )
    if as_json:
        common.print_json(result)
        return
    rows = [["steps", str(result["steps"])]]
    if "loss" in result:  # a run that had already ended takes no step
        rows.append(["loss of the last step", f"{result['loss']:.4f}"])
    rows.append(["items skipped", str(result["skipped"])])
    rows += [[name, f"{value:.4f}"] for name, value in _flat(result.get("evaluation", {}))]
    common.table(f"Trained model: {result['out']}", ["", "value"], rows, right=(1,))


def _recipe(context: typer.Context) -> dict[str, Any]:
    """Returns the fields of the recipe that were given; a resumed run keeps its own values of the others."""
    given, values = common.given(context), context.params
    recipe = {field.name: values[field.name] for field in dataclasses.fields(Recipe) if field.name in given - {"steps"}}
    if "freeze" in recipe:
        recipe["freeze"] = (recipe["freeze"],)
    if given & {"beta1", "beta2"}:
        recipe["betas"] = (values["beta1"], values["beta2"])
    return recipe


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Returns the fractions in a nested evaluation, by their paths."""
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name} ")
        elif isinstance(value, float):
            found.append((prefix + name, value))
    return found
