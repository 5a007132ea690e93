"""What `register` says without the programs; `tests/clients` runs it with them."""

from __future__ import annotations

import sys

import pytest

import clipmb


def test_an_unknown_program_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"program must be one of 'diffusers'\. Received: 'difusers'"):
        clipmb.register("difusers")  # pyright: ignore[reportArgumentType]


def test_a_program_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="pip install -U diffusers transformers"):
        clipmb.register("diffusers")
