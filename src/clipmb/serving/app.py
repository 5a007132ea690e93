"""The application: routes, who may ask, limits, deadlines, and the form of answers and errors."""

from __future__ import annotations

import asyncio
import base64
import functools
import hmac
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import asynccontextmanager
from hashlib import sha256
from importlib.resources import files
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from clipmb.common.errors import logger
from clipmb.common.json_files import json_values
from clipmb.serving.metrics import CONTENT_TYPE, Metrics
from clipmb.serving.requests import Classification, Embeddings, Refused, Search, json_object
from clipmb.serving.service import Service

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_BODIES = 8  # largest bodies that are held at a time
_MOST_RESULTS = 1000
_OPEN = ("/", "/health")  # without a token
_GONE = 499  # the client went away; only the metrics see it

_HOST = re.compile(r"(?:\[([^\]]+)\]|([^:]*))(?::\d+)?")

Handler = Callable[[Request, bytes], Coroutine[Any, Any, Response]]  # the request, and its body


class Application:
    """The handlers of the routes, over a service.

    Args:
        service: What computes.
        metrics: Where requests are counted.
        token: What clients must send as bearer token; None for no token.
        deadline: Seconds that an answer may take.
        max_bytes: The largest body.
        hosts: The names under which clients may address the server; None for any. Where no token is asked for, this
            keeps pages on the web from reading a server on the visitor's machine by a name that they let point to it.
    """

    def __init__(
        self,
        service: Service,
        metrics: Metrics,
        *,
        token: str | None,
        deadline: float,
        max_bytes: int,
        hosts: Collection[str] | None,
    ) -> None:
        self.service, self.metrics = service, metrics
        self.token, self.deadline, self.max_bytes, self.hosts = token, deadline, max_bytes, hosts
        self.held = 0  # bytes of bodies
        about = "Requests by route and status; 499 where the client went away."
        self.count = metrics.counter("clipmb_requests_total", about, ("route", "status"))
        self.time = metrics.histogram("clipmb_request_seconds", "Seconds from request to answer.", _SECONDS, ("route",))

    def starlette(self) -> Starlette:
        """Returns the application that servers run."""
        routes = [
            self.route("/", self.page),
            self.route("/v1/embeddings", self.embeddings, "POST"),
            self.route("/v1/models", self.models),
            self.route("/v1/models/{name:path}", self.one_model),
            self.route("/classify", self.classify, "POST"),
            self.route("/search", self.search, "GET", "POST"),
            self.route("/thumbnail/{kind}/{row}", self.thumbnail),
            self.route("/health", self.health),
            self.route("/metrics", self.metrics_text),
        ]

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.service.close)

        made = Starlette(routes=routes, exception_handlers={HTTPException: self.unrouted}, lifespan=lifespan)
        made.router.redirect_slashes = False  # an error says what is wrong; a redirection loses bodies in many clients
        return made

    def route(self, path: str, handler: Handler, *methods: str) -> Route:
        """Returns a route whose handler is counted, has a deadline, and ends when the client goes away."""

        async def endpoint(request: Request) -> Response:
            begun = time.perf_counter()
            response = await self.answer(request, path, handler)
            self.count(path, str(response.status_code))
            self.time(path, value=time.perf_counter() - begun)
            return response

        return Route(path, endpoint, methods=methods or ("GET",))

    async def answer(self, request: Request, path: str, handler: Handler) -> Response:
        """Returns what a handler answers, or the error."""
        reading = False
        try:
            self.check(request, path)
            reading = True
            async with asyncio.timeout(self.deadline), self.body(request) as body:
                reading = False
                response = await _while_connected(request, handler(request, body))
        except Refused as refused:
            response = self.refusal(refused)
        except TimeoutError:
            if reading:
                message = f"The body must arrive within {self.deadline:g} seconds. Send it faster, or a smaller one."
                return self.finished(self.refusal(Refused(408, message, "body_late", headers={"connection": "close"})))
            message = f"There was no result within {self.deadline:g} seconds. Try again later."
            response = self.refusal(Refused(503, message, "deadline_exceeded", headers={"retry-after": "1"}))
        except ClientDisconnect:
            response = Response(status_code=_GONE)
        except asyncio.CancelledError:  # a second SIGINT
            response = self.refusal(Refused(503, "The server ends. Ask another, or later.", "shutting_down"))
        except Exception:
            logger.exception("clipmb: %s %s failed", request.method, path)
            message = "The server failed; its log says why."
            response = self.refusal(Refused(500, message, "internal_error"))
        return self.finished(response)

    def check(self, request: Request, path: str) -> None:
        """Refuses clients that may not ask.

        Raises:
            Refused: The token is missing or wrong, or the server is addressed by a name that is not its own.
        """
        host = _HOST.fullmatch(request.headers.get("host", ""))
        if self.hosts is not None and (host is None or (host[1] or host[2]).lower() not in self.hosts):
            names = " or ".join(sorted(self.hosts))
            message = f"The Host of a request must be {names}. Received: another. Address the server as one of these."
            raise Refused(421, message, "wrong_host")
        if self.token is None or path in _OPEN:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
            message = "A bearer token is needed, and it must be the right one. Send Authorization: Bearer TOKEN."
            raise Refused(401, message, "invalid_api_key", headers={"www-authenticate": "Bearer"})

    async def unrouted(self, request: Request, error: Exception) -> Response:
        """Answers what no route takes: 404, or 405 for another method."""
        status = error.status_code if isinstance(error, HTTPException) else 500
        allowed = dict(getattr(error, "headers", None) or {})
        self.count("other", str(status))
        if status == 405:
            path, method = request.scope["path"], request.method
            message = f"{path} does not take {method}. Use {allowed.get('Allow', 'another method')}."
            return self.finished(self.refusal(Refused(405, message, "method_not_allowed", headers=allowed)))
        message = f"There is no {request.method} {request.scope['path']}. GET / and GET /v1/models are there."
        return self.finished(self.refusal(Refused(status, message, "not_found")))

    def finished(self, response: Response) -> Response:
        """Adds the headers that every response has."""
        response.headers["x-clipmb-passport"] = self.service.digest
        response.headers["x-content-type-options"] = "nosniff"
        response.headers.setdefault("cache-control", "no-store")
        return response

    def refusal(self, refused: Refused) -> Response:
        """Returns the response of an error."""
        return _json(refused.content, refused.status, refused.headers)

    async def page(self, request: Request, body: bytes) -> Response:
        """GET /: the page for people, which asks the other routes."""
        content, policy = _page()
        return Response(content, media_type="text/html", headers={"content-security-policy": policy})

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """Reads a body; its bytes count as held until the answer is there.

        Raises:
            Refused: It is too large, or too many bodies are held already.
        """
        size, chunks = 0, []
        declared = request.headers.get("content-length", "")
        too_large = declared.isdecimal() and int(declared) > self.max_bytes
        waits = request.headers.get("expect", "").lower() == "100-continue"
        try:
            async for chunk in request.stream() if not (too_large and waits) else _nothing():
                size += len(chunk)
                self.held += len(chunk)
                too_large |= size > self.max_bytes
                if self.held > _BODIES * self.max_bytes:
                    message = "Too many large requests are read at the same time. Try again later."
                    raise Refused(429, message, "queue_full", headers={"retry-after": "1"})
                if size > 2 * self.max_bytes:
                    break
                if not too_large:  # else the rest is read, so that the client comes to read the answer, but not kept
                    chunks.append(chunk)
            if too_large:
                message = f"A body may have at most {self.max_bytes} bytes. Send fewer or smaller images at a time."
                raise Refused(413, message, "too_large")
            coding = request.headers.get("content-encoding", "identity")
            if coding.lower() != "identity":
                message = f"A body must not be compressed. Received: {coding!r:.40}. Send it as it is."
                raise Refused(415, message, "content_encoding", headers={"accept-encoding": "identity"})
            content = b"".join(chunks)
            chunks.clear()
            yield content
        finally:
            self.held -= size

    async def read(self, check: Callable[..., Any], body: bytes, *arguments: Any) -> Any:
        """Returns what a check makes of the JSON object of a body."""
        return await self.service.run(lambda: check(json_object(body), *arguments), size=len(body))

    async def embeddings(self, request: Request, body: bytes) -> Response:
        """POST /v1/embeddings."""
        service = self.service
        asked = await self.read(Embeddings.of, body, service.name, service.dimension)
        embeds, tokens = await service.embed(asked.inputs, service.passport["normalized"])
        size = embeds.nbytes * (1 if asked.base64 else 3)
        return await service.run(_embeddings, embeds, tokens, service.name, asked.base64, size=size)

    async def models(self, request: Request, body: bytes) -> Response:
        """GET /v1/models."""
        return _json({"object": "list", "data": [self.about()]})

    async def one_model(self, request: Request, body: bytes) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        if name != self.service.name:
            raise Refused(404, f"There is no model {name!r}, only {self.service.name!r}.", "model_not_found", "model")
        return _json(self.about())

    def about(self) -> dict[str, Any]:
        """Describes the model, in OpenAI's fields and some more."""
        service = self.service
        counts = {kind: service.index.count(kind) for kind in ("images", "texts")} if service.index else None
        return {
            "id": service.name, "object": "model", "created": service.created, "owned_by": "clipmb",
            "dimensions": service.dimension, "passport": service.passport, "index": counts,
        }  # fmt: skip

    async def classify(self, request: Request, body: bytes) -> Response:
        """POST /classify."""
        asked = await self.read(Classification.of, body, self.service.name)
        found = await self.service.classify(asked)
        results = [
            {"index": i, "label": asked.labels[int(row.argmax())], "probabilities": row.tolist()}
            for i, row in enumerate(found)
        ]
        return _json({"model": self.service.name, "labels": asked.labels, "results": results})

    async def search(self, request: Request, body: bytes) -> Response:
        """GET and POST /search."""
        if request.method == "POST":
            asked = await self.read(Search.of, body, _MOST_RESULTS)
        else:
            asked = Search.of_query(request.scope["query_string"], _MOST_RESULTS)
        return _json({"kind": asked.kind, "results": json_values(await self.service.search(asked))})

    async def thumbnail(self, request: Request, body: bytes) -> Response:
        """GET /thumbnail/KIND/ROW: of a row of the index, never of another file."""
        kind, row = request.path_params["kind"], request.path_params["row"]
        number = re.fullmatch("[0-9]{1,18}", row)
        content = await self.service.thumbnail(kind, int(row)) if number else None
        if content is None:
            raise Refused(404, f"There is no readable image of row {row!r:.40} of {kind!r:.40}.", "not_found")
        return Response(content, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})

    async def health(self, request: Request, body: bytes) -> Response:
        """GET /health."""
        alive = self.service.batcher.alive
        return _json({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def metrics_text(self, request: Request, body: bytes) -> Response:
        """GET /metrics."""
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})


