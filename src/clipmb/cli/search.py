"""``clipmb search``: the embeddings that are most similar to a text, an image, or several; and how good that is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipmb.cli import common
from clipmb.common.errors import bad_input
from clipmb.common.saving import write_atomically
from clipmb.embedding.store import KINDS

# Parameters that only a query has.
_QUERY = ("text", "image", "minus", "minus_image", "where", "model", "backend", "device", "html", "approximate")


def run(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder that clipmb embed wrote.")],
    text: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="What to search for.")] = None,
    image: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Image to search for; added to the texts; repeatable.")
    ] = None,
    minus: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Text to move away from; repeatable.")] = None,
    minus_image: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Image to move away from; repeatable.")
    ] = None,
    number: Annotated[int, typer.Option("--number", "-k", metavar="N", min=1, help="Results.")] = 10,
    kind: Annotated[str, common.choice("--kind", values=KINDS, help="What to find")] = "images",
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION", help="Condition on a column, such as 'label=cat' or 'width>=512'; repeatable."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="MODEL", help="Checkpoint for the query.", show_default="the manifest's"),
    ] = None,
    backend: Annotated[
        str | None,
        common.choice(
            "--backend", "-b", values=common.BACKENDS, help="Framework to compute with", show_default="the manifest's"
        ),
    ] = None,
    device: common.Device = None,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Look only at what the index of clipmb index proposes.")
    ] = False,
    ef: Annotated[
        int | None, typer.Option("--ef", metavar="N", min=1, help="Rows in sight in an hnsw index.", show_default="128")
    ] = None,
    probes: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Lists to look through in an ivf index.", show_default="a 16th"),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--eval", help="Measure what approximate search misses, and how well captions find their images."),
    ] = False,
    sample: Annotated[int, typer.Option(metavar="N", min=1, help="Queries of --eval.")] = 1000,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write a gallery with thumbnails.")] = None,
    as_json: common.Json = False,
) -> None:
    """Search embeddings by text, by image, or by both.

    Several texts and images are added up; --minus and --minus-image are subtracted.
    """
    if measure:
        common.refuse(context, _QUERY, "has no effect with --eval.")
        _measure(folder, number, kind, sample, ef, probes, as_json)
        return
    common.refuse(context, ["sample"], "is for --eval.")
    if html is not None and not Path(html).absolute().parent.is_dir():
        raise bad_input("--html must be in a folder that exists", html, "Create the folder first")
    if html is not None and Path(html).is_dir():
        raise bad_input("--html must be a file", html, "Name a file in this folder")
    if not text and not image:
        raise bad_input("search needs a text or an image", "neither", "Pass TEXT or --image", shown=True)
    from clipmb.embedding.gallery import gallery
    from clipmb.embedding.index import Index, columns_of

    index = Index.open(folder, model=model, backend=backend, device=device)
    with common.quiet():
        _ = index.pipeline
    hits = index.search(
        text or None, image or None, k=number, kind=kind, where=where or None,
        minus_text=minus or None, minus_image=minus_image or None, approximate=approximate, ef=ef, probes=probes,
    )  # fmt: skip
    if html is not None:
        title = " + ".join([*(text or []), *(image or [])])
        title = " − ".join([title, *(minus or []), *(minus_image or [])])
        write_atomically(Path(html), gallery(title, hits).encode(errors="backslashreplace"))
    if as_json:
        common.print_json([{"score": hit["score"], "row": hit["row"], **columns_of(hit)} for hit in hits])
        return
    names = list(dict.fromkeys(name for hit in hits for name in columns_of(hit) if name != "path"))
    rows = [[f"{hit['score']:.3f}", *(str(columns_of(hit).get(name, "")) for name in names)] for hit in hits]
    common.table("", ["score", *names], rows, right=(0,))
    if html is not None:
        typer.echo(html)


def _measure(
    folder: str, number: int, kind: str, sample: int, ef: int | None, probes: int | None, as_json: bool
) -> None:
    from clipmb.cli.evaluate import report
    from clipmb.embedding.index import Index

    found = Index.open(folder).evaluate(number, kind=kind, sample=sample, ef=ef, probes=probes)
    if as_json:
        common.print_json(found)
        return
    if scores := found.get("approximate"):
        times = [f"{value:.2f}" for value in scores["milliseconds"].values()]
        columns = [f"recall@{scores['k']}", *(f"{name}, ms a query" for name in scores["milliseconds"])]
        title = f"{folder}: {scores['method']} of {scores['kind']}, {scores['queries']:,} queries"
        common.table(title, columns, [[f"{scores['recall']:.2%}", *times]], right=(0, 1, 2))
    for parts in report({"skipped": [], **found}, "" if scores else folder):
        common.table(*parts)
