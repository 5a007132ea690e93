"""What is done to a text before it is cut into words: Unicode forms, white space, lower case, repaired encodings."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable
from functools import partial

from clipmb.common.errors import one_of

CLEANINGS = ("nfc", "basic", "ftfy", "openai")
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space
_NOT_SPACE = re.compile(f"[^{SPACE}]+")
_NOT_BASIC_SPACE = re.compile(r"[^\t\n\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
# str.split() also cuts at these, which the rules take for characters ("nfc") or remove ("basic").
_ODD_SEPARATORS = {"nfc": "\x1c\x1d\x1e\x1f", "basic": "\x0b\x0c\x1c\x1d\x1e\x1f\x85"}
_CHUNK = {"nfc": _NOT_SPACE, "basic": _NOT_BASIC_SPACE}

Spans = list[tuple[int, int]] | None  # the place of each cleaned character; None where cleaning moved none
_Placed = list[tuple[str, tuple[int, int]]]  # characters, each with its start and end in the text


def cleaner(cleaning: str, *, spaced: bool) -> Callable[[str], tuple[str, Spans]]:
    """Returns the function that cleans a text.

    Args:
        cleaning: One of CLEANINGS.
        spaced: White space is normalised too. Words don't need it, added tokens with spaces in them do.

    Returns:
        A function from a text to the cleaned text and, where they differ, the place in the text of each of its
        characters. "ftfy" and "openai" don't know the places.

    Raises:
        ValueError: The cleaning is none of CLEANINGS.
        ImportError: The cleaning needs ftfy, which is not installed.
    """
    if cleaning not in CLEANINGS:
        raise one_of("text_cleaning", cleaning, CLEANINGS)
    if cleaning == "nfc":
        return partial(_nfc_or_shortcut, spaced=spaced)
    if cleaning == "basic":
        return _basic_or_shortcut
    return partial(_clean_ftfy, _ftfy(cleaning), unescape=cleaning == "openai")


def chunker(cleaning: str, text: str) -> Callable[[str], list[str]]:
    """Returns the function that cuts texts at what "nfc" or "basic" take for white space.

    Args:
        cleaning: "nfc" or "basic".
        text: All the texts in one, to see whether ``str.split``, the fastest, cuts them right.
    """
    if any(separator in text for separator in _ODD_SEPARATORS[cleaning]):
        return _CHUNK[cleaning].findall
    return str.split


def lower(text: str) -> str:
    """Lower case, character by character: str.lower() alone knows a second small sigma at the end of words."""
    return text.replace("Σ", "σ").lower()


def normalized_content(content: str) -> str:
    """Returns the text of an added token as it stands in texts that "nfc" cleaned."""
    return re.sub(f"[{SPACE}]+", " ", lower(unicodedata.normalize("NFC", content)))


def _nfc_or_shortcut(text: str, *, spaced: bool) -> tuple[str, Spans]:
    if text.isascii() and not spaced:
        return text.lower(), None
    lowered = lower(text)
    if len(lowered) == len(text) and not spaced and unicodedata.is_normalized("NFC", text):
        return lowered, None
    return _clean_nfc(text)


def _basic_or_shortcut(text: str) -> tuple[str, Spans]:
    return (text.lower(), None) if text.isascii() and text.isprintable() else _clean_basic(text)


def _clean_ftfy(fix_text: Callable[[str], str], text: str, *, unescape: bool) -> tuple[str, Spans]:
    """Repaired encodings, white space to single spaces, lower case.

    Source: CLIPTokenizer of transformers 4 where ftfy is installed; with ``unescape``, OpenAI's own code.
    """
    text = fix_text(text)
    if unescape:
        text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", text).strip().lower(), None


def _clean_nfc(text: str) -> tuple[str, list[tuple[int, int]]]:
    """NFC, whitespace to single spaces, lower case.

    Source: the normalizer of transformers 4's CLIPTokenizerFast, Sequence[NFC, Replace whitespace, Lowercase].
    """
    chars: _Placed = []
    for char, span in _nfc([(char, (i, i + 1)) for i, char in enumerate(text)]):
        if not _NOT_SPACE.match(char):
            if not chars or chars[-1][0] != " ":
                chars.append((" ", span))
            else:
                chars[-1] = (" ", span)  # the place of the last, as in transformers 4's CLIPTokenizerFast
        else:
            chars.extend((lowered, span) for lowered in char.lower())
    return "".join(char for char, _ in chars), [span for _, span in chars]


def _clean_basic(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Control and format characters away, Chinese characters apart, NFC, lower case.

    Source: BasicTokenizer(strip_accents=False, do_split_on_punc=False), which transformers 4's CLIPTokenizer uses
    without ftfy.
    """
    kept: _Placed = []
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
    lowered = "".join(char for char, _ in composed).lower()
    spans = [span for char, span in composed for _ in char.lower()]  # sigma apart, lower case has no context
    return lowered, spans


def _is_chinese(code: int) -> bool:
    return (
        0x4E00 <= code <= 0x9FFF
        or 0x3400 <= code <= 0x4DBF
        or 0x20000 <= code <= 0x2A6DF
        or 0x2A700 <= code <= 0x2CEAF
        or 0xF900 <= code <= 0xFAFF
        or 0x2F800 <= code <= 0x2FA1F
    )


def _nfc(chars: _Placed) -> _Placed:
    """Composes characters (NFC) and keeps their places.

    A composed character has the place of its base: offsets leave combining marks out. Source: measured on
    transformers 4's CLIPTokenizerFast.
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
    result: _Placed = []
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


def _ftfy(cleaning: str) -> Callable[[str], str]:
    try:
        import ftfy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"text_cleaning={cleaning!r} needs ftfy, which cannot be imported ({error}). Install it: pip install ftfy"
        ) from error
    return ftfy.fix_text
