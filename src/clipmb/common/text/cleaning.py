"""What is done to a text before it is cut into words: Unicode forms, white space, lower case, repaired encodings."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from functools import lru_cache, partial

from clipmb.common.errors import one_of
from clipmb.common.text.unicode import characters, combining, composed, lower, lower_words, matching, nfc, nfd

CLEANINGS = ("nfc", "basic", "ftfy", "openai")
_REMOVED = "\x0b\x0c\x1c\x1d\x1e\x1f\x85"  # str.split() cuts at these; "basic" removes them, as all controls
_ODD_SEPARATORS = {"nfc": "\x1c\x1d\x1e\x1f", "basic": _REMOVED}  # at these str.split() cuts, but the cleaning does not
SPACES = characters("spaces")
_NOT_SPACE = re.compile(f"[^{''.join(sorted(SPACES))}]+")
_NOT_BASIC_SPACE = re.compile(f"[^{''.join(sorted(SPACES - set(_REMOVED)))}]+")
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
        ValueError: The cleaning is not one of CLEANINGS.
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


def normalized_content(content: str) -> str:
    """Returns the text of an added token as it stands in texts that "nfc" cleaned."""
    return matching("spaces").sub(" ", lower(nfc(content)))


def _nfc_or_shortcut(text: str, *, spaced: bool) -> tuple[str, Spans]:
    if text.isascii() and not spaced:
        return text.lower(), None
    lowered = lower(text)
    if len(lowered) == len(text) and not spaced and composed(text):
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
    return lower_words(re.sub(r"\s+", " ", text).strip()), None


def _clean_nfc(text: str) -> tuple[str, list[tuple[int, int]]]:
    """NFC, whitespace to single spaces, lower case.

    Source: the normalizer of transformers 4's CLIPTokenizerFast, Sequence[NFC, Replace whitespace, Lowercase].
    """
    chars: _Placed = []
    for char, span in _nfc([(char, (i, i + 1)) for i, char in enumerate(text)]):
        if char in SPACES:
            if not chars or chars[-1][0] != " ":
                chars.append((" ", span))
            else:
                chars[-1] = (" ", span)  # the place of the last, as in transformers 4's CLIPTokenizerFast
        else:
            chars.extend((lowered, span) for lowered in lower(char))
    return "".join(char for char, _ in chars), [span for _, span in chars]


def _clean_basic(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Control and format characters away, Chinese characters apart, NFC, lower case.

    Source: BasicTokenizer(strip_accents=False, do_split_on_punc=False), which transformers 4's CLIPTokenizer uses
    without ftfy.
    """
    kept = [(part, (i, i + 1)) for i, char in enumerate(text) for part in _basic_form(char)]
    made = _nfc(kept)
    lowered = lower_words("".join(char for char, _ in made))
    spans = [span for char, span in made for _ in lower(char)]  # a sigma is one character, whichever it becomes
    return lowered, spans


@lru_cache(maxsize=1 << 16)
def _basic_form(char: str) -> str:
    """Returns what becomes of a character: nothing, a space, itself, or itself between spaces."""
    if char in "\t\n\r":
        return " "
    if char == "\ufffd" or matching("other").match(char):
        return ""
    if char in SPACES:
        return " "
    return f" {char} " if _is_chinese(ord(char)) else char


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
    if composed(text):  # not nfc(text) == text: Python's normalize is quadratic in the marks of one character
        return chars
    # Each decomposed character with how many characters it adds to the text: 0 for the first of a character, else 1.
    parts: list[tuple[str, int]] = []
    for char, _ in chars:
        parts.extend((part, int(i > 0)) for i, part in enumerate(nfd(char)))
    parts = _reorder(parts)
    made: list[tuple[str, int]] = []
    base = -1  # index in made of the last starter
    last_class = 0
    for part, added in parts:
        order = combining(part)
        blocked = base < 0 or (base < len(made) - 1 and last_class >= order)
        joined = "" if blocked else nfc(made[base][0] + part)
        if len(joined) == 1:
            made[base] = (joined, made[base][1] + added - 1)
            continue
        made.append((part, added))
        last_class = order
        if order == 0:
            base = len(made) - 1
    result: _Placed = []
    at = 0
    for char, added in made:
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
        if combining(part[0]):
            run.append(part)
            continue
        result.extend(sorted(run, key=lambda item: combining(item[0])))
        run = []
        result.append(part)
    return result + sorted(run, key=lambda item: combining(item[0]))


def _ftfy(cleaning: str) -> Callable[[str], str]:
    try:
        import ftfy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"text_cleaning={cleaning!r} needs ftfy, which cannot be imported ({error}). Install it: pip install ftfy"
        ) from error
    return ftfy.fix_text
