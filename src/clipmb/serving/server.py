"""What is called: the application over a model or a folder of embeddings, and the server that runs it."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipmb.common.errors import MissingBackendError, bad_input, one_of, whole_number
from clipmb.common.workers import default_workers
from clipmb.embedding import store
from clipmb.embedding.index import Index
from clipmb.pipeline import LONG_TEXT, CLIPPipeline, loaded
from clipmb.serving.metrics import Metrics
from clipmb.serving.service import Service, name_of

if TYPE_CHECKING:
    from starlette.applications import Starlette


def application(
    source: Index | CLIPPipeline | str | os.PathLike[str],
    *,
    model: CLIPPipeline | str | os.PathLike[str] | None = None,
    backend: str | None = None,
    dtype: Any = None,
    device: Any = None,
    name: str | None = None,
    long_text: str | None = None,
    token: str | None = None,
    batch_size: int = 32,
    max_wait: float = 5.0,
    queue: int = 512,
    deadline: float = 30.0,
    max_bytes: int = 32 << 20,
    workers: int | None = None,
    hosts: Collection[str] | None = None,
) -> Starlette:
    """Returns the ASGI application that `serve` runs, for a server of one's own.

    Args:
        source: A folder that `embed` wrote, or an index, which is searched; or a pipeline, or the folder or Hub id of a
            checkpoint.
        model: For a folder of embeddings, what embeds queries, as `Index.open` takes it.
        backend: Key of `clipmb.backends.BACKENDS`, for a model that is loaded here.
        dtype: What to compute in, as `CLIPPipeline.from_pretrained` takes it, for a checkpoint.
        device: Device, as the framework names it, for a model that is loaded here.
        name: What clients call the model; its Hub id, or the name of its folder or file, when None.
        long_text: What to do with text longer than the model's context, as in `CLIPPipeline.encode_text`; "truncate"
            when None. For a folder of embeddings it is what its passport says.
        token: What clients must send as bearer token; None for no token.
        batch_size: Images or texts of a step, at most.
        max_wait: Milliseconds that an image or text waits for others at most.
        queue: Images and texts in the server, at most; further requests are refused with status 429.
        deadline: Seconds that an answer may take; then the status is 503.
        max_bytes: The largest body of a request; a larger one is refused with status 413.
        workers: Threads that decode and resize images. Default: one for each processor, at most 8.
        hosts: The names under which clients may address the server; None for any.

    Raises:
        ValueError: An argument is out of its range, or has no effect on this source.
        CheckpointError: The embeddings or the model cannot be loaded.
        ImportError: starlette is not installed, or pyarrow for a folder of embeddings.
    """
    try:
        from clipmb.serving.app import Application
    except ImportError as error:
        raise MissingBackendError("serve", "starlette", cause=str(error)) from error
    whole_number("batch_size", batch_size, 1)
    whole_number("max_bytes", max_bytes, 1)
    whole_number("queue", queue, 1)
    workers = default_workers() if workers is None else whole_number("workers", workers, 1, 1024)
    for field, value, least in (("max_wait", max_wait, 0), ("deadline", deadline, 1e-3)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            raise bad_input(f"{field} must be a number of at least {least:g}", value, f"Correct {field}")
    if name is not None and not (isinstance(name, str) and name.strip()):
        raise bad_input("name must be a text, not empty", name, "Leave it out, or pass what clients call the model")
    if token is not None and not (isinstance(token, str) and re.fullmatch("[!-~]+", token)):
        rule = "token must be letters, digits and signs of ASCII, without spaces"
        raise bad_input(rule, "something else", "Choose another, such as that of openssl rand -hex 32", shown=True)
    if long_text is not None and long_text not in LONG_TEXT:
        raise one_of("long_text", long_text, LONG_TEXT)
    index, pipeline = _opened(source, model, backend, dtype, device, long_text)
    known = name or name_of(index.passport["model"] if index else pipeline.config.name_or_path) or "clip"
    metrics = Metrics()
    service = Service(
        pipeline, index, name=known, long_text=long_text or "truncate", batch_size=batch_size, max_wait=max_wait,
        queue=queue, workers=workers, metrics=metrics,
    )  # fmt: skip
    made = Application(service, metrics, token=token, deadline=deadline, max_bytes=max_bytes, hosts=hosts)
    return made.starlette()


def serve(
    source: Index | CLIPPipeline | str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    open_to_all: bool = False,
    token: str | None = None,
    deadline: float = 30.0,
    started: Callable[[str], None] | None = None,
    **options: Any,
) -> None:
    """Serves embeddings, classification and search over HTTP until SIGINT or SIGTERM; then finishes what it accepted.

    Args:
        source: As in `application`.
        host: The address to listen at. Beyond this machine it needs a token, or ``open_to_all``.
        port: The port; 0 for a free one.
        open_to_all: Serve other machines without a token, or on this one by any name, as behind a proxy.
        token: As in `application`.
        deadline: As in `application`.
        started: Called with the server's URL when it accepts requests.
        **options: Of `application`.

    Raises:
        ValueError: As in `application`, or the address would be open to everyone.
        CheckpointError: As in `application`.
        ImportError: As in `application`, or uvicorn is not installed.
        OSError: The address cannot be had.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise MissingBackendError("serve", "uvicorn", cause=str(error)) from error
    whole_number("port", port, 0, 65535)
    host = host.strip("[]")  # of an address as URLs have it
    local = _is_loopback(host)
    if not local and token is None and not open_to_all:
        raise bad_input(
            "A server that other machines can reach needs a token", f"host {host}, no token",
            "Pass token= (--token or CLIPMB_TOKEN), or open_to_all=True (--no-token) to serve everyone", shown=True,
        )  # fmt: skip
    if token is not None and open_to_all:
        raise bad_input("A server has a token or is open to all", "both", "Pass one of them", shown=True)
    if local and token is None and not open_to_all:
        options.setdefault("hosts", {"localhost", "127.0.0.1", "::1", host.lower()})
    with _bound(host, port) as listener:  # before the model is loaded, which may take long
        made = application(source, token=token, deadline=deadline, **options)
        config = uvicorn.Config(
            made, http=_protocol(deadline), log_config=None, access_log=False, server_header=False, lifespan="on",
            timeout_graceful_shutdown=math.ceil(deadline) + 5,
        )  # fmt: skip

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                if started is not None:
                    shown = f"[{host}]" if ":" in host else host
                    started(f"http://{shown}:{listener.getsockname()[1]}")

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                await super().shutdown(sockets)
                if self.force_exit:  # by a second SIGINT, without an end of what is running
                    for task in self.server_state.tasks:
                        task.cancel()
                    await self.lifespan.shutdown()

        with _signals_end_it():
            Server(config).run([listener])


