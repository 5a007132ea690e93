"""``clipmb export``: a checkpoint for another runtime, compared with it."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from clipmb.cli import common
from clipmb.exporting import RECORD_NAME, TARGETS, TOWERS, export
from clipmb.layouts import LAYOUTS, PLAIN

_DTYPES = list(dict.fromkeys(dtype for target in TARGETS.values() for dtype in target.dtypes))


def run(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, weights file or Hub id, in any format.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Folder to write; new or empty.")],
    to: Annotated[str, common.choice("--to", values=TARGETS, metavar="TARGET", help="Format to write")] = "onnx",
    layout: Annotated[
        str | None,
        common.choice(
            "--for",
            values=LAYOUTS,
            help="Program that loads the ONNX files",
            show_default="transformers.js and Optimum",
        ),
    ] = None,
    tower: Annotated[str, common.choice("--tower", values=(*TOWERS, "all"), help="Part of the model")] = "all",
    dtype: Annotated[
        str, common.choice("--dtype", values=_DTYPES, help="Precision of the weights and of what is computed")
    ] = "float32",
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Scale the embeddings of each tower to length 1.")
    ] = False,
    ids: Annotated[
        str | None,
        common.choice(
            "--ids", values=PLAIN.ids, help="Dtype of token ids and masks", show_default="int64, and int32 for immich"
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Fixed number of tokens per text.", show_default="any number")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|N|auto",
            help="Weight to leave in float32 with int8, repeatable; or how many of each tower, the most sensitive; or "
            "as few as reach --min-cosine.",
            show_default="none",
        ),
    ] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option(
            metavar="X", min=0, max=1, help="Least cosine of results in other dtypes than float32.", show_default="0.99"
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Images with labels, as for clipmb evaluate, on which the accuracy of int8 and float32 is measured.",
            show_default="the held-out pictures of the small model, for that",
        ),
    ] = None,
    with_preprocessing: Annotated[
        bool,
        typer.Option("--with-preprocessing", help="Take pictures of any size, and preprocess them in the ONNX file."),
    ] = False,
    subfolder: common.Subfolder = "",
    revision: common.Revision = None,
    as_json: common.Json = False,
) -> None:
    """Write a checkpoint for another runtime, and compare them.

    The written files are run in a process in which clipmb, and every framework but their own runtime, cannot be
    imported. If their results differ from the checkpoint's, the exit code is 1 and nothing is written.
    """
    if os.path.exists(model):
        common.refuse(context, {"revision"}, "has no effect on local files.")
    common.load_framework(TARGETS[to].backend)
    with common.quiet():
        record = export(
            model,
            out,
            to,
            layout=layout,
            tower=tower,
            dtype=dtype,
            normalize=normalize,
            ids=ids,
            length=length,
            keep=_keep(keep or []),
            min_cosine=min_cosine,
            data=data,
            with_preprocessing=with_preprocessing,
            subfolder=subfolder,
            revision=revision,
        )
    if as_json:
        common.print_json(record)
        return
    rows = []
    for entry in record["towers"].values():
        size = sum(record["files"][name]["bytes"] for name in entry["files"])
        for output, found in entry["outputs"].items():
            rows.append([entry["load"], f"{size:,}", output, f"{found['difference']:.1e}", f"{found['cosine']:.6f}"])
    title = f"{out}: compared with {record['compared_with']} at batches of {', '.join(map(str, record['batches']))}"
    common.table(title, ["file or folder", "bytes", "output", "max|a-b|/max|b|", "cosine"], rows, right=(1, 3, 4))
    if scores := record["zero_shot"]:
        rows = [[kind, f"{scores[kind]['top1']:.2%}", f"{scores[kind]['top5']:.2%}"] for kind in ("float32", "int8")]
        images, classes = (scores["int8"][name] for name in ("images", "classes"))
        title = f"zero-shot classification: {images:,} images, {classes:,} classes of {scores['data']}"
        common.table(title, ["", "top1", "top5"], rows, right=(1, 2))
    if record["keep"]:
        typer.echo(f"Left in float32: {', '.join(record['keep'])}")
    typer.echo(f"{RECORD_NAME} has the hashes and versions.")


def _keep(given: list[str]) -> list[str] | str | int:
    if given == ["auto"]:
        return "auto"
    return int(given[0]) if len(given) == 1 and given[0].isdecimal() else given
