"""``clipmb evaluate``: zero-shot classification and retrieval on a data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from clipmb.cli import common
from clipmb.common.errors import bad_input


def run(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Table of pictures with captions or labels (.csv, .tsv, .jsonl, .parquet), folder, or .tar shards.",
        ),
    ],
    model: common.Model = common.DEFAULT_MODEL,
    backend: common.Backend = None,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            "-l",
            help='The classes: "a cat,a dog", or a file with one label, or label, tab and name in the prompts, a line; '
            "the labels of the data if not given.",
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            "--template", "-t", help='Text with {} for the label, or "photo", "label", "seven"; may be repeated.'
        ),
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of the pictures.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of the captions.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels.")] = None,
    separator: Annotated[str | None, typer.Option(help="What separates the cells of a text table.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16 or float64.")] = "float32",
    device: Annotated[str | None, typer.Option(help="As the framework names it.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per step.")] = 32,
    as_json: common.Json = False,
) -> None:
    """Measure zero-shot classification where items have labels, and retrieval where they have captions."""
    model, templates = common.chosen(model, template[0] if template and len(template) == 1 else template)
    common.load_framework(backend)
    from clipmb import backends
    from clipmb.evaluation import evaluate

    name = backends.engine(backend).backend
    found = evaluate(
        model,
        data,
        name,
        labels=None if labels is None else _classes(labels),
        templates=templates,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        progress=True,
        image_column=image_column,
        caption_column=caption_column,
        label_column=label_column,
        separator=separator,
    )
    if as_json:
        typer.echo(json.dumps({"model": model, "backend": name, "data": data, **found}, indent=2))
        return
    for parts in report(found, f"{model} on {name}: {data}"):
        common.table(*parts)


def report(found: dict[str, Any], title: str) -> list[tuple[str, list[str], list[list[str]], tuple[int, ...]]]:
    """Returns the tables of an evaluation: title, columns, rows and the columns aligned to the right."""
    tables = []
    if scores := found.get("zero_shot"):
        about = f"{title}\nzero-shot classification: {scores['images']:,} pictures, {scores['classes']:,} classes"
        measures = [key for key in scores if key not in ("images", "classes")]
        row = [f"{scores[key]:.2%}" for key in measures]
        tables.append((about, measures, [row], tuple(range(len(row)))))
        title = ""
    if scores := found.get("retrieval"):
        about = f"retrieval: {scores['images']:,} pictures, {scores['captions']:,} captions"
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


def _classes(labels: str) -> list[str] | Path:
    if Path(labels).is_file():
        return Path(labels)
    if "," not in labels:
        raise bad_input("--labels must be a file, or names with commas between them", labels, "Correct it")
    return [name.strip() for name in labels.split(",") if name.strip()]
