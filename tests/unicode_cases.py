"""Texts on which installed Unicode tables would show, and what a tokenizer makes of them as one number."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from typing import Any

from clipmb.common.text import unicode

CONTEXTS = ("a{0}b", "{0}1 {0}", "{0}{0}{0}", "'{0}s", "!{0}\u03012")
_CHUNK = 20_000
# Combining marks of Unicode 10 to 16, which the reference's normalisation of Unicode 9 takes for inert.
_NEWER_MARKS = (
    "\u07fd\u0897\u0898\u089f\u08d3\u09fe\u0c3c\u0eba\u1abf\u1ac0\u1ace\u1df6\u1df9\U00010efd\U00010f46\U00010f50"
    "\U0001133b\U00011d42\U00011d97\U0001e08f\U0001e130\U0001e2ec\U0001e4ec"
)
_MARKS = "\u0300\u0301\u0302\u0308\u0323\u0327\u0345\u0338\u3099\u05b0\u0651"
_BASES = "aeiounAEOUwxΣσςıİſé\u1e69\uac00\u1100\u1161\u11a8\u0995日1 !'"


# What `digest` gives. The numbers of CLIPTokenizerFast are the reference's. Those of CLIPTokenizer are ours alone: its
# reference depends on the installed Python and regex.
SOME = {"CLIPTokenizer": "92068d6909d93251", "CLIPTokenizerFast": "96bba6edce525074"}
EVERY = {"CLIPTokenizer": "c22cb0bd50fe5fe1", "CLIPTokenizerFast": "bdd4eb30c90e68be"}
MARKS = {"CLIPTokenizer": "ac0ab20268556a68", "CLIPTokenizerFast": "7551295fba7816ae"}


def every_code() -> list[int]:
    """Every code point but surrogates."""
    return [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]


def some_codes() -> list[int]:
    """The ends of every range of every table and their neighbours, where versions differ, and some others."""
    found = set(range(0, 0x110000, 499)) | set(range(0x250))
    for name in ("letters", "numbers", "spaces", "composing"):
        for first, last in unicode._ranges(name):
            found |= {max(first - 1, 0), first, last, min(last + 1, 0x10FFFF)}
    for first, last, step, _ in unicode._table()["lower"]:
        found |= {first - 1, first, first + step, last, last + 1}
    return sorted(code for code in found if not 0xD800 <= code < 0xE000)


def in_contexts(codes: list[int]) -> Iterator[list[str]]:
    """Yields the texts of every code point in every context, some at a time."""
    for context in CONTEXTS:
        for at in range(0, len(codes), _CHUNK):
            yield [context.format(chr(code)) for code in codes[at : at + _CHUNK]]


def with_newer_marks(count: int) -> list[str]:
    """Texts in which old and newer marks meet."""
    draw = random.Random(20_261_125)
    pools = (_BASES, _MARKS, _NEWER_MARKS)
    return ["".join(draw.choice(draw.choice(pools)) for _ in range(draw.randint(3, 10))) for _ in range(count)]


def rows(tokenizer: Any, texts: list[str]) -> list[list[Any]]:
    """Ids of every text and, where the tokenizer is a fast one, the places of its tokens."""
    if not tokenizer.is_fast:
        return [[ids] for ids in tokenizer(texts)["input_ids"]]
    encoded = tokenizer(texts, return_offsets_mapping=True)
    return [[ids, places] for ids, places in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]


def digest(encoded: Iterable[list[list[Any]]]) -> str:
    """One number for all of what `rows` gives."""
    found = hashlib.sha256()
    for part in encoded:
        found.update(json.dumps(part, separators=(",", ":")).encode())
    return found.hexdigest()[:16]
