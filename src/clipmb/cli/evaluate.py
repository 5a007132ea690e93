"""``clipmb evaluate``: zero-shot classification and retrieval on a data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from clipmb.cli import common
from clipmb.common.errors import bad_input


def run(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Images with labels or captions: a table (.csv, .tsv, .jsonl, .parquet), a folder, or .tar shards.",
        ),
    ],
    model: common.Model = None,
    backend: common.Backend = None,
    labels: common.Labels = [],  # noqa: B006
    classes: common.ClassesFile = None,
    template: common.Template = None,
    image_column: common.ImageColumn = None,
    caption_column: common.CaptionColumn = None,
    label_column: common.LabelColumn = None,
    separator: common.Separator = None,
    image_root: common.ImageRoot = None,
    dtype: common.Dtype = "float32",
    device: common.Device = None,
    batch_size: common.BatchSize = 32,
    as_json: common.Json = False,
) -> None:
    """Measure zero-shot accuracy and image-text retrieval.

    Zero-shot classification is measured on the images with labels, retrieval on those with captions.
    """
    given = None
    if labels or classes is not None:
        model, templates, given = common.chosen_classes(context, model, template, labels, classes)
    else:
        model, templates = common.chosen(model, template)
    if isinstance(given, dict) and len(given) < 2:
        raise bad_input("--labels must be a file or names separated by commas", labels, "Pass at least two names")
    common.load_framework(backend)
    from clipmb import backends
    from clipmb.evaluation import evaluate

    name = backends.engine(backend).backend
    found = evaluate(
        model,
        data,
        name,
        labels=given,
        templates=templates,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        progress=True,
        image_column=image_column,
        caption_column=caption_column,
        label_column=label_column,
        separator=separator,
        image_root=image_root,
    )
    if template and "zero_shot" not in found:
        typer.echo("--template had no effect: the data has no labels.", err=True)
    if as_json:
        common.print_json({"model": model, "backend": name, "data": data, **found})
        return
    for parts in report(found, f"{model} on {name}: {data}"):
        common.table(*parts)


def report(found: Mapping[str, Any], title: str) -> list[tuple[str, list[str], list[list[str]], tuple[int, ...]]]:
    """Returns the tables of an evaluation, each as title, columns, rows and the columns aligned to the right."""
    tables = []
    if scores := found.get("zero_shot"):
        about = f"{title}\nzero-shot classification: {scores['images']:,} images, {scores['classes']:,} classes"
        measures = [key for key in scores if key not in ("images", "classes")]
        row = [f"{scores[key]:.2%}" for key in measures]
        tables.append((about, measures, [row], tuple(range(len(row)))))
        title = ""
    if scores := found.get("retrieval"):
        about = f"retrieval: {scores['images']:,} images, {scores['captions']:,} captions"
        directions = [key for key, value in scores.items() if isinstance(value, dict)]
        measures = list(scores[directions[0]])
        rows = [
            [way.replace("_", " "), *(f"{v:g}" if "rank" in k else f"{v:.2%}" for k, v in scores[way].items())]
            for way in directions
        ]
        columns = ["", *(key.replace("_", " ") for key in measures)]
        tables.append((f"{title}\n{about}".strip(), columns, rows, tuple(range(1, len(columns)))))
    if skipped := found["skipped"]:
        rows = [[entry["id"], entry["reason"]] for entry in skipped]
        tables.append((f"left out: {len(skipped):,}", ["id", "reason"], rows, ()))
    return tables
