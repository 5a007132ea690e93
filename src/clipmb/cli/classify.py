"""``clipmb classify``: which label fits each image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipmb.cli import common
from clipmb.sorting import homes, move, plan

if TYPE_CHECKING:
    import numpy as np

    from clipmb.pipeline import CLIPPipeline


def run(
    context: typer.Context,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files.")],
    labels: common.Labels = [],  # noqa: B006
    classes: common.ClassesFile = None,
    model: common.Model = None,
    backend: common.Backend = None,
    template: common.Template = None,
    long_text: common.LongText = "error",
    dtype: common.Dtype = "float32",
    device: common.Device = None,
    batch_size: common.BatchSize = 32,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Labels to show for each image.")] = 5,
    move_into: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Sort the images into a folder for each label; only shown without --yes."),
    ] = None,
    least: Annotated[
        float | None,
        typer.Option(
            metavar="P", min=0, max=1, help="Leave images whose best label is less probable.", show_default="0"
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Move the images of --move-into.")] = False,
    as_json: common.Json = False,
) -> None:
    """Classify images with zero-shot labels; sort them if wanted.

    With --move-into, each image goes into the folder of its best label. No file is ever replaced; images that cannot be
    read stay.
    """
    if move_into is None and (yes or least is not None):
        raise typer.BadParameter("--yes and --least belong to --move-into.")
    if move_into is not None and not as_json:
        common.refuse(
            context, ["top"], "has no effect with --move-into: the best label decides. Pass --json to see others."
        )
    model, templates, given = common.chosen_classes(context, model, template, labels, classes)
    names = list(given) if isinstance(given, dict) else list(given.labels)
    if move_into is not None:
        homes(move_into, names)  # what is wrong with labels and files shows before the work
        plan(images, names[:1] * len(images), move_into)
    pipeline = common.load_pipeline(model, backend, dtype, device)

    def classified(images: list[str]) -> np.ndarray:
        return pipeline.classify(images, given, templates, batch_size=batch_size, progress=True, long_text=long_text)

    unread: dict[str, str] = {}
    try:
        probabilities = classified(images)
    except ValueError:
        unread = {} if move_into is None else _unread(pipeline, images)
        if not unread:
            raise
        images = [image for image in images if image not in unread]
        probabilities = classified(images)
    order = (-probabilities).argsort(axis=1, kind="stable")[:, :top]
    found = [
        {"image": image, "labels": [{"label": names[i], "probability": float(row[i])} for i in best]}
        for image, row, best in zip(images, probabilities, order, strict=True)
    ]
    if move_into is not None:
        sure = [entry for entry in found if entry["labels"][0]["probability"] >= (least or 0)]
        moves = plan([entry["image"] for entry in sure], [entry["labels"][0]["label"] for entry in sure], move_into)
        if yes:
            move(moves)
        targets = {str(step.source): str(step.target) for step in moves}
        found = [{**entry, "target": targets.get(str(Path(entry["image"])))} for entry in found]
    if as_json:
        about = {"model": model, "backend": pipeline.backend, "images": found}
        if move_into is not None:
            skipped = [{"image": image, "reason": reason} for image, reason in unread.items()]
            about |= {"moved": yes, "skipped": skipped}
        common.print_json(about)
        return
    if move_into is None:
        rows = [
            [entry["image"] if not place else "", best["label"], f"{best['probability']:.4f}"]
            for entry in found
            for place, best in enumerate(entry["labels"])
        ]
        common.table(f"{model} on {pipeline.backend}", ["image", "label", "probability"], rows, right=(2,))
        return
    rows = [[entry["image"], f"{entry['labels'][0]['probability']:.4f}", entry["target"] or "stays"] for entry in found]
    rows += [[image, "", f"stays: {reason}"] for image, reason in unread.items()]
    common.table(
        f"{model} on {pipeline.backend}", ["image", "probability", "moved to" if yes else "would move to"], rows
    )
    count = sum(entry["target"] is not None for entry in found)
    typer.echo(f"{count} of {len(rows)} images {'moved' if yes else 'would move; --yes moves them'}")


def _unread(pipeline: CLIPPipeline, images: list[str]) -> dict[str, str]:
    """Returns the images that cannot be read, with the reasons."""
    found = {}
    for image in images:
        try:
            pipeline.processor.image_processor(image)
        except (ValueError, TypeError, OSError) as error:
            found[image] = str(error)
    return found
