"""``clipmb verify``: do the backends, or two checkpoints, compute the same? Are files as a conversion wrote them?"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from clipmb.cli import common


def run(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder or hub id of a CLIP checkpoint.")],
    backends: Annotated[
        str | None,
        typer.Option("--backends", "-b", help="Comma-separated: pt,tf,flax; all installed ones if not given."),
    ] = None,
    against: Annotated[str | None, typer.Option(help="Another checkpoint, which is then the standard.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    record: Annotated[
        bool, typer.Option("--record", help="Instead compare the files with conversion.json, without a framework.")
    ] = False,
    as_json: common.Json = False,
) -> None:
    """Compare the backends, or two checkpoints, stage by stage: exit code 1 when they disagree."""
    if record:
        _check_record(checkpoint, as_json)
        return
    from clipmb import backends as known
    from clipmb.verification import compare

    chosen = known.installed() if backends is None else [name.strip() for name in backends.split(",") if name.strip()]
    for name in chosen:
        common.load_framework(name)
    report = compare(checkpoint, chosen, dtype=dtype, against=against)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        rows = [
            [
                entry.contender,
                entry.stage,
                f"{entry.difference:.1e}",
                f"{entry.bound:.0e}" if entry.bound else "equal",
                "yes" if entry.agrees else f"NO {entry.detail}",
            ]
            for entry in report.comparisons
        ]
        title = f"{checkpoint} in {report.dtype}: max|a-b|/max|b| to {report.standard}"
        common.table(title, ["contender", "stage", "difference", "allowed", "agrees"], rows, right=(2, 3))
        typer.echo(report.explain())
    if not report.agrees:
        raise typer.Exit(1)


def _check_record(folder: str, as_json: bool) -> None:
    from clipmb.common.convert import RECORD_NAME, check_record

    problems = check_record(folder)
    if as_json:
        typer.echo(json.dumps({"folder": folder, "agrees": not problems, "problems": problems}, indent=2))
    else:
        typer.echo("\n".join(problems) if problems else f"{folder} is as {RECORD_NAME} says.")
    if problems:
        raise typer.Exit(1)
