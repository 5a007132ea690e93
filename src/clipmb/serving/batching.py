"""Dynamic batching: what many clients ask for at the same time is computed together, by one thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Compute = Callable[[list[Any]], np.ndarray]  # items to one row each
Observe = Callable[[str, int, float], None]  # the kind of a step, its items and its seconds

_STEP = 16  # what a step costs beside its items, in tokens (PyTorch, ViT-B/32, two cores)
_PADDING = 0.125  # the most that is padding of a step, as a share of its items' own lengths


@dataclass
class _Work:
    """The items of one request, and the rows of those that are computed."""

    rows: list[Any]
    left: int
    future: Future[np.ndarray] = field(default_factory=Future)


class _Item(NamedTuple):
    value: Any
    length: int
    work: _Work
    place: int  # in its work
    entered: float


class Batcher:
    """Puts items of different requests into steps, and computes them in a thread of its own.

    Items wait in a queue for each kind. A step is due as soon as there are enough items for a full one, else when the
    first has waited long enough. It takes the oldest item, and of the others those whose length is nearest, as long as
    computing them with it costs less than a step of their own. A step that fails is repeated item by item, so that only
    the request of the item at fault fails.

    Args:
        compute: For each kind, what computes a step.
        sizes: For each kind, the most items of a step.
        max_wait: Seconds that an item waits at most for others.
        observe: Called after each step that did not fail, before its results are there.
        few_sizes: Steps have 1, 2, 4, … items or are full, so that a compiler meets few shapes without filling up.
    """

    def __init__(
        self,
        compute: Mapping[str, Compute],
        sizes: Mapping[str, int],
        max_wait: float,
        observe: Observe = lambda kind, items, seconds: None,
        few_sizes: bool = False,
    ) -> None:
        self._compute, self._sizes, self._max_wait, self._observe = compute, sizes, max_wait, observe
        self._few_sizes = few_sizes
        self._queues: dict[str, deque[_Item]] = {kind: deque() for kind in compute}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="clipmb-model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    def submit(self, kind: str, values: Sequence[Any], lengths: Sequence[int]) -> Future[np.ndarray]:
        """Lets items wait for their steps.

        Args:
            kind: Key of ``compute``.
            values: The items, at least one.
            lengths: What each costs, such as its tokens; in a step all cost as much as the longest.

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
            for place, (value, length) in enumerate(zip(values, lengths, strict=True)):
                self._queues[kind].append(_Item(value, length, work, place, entered))
            self._changed.notify()
        return work.future

    def withdraw(self) -> None:
        """Forgets the items of requests that were cancelled, at once and not when their turn comes."""
        with self._changed:
            for kind in self._queues:
                self._forget(kind)

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
                first: tuple[float, str] | None = None
                for kind in self._queues:
                    self._forget(kind)
                    if not (queue := self._queues[kind]):
                        continue
                    full = self._closed or len(queue) >= self._sizes[kind]
                    due = queue[0].entered + (0 if full else self._max_wait)
                    if first is None or due < first[0]:
                        first = due, kind
                if first is None and self._closed:
                    return None
                wait = None if first is None else first[0] - time.monotonic()
                if first is not None and wait is not None and wait <= 0:
                    return first[1], self._taken(first[1])
                self._changed.wait(wait)

    def _forget(self, kind: str) -> None:
        """Takes the items away whose request was cancelled or has failed."""
        queue = self._queues[kind]
        if any(item.work.future.done() for item in queue):
            self._queues[kind] = deque(item for item in queue if not item.work.future.done())

    def _taken(self, kind: str) -> list[_Item]:
        """Takes the items of a step from a queue: the oldest, and its neighbours in the order of lengths."""
        queue, size = self._queues[kind], self._sizes[kind]
        items = sorted(queue, key=lambda item: item.length)  # of one length, the older first
        low = high = next(place for place, item in enumerate(items) if item is queue[0])
        taken, used = [queue[0]], queue[0].length
        while len(taken) < size:
            sides = [place for place in (high + 1, low - 1) if 0 <= place < len(items)]
            costs = [
                (len(taken) + 1) * max(items[high].length, items[side].length) - items[side].length for side in sides
            ]
            if not sides or (cost := min(costs)) - used > max(_STEP, used * _PADDING):
                break
            side = sides[costs.index(cost)]
            low, high = min(low, side), max(high, side)
            taken.append(items[side])
            used += items[side].length
        if self._few_sizes and len(taken) < size:
            taken = taken[: 1 << len(taken).bit_length() - 1]
        chosen = set(map(id, taken))
        self._queues[kind] = deque(item for item in queue if id(item) not in chosen)
        return taken


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
