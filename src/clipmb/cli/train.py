"""``clipmb train``: contrastive training and fine-tuning."""

from __future__ import annotations

import json
import logging
from typing import Annotated

import typer

from clipmb.cli import common
from clipmb.common.training.recipe import DISTRIBUTED, LOSSES, PRECISIONS, Recipe


def run(
    data: Annotated[str, typer.Argument(help="Captions file, folder or WebDataset shards: pictures with captions.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for the trained model.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or hub id to begin from; not needed to resume.")
    ] = None,
    backend: common.Backend = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data; or give --steps.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="New weights; only config and tokenizer come from --model.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, with any backend.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew although --out has a checkpoint.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(help=f"Pairs in a step, over all devices.  [{Recipe.batch_size}]")
    ] = None,
    chunk_size: Annotated[
        int | None, typer.Option(help="Pairs encoded at once: the same result in less memory.  [whole batch]")
    ] = None,
    loss: Annotated[str | None, typer.Option(help=f"{' or '.join(LOSSES)}.  [{Recipe.loss}]")] = None,
    local_loss: Annotated[
        bool | None, typer.Option("--local-loss", help="Each device computes the loss of its own rows only.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", help=f"The highest.  [{Recipe.learning_rate}]")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help=f"Of linear warm-up.  [{Recipe.warmup_steps}]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help=f"AdamW's.  [{Recipe.weight_decay}]")] = None,
    beta1: Annotated[float | None, typer.Option(help=f"AdamW's.  [{Recipe.betas[0]}]")] = None,
    beta2: Annotated[float | None, typer.Option(help=f"AdamW's.  [{Recipe.betas[1]}]")] = None,
    eps: Annotated[float | None, typer.Option(help=f"AdamW's.  [{Recipe.eps}]")] = None,
    clip_norm: Annotated[
        float | None, typer.Option(help=f"Largest norm of the gradient; 0 for no clipping.  [{Recipe.clip_norm}]")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help=f"{', '.join(PRECISIONS)}: of the towers.  [{Recipe.precision}]")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Recompute blocks instead of keeping their results.")
    ] = None,
    freeze: Annotated[str | None, typer.Option(help="text or vision: the tower that stays as it is.")] = None,
    distributed: Annotated[
        str | None, typer.Option(help=f"{', '.join(DISTRIBUTED)}: over several devices.  [{Recipe.distributed}]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help=f"Of order, augmentation, dropout.  [{Recipe.seed}]")] = None,
    augment: Annotated[str | None, typer.Option(help="crop: random resized crops.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that decode pictures.  [processors, at most 8]")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of the pictures' paths.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of the captions.")] = None,
    separator: Annotated[str | None, typer.Option(help="Between the columns of a CSV.")] = None,
    evaluation_data: Annotated[
        str | None, typer.Option("--eval", help="Held-out labelled or captioned pictures.")
    ] = None,
    evaluate_every: Annotated[int | None, typer.Option("--eval-every", help="Steps.  [at the end only]")] = None,
    template: Annotated[
        list[str] | None, typer.Option("--template", "-t", help="Of zero-shot evaluation, as for classify.")
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps.")] = 1000,
    device: Annotated[str | None, typer.Option(help="As the framework names it.")] = None,
    as_json: common.Json = False,
) -> None:
    """Train a CLIP on pictures with captions, or fine-tune one."""
    common.load_framework(backend)
    from clipmb.training import train

    logging.getLogger("clipmb").setLevel(logging.INFO)
    betas = None
    if beta1 is not None or beta2 is not None:
        default = Recipe.betas
        betas = (default[0] if beta1 is None else beta1, default[1] if beta2 is None else beta2)
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
        templates=template[0] if template and len(template) == 1 else template,
        save_every=save_every,
        augment=augment,
        workers=workers,
        device=device,
        progress=True,
        columns={"image_column": image_column, "caption_column": caption_column, "separator": separator},
        batch_size=batch_size,
        chunk_size=chunk_size,
        loss=loss,
        local_loss=local_loss,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        betas=betas,
        eps=eps,
        clip_norm=clip_norm,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        freeze=None if freeze is None else tuple(name.strip() for name in freeze.split(",")),
        distributed=distributed,
        seed=seed,
    )
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    rows = [["steps", str(result["steps"])]]
    if "loss" in result:  # a run that was over before takes no step
        rows.append(["loss of the last step", f"{result['loss']:.4f}"])
    rows.append(["items skipped", str(result["skipped"])])
    rows += [[name, f"{value:.4f}"] for name, value in _flat(result.get("evaluation", {}))]
    common.table(f"Trained into {result['out']}", ["what", "value"], rows, right=(1,))


def _flat(values: dict, prefix: str = "") -> list[tuple[str, float]]:
    """The fractions of a nested evaluation by their paths."""
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name} ")
        elif isinstance(value, float):
            found.append((prefix + name, value))
    return found