async def _while_connected(request: Request, answer: Coroutine[Any, Any, Response]) -> Response:
    """Awaits an answer; cancels it when the client goes away.

    Raises:
        ClientDisconnect: It did.
    """
    work, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Returns when the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass  # the end of a body


async def _nothing() -> AsyncIterator[bytes]:
    for chunk in ():
        yield chunk


@functools.cache
def _page() -> tuple[str, str]:
    """Returns the page, and the policy that keeps browsers from running or fetching anything that is not in it."""
    content = files("clipmb.serving").joinpath("page.html").read_text("utf-8")
    hashes = {}
    for tag in ("script", "style"):
        inside = content.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        hashes[tag] = base64.b64encode(sha256(inside.encode()).digest()).decode()
    policy = [f"{tag}-src 'sha256-{digest}'" for tag, digest in hashes.items()]
    own = ("connect-src 'self'", "img-src blob: data:")
    closed = (f"{what} 'none'" for what in ("base-uri", "form-action", "frame-ancestors"))
    return content, "; ".join(["default-src 'none'", *policy, *own, *closed])


def _embeddings(embeds: np.ndarray, tokens: int, model: str, as_base64: bool) -> Response:
    rows = np.ascontiguousarray(embeds, "<f4")
    if as_base64:
        texts = [f'"{base64.b64encode(row).decode()}"' for row in rows]
    else:  # nine digits give a float32 back to the bit; the json module writes up to 17, in five times as long
        form = ",".join(["%.9g"] * rows.shape[1])
        texts = [f"[{form % tuple(row)}]" for row in rows.tolist()]
    data = ",".join(f'{{"object":"embedding","index":{i},"embedding":{text}}}' for i, text in enumerate(texts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    rest = _text({"model": model, "usage": usage})[1:]
    return _answer(f'{{"object":"list","data":[{data}],{rest}')


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return _answer(_text(content), status, headers)


def _text(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _answer(text: str, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    content = text.encode(errors="backslashreplace")  # half of a surrogate pair, as JSON writes it
    return Response(content, status, {**(headers or {}), "content-type": "application/json"})
