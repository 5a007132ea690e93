"""``clipmb serve``: embeddings, classification and search over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from clipmb.cli import common
from clipmb.common.dtypes import DTYPES


def run(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="DIR|MODEL",
            help="Folder that clipmb embed wrote, which is searched; or folder or Hub id of a CLIP checkpoint.",
            show_default="the emoji model in the package",
        ),
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Port; 0 for a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(metavar="TEXT", envvar="CLIPMB_TOKEN", help="Bearer token that clients must send."),
    ] = None,
    no_token: Annotated[
        bool, typer.Option("--no-token", help="Serve other machines, or under any name, without a token.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="Checkpoint for the queries of DIR.", show_default="the manifest's"
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What clients call the model.", show_default="its Hub id or folder's name"),
    ] = None,
    backend: common.Backend = None,
    dtype: Annotated[
        str | None,
        common.choice(
            "--dtype",
            values=(*DTYPES, "int8"),
            help="Precision of MODEL (int8 with onnx only)",
            show_default="float32, or that of DIR",
        ),
    ] = None,
    device: common.Device = None,
    long_text: Annotated[
        str | None,
        common.choice(
            "--long-text",
            values=common.LONG_TEXT,
            help="What to do with text longer than the context of MODEL",
            show_default="truncate, or that of DIR",
        ),
    ] = None,
    batch_size: common.BatchSize = 32,
    max_wait: Annotated[
        float, typer.Option(metavar="MS", min=0, help="Milliseconds that an image or text waits for others.")
    ] = 5.0,
    queue: Annotated[
        int, typer.Option(metavar="N", min=1, help="Images and texts in the server; more is status 429.")
    ] = 512,
    deadline: Annotated[
        float, typer.Option(metavar="S", min=0.001, help="Seconds that an answer may take; longer is status 503.")
    ] = 30.0,
    max_bytes: Annotated[
        int, typer.Option(metavar="N", min=1, help="Largest body of a request; a larger one is status 413.")
    ] = 32 << 20,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Threads that decode and resize.", show_default="one per processor, at most 8"
        ),
    ] = None,
) -> None:
    """Serve embeddings, classification and search over HTTP.

    POST /v1/embeddings is as OpenAI's, for texts and images; POST /classify, GET and POST /search, GET /health and
    GET /metrics are beside it, and a page for people at /. SIGINT and SIGTERM end it after what was accepted.
    """
    source, _ = common.chosen(source)
    common.load_framework(backend)
    from clipmb.serving.server import serve

    serve(
        source, host=host, port=port, token=token, open_to_all=no_token, model=model, name=name, backend=backend,
        dtype=dtype, device=device, long_text=long_text, batch_size=batch_size, max_wait=max_wait, queue=queue,
        deadline=deadline, max_bytes=max_bytes, workers=workers,
        started=lambda url: typer.echo(f"{source}: {url}"),
    )  # fmt: skip
