"""A corpus that tokenizers disagree about: seeded, at least 20,000 strings, the same on every machine."""

from __future__ import annotations

import random
import sys
import unicodedata
from collections import defaultdict

SEED = 20_240_613
# The oracle, Python and regex each have Unicode tables of their own year. What Unicode 3.2 has is the same in all of
# them, and so are these scripts and symbols of Unicode 4 to 9: Nko, Balinese, Lepcha, Glagolitic, Coptic, Tifinagh,
# Lisu, Vai, Phags-pa, Javanese, Cherokee, Linear B, Phaistos, Osage, Brahmi, cuneiform, hieroglyphs, Adlam,
# emoji, Chinese.
_NEWER = (
    (0x07C0, 0x07FA), (0x1B00, 0x1B4B), (0x1C00, 0x1C37), (0x2C00, 0x2C2E), (0x2C80, 0x2CF3), (0x2D30, 0x2D67),
    (0xA4D0, 0xA4FF), (0xA500, 0xA62B), (0xA840, 0xA877), (0xA980, 0xA9CD), (0xAB70, 0xABBF), (0x10000, 0x1005D),
    (0x101D0, 0x101FD), (0x104B0, 0x104FB), (0x11000, 0x1104D), (0x12000, 0x12399), (0x13000, 0x1342E),
    (0x1E900, 0x1E943), (0x1F300, 0x1F64F), (0x1F680, 0x1F6D2), (0x1F910, 0x1F91E), (0x2A700, 0x2B734),
    (0x2B820, 0x2CEA1),
)  # fmt: skip


def _certain(code: int) -> bool:
    known = unicodedata.ucd_3_2_0.category(chr(code)) not in ("Cn", "Cs", "Co")
    return known or (any(first <= code <= last for first, last in _NEWER) and unicodedata.category(chr(code)) != "Cn")


WORDS = [
    "a",
    "photo",
    "of",
    "the",
    "cat",
    "dog",
    "sitting",
    "on",
    "red",
    "wooden",
    "bench",
    "near",
    "lake",
    "sunset",
    "café",
    "naïve",
    "résumé",
    "über",
    "straße",
    "façade",
    "don't",
    "it's",
    "we're",
    "I've",
    "I'll",
    "she'd",
    "I'm",
    "o'clock",
    "rock'n'roll",
    "NASA",
    "iPhone",
    "WiFi",
    "COVID-19",
    "e-mail",
    "state-of-the-art",
    "3.14",
    "1,000,000",
    "$5",
    "50%",
    "#hashtag",
    "@user",
    "http://example.com/a?b=c&d=e",
    "user@example.org",
    "C++",
    "#1",
    "A/B",
    "hello...",
    "wow!!!",
    "?!?!",
    "(parentheses)",
    "[brackets]",
    "{braces}",
    "<tag>",
    "</w>",
    "<w>",
    "under_score",
    "__init__",
    "snake_case",
    "camelCase",
    "ALLCAPS",
    "MiXeD",
    "x²",
    "H₂O",
    "½",
    "Ⅷ",
    "①",
    "ﬁ",
    "ﬂ",
    "ŉ",
]
SPECIAL = (
    "<|startoftext|>", "<|endoftext|>", "<|EndOfText|>", "<|STARTOFTEXT|>", "<|endoftext", "endoftext|>", "<|", "|>",
    "<|endoftext|><|endoftext|>", "<|end oftext|>", "<|pad|>",
)  # fmt: skip
ENTITIES = ("&amp;", "&lt;b&gt;", "&#39;", "&quot;x&quot;", "&nbsp;", "&amp;amp;", "&eacute;", "&#x1F600;")
MOJIBAKE = ("donâ€™t", "cafÃ©", "â€œquotedâ€\x9d", "ÃƒÂ©", "don’t", "“curly”", "ＦＵＬＬ　ＷＩＤＴＨ", "…", "—", "–")
EMOJI = (
    "😀", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "🇺🇸🇫🇷", "1️⃣", "❤️", "☃︎", "🧑🏿‍🚀", "✌🏻", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "😀😀😀", "a😀b",
)  # fmt: skip
CONTRACTIONS = (
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    "'S",
    "'RE",
    "'Ve",
    "''s",
    "'sa",
    "x's's",
    "'",
    "'''",
    "'lll",
)
SPACES = (" ", "  ", "\t", "\n", "\r\n", "\x0b", "\x0c", "\u00a0", "\u2003", "\u2028", "\u2029", "\u3000", "\u1680")
CONTROLS = (
    "\x00",
    "\x01",
    "\x1b",
    "\x1c",
    "\x1d",
    "\x1e",
    "\x1f",
    "\x7f",
    "\x85",
    "\u200b",
    "\u200e",
    "\u00ad",
    "\ufeff",
    "\ufffd",
)
MARKS = (
    "\u0300",
    "\u0301",
    "\u0302",
    "\u0303",
    "\u0308",
    "\u0323",
    "\u0327",
    "\u0345",
    "\u0338",
    "\u3099",
    "\u05b0",
    "\u0651",
)
CASES = (
    "ΟΔΟΣ", "Σ", "ΣΑΣ Σ", "İstanbul", "ıI", "ſ", "'ſ", "K", "Å", "ẞ", "ǅ", "Ǆ", "ΐ", "ᾼ", "Ω",
    "\u212bngstro\u0308m", "\u1e9b\u0323",
    "\u0344", "\u0958", "\uac00\u11a8", "\u1100\u1161\u11a8", "\ufb1d", "\u2126",
    "\u0387", "\U0001d15e", "\u2adc", "\u0f73",
)  # fmt: skip


