"""``clipmb index``: an index of embeddings for approximate search."""

from __future__ import annotations

from typing import Annotated

import typer

from clipmb.cli import common
from clipmb.embedding.approximate import EF_CONSTRUCTION, METHODS, M
from clipmb.embedding.store import KINDS


def run(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder that clipmb embed wrote.")],
    method: Annotated[
        str, common.choice("--method", values=METHODS, help="A graph, or lists of similar rows")
    ] = METHODS[0],
    kind: Annotated[
        str | None, common.choice("--kind", values=KINDS, help="What to index", show_default="all that are there")
    ] = None,
    m: Annotated[int, typer.Option("--m", metavar="N", min=2, help="Neighbours of a row in the graph of hnsw.")] = M,
    ef_construction: Annotated[
        int, typer.Option(metavar="N", min=1, help="Rows in sight when one is added to the graph of hnsw.")
    ] = EF_CONSTRUCTION,
    lists: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Lists of ivf.", show_default="4 times the square root of the rows"),
    ] = None,
    as_json: common.Json = False,
) -> None:
    """Build an index of embeddings for approximate search.

    clipmb search --approximate uses it. After clipmb embed --append it has to be built anew.
    """
    if method == "hnsw":
        common.refuse(context, ["lists"], "is for --method ivf.")
    else:
        common.refuse(context, ["m", "ef_construction"], "is for --method hnsw.")
    from clipmb.embedding.index import Index

    index = Index.open(folder)
    options = {"m": m, "ef_construction": ef_construction} if method == "hnsw" else {"lists": lists}
    kinds = [name for name in KINDS if index.count(name)] if kind is None else [kind]
    built = {name: index.build(name, method=method, **options) for name in kinds}
    if as_json:
        common.print_json(built)
        return
    for name, about in built.items():
        rest = {key: value for key, value in about.items() if key not in ("manifest", "method", "rows")}
        shown = ", ".join(f"{key} {value}" for key, value in rest.items())
        typer.echo(f"{folder}: {about['rows']:,} {name}, {about['method']} ({shown})")
