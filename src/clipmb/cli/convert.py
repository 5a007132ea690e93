"""``clipmb convert``: a checkpoint in another format, verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from clipmb.cli import common
from clipmb.common.checkpoint.formats import FORMATS


def run(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Folder, file of weights, or hub id, in any format.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Folder to write into; new or empty.")],
    to: Annotated[str, typer.Option("--to", "-t", help=f"{', '.join(FORMATS)}.")] = "safetensors",
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; the source's own if not given.")
    ] = None,
    head: Annotated[str | None, typer.Option(help="Write this model out of a larger one: CLIPTextModel, …")] = None,
    shard_size: Annotated[str, typer.Option(help="Split larger results: 200MB, 5GB, 2GiB.")] = "5GB",
    subfolder: Annotated[str, typer.Option(help="Folder inside SRC.")] = "",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    variant: Annotated[str | None, typer.Option(help="Read model.VARIANT.safetensors.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint that DST holds.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the mapping and write nothing.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also run source and result through every installed backend.")
    ] = False,
    as_json: common.Json = False,
) -> None:
    """Write a checkpoint in another format, and compare every tensor with the source.

    The config, tokenizer and image processor are written too, and conversion.json records what was done. A kill, a full
    disk or a difference leaves DST as it was.
    """
    from clipmb.common.convert import RECORD_NAME, convert

    done = convert(
        src,
        dst,
        to,
        dtype=dtype,
        head=head,
        max_shard_size=shard_size,
        variant=variant,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=True,
        check=_check() if verify and not dry_run else None,
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
        typer.echo(json.dumps(plan if dry_run else done.record, indent=2))
        return
    title = f"{done.source} ({done.source_format}) to {done.folder} ({done.target_format}): {done.head}"
    if dry_run:
        rows = [[e.source, e.canonical, e.target, str(e.shape), e.dtype] for e in done.mapping]
        common.table(title, ["source", "canonical", "result", "shape", "dtype"], rows)
        common.table("", ["decision", ""], [[key, text] for key, text in done.decisions.items()])
        typer.echo(f"Nothing was written; {len(done.mapping)} tensors would be.")
        return
    files = done.record["result"]["files"]
    common.table(title, ["file", "bytes"], [[name, f"{entry['bytes']:,}"] for name, entry in files.items()], (1,))
    common.table("", ["decision", ""], [[key, text] for key, text in done.decisions.items()])
    typer.echo(f"{len(done.mapping)} tensors {verdict(done.record['verification'])}; recorded in {RECORD_NAME}.")


def verdict(verification: dict[str, Any]) -> str:
    """Says how the result compares with the source."""
    difference = verification["largest_difference"]
    said = f"rounded, by at most {difference:.1e} of the largest value" if difference else "equal to the bit"
    checked = verification["backends"]
    return said if checked is None else f"{said}; source and result agree on {', '.join(checked['contenders'])}"


def _check() -> Callable[..., dict[str, Any]]:
    from clipmb import backends
    from clipmb.verification import verify_conversion

    for name in backends.installed():
        common.load_framework(name)
    return verify_conversion
