"""Tokens depend on nothing installed: the same numbers on every Python, measured once from the reference.

tests/reference/test_unicode.py holds the same numbers to the reference itself.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable

import pytest
import unicode_cases as cases
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmb import CLIPTokenizer, CLIPTokenizerFast
from clipmb.common.text import unicode

OLD = st.characters(codec="utf-8").filter(lambda char: unicodedata.ucd_3_2_0.category(char) not in ("Cn", "Co", "Cs"))
GREEK = st.text(st.sampled_from("ΣσςΑα'.\u0301\u00ad \u02b0\u0345İẞa1"), max_size=12)


def digest(kind: type, batches: Iterable[list[str]]) -> str:
    tokenizer = kind()
    return cases.digest(cases.rows(tokenizer, texts) for texts in batches)


@pytest.mark.parametrize("kind", [CLIPTokenizer, CLIPTokenizerFast])
def test_some_characters_in_every_context(kind):
    assert digest(kind, cases.in_contexts(cases.some_codes())) == cases.SOME[kind.__name__]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [CLIPTokenizer, CLIPTokenizerFast])
def test_every_character_in_every_context(kind):
    assert digest(kind, cases.in_contexts(cases.every_code())) == cases.EVERY[kind.__name__]


@pytest.mark.parametrize("kind", [CLIPTokenizer, CLIPTokenizerFast])
def test_marks_that_newer_tables_would_move(kind):
    assert digest(kind, [cases.with_newer_marks(40_000)]) == cases.MARKS[kind.__name__]


@settings(max_examples=300, deadline=None)
@given(st.text(OLD, max_size=20))
def test_old_characters_are_as_every_python_has_them(text):
    assert unicode.nfc(text) == unicodedata.normalize("NFC", text)
    assert unicode.lower(text) == "".join(char.lower() for char in text)
    assert unicode.lower_words(text) == text.lower()


@settings(max_examples=300, deadline=None)
@given(GREEK)
def test_the_sigma_at_the_end_of_a_word(text):
    assert unicode.lower_words(text) == text.lower()


@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("markers", [True, False])
def test_every_character_is_a_word_or_white_space(markers, ascii):
    """Except the mark that the reference loses where it ignores case."""
    text = "".join(map(chr, range(128 if ascii else sys.maxunicode + 1)))
    lost = set(text) - set("".join(unicode.words(markers, ascii).findall(text)))
    assert lost - unicode.characters("spaces") == ({"\u0345"} if markers and not ascii else set())


def test_ascii_alone_gives_the_same_words():
    text = "".join(map(chr, range(128))) + "It's 12 O'CLOCK, I'LL <|EndOfText|> don't!! 'sa a's"
    for markers in (True, False):
        assert unicode.words(markers, True).findall(text) == unicode.words(markers, False).findall(text)
