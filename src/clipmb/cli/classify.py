"""``clipmb classify``: which label fits each image."""

from __future__ import annotations

from typing import Annotated

import typer

from clipmb.cli import common


def run(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files.")],
    labels: Annotated[
        list[str],
        typer.Option("--labels", "-l", metavar="NAMES", help="Class names, separated by commas; repeatable."),
    ],
    model: common.Model = None,
    backend: common.Backend = None,
    template: common.Template = None,
    long_text: common.LongText = "error",
    dtype: common.Dtype = "float32",
    device: common.Device = None,
    batch_size: common.BatchSize = 32,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Labels to show for each image.")] = 5,
    as_json: common.Json = False,
) -> None:
    """Classify images with zero-shot labels."""
    names = [name for part in labels for name in common.split(part)]
    model, templates = common.chosen(model, template)
    pipeline = common.load_pipeline(model, backend, dtype, device)
    probabilities = pipeline.classify(
        images, names, templates, batch_size=batch_size, progress=True, long_text=long_text
    )
    order = (-probabilities).argsort(axis=1, kind="stable")[:, :top]
    found = [
        {"image": image, "labels": [{"label": names[i], "probability": float(row[i])} for i in best]}
        for image, row, best in zip(images, probabilities, order, strict=True)
    ]
    if as_json:
        common.print_json({"model": model, "backend": pipeline.backend, "images": found})
        return
    rows = [
        [entry["image"] if not place else "", best["label"], f"{best['probability']:.4f}"]
        for entry in found
        for place, best in enumerate(entry["labels"])
    ]
    common.table(f"{model} on {pipeline.backend}", ["image", "label", "probability"], rows, right=(2,))
