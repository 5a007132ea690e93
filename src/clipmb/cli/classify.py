"""``clipmb classify``: which label fits each picture."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from clipmb.cli import common


def run(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Picture files.")],
    labels: Annotated[list[str], typer.Option("--labels", "-l", help='Class names, "a cat,a dog"; may be repeated.')],
    model: common.Model = common.DEFAULT_MODEL,
    backend: common.Backend = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            "--template", "-t", help='Text with {} for the label, or "photo", "label", "seven"; may be repeated.'
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16 or float64.")] = "float32",
    device: Annotated[str | None, typer.Option(help="As the framework names it.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per step.")] = 32,
    top: Annotated[int, typer.Option(min=1, help="Labels shown for each picture.")] = 5,
    as_json: common.Json = False,
) -> None:
    """Tell which label fits each picture."""
    names = [name.strip() for part in labels for name in part.split(",") if name.strip()]
    model, templates = common.chosen(model, template[0] if template and len(template) == 1 else template)
    common.load_framework(backend)
    from clipmb.pipeline import CLIPPipeline

    pipeline = CLIPPipeline.from_pretrained(model, backend=backend, dtype=dtype, device=device)
    probabilities = pipeline.classify(images, names, templates, batch_size=batch_size, progress=True)
    order = (-probabilities).argsort(axis=1, kind="stable")[:, :top]
    found = [
        {"image": image, "labels": [{"label": names[i], "probability": float(row[i])} for i in best]}
        for image, row, best in zip(images, probabilities, order, strict=True)
    ]
    if as_json:
        typer.echo(json.dumps({"model": model, "backend": pipeline.backend, "images": found}, indent=2))
        return
    rows = [
        [entry["image"] if not place else "", best["label"], f"{best['probability']:.4f}"]
        for entry in found
        for place, best in enumerate(entry["labels"])
    ]
    common.table(f"{model} on {pipeline.backend}", ["image", "label", "probability"], rows, right=(2,))
