"""``clipmb duplicates``: embeddings that are nearly the same."""

from __future__ import annotations

from typing import Annotated

import typer

from clipmb.cli import common
from clipmb.embedding.store import KINDS


def run(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder that clipmb embed wrote.")],
    threshold: Annotated[float, typer.Option(metavar="COSINE", help="Least similarity, above 0 and at most 1.")] = 0.95,
    kind: Annotated[str, common.choice("--kind", values=KINDS, help="What to compare")] = "images",
    as_json: common.Json = False,
) -> None:
    """Find near duplicates among embeddings.

    Each is in one group with all that are at least this similar to it, and those that are to them. They are named by
    their ids, or by their paths where the folder has several sources, whose ids may be the same.
    """
    from clipmb.embedding.index import Index

    index = Index.open(folder)
    groups = index.duplicates(threshold, kind)
    columns = ["path", "id"] if len(index.manifest.sources) > 1 else ["id"]
    names: list[str] = []
    for table in index.rows(kind).tables(columns) if groups else ():
        several = zip(*(table.column(name).to_pylist() for name in columns), strict=True)
        names += [next((name for name in some if name), "") for some in several]
    named = [[names[row] for row in rows] for rows in groups]
    if as_json:
        common.print_json(named)
        return
    for group in named:
        typer.echo("\n".join([*group, ""]))
    typer.echo(f"{len(named):,} groups of {sum(map(len, named)):,} {kind}, of {index.count(kind):,}")
