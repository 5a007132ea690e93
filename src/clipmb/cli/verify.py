"""``clipmb verify``: whether backends or checkpoints compute the same, or files are as a conversion wrote them."""

from __future__ import annotations

from typing import Annotated

import typer

from clipmb.cli import common


def run(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a CLIP checkpoint.")],
    backend: common.Backends = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Checkpoint to compare with, instead of the first backend."),
    ] = None,
    dtype: common.Dtype = "float32",
    record: Annotated[
        bool,
        typer.Option("--record", help="Check the files against conversion.json only; needs no framework."),
    ] = False,
    as_json: common.Json = False,
) -> None:
    """Check that backends, or two checkpoints, agree at every stage.

    The exit code is 1 when they do not.
    """
    if record:
        common.refuse(context, {"backend", "against", "dtype"}, "has no effect with --record.")
        agrees = _check_record(checkpoint, as_json)
    else:
        agrees = _compare(checkpoint, backend, against, dtype, as_json)
    if not agrees:
        raise typer.Exit(1)


def _compare(checkpoint: str, backend: list[str] | None, against: str | None, dtype: str, as_json: bool) -> bool:
    from clipmb import backends
    from clipmb.verification import compare

    names = backend or backends.installed(dtype)
    for name in names:
        common.load_framework(name)
    report = compare(checkpoint, names, dtype=dtype, against=against)
    if as_json:
        common.print_json(report.to_dict())
        return report.agrees
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
    return report.agrees


def _check_record(folder: str, as_json: bool) -> bool:
    from clipmb.common.convert import RECORD_NAME, check_record

    problems = check_record(folder)
    if as_json:
        common.print_json({"folder": folder, "agrees": not problems, "problems": problems})
    else:
        typer.echo("\n".join(problems) or f"All files in {folder} match {RECORD_NAME}.")
    return not problems
