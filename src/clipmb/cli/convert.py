"""``clipmb convert``: a checkpoint in another format, verified."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from clipmb.cli import common
from clipmb.common.checkpoint.formats import FORMATS, OWN
from clipmb.common.convert import DTYPES, RECORD_NAME, convert
from clipmb.common.parameters import HEADS


def run(
    context: typer.Context,
    src: Annotated[str, typer.Argument(metavar="SRC", help="Folder, weights file or Hub id, in any format.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Folder to write; new or empty.")],
    to: Annotated[str, common.choice("--to", values=FORMATS, metavar="FORMAT", help="Format to write")] = OWN,
    dtype: Annotated[
        str | None, common.choice(values=DTYPES, help="Floating-point type to round to", show_default="as in SRC")
    ] = None,
    head: Annotated[
        str | None,
        common.choice(values=HEADS, help="Model to write, if only a part", show_default="as in SRC"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="config.json for a SRC without one, or its folder.",
            show_default="SRC's",
        ),
    ] = None,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest file; bigger results are split: 200MB, 2GiB.")
    ] = "5GB",
    subfolder: common.Subfolder = "",
    revision: common.Revision = None,
    variant: Annotated[str | None, typer.Option(metavar="NAME", help="Read model.NAME.safetensors.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in DST.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the mapping; write nothing.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also run source and result through every installed backend.")
    ] = False,
    as_json: common.Json = False,
) -> None:
    """Convert a checkpoint to another format, and verify it.

    The config, tokenizer and image processor are converted too, and conversion.json records what was done. If the
    process is killed, the disk fills up or verification fails, DST is left untouched.
    """
    if os.path.exists(src):
        common.refuse(context, {"revision"}, "has no effect on local files.")
    if dry_run:
        common.refuse(context, {"verify"}, "needs a result, and --dry-run writes none.")
    done = convert(
        src,
        dst,
        to,
        dtype=dtype,
        head=head,
        config=config,
        max_shard_size=shard_size,
        variant=variant,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=True,
        check=_check() if verify else None,
        subfolder=subfolder,
        revision=revision,
    )
    if as_json:
        plan = {
            "head": done.head,
            "from": done.source_format,
            "to": done.target_format,
            "decisions": done.decisions,
            "mapping": [entry._asdict() for entry in done.mapping],
        }
        common.print_json(plan if dry_run else done.record)
        return
    title = f"{done.source} ({done.source_format}) to {done.folder} ({done.target_format}): {done.head}"
    if dry_run:
        rows = [[e.source, e.canonical, e.target, str(e.shape), e.dtype] for e in done.mapping]
        common.table(title, ["source", "canonical", "result", "shape", "dtype"], rows)
    else:
        files = done.record["result"]["files"]
        common.table(title, ["file", "bytes"], [[name, f"{entry['bytes']:,}"] for name, entry in files.items()], (1,))
    common.table("", ["decision", ""], [[key, text] for key, text in done.decisions.items()])
    if dry_run:
        typer.echo(f"Nothing was written; {len(done.mapping)} tensors would be.")
    else:
        typer.echo(f"{len(done.mapping)} tensors {_verdict(done.record['verification'])}; recorded in {RECORD_NAME}.")


def _verdict(verification: dict[str, Any]) -> str:
    """Returns how the result compares with the source, in words."""
    difference = verification["largest_difference"]
    result = f"rounded, by at most {difference:.1e} of the largest value" if difference else "equal to the bit"
    checked = verification["backends"]
    return result if checked is None else f"{result}; source and result agree on {', '.join(checked['contenders'])}"


def _check() -> Callable[..., dict[str, Any]]:
    from clipmb import backends
    from clipmb.verification import verify_conversion

    for name in backends.installed():
        common.load_framework(name)
    return verify_conversion
