"""Makes src/clipmb/data/unicode.json: what the reference tokenizer takes for letters, numbers or white space.

Run it in the environment of `make test` (it needs tokenizers 0.22.2): ``python scripts/make_unicode.py``

The reference mixes three Unicode versions: classes of 16.0 (Oniguruma), lower case of 17.0 (Rust), and NFC of 9.0
(unicode-normalization-alignments). So nothing is taken from Unicode's files: every code point is shown to the
reference's own normalizers, and the answers are written down.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import Regex, normalizers

FILE = Path(__file__).parents[1] / "src/clipmb/data/unicode.json"
VERSION = "0.22.2"
SURROGATES = range(0xD800, 0xE000)  # which the reference cannot be shown
CODES = [code for code in range(0x110000) if code not in SURROGATES]
MARK = 0x345  # a combining mark of class 240, the highest: any mark put behind it has to change places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=FILE, help="The file to write.")
    arguments = parser.parse_args()
    if tokenizers.__version__ != VERSION:
        raise SystemExit(f"The reference is tokenizers {VERSION}. Received: {tokenizers.__version__}.")
    arguments.out.write_text(json.dumps(tables(), separators=(",", ":"), ensure_ascii=True) + "\n", "utf-8")
    print(f"{arguments.out}: {arguments.out.stat().st_size:,} bytes")


def tables() -> dict[str, object]:
    """Returns what the file holds."""
    letters, numbers, spaces = members(r"\p{L}"), members(r"\p{N}"), members(r"\s")
    rest = members(r"[^\s\p{L}\p{N}]")
    require(len(letters) + len(numbers) + len(spaces) + len(rest) == len(CODES), "The word pattern's classes overlap")
    require(letters | numbers | spaces | rest == set(CODES), "The word pattern leaves characters out")
    require(members(r"[\p{L}]+") == letters and members(r"\s+") == spaces, "Repetition changes a class")
    other = members(r"\p{C}") | set(SURROGATES)
    lower_runs, lower_many = lower_case()
    return {
        "source": f"tokenizers {VERSION}, asked for every code point by scripts/make_unicode.py; LICENSE-unicode.txt",
        "unicode": {
            "letters numbers spaces other cased ignorable": "16.0",
            "lower lower_many": "17.0",
            "composing": "9.0",
        },
        "coding": "Ranges: [gap, length - 1, ...], the gap counted from the end of the range before. lower: "
        "[first, last, step, difference], ... composing: what NFC can change or join; every other one stands alone.",
        "letters": ranges(letters),
        "numbers": ranges(numbers),
        "spaces": ranges(spaces),
        "other": ranges(other),
        "cased": ranges(members(r"\p{Cased}")),
        "ignorable": ranges(members(r"\p{Case_Ignorable}")),
        "lower": lower_runs,
        "lower_many": lower_many,
        "composing": ranges(composing()),
    }


def require(holds: bool, message: str) -> None:
    """Ends the script unless a thing holds that the tables rest on."""
    if not holds:
        raise SystemExit(f"{message}: the reference is not what this script knows.")


def members(pattern: str) -> set[int]:
    """Returns the code points that a pattern of one character matches."""
    remove = normalizers.Replace(Regex(pattern), "").normalize_str
    return {code for code in CODES if remove(chr(code)) == ""}


def lower_case() -> tuple[list[list[int]], dict[str, str]]:
    """Returns lower case: runs [first, last, step, difference], and the characters that become several."""
    lower = normalizers.Lowercase().normalize_str
    runs: list[list[int]] = []
    many: dict[str, str] = {}
    for code in CODES:
        text = lower(chr(code))
        require(lower(f"A{chr(code)}B ") == f"a{text}b ", f"Lower case of U+{code:04X} depends on its neighbours")
        if text == chr(code):
            continue
        if len(text) > 1:
            many[str(code)] = text
            continue
        difference = ord(text) - code
        step = code - runs[-1][1] if runs else 0
        if runs and runs[-1][3] == difference and step in (1, 2) and runs[-1][2] in (0, step):
            runs[-1][1:3] = [code, step]
        else:
            runs.append([code, code, 0, difference])
    return [[first, last, step or 1, difference] for first, last, step, difference in runs], many


def composing() -> set[int]:
    """Returns every character that normalisation can change, move, or join with another."""
    decompose = normalizers.NFD().normalize_str
    parts = {code: decompose(chr(code)) for code in CODES}
    whole = {code: text for code, text in parts.items() if text != chr(code)}
    marks = {code for code in CODES if code not in whole and decompose(chr(MARK) + chr(code)) != chr(MARK) + chr(code)}
    jamo = {*range(0x1100, 0x1113), *range(0x1161, 0x1176), *range(0x11A8, 0x11C3)}  # join into Hangul by arithmetic
    return {*whole, *marks, MARK, *jamo} | {ord(char) for text in whole.values() for char in text}


def ranges(codes: Iterable[int]) -> list[int]:
    """Returns the ranges of code points as gaps and lengths, which is half as long as the code points."""
    found: list[list[int]] = []
    for code in sorted(codes):
        if found and found[-1][1] == code - 1:
            found[-1][1] = code
        else:
            found.append([code, code])
    flat = []
    end = 0
    for first, last in found:
        flat += [first - end, last - first]
        end = last
    return flat


if __name__ == "__main__":
    main()
