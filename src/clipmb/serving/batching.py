"""Dynamic batching: what many clients ask for at the same time is computed together, by one thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Compute = Callable[[list[Any]], np.ndarray]  # items to one row each
Observe = Callable[[str, int, float], None]  # the kind of a step, its items and its seconds


@dataclass
class _Work:
    """The items of one request, and the rows of those that are computed."""

    rows: list[Any]
    left: int
    future: Future[np.ndarray] = field(default_factory=Future)


class _Item(NamedTuple):
    value: Any
    work: _Work
    place: int  # in its work
    entered: float


class Batcher:
    """Puts items of different requests into steps, and computes them in a thread of its own.

    Items wait in queues, one for each kind and shape. A step takes the oldest of one queue: as soon as there is a full
    step, else when the first has waited long enough. It has 1, 2, 4, … items or a full step, so that a compiler meets
    few shapes and nothing is padded. A step that fails is repeated item by item, so that only the request of the item
    at fault fails.

    Args:
        compute: For each kind, what computes a step.
        sizes: For each kind, the most items of a step.
        max_wait: Seconds that an item waits at most for others.
        observe: Called after each step that did not fail, before its results are there.
    """

    def __init__(
        self,
        compute: Mapping[str, Compute],
        sizes: Mapping[str, int],
        max_wait: float,
        observe: Observe = lambda kind, items, seconds: None,
    ) -> None:
        self._compute, self._sizes, self._max_wait, self._observe = compute, sizes, max_wait, observe
        self._queues: dict[tuple[str, Hashable], deque[_Item]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="clipmb-model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    def submit(self, kind: str, values: Sequence[Any], shapes: Sequence[Hashable]) -> Future[np.ndarray]:
        """Lets items wait for their steps.

        Args:
            kind: Key of ``compute``.
            values: The items, at least one.
            shapes: The shape of each; only those of one shape share a step.

        Returns:
            The rows of all items, in their order. Cancelling it takes away those that still wait.

        Raises:
            RuntimeError: The batcher is closed.
        """
        work = _Work([None] * len(values), len(values))
        entered = time.monotonic()
        with self._changed:
            if self._closed:
                raise RuntimeError("The batcher is closed.")
            for place, (value, shape) in enumerate(zip(values, shapes, strict=True)):
                queue = self._queues.setdefault((kind, shape), deque())
                queue.append(_Item(value, work, place, entered))
            self._changed.notify()
        return work.future

    def withdraw(self) -> None:
        """Forgets the items of requests that were cancelled, at once and not when their turn comes."""
        with self._changed:
            for key, queue in self._queues.items():
                self._queues[key] = deque(item for item in queue if not item.work.future.done())

    def close(self) -> None:
        """Computes what waits, and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (step := self._next()) is not None:
            kind, items = step
            for part in (items, *([item] for item in items if len(items) > 1)):
                begun = time.monotonic()
                try:
                    rows = self._compute[kind]([item.value for item in part])
                except Exception as error:
                    if len(part) == 1:
                        _fail(part[0].work, error)
                    continue
                self._observe(kind, len(part), time.monotonic() - begun)
                for item, row in zip(part, rows, strict=True):
                    _finish(item, row)
                if part is items:
                    break

    def _next(self) -> tuple[str, list[_Item]] | None:
        """Waits for the next step and takes its items; None when the batcher is closed and nothing is left."""
        with self._changed:
            while True:
                first: tuple[float, tuple[str, Hashable]] | None = None
                for key, queue in list(self._queues.items()):
                    while queue and queue[0].work.future.done():
                        queue.popleft()
                    if not queue:
                        del self._queues[key]
                        continue
                    full = self._closed or len(queue) >= self._sizes[key[0]]
                    due = queue[0].entered + (0 if full else self._max_wait)
                    if first is None or due < first[0]:
                        first = due, key
                if first is None and self._closed:
                    return None
                wait = None if first is None else first[0] - time.monotonic()
                if first is not None and wait is not None and wait <= 0:
                    if items := self._taken(first[1]):
                        return first[1][0], items
                    continue
                self._changed.wait(wait)

    def _taken(self, key: tuple[str, Hashable]) -> list[_Item]:
        queue, size = self._queues[key], self._sizes[key[0]]
        count = sum(not item.work.future.done() for item in queue) if len(queue) < size else size
        count = size if count >= size else 1 << max(count.bit_length() - 1, 0)
        items: list[_Item] = []
        while queue and len(items) < count:
            item = queue.popleft()
            if not item.work.future.done():
                items.append(item)
        return items


def _finish(item: _Item, row: np.ndarray) -> None:
    work = item.work
    work.rows[item.place] = row
    work.left -= 1
    if not work.left:
        with suppress(InvalidStateError):  # it was cancelled, or another of its items failed
            work.future.set_result(np.stack(work.rows))


def _fail(work: _Work, error: Exception) -> None:
    with suppress(InvalidStateError):
        work.future.set_exception(error)
