"""Rows of tokens: what truncation keeps, special tokens around it, padding beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from clipmb.common.errors import bad_input
from clipmb.common.text.encoding import Encoding
from clipmb.common.text.engine import Aligned, Engine
from clipmb.common.text.options import NO_LIMIT, Options


class Row(NamedTuple):
    """Which text a row is of, and which tokens of it and of its pair it has."""

    sample: int
    first: slice = slice(None)
    second: slice = slice(None)


class Truncation:
    """What truncation keeps.

    Args:
        options: The settings of the call.
        special: How many special tokens go around the text.
        side: "right" or "left": where tokens are taken away.
        several_rows: What is cut off makes further rows, as in transformers 4's fast tokenizer, not a list of ids.

    Raises:
        ValueError: ``max_length`` has no room for the special tokens.
    """

    def __init__(self, options: Options, special: int, side: str, several_rows: bool) -> None:
        self._options = options
        self._right = side == "right"
        self._several_rows = several_rows
        self.on = options.truncation != "do_not_truncate"
        self.room = options.max_length - special if self.on else NO_LIMIT
        if self.room < 0:
            raise bad_input(
                f"max_length must leave room for the {special} special tokens",
                options.max_length,
                f"Pass {special} or more, or add_special_tokens=False",
            )

    def rows(self, sample: int, count: int, pair: int | None) -> list[Row]:
        """Returns the rows that a text becomes.

        Args:
            sample: The number of the text.
            count: Its tokens.
            pair: The tokens of its pair; None where there is none.

        Raises:
            ValueError: The options don't allow to cut where it is needed, or ``stride`` is too large.
        """
        if count + (pair or 0) <= self.room:
            return [Row(sample)]
        keep, keep_pair = self._kept(count, pair)
        first = self._parts(count, keep)
        second = [slice(None)] if pair is None else self._parts(pair, keep_pair)
        # The order of transformers 4: further parts of the first with each of the second, then the first with the rest.
        order = [(0, 0)]
        order += [(i, j) for i in range(1, len(first)) for j in range(len(second))]
        order += [(0, j) for j in range(1, len(second))]
        return [Row(sample, first[i], second[j]) for i, j in order]

    def overflowing(self, ids: list[int], pair: list[int] | None) -> tuple[list[int], int]:
        """Returns the ids that were cut off, with ``stride`` more, and how many were."""
        removed = len(ids) + len(pair or ()) - self.room
        if not self.on or removed <= 0:
            return [], 0
        cut = pair if self._options.truncation == "only_second" and pair is not None else ids
        if pair is not None and self._options.truncation == "longest_first":
            return [], removed
        size = min(len(cut), self._options.stride + removed)
        return cut[len(cut) - size :] if self._right else cut[:size], removed

    def _kept(self, count: int, pair: int | None) -> tuple[int, int]:
        strategy, room = self._options.truncation, self.room
        if pair is None:
            if strategy == "only_second":
                raise bad_input("truncation='only_second' needs pairs", None, "Pass text_pair, or truncation=True")
            return room, 0
        if strategy == "longest_first":
            return self._kept_of_pair(count, pair)
        keep, keep_pair = (room - pair, pair) if strategy == "only_first" else (count, room - count)
        if keep < 0 or keep_pair < 0:
            raise bad_input(
                f"truncation={strategy!r} cannot reach max_length: the other text is already too long",
                f"{count} and {pair} tokens, room for {room}",
                "Use truncation='longest_first'",
                shown=True,
            )
        return keep, keep_pair

    def _kept_of_pair(self, count: int, pair: int) -> tuple[int, int]:
        """Halves, where both texts are longer than half; the odd token is where transformers 4 has it."""
        short, long, half = min(count, pair), max(count, pair), self.room // 2
        if self._several_rows:
            if short + min(long, max(short, self.room - short)) <= self.room:
                kept = short, self.room - short
            else:
                kept = half, self.room - half
            return kept if count <= pair else (kept[1], kept[0])
        removed = count + pair - self.room
        both = removed - min(long - short, removed)
        if count > pair:
            return count - (removed - both) - both // 2, pair - (both - both // 2)
        return count - both // 2, pair - (removed - both // 2)

    def _parts(self, count: int, keep: int) -> list[slice]:
        """Returns the kept part first, then the further ones where they are wanted."""
        if count <= keep:
            return [slice(0, count)]
        main = slice(0, keep) if self._right else slice(count - keep, count)
        if not (self._several_rows and self._options.return_overflowing_tokens):
            return [main]
        if keep == 0:
            return [main, slice(0, count)]
        step = keep - self._options.stride
        if step <= 0:
            raise bad_input(
                f"stride must be less than the {keep} tokens of the text that a row has room for",
                self._options.stride,
                "Pass a smaller stride or a larger max_length",
            )
        parts = []
        for at in range(0, count, step):
            end = min(at + keep, count)
            parts.append(slice(at, end) if self._right else slice(count - end, count - at))
            if end == count:
                break
        return parts


class Padding:
    """How rows are filled up.

    Args:
        options: The settings of the call.
        lengths: Tokens of each row.
    """

    def __init__(self, options: Options, lengths: list[int]) -> None:
        self._options = options
        self._lengths = lengths
        self._left = options.padding_side == "left"
        length = 0
        if options.padding == "longest":
            length = max(lengths, default=0)
        elif options.padding == "max_length" and options.max_length < NO_LIMIT:
            length = options.max_length
        if length and options.pad_to_multiple_of:
            length += -length % options.pad_to_multiple_of
        self.length = length

    def fill(self, name: str, rows: list[list[Any]], value: Any) -> Any:
        """Returns the rows, filled up with ``value``: lists, or an array (batch, seq, ...) when a tensor was asked for.

        Raises:
            ValueError: The rows differ in length and are to become a tensor.
        """
        if self._options.return_tensors is None:
            return [self.fill_row(row, value) for row in rows] if self.length else rows
        width = max(self.length, max(self._lengths, default=0))
        if any(max(self.length, n) != width for n in self._lengths):
            raise bad_input(
                f"The rows of {name} must have one length to become a tensor",
                f"lengths {sorted(set(self._lengths))[:8]}",
                "Pass padding=True, and truncation=True where texts may be too long",
                shown=True,
            )
        return pad_rows(rows, width, value, left=self._left)

    def fill_row(self, row: list[Any], value: Any) -> list[Any]:
        """Returns one row, filled up with ``value``; as it is where there is no padding or no room."""
        fill = [value] * (self.length - len(row))
        return fill + row if self._left else row + fill


def pad_rows(rows: Sequence[Sequence[Any]], length: int, value: Any, *, left: bool = False) -> np.ndarray:
    """Fills rows up to one length.

    Args:
        rows: The rows, none of them longer than ``length``.
        length: The length of each row of the result.
        value: What fills them up: a number, or a tuple where the items of rows are tuples.
        left: Put it before the row, not behind.

    Returns:
        (rows, length), int64; with tuples of n numbers (rows, length, n).
    """
    array = np.empty((len(rows), length, *np.shape(value)), np.int64)
    array[...] = value
    if rows and length:
        counts = np.array([len(row) for row in rows])[:, None]
        places = np.arange(length)
        used = places >= length - counts if left else places < counts
        flat = chain.from_iterable(rows)
        array[used] = list(flat) if np.shape(value) else np.fromiter(flat, np.int64, int(counts.sum()))
    return array


def cut_inside(ids: list[int], limit: int) -> list[int]:
    """Cuts a row with its special tokens to ``limit`` tokens; the last, the end token, stays the last."""
    return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


def surround(first: Sequence[Any], second: Sequence[Any] | None, start: Any, end: Any) -> list[Any]:
    """Returns start, first, end; with a second start, first, end, end, second, end; without ends just both."""
    if end is None:
        return [*first, *(second or ())]
    return [start, *first, end] if second is None else [start, *first, end, end, *second, end]


def encode_words(engine: Engine, texts: Sequence[Sequence[str]]) -> list[list[int]]:
    """Turns texts that are lists of words into ids."""
    return [list(chain.from_iterable(engine.encode(words))) for words in texts]


def align(
    engine: Engine, texts: Sequence[Any], pairs: Sequence[Any] | None, split: bool
) -> list[tuple[Aligned, Aligned | None]]:
    """Returns ids, places and words of every text and its pair."""
    one = _align_words if split else Engine.align
    return [(one(engine, text), None if pairs is None else one(engine, pairs[i])) for i, text in enumerate(texts)]


def _align_words(engine: Engine, words: Sequence[str]) -> Aligned:
    result = Aligned([], [], [])
    for number, word in enumerate(words):
        part = engine.align(word)
        result.ids.extend(part.ids)
        result.offsets.extend(part.offsets)
        result.words.extend([number] * len(part.ids))
    return result


def encodings(
    details: Callable[[], list[tuple[Aligned, Aligned | None]]],
    rows: list[Row] | None,
    options: Options,
    padding: Padding,
    tokens: dict[int, str],
    ends: tuple[Any, Any, Any],
) -> list[Encoding]:
    """Describes the tokens of every row.

    Args:
        details: Makes ids, places and words of every text.
        rows: The rows; None for one of each text, whole.
        options: The settings of the call.
        padding: How the rows are filled up.
        tokens: Id to token.
        ends: Ids of start, end and padding.
    """
    aligned = details()
    start, end, pad = ends
    special = options.add_special_tokens
    result = []
    for row in [Row(i) for i in range(len(aligned))] if rows is None else rows:
        first, second = aligned[row.sample]
        tail = (None, None) if special else ()  # what surrounds the text; None stands for a special token
        cells: list[_Cell | None] = [_Cell(0, i) for i in range(len(first.ids))[row.first]]
        if second is not None:
            cells = [*cells, *tail, *(_Cell(1, i) for i in range(len(second.ids))[row.second])]
        cells = [*tail[:1], *cells, *tail[:1]]
        row_ids = [_of(cell, first, second, "ids", end) for cell in cells]
        if special:
            row_ids[0] = start
        ids = padding.fill_row(row_ids, pad)
        attention_mask = padding.fill_row([1] * len(cells), 0)
        cells = padding.fill_row(cells, None)
        result.append(
            Encoding(
                ids=ids,
                tokens=[tokens.get(index, "") for index in ids],
                offsets=[_of(cell, first, second, "offsets", (0, 0)) for cell in cells],
                word_ids=[_of(cell, first, second, "words", None) for cell in cells],
                sequence_ids=[None if cell is None else cell.sequence for cell in cells],
                special_tokens_mask=[int(cell is None) for cell in cells],
                attention_mask=attention_mask,
                type_ids=[0] * len(cells),
            )
        )
    return result


class _Cell(NamedTuple):
    """A token of a row: the text it comes from, and its number there."""

    sequence: int
    token: int


def _of(cell: _Cell | None, first: Aligned, second: Aligned | None, field: str, otherwise: Any) -> Any:
    if cell is None:
        return otherwise
    return getattr(second if cell.sequence else first, field)[cell.token]
