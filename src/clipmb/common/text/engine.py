"""The tokenizer's engine: cleaning rules, word pattern, byte-level BPE and the caches, from text to ids and offsets.

Everything rests on one fact: no word of CLIP's pattern contains whitespace, and no cleaning rule looks across it. So a
text is cut at whitespace, and each chunk is looked up, raw as it is, in a cache from chunk to ids. Only a chunk never
seen before is cleaned, cut into words and merged.
"""

from __future__ import annotations

import heapq
import html
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any, NamedTuple

import regex

from clipmb.common.errors import bad_input, one_of
from clipmb.common.text.vocabulary import SUFFIX, Vocabulary, byte_symbols

CLEANINGS = ("nfc", "basic", "ftfy", "openai")
CACHE_ENTRIES = 65_536  # of each of the two caches, about 10 MB each when full
CACHE_LENGTH = 64  # longer chunks and words are not kept
_SHORT = 64

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORD = regex.compile(_WORDS)
_WORD_OR_MARKER = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|" + _WORDS, regex.IGNORECASE)
_MARKERS = ("<|startoftext|>", "<|endoftext|>")
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space
_NOT_SPACE = re.compile(f"[^{_SPACE}]+")
_NOT_BASIC_SPACE = re.compile(r"[^\t\n\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
# str.split() also cuts at these, which the rules take for characters ("nfc") or remove ("basic").
_ODD_SEPARATORS = {"nfc": "\x1c\x1d\x1e\x1f", "basic": "\x0b\x0c\x1c\x1d\x1e\x1f\x85"}
_CHUNK = {"nfc": _NOT_SPACE, "basic": _NOT_BASIC_SPACE}


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before anything else is done to it.

    Attributes:
        content: The token.
        single_word: Only where it stands alone: CLIPTokenizerFast not inside a word, CLIPTokenizer between whitespace.
        lstrip: It takes the whitespace on its left with it.
        rstrip: It takes the whitespace on its right with it.
        normalized: `CLIPTokenizerFast` searches it in the cleaned text, so in any case; otherwise in the raw text.
        special: Left out by ``skip_special_tokens``. None: no.
    """

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False

    def __post_init__(self) -> None:
        if self.normalized is None:
            object.__setattr__(self, "normalized", not self.special)

    def __str__(self) -> str:
        return self.content

    @classmethod
    def of(cls, token: Any, **defaults: Any) -> AddedToken:
        """Builds one from a string, from a dict as tokenizer files hold it, or from any object with these attributes.

        Raises:
            TypeError: It is none of these.
            ValueError: The content is empty.
        """
        names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
        if isinstance(token, str):
            made = cls(token, **defaults)
        elif isinstance(token, dict) and isinstance(token.get("content"), str):
            made = cls(**{**defaults, **{name: token[name] for name in names if name in token}})
        elif isinstance(getattr(token, "content", None), str):
            made = cls(**{**defaults, **{name: getattr(token, name) for name in names if hasattr(token, name)}})
        else:
            raise bad_input("A token must be a string or an AddedToken", token, "Pass the token's text", TypeError)
        if not made.content:
            raise bad_input("A token must have at least one character", token, "Leave it out")
        return made

    def flags(self, *, special: bool = True) -> dict[str, Any]:
        """Returns the token as tokenizer files hold it."""
        names = ("content", "lstrip", "normalized", "rstrip", "single_word") + (("special",) if special else ())
        return {name: getattr(self, name) for name in names}


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


_Spans = list[tuple[int, int]] | None  # the place of each cleaned character; None where cleaning moved none


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
    """Text to ids. Immutable once built, but for its caches, so that threads may share it.

    Args:
        vocabulary: Tokens and merges.
        cleaning: One of CLEANINGS.
        added: Added tokens and their ids.
        unknown: The token for what the vocabulary lacks; None to leave that out.

    Raises:
        ValueError: The cleaning is none of CLEANINGS.
        ImportError: The cleaning needs ftfy, which is not installed.
    """

    def __init__(
        self, vocabulary: Vocabulary, cleaning: str, added: Sequence[tuple[AddedToken, int]], unknown: str | None
    ) -> None:
        if cleaning not in CLEANINGS:
            raise one_of("text_cleaning", cleaning, CLEANINGS)
        self.vocabulary = vocabulary
        self.cleaning = cleaning
        self.added = tuple(added)
        self.unknown = unknown
        self._prepare()

    def _prepare(self) -> None:
        self._fix_text = _ftfy(self.cleaning) if self.cleaning in ("ftfy", "openai") else None
        self.alignable = self._fix_text is None
        searches_cleaned = self.cleaning == "nfc"
        raw = [item for item in self.added if not (searches_cleaned and item[0].normalized)]
        cleaned = [
            (
                replace(
                    token, content=re.sub(f"[{_SPACE}]+", " ", _lower(unicodedata.normalize("NFC", token.content)))
                ),
                i,
            )
            for token, i in self.added
            if searches_cleaned and token.normalized
        ]
        self._raw_added = _finder(raw, not searches_cleaned)
        self._cleaned_added = _finder(cleaned, False)
        self._raw_ids = {token.content: i for token, i in raw}
        self._cleaned_ids = {token.content: i for token, i in cleaned}
        self._spaced = any(char.isspace() for token, _ in self.added for char in token.content)
        self._pattern = _WORD if self.cleaning == "nfc" else _WORD_OR_MARKER
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
            TypeError: A text is no string.
            ValueError: A text holds a lone surrogate, which has no UTF-8 form.
        """
        try:
            everything = "".join(texts)
        except TypeError:
            wrong = next(text for text in texts if not isinstance(text, str))
            raise not_a_text(wrong) from None
        if self._spaced or self._fix_text is not None:
            return [self._whole_ids(text) for text in texts]
        find = self._chunk_cache.__getitem__
        cut = str.split
        if any(separator in everything for separator in _ODD_SEPARATORS[self.cleaning]):
            cut = _CHUNK[self.cleaning].findall
        return [list(chain.from_iterable(map(find, cut(text)))) for text in texts]

    def align(self, text: str) -> Aligned:
        """Turns a text into ids, with the place of every token in the text.

        Raises:
            TypeError: The text is no string.
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

    def _pieces(self, text: str) -> Iterator[tuple[str | int, int, int, _Spans, int]]:
        """Yields each word or added token's id, and its place, as the arguments of `_places`."""
        for start, end, added in _cut(text, self._raw_added, self._raw_ids):
            if added is not None:
                yield added, start, end, None, 0
                continue
            clean, spans = self._clean(text[start:end])
            for first, last, token in _cut(clean, self._cleaned_added, self._cleaned_ids):
                if token is not None:
                    yield token, first, last, spans, start
                    continue
                for match in self._pattern.finditer(clean, first, last):
                    yield match[0], *match.span(), spans, start

    def _clean(self, text: str) -> tuple[str, _Spans]:
        """Returns the cleaned text and, where they differ, the place in ``text`` of each of its characters."""
        if self._fix_text is not None:
            text = self._fix_text(text)
            if self.cleaning == "openai":
                text = html.unescape(html.unescape(text))
            return re.sub(r"\s+", " ", text).strip().lower(), None
        if self.cleaning == "nfc":
            if text.isascii() and not self._spaced:
                return text.lower(), None
            lower = _lower(text)
            if len(lower) == len(text) and not self._spaced and unicodedata.is_normalized("NFC", text):
                return lower, None
            return _clean_nfc(text)
        if text.isascii() and text.isprintable():
            return text.lower(), None
        return _clean_basic(text)

    def _merge(self, word: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the ids of a cleaned word, and how many bytes each of them stands for."""
        ids = self.vocabulary.ids
        if self._pattern is _WORD_OR_MARKER and word in _MARKERS:
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
    """A text is no string. It is a ValueError too because that is what the former tokenizers raised."""


def not_a_text(value: object) -> Exception:
    """Builds the error for a text that is no string."""
    return bad_input("A text must be a string", value, "Pass str, or a list of str for a batch", TextTypeError)


def merge_symbols(symbols: list[str], ranks: dict[str, int]) -> list[str]:
    """Applies byte pair merges to the symbols of one word: the pair of lowest rank first, among equals the leftmost.

    Args:
        symbols: One symbol per byte; not empty.
        ranks: Rank of each merge, by its two symbols with a space between.

    Returns:
        The merged symbols, the last of them ending in ``</w>``.
    """
    symbols = [*symbols[:-1], symbols[-1] + SUFFIX]
    return _merge_short(symbols, ranks) if len(symbols) <= _SHORT else _merge_long(symbols, ranks)


def _merge_short(symbols: list[str], ranks: dict[str, int]) -> list[str]:
    """Quadratic in the length, and the fastest for the words there are."""
    find = ranks.get
    never = len(ranks)
    pairs = [find(f"{left} {right}", never) for left, right in pairwise(symbols)]
    while pairs and (lowest := min(pairs)) < never:
        i = pairs.index(lowest)
        symbols[i] += symbols.pop(i + 1)
        del pairs[i]
        if i:
            pairs[i - 1] = find(f"{symbols[i - 1]} {symbols[i]}", never)
        if i < len(pairs):
            pairs[i] = find(f"{symbols[i]} {symbols[i + 1]}", never)
    return symbols


def _merge_long(symbols: list[str], ranks: dict[str, int]) -> list[str]:
    """O(n log n): a word of a million letters must not stop a server."""
    count = len(symbols)
    after = list(range(1, count + 1))
    before = list(range(-1, count - 1))
    heap = []
    for i, (left, right) in enumerate(pairwise(symbols)):
        rank = ranks.get(f"{left} {right}")
        if rank is not None:
            heap.append((rank, i))
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        right = after[i]
        if right >= count or not symbols[i] or ranks.get(f"{symbols[i]} {symbols[right]}") != rank:
            continue  # a neighbour was merged in the meantime
        symbols[i] += symbols[right]
        symbols[right] = ""
        after[i] = after[right]
        if after[i] < count:
            before[after[i]] = i
        for left in (before[i], i):
            if left >= 0 and after[left] < count:
                rank = ranks.get(f"{symbols[left]} {symbols[after[left]]}")
                if rank is not None:
                    heapq.heappush(heap, (rank, left))
    return [symbol for symbol in symbols if symbol]


def _places(spans: _Spans, first: int, last: int, start: int) -> list[tuple[int, int]]:
    """Returns the places in the text of characters ``first`` to ``last`` of the cleaned part beginning at ``start``."""
    if spans is None:
        return [(start + i, start + i + 1) for i in range(first, last)]
    return [(start + left, start + right) for left, right in spans[first:last]]


def _finder(added: Iterable[tuple[AddedToken, int]], spaced: bool) -> re.Pattern[str] | None:
    """Compiles the search for added tokens: leftmost, then longest. ``spaced``: single words have whitespace around."""
    before, after = (r"(?<!\S)", r"(?!\S)") if spaced else (r"(?<!\w)", r"(?!\w)")
    alternatives = []
    for token, _ in sorted(added, key=lambda item: -len(item[0].content)):
        found = f"(?:{re.escape(token.content)})"
        found = before + found + after if token.single_word else found
        alternatives.append((r"\s*" if token.lstrip else "") + f"({found})" + (r"\s*" if token.rstrip else ""))
    return re.compile("|".join(alternatives)) if alternatives else None


def _cut(text: str, finder: re.Pattern[str] | None, ids: dict[str, int]) -> Iterator[tuple[int, int, int | None]]:
    """Yields start, end and the added token's id; None where there is text between added tokens."""
    at = 0
    if finder is not None:
        for match in finder.finditer(text):
            if match.start() > at:
                yield at, match.start(), None
            yield match.start(), match.end(), ids[match[match.lastindex or 0]]
            at = match.end()
    if at < len(text):
        yield at, len(text), None


def _lower(text: str) -> str:
    """Lower case, character by character: str.lower() alone knows a second small sigma at the end of words."""
    return text.replace("Σ", "σ").lower()


def _clean_nfc(text: str) -> tuple[str, list[tuple[int, int]]]:
    """NFC, whitespace to single spaces, lower case.

    Source: the normalizer of the former CLIPTokenizerFast, Sequence[NFC, Replace whitespace, Lowercase].
    """
    chars: list[tuple[str, tuple[int, int]]] = []
    for char, span in _nfc([(char, (i, i + 1)) for i, char in enumerate(text)]):
        if not _NOT_SPACE.match(char):
            if not chars or chars[-1][0] != " ":
                chars.append((" ", span))
            else:
                chars[-1] = (" ", span)  # the place of the last, as in the former CLIPTokenizerFast
        else:
            chars.extend((lower, span) for lower in char.lower())
    return "".join(char for char, _ in chars), [span for _, span in chars]


def _clean_basic(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Control and format characters away, Chinese characters apart, NFC, lower case.

    Source: BasicTokenizer(strip_accents=False, do_split_on_punc=False), what the former CLIPTokenizer did without ftfy.
    """
    kept: list[tuple[str, tuple[int, int]]] = []
    for i, char in enumerate(text):
        span = (i, i + 1)
        category = unicodedata.category(char)
        if char in "\t\n\r" or category == "Zs":
            kept.append((" ", span))
        elif char == "\ufffd" or category[0] == "C":
            continue
        elif _is_chinese(ord(char)):
            kept.extend(((" ", span), (char, span), (" ", span)))
        else:
            kept.append((char, span))
    composed = _nfc(kept)
    lower = "".join(char for char, _ in composed).lower()
    spans = [span for char, span in composed for _ in char.lower()]  # sigma apart, lower case has no context
    return lower, spans


def _is_chinese(code: int) -> bool:
    return (
        0x4E00 <= code <= 0x9FFF
        or 0x3400 <= code <= 0x4DBF
        or 0x20000 <= code <= 0x2A6DF
        or 0x2A700 <= code <= 0x2CEAF
        or 0xF900 <= code <= 0xFAFF
        or 0x2F800 <= code <= 0x2FA1F
    )


def _nfc(chars: list[tuple[str, tuple[int, int]]]) -> list[tuple[str, tuple[int, int]]]:
    """Composes characters (NFC) and keeps their places.

    A composed character has the place of its base: offsets leave combining marks out. Source: measured on the former
    CLIPTokenizerFast.
    """
    text = "".join(char for char, _ in chars)
    if unicodedata.is_normalized("NFC", text):
        return chars
    # Each decomposed character with how many characters it adds to the text: 0 for the first of a character, else 1.
    parts: list[tuple[str, int]] = []
    for char, _ in chars:
        parts.extend((part, int(i > 0)) for i, part in enumerate(unicodedata.normalize("NFD", char)))
    parts = _reorder(parts)
    composed: list[tuple[str, int]] = []
    base = -1  # index in composed of the last starter
    last_class = 0
    for part, added in parts:
        order = unicodedata.combining(part)
        blocked = base < 0 or (base < len(composed) - 1 and last_class >= order)
        joined = "" if blocked else unicodedata.normalize("NFC", composed[base][0] + part)
        if len(joined) == 1:
            composed[base] = (joined, composed[base][1] + added - 1)
            continue
        composed.append((part, added))
        last_class = order
        if order == 0:
            base = len(composed) - 1
    result: list[tuple[str, tuple[int, int]]] = []
    at = 0
    for char, added in composed:
        if added > 0:
            result.append((char, chars[max(at - 1, 0)][1]))
        else:
            result.append((char, chars[at][1]))
            at += 1 - added
    return result


def _reorder(parts: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Puts combining marks into canonical order."""
    result: list[tuple[str, int]] = []
    run: list[tuple[str, int]] = []
    for part in parts:
        if unicodedata.combining(part[0]):
            run.append(part)
            continue
        result.extend(sorted(run, key=lambda item: unicodedata.combining(item[0])))
        run = []
        result.append(part)
    return result + sorted(run, key=lambda item: unicodedata.combining(item[0]))


@lru_cache(maxsize=1)
def _ftfy(cleaning: str) -> Callable[[str], str]:
    try:
        import ftfy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"text_cleaning={cleaning!r} needs ftfy, which cannot be imported ({error}). Install it: pip install ftfy"
        ) from error
    return ftfy.fix_text