def _by_script() -> dict[str, list[str]]:
    """Every certain character, by the first word of its name, which is its script or kind."""
    scripts: dict[str, list[str]] = defaultdict(list)
    for code in range(sys.maxunicode + 1):
        if _certain(code):
            name = unicodedata.name(chr(code), "CONTROL")
            scripts[name.split()[0].split("-")[0]].append(chr(code))
    return scripts


def strings() -> list[str]:
    """Returns the corpus."""
    draw = random.Random(SEED)
    scripts = _by_script()
    names = sorted(scripts)
    every = [*WORDS, *SPECIAL, *ENTITIES, *MOJIBAKE, *EMOJI, *CONTRACTIONS, *SPACES, *CONTROLS, *MARKS, *CASES]
    found = [
        "",
        *every,
        *(f"x{part}y" for part in every),
        *(f" {part} {part.upper()}{part.title()} " for part in every),
    ]
    for name in names:  # every script: single characters, and runs of them
        chars = scripts[name]
        found.extend(draw.sample(chars, min(len(chars), 6)))
        found.extend("".join(draw.choices(chars, k=draw.randint(2, 12))) for _ in range(4))
    while len(found) < 14_000:  # captions
        found.append(" ".join(draw.choices(WORDS, k=draw.randint(1, 14))))
    while len(found) < 21_000:  # everything beside everything
        parts: list[str] = []
        for _ in range(draw.randint(1, 10)):
            kind = draw.randrange(9)
            pool = (WORDS, SPECIAL, ENTITIES, MOJIBAKE, EMOJI, CONTRACTIONS, CONTROLS, CASES, ())[kind]
            parts.append(
                draw.choice(pool) if pool else "".join(draw.choices(scripts[draw.choice(names)], k=draw.randint(1, 5)))
            )
            if draw.random() < 0.3:
                parts.append("".join(draw.choices(MARKS, k=draw.randint(1, 3))))
            if draw.random() < 0.6:
                parts.append(draw.choice(SPACES))
        found.append("".join(parts))
    found += ["".join(draw.choices("abcdefghij", k=n)) for n in (63, 64, 65, 100, 1000, 5000)]  # long words
    found += ["a" * 3000, "!" * 700, "é" * 500, "日本" * 300, "9" * 200, "ha" * 999, "\u0301" * 50, " " * 300]
    return found
