"""``clipmb embed``: the embeddings of whole collections, as Parquet shards."""

from __future__ import annotations

from typing import Annotated

import typer

from clipmb.cli import common
from clipmb.embedding.clip_retrieval import LAYOUTS
from clipmb.embedding.store import ENGINES, STORED


def _size(text: str) -> int | str:
    if text == "auto" or (text.isdecimal() and int(text) > 0):
        return text if text == "auto" else int(text)
    raise typer.BadParameter(f"{text!r} is neither a positive number nor auto.")


def run(
    context: typer.Context,
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC...",
            help="Images and texts: folders, image files, patterns of files, tables (.csv, .tsv, .jsonl, .parquet), "
            ".tar shards, text files (.txt, one text per line).",
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Folder for the embeddings.")],
    model: common.Model = None,
    backend: common.Backend = None,
    dtype: common.Dtype = "float32",
    device: common.Device = None,
    batch_size: Annotated[
        str, typer.Option(metavar="N|auto", parser=_size, help="Images per step; auto measures which is fastest.")
    ] = "32",
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Threads that read and decode.", show_default="one per processor, at most 8"
        ),
    ] = None,
    normalize: Annotated[bool, typer.Option(help="Scale embeddings to unit length.")] = True,
    stored: Annotated[str, common.choice("--stored", values=STORED, help="Numbers in the files")] = "float32",
    long_text: common.LongText = "truncate",
    shard_size: Annotated[int, typer.Option(metavar="N", min=1, help="Items of SRC in a shard.")] = 10_000,
    resume: Annotated[bool, typer.Option("--resume", help="Finish an interrupted job, or begin it.")] = False,
    append: Annotated[bool, typer.Option("--append", help="Add to the embeddings that are there.")] = False,
    discard: Annotated[bool, typer.Option("--discard", help="Drop an interrupted job before.")] = False,
    layout: Annotated[
        str | None,
        common.choice(
            "--layout", values=LAYOUTS, help="Write the embeddings as this program does too", show_default="none"
        ),
    ] = None,
    engine: Annotated[
        str, common.choice("--engine", values=ENGINES, help="This process, or the Ray cluster of RAY_ADDRESS")
    ] = "local",
    replicas: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Processes that load the model (ray only).", show_default="1"),
    ] = None,
    gpus_per_replica: Annotated[
        float | None,
        typer.Option(
            metavar="F", min=0, max=1, help="Share of a GPU that each replica reserves (ray only).", show_default="0"
        ),
    ] = None,
    image_column: common.ImageColumn = None,
    caption_column: common.CaptionColumn = None,
    label_column: common.LabelColumn = None,
    separator: common.Separator = None,
    image_root: common.ImageRoot = None,
    as_json: common.Json = False,
) -> None:
    """Embed collections of images and texts.

    Each image and each caption becomes a row of images-00000.parquet and texts-00000.parquet and the shards after them.
    What cannot be embedded is listed in errors.parquet; manifest.json says what made the embeddings.
    """
    model, _ = common.chosen(model)
    if engine == "local":
        common.load_framework(backend)
    from clipmb.embedding.job import embed

    done = embed(
        source,
        out,
        model=model,
        backend=backend,
        dtype=dtype,
        device=device,
        batch_size=batch_size,
        workers=workers,
        normalize=normalize,
        stored=stored,
        long_text=long_text,
        shard_size=shard_size,
        resume=resume,
        append=append,
        discard=discard,
        layout=layout,
        engine=engine,
        replicas=replicas,
        gpus_per_replica=gpus_per_replica,
        progress=True,
        image_column=image_column,
        caption_column=caption_column,
        label_column=label_column,
        separator=separator,
        image_root=image_root,
    )
    if as_json:
        common.print_json(done)
        return
    counts = f"{done['images']:,} images, {done['texts']:,} texts, {done['errors']:,} errors of {done['items']:,} items"
    typer.echo(f"{out}: {counts}")
    if done["bottleneck"]:
        seconds = ", ".join(f"{name} {value:.1f}" for name, value in done["seconds"].items() if name != "total")
        typer.echo(f"{done['seconds']['total']:.1f} s; work: {seconds}; bottleneck: {done['bottleneck']}")
