"""``clipmb classes``: class embeddings for classify and evaluate, made once."""

from __future__ import annotations

from typing import Annotated

import typer

from clipmb.cli import common


def run(
    labels: common.Labels,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="File for the classes (.safetensors).")],
    model: common.Model = None,
    backend: common.Backend = None,
    template: common.Template = None,
    long_text: common.LongText = "error",
    dtype: common.Dtype = "float32",
    device: common.Device = None,
) -> None:
    """Embed class names once, for classify and evaluate.

    The file says what made it, and is refused with another model.
    """
    from clipmb.embedding.classes import Classes, checked_path

    checked_path(out)
    named = common.named_labels(labels)
    model, templates = common.chosen(model, template)
    pipeline = common.load_pipeline(model, backend, dtype, device)
    made = Classes.build(pipeline, named, templates, long_text=long_text, progress=True)
    made.save(out)
    typer.echo(f"{out}: {len(made):,} classes in {len(made.templates)} templates, {made.vectors.shape[1]} numbers each")
