"""Reading and writing JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest

from clipmb import CheckpointError
from clipmb.common.json_files import json_text, json_values, read_json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "x.json is not valid JSON"),
        (b"[1]", "must hold a JSON object, but holds list"),
        (b"\xff", "x.json cannot be read"),
        (b"[" * 100_000, "x.json is not valid JSON"),
    ],
)
def test_files_that_are_no_json_objects(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path / "none.json")


def test_text_is_sorted_and_ends_its_line():
    text = json_text({"b": np.float64(1.5), "a": np.arange(2)})
    assert json.loads(text) == {"a": [0, 1], "b": 1.5}
    assert text.index('"a"') < text.index('"b"')
    assert text.endswith("}\n")
    with pytest.raises(TypeError, match="must be JSON values"):
        json_text({"a": object()})


def test_values_have_a_json_form():
    given = {"a": (np.float32(0.5), float("nan")), 1: {"b": np.int64(2), "c": None, "d": float("-inf")}}
    assert json_values(given) == {"a": [0.5, None], "1": {"b": 2, "c": None, "d": None}}
    with pytest.raises(TypeError, match=r"result\.a\[0\] must be a number"):
        json_values({"a": [object()]}, "result")
