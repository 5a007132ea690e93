"""The tokenizer's engine: cleaning rules, word pattern, byte-level BPE and the caches, from text to ids and offsets.

Everything rests on one fact: no word of CLIP's pattern contains whitespace, and no cleaning rule looks across it. So a
text is cut at whitespace, and each chunk is looked up, raw as it is, in a cache from chunk to ids. Only a chunk never
seen before is cleaned, cut into words and merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

from clipmb.common.errors import bad_input
from clipmb.common.text.added import AddedToken, cut, finder
from clipmb.common.text.bpe import merge_symbols
from clipmb.common.text.cleaning import Spans, chunker, cleaner, normalized_content
from clipmb.common.text.unicode import words
from clipmb.common.text.vocabulary import (
    MARKERS,
    SUFFIX,
    Vocabulary,
    byte_symbols,
)

CACHE_ENTRIES = 65_536  # of each of the two caches, about 10 MB each when full
CACHE_LENGTH = 64  # longer chunks and words are not kept


class Aligned(NamedTuple):
    """The tokens of one text.

    Attributes:
        ids: Token ids.
        offsets: For each token, start and end of the characters of the text that it stands for.
        words: For each token, the number of its word.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    words: list[int]


class _Cache(dict):
    """A dict that computes what it lacks and keeps at most CACHE_ENTRIES of it; it is emptied when full."""

    def __init__(self, compute: Callable[[str], Any]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, key: str) -> Any:
        value = self._compute(key)
        if len(key) <= CACHE_LENGTH:
            if len(self) >= CACHE_ENTRIES:
                self.clear()
            self[key] = value
        return value