def _protocol(seconds: float) -> type[asyncio.Protocol]:
    """Returns uvicorn's protocol, which waits for the headers of a request without end, with an end to that."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    base: Any = AutoHTTPProtocol

    class Protocol(base):
        waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self.stop()

        def watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:  # a request is answered
                self.stop()
            elif self.waiting is None:
                self.waiting = self.loop.call_later(seconds, self.transport.close)

        def stop(self) -> None:
            if self.waiting is not None:
                self.waiting.cancel()
                self.waiting = None

    return Protocol


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """Binds an address; nothing is accepted before it is listened at."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise OSError(f"The host {host!r} has no address here: {error}. Correct --host.") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise OSError(f"{host} port {port} cannot be had: {error}. Choose another --host or --port.") from error
        yield listener


@contextmanager
def _signals_end_it() -> Iterator[None]:
    """Lets SIGINT and SIGTERM end the server and nothing else: uvicorn raises them again when it has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _opened(
    source: Any, model: Any, backend: str | None, dtype: Any, device: Any, long_text: str | None
) -> tuple[Index | None, CLIPPipeline]:
    """Returns the index, where there is one, and the model."""
    folder = isinstance(source, str | os.PathLike) and (Path(source) / store.MANIFEST).is_file()
    if not folder and not isinstance(source, Index):
        if model is not None:
            raise bad_input("model is for a folder of embeddings", model, "Pass the model alone, as source")
        return None, loaded(source, backend, dtype, device)
    given = {"dtype": dtype, "long_text": long_text}
    if isinstance(source, Index):
        given |= {"model": model, "backend": backend, "device": device}
    if fixed := [name for name, value in given.items() if value is not None]:
        raise bad_input(
            "What made the embeddings decides how queries are embedded", ", ".join(fixed), "Leave it out", shown=True
        )
    index = source if isinstance(source, Index) else Index.open(source, model=model, backend=backend, device=device)
    return index, index.pipeline


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
