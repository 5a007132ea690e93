"""Every character is to us what it is to the fast tokenizer of transformers 4.57.6, and its answers make our tables."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path

import pytest
import transformers
import unicode_cases as cases

import clipmb


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    paths = clipmb.CLIPTokenizer().save_vocabulary(tmp_path_factory.mktemp("official"))
    return transformers.CLIPTokenizerFast(*map(str, paths))


def compared(fast, batches: Iterable[list[str]]) -> Iterator[list]:
    """Yields what the reference gives, when ours is the same; a failure names some of the texts."""
    ours = clipmb.CLIPTokenizerFast()
    for texts in batches:
        expected, got = cases.rows(fast, texts), cases.rows(ours, texts)
        wrong = [text for text, a, b in zip(texts, expected, got, strict=True) if a != b]
        assert not wrong[:5], f"{len(wrong)} differ"
        yield expected


def test_some_characters_in_every_context(fast):
    assert cases.digest(compared(fast, cases.in_contexts(cases.some_codes()))) == cases.SOME["CLIPTokenizerFast"]


@pytest.mark.slow
def test_every_character_in_every_context(fast):
    assert cases.digest(compared(fast, cases.in_contexts(cases.every_code()))) == cases.EVERY["CLIPTokenizerFast"]


def test_marks_that_newer_tables_would_move(fast):
    assert cases.digest(compared(fast, [cases.with_newer_marks(40_000)])) == cases.MARKS["CLIPTokenizerFast"]


@pytest.mark.slow
def test_the_script_makes_the_table_that_is_shipped():
    path = Path(__file__).parents[2] / "scripts/make_unicode.py"
    spec = importlib.util.spec_from_file_location("make_unicode", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    shipped = resources.files("clipmb").joinpath("data", "unicode.json").read_text("utf-8")
    assert json.loads(shipped) == script.tables()
