"""What the Hub answers, looked at before huggingface_hub acts on it, and whether it can be reached at all.

huggingface_hub (2.4, for example) tries again for half a minute where there is no network or the Hub is overloaded,
with two lines for each attempt, and it calls files as the answers of a server say, of which `HF_ENDPOINT` may be any.
"""

from __future__ import annotations

import contextlib
import re
import socket
import urllib.request
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

_SECONDS = 3.0  # for a connection without anything sent
_PORTS = {"http": 80, "https": 443}
_PLAIN = re.compile(r"[A-Za-z0-9_+=-][A-Za-z0-9._+=-]{0,200}")
_watching: ContextVar[bool] = ContextVar("watching", default=False)


class Answer(Exception):
    """An answer of the Hub that ends a download at once.

    Attributes:
        status: Its HTTP status.
        wait: The seconds that it asks to wait, as text; "" when it does not say.
        hostile: What is wrong with it, if the Hub is no honest one; "" otherwise.
    """

    def __init__(self, status: int, wait: str = "", hostile: str = "") -> None:
        super().__init__(hostile or f"status {status}")
        self.status, self.wait, self.hostile = status, wait, hostile


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Looks at every answer that huggingface_hub gets inside, in this thread.

    Raises:
        Answer: The Hub is overloaded or out of order, or names files in a way that would leave the cache.
    """
    from huggingface_hub import get_session

    session: Any = get_session()  # of httpx, or of requests before huggingface_hub 1
    hooks = getattr(session, "event_hooks", None) or session.hooks
    if _look not in hooks["response"]:
        hooks["response"].append(_look)
    token = _watching.set(True)
    try:
        yield
    finally:
        _watching.reset(token)


def _look(response: Any, *_: Any, **__: Any) -> None:
    if not _watching.get():  # the session belongs to the whole process
        return
    headers = response.headers
    if response.status_code == 429 or response.status_code >= 500:
        raise Answer(response.status_code, headers.get("Retry-After") or "")
    if (commit := headers.get("X-Repo-Commit")) is None:
        return  # from a server of files, whose answers name nothing
    for name, value in (("X-Repo-Commit", commit), *((n, headers.get(n)) for n in ("X-Linked-Etag", "ETag"))):
        if value is not None and not _PLAIN.fullmatch(value.removeprefix("W/").strip('"')):
            raise Answer(response.status_code, hostile=f"{name} {value[:100]!r}")


def is_plain(name: str) -> bool:
    """Whether this is the name of a file in a folder, on any system."""
    return name not in ("", ".", "..") and not re.search(r"[/\\\x00-\x1f:]", name)


def reachable() -> bool:
    """Whether something listens where the Hub, or the proxy before it, should be."""
    from huggingface_hub import constants, get_session

    hub = urlsplit(constants.ENDPOINT)
    proxies = {} if urllib.request.proxy_bypass(hub.hostname or "") else urllib.request.getproxies()
    proxy = proxies.get(hub.scheme) or proxies.get("all")
    target = urlsplit(proxy if "//" in proxy else f"//{proxy}") if proxy else hub
    try:
        address = (target.hostname or "", target.port or _PORTS.get(target.scheme, 443))
        with socket.create_connection(address, timeout=_SECONDS):
            return True
    except (OSError, ValueError):
        pass
    try:  # a session of the user's own making may know another way
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:
        return False
    return True
