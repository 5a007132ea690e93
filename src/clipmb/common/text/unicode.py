"""What is a letter, a number, white space, lower case, composed: the reference's Unicode, whatever is installed.

Python, `regex` and the reference each follow Unicode versions of their own, and the reference mixes three. So that the
same text gives the same ids everywhere, nothing here asks the installed Python about a character of which versions
disagree: data/unicode.json has the reference's answers for every code point (made by scripts/make_unicode.py).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256
from importlib import resources
from itertools import pairwise
from typing import Any

from clipmb.common.json_files import parse_json
from clipmb.common.text.vocabulary import CONTRACTIONS, MARKER_PATTERN

_HIGH = "\U00010000-\U0010ffff"
_EMOJI = 0x1F600
_YPOGEGRAMMENI = 0x345  # a mark, but the same as the letter iota where case is ignored


_NAME = "unicode.json"


def _text() -> str:
    return resources.files("clipmb").joinpath("data", _NAME).read_text("utf-8")


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    return parse_json(_text(), _NAME)


def table_digest() -> str:
    """SHA-256 of the table, 64 hexadecimal digits."""
    return sha256(_text().encode()).hexdigest()


def _ranges(name: str) -> Iterator[tuple[int, int]]:
    """Yields first and last code point of each range of a class."""
    last = 0
    flat = iter(_table()[name])
    for gap, more in zip(flat, flat, strict=True):
        first = last + gap
        last = first + more
        yield first, last


@lru_cache
def characters(name: str) -> frozenset[str]:
    """Returns one of the small classes: "spaces", "cased" or "ignorable"."""
    return frozenset(chr(code) for first, last in _ranges(name) for code in range(first, last + 1))


@lru_cache
def matching(name: str) -> re.Pattern[str]:
    """Compiles the pattern of a run of characters of one class.

    Args:
        name: "letters", "numbers", "spaces", "other" (controls, formats, private use, unassigned), "cased",
            "ignorable" (where a sigma looks for its word), "composing" (what NFC can change or join).
    """
    return re.compile(f"[{_inside(name)}]+")


def _inside(*names: str, first: int = 0, last: int = 0x10FFFF) -> str:
    """Returns the inside of a pattern's [] for the classes, between two code points."""
    found = (span for name in names for span in _ranges(name) if span[0] <= last and span[1] >= first)
    return "".join(f"\\U{max(a, first):08x}-\\U{min(b, last):08x}" for a, b in found)


@lru_cache
def words(markers: bool, ascii: bool) -> re.Pattern[str]:
    """Compiles CLIP's word pattern: contractions, runs of letters, single numbers, runs of anything else not space.

    Written for the speed of `re`, which looks up characters below U+10000 in one table, but higher ones range by range.
    So high letters and numbers are asked for only behind a look-ahead, and emoji, which lie in the widest gap between
    such letters and numbers, are recognised by two ranges. The same classes as ranges in `regex` took 13 to 26 times as
    long, in one flat set of `re` 3 times.

    Args:
        markers: With start and end marker. Both and the contractions in any case, as transformers 4's CLIPTokenizer.
        ascii: For texts in ASCII only: it takes no time to compile.
    """
    fixed = f"(?i:{MARKER_PATTERN}|{CONTRACTIONS})" if markers else CONTRACTIONS
    low = {name: _inside(name, last=0x7F if ascii else 0xFFFF) for name in ("letters", "numbers", "spaces")}
    neither = low["spaces"] + low["letters"] + low["numbers"]
    if ascii:
        return re.compile(f"{fixed}|[{low['letters']}]+|[{low['numbers']}]|[^{neither}]+")
    if markers:  # the reference ignores case throughout, and so takes this mark neither for a letter nor for another
        neither += chr(_YPOGEGRAMMENI)
    high = {name: _inside(name, first=0x10000) for name in ("letters", "numbers")}
    spans = sorted(span for name in high for span in _ranges(name) if span[1] >= 0x10000)
    gap = next((left[1], right[0]) for left, right in pairwise(spans) if left[1] < _EMOJI < right[0])
    mixed = f"\U00010000-\\U{gap[0]:08x}\\U{gap[1]:08x}-\U0010ffff"  # where letters, numbers and others alternate
    return re.compile(
        f"{fixed}|(?:[{low['letters']}]+|(?=[{_HIGH}])[{high['letters']}]+)+|[{low['numbers']}]"
        f"|(?:[^{neither}{mixed}]+|(?=[{mixed}])[^{high['letters']}{high['numbers']}\x00-\uffff]+)+"
        f"|(?=[{_HIGH}])[{high['numbers']}]"
    )


@lru_cache(maxsize=1)
def _lower_map() -> dict[int, int | str]:
    runs = _table()["lower"]
    one = {code: code + more for first, last, step, more in runs for code in range(first, last + 1, step)}
    return {**one, **{int(code): text for code, text in _table()["lower_many"].items()}}


def lower(text: str) -> str:
    """Lower case, character by character; U+0130 becomes two."""
    return text.lower() if text.isascii() else text.translate(_lower_map())


def lower_words(text: str) -> str:
    """Lower case as in words: a sigma at the end of one is another than inside.

    Source: Final_Sigma of the Unicode Standard, table 3-17, which ``str.lower`` follows.
    """
    if "Σ" not in text:
        return lower(text)
    cased, ignorable = characters("cased"), characters("ignorable")
    seen = [char for char in text if char not in ignorable]
    sigmas = iter(
        "ς" if before in cased and after not in cased else "σ"
        for before, char, after in zip(["", *seen], seen, [*seen[1:], ""], strict=False)
        if char == "Σ"
    )
    return "".join(next(sigmas) if char == "Σ" else lower(char) for char in text)


def composed(text: str) -> bool:
    """Whether a text surely is in NFC; where newer tables than the reference's object, False for some that are."""
    return unicodedata.is_normalized("NFC", text)  # then every run that the reference knows is


def nfc(text: str) -> str:
    """Unicode's normalization form C, as the reference knows it.

    By Unicode's stability policy every Python agrees about characters of old versions among themselves, so it may
    compose runs of those that the reference knows; others, newer marks too, stay where they are.
    """
    return text if composed(text) else matching("composing").sub(lambda run: unicodedata.normalize("NFC", run[0]), text)


def nfd(char: str) -> str:
    """Returns the characters that a character is composed of."""
    return unicodedata.normalize("NFD", char) if matching("composing").match(char) else char


def combining(char: str) -> int:
    """Returns the canonical combining class of a character."""
    return unicodedata.combining(char) if matching("composing").match(char) else 0