class Engine:
    """Text to ids. Immutable once built, except for its caches, so that threads may share it.

    Args:
        vocabulary: Tokens and merges.
        cleaning: One of CLEANINGS.
        added: Added tokens and their ids.
        unknown: The token for what the vocabulary lacks; None to leave that out.

    Raises:
        ValueError: The cleaning is not one of CLEANINGS.
        ImportError: The cleaning needs ftfy, which is not installed.
    """

    def __init__(
        self, vocabulary: Vocabulary, cleaning: str, added: Sequence[tuple[AddedToken, int]], unknown: str | None
    ) -> None:
        self.vocabulary = vocabulary
        self.cleaning = cleaning
        self.added = tuple(added)
        self.unknown = unknown
        self._prepare()

    def _prepare(self) -> None:
        searches_cleaned = self.cleaning == "nfc"
        raw = [item for item in self.added if not (searches_cleaned and item[0].normalized)]
        cleaned = [
            (replace(token, content=normalized_content(token.content)), i)
            for token, i in self.added
            if searches_cleaned and token.normalized
        ]
        self._raw_added = finder(raw, not searches_cleaned)
        self._cleaned_added = finder(cleaned, False)
        self._raw_ids = {token.content: i for token, i in raw}
        self._cleaned_ids = {token.content: i for token, i in cleaned}
        self._spaced = any(char.isspace() for token, _ in self.added for char in token.content)
        self._clean = cleaner(self.cleaning, spaced=self._spaced)
        self.alignable = self.cleaning in ("nfc", "basic")
        self._markers = self.cleaning != "nfc"  # which "nfc" leaves to the added tokens
        added = {token.content: i for token, i in self.added}
        self._unknown_id = (
            None if self.unknown is None else added.get(self.unknown, self.vocabulary.ids.get(self.unknown))
        )
        self._word_cache = _Cache(self._merge)
        self._chunk_cache = _Cache(self._chunk_ids)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("vocabulary", "cleaning", "added", "unknown")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def with_added(self, added: Sequence[tuple[AddedToken, int]]) -> Engine:
        """Returns an engine with the same vocabulary and other added tokens."""
        return Engine(self.vocabulary, self.cleaning, added, self.unknown)

    def clear_caches(self) -> None:
        """Forgets all words and chunks; only speed changes."""
        self._word_cache.clear()
        self._chunk_cache.clear()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Turns texts into ids, without special tokens around them.

        Raises:
            TypeError: A text is not a string.
            ValueError: A text holds a lone surrogate, which has no UTF-8 form.
        """
        try:
            everything = "".join(texts)
        except TypeError:
            wrong = next(text for text in texts if not isinstance(text, str))
            raise not_a_text(wrong) from None
        if self._spaced or not self.alignable:
            return [self._whole_ids(text) for text in texts]
        find = self._chunk_cache.__getitem__
        chunks = chunker(self.cleaning, everything)
        return [list(chain.from_iterable(map(find, chunks(text)))) for text in texts]

    def align(self, text: str) -> Aligned:
        """Turns a text into ids, with the place of every token in the text.

        Raises:
            TypeError: The text is not a string.
            ValueError: The cleaning rewrites texts so that places are lost, or the text holds a lone surrogate.
        """
        if not isinstance(text, str):
            raise not_a_text(text)
        if not self.alignable:
            raise bad_input(
                "Offsets and word ids need a text_cleaning that keeps track of places: 'nfc' or 'basic'",
                self.cleaning,
                "Build the tokenizer with one of these",
            )
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        words: list[int] = []
        for number, (found, first, last, spans, start) in enumerate(self._pieces(text)):
            places = _places(spans, first, last, start)
            if isinstance(found, int):
                ids.append(found)
                offsets.append((places[0][0], places[-1][1]))
                words.append(number)
                continue
            merged, sizes = self._word_cache[found]
            byte_places = [place for char, place in zip(found, places, strict=True) for _ in range(len(char.encode()))]
            at = 0
            for token, size in zip(merged, sizes, strict=True):
                ids.append(token)
                offsets.append((byte_places[at][0], byte_places[at + size - 1][1]))
                words.append(number)
                at += size
        return Aligned(ids, offsets, words)

    def _whole_ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for found, _, _, _, _ in self._pieces(text):
            if isinstance(found, int):
                ids.append(found)
            else:
                ids.extend(self._word_cache[found][0])
        return ids

    def _chunk_ids(self, chunk: str) -> tuple[int, ...]:
        return tuple(self._whole_ids(chunk))

    def _pieces(self, text: str) -> Iterator[tuple[str | int, int, int, Spans, int]]:
        """Yields each word or added token's id, and its place, as the arguments of `_places`."""
        for start, end, added in cut(text, self._raw_added, self._raw_ids):
            if added is not None:
                yield added, start, end, None, 0
                continue
            clean, spans = self._clean(text[start:end])
            for first, last, token in cut(clean, self._cleaned_added, self._cleaned_ids):
                if token is not None:
                    yield token, first, last, spans, start
                    continue
                for match in words(self._markers, clean.isascii()).finditer(clean, first, last):
                    yield match[0], *match.span(), spans, start

    def _merge(self, word: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the ids of a cleaned word, and how many bytes each of them stands for."""
        ids = self.vocabulary.ids
        if self._markers and word in MARKERS:
            found = ids.get(word, self._unknown_id)
            return ((), ()) if found is None else ((found,), (len(word),))
        try:
            symbols = merge_symbols([byte_symbols()[byte] for byte in word.encode()], self.vocabulary.ranks)
        except UnicodeEncodeError:
            raise bad_input(
                "A text must be valid Unicode, without lone surrogates",
                word,
                'Repair it: text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")',
            ) from None
        sizes = [len(symbol) for symbol in symbols]
        sizes[-1] -= len(SUFFIX)
        found = [(ids.get(symbol, self._unknown_id), size) for symbol, size in zip(symbols, sizes, strict=True)]
        known = [(token, size) for token, size in found if token is not None]
        return tuple(token for token, _ in known), tuple(size for _, size in known)


class TextTypeError(TypeError, ValueError):
    """A text is not a string. It is a ValueError too because that is what transformers 4 raises."""


def not_a_text(value: object) -> Exception:
    """Builds the error for a text that is not a string."""
    return bad_input("A text must be a string", value, "Pass str, or a list of str for a batch", TextTypeError)


def _places(spans: Spans, first: int, last: int, start: int) -> list[tuple[int, int]]:
    """Returns the places in the text of characters ``first`` to ``last`` of the cleaned part beginning at ``start``."""
    if spans is None:
        return [(start + i, start + i + 1) for i in range(first, last)]
    return [(start + left, start + right) for left, right in spans[first:last]]
