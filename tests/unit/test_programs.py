"""What `register` says without the programs; `tests/clients` runs it with them."""

from __future__ import annotations

import sys

import pytest

import clipmb


def test_an_unknown_program_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"program must be one of 'diffusers', 'transformers'\. Received: 'difusers'"):
        clipmb.register("difusers")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("program", "module"), [("diffusers", "diffusers"), ("transformers", "transformers.trainer")])
def test_a_program_that_is_missing_is_named(monkeypatch, program, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install -U {program}"):
        clipmb.register(program)
