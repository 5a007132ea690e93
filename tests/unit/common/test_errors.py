"""The wording of errors, and the checks of numbers, which every module shares."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest

from clipmb.common.errors import (
    CheckpointError,
    MissingBackendError,
    ShapeMismatchError,
    bad_input,
    one_of,
    warn_once,
    whole_number,
)
from clipmb.common.json_files import ContentError
from clipmb.common.text.engine import not_a_text


def test_rule_received_and_fix():
    assert str(bad_input("It must be odd", 4, "Add one")) == "It must be odd. Received: 4. Add one."
    assert str(bad_input("It must be odd", "4 and 6", "Add one", shown=True)).endswith("Received: 4 and 6. Add one.")
    assert type(bad_input("It must be a number", "x", "Pass one", TypeError)) is TypeError
    assert str(one_of("dtype", "int8", ("float32",))) == (
        "dtype must be one of 'float32'. Received: 'int8'. Pass one of these as dtype."
    )


def test_long_values_are_shortened():
    assert len(str(bad_input("It must be short", "x" * 100_000, "Shorten it"))) < 300


@pytest.mark.parametrize("value", [1, np.int64(1), np.uint8(1)])
def test_whole_numbers(value):
    assert whole_number("steps", value) == 1
    assert type(whole_number("steps", value)) is int


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None, np.float32(1), 11])
def test_other_numbers(value):
    with pytest.raises(ValueError, match="steps must be a whole number from 1 to 10"):
        whole_number("steps", value, most=10)


def test_a_warning_comes_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            warn_once("said by test_errors")
    assert [str(warning.message) for warning in caught] == ["said by test_errors"]


@pytest.mark.parametrize(
    "error",
    [
        MissingBackendError("pt", "torch", cause="No module named 'torch'"),
        CheckpointError("It must fit", ["one", "two"]),
        ShapeMismatchError("It must fit", ["one"]),
        ContentError("It must be a number"),
        not_a_text(7),
    ],
)
def test_errors_travel_to_other_processes(error):
    """As those of worker processes and of Ray's actors do."""
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is type(error)
    assert str(other) == str(error)
    assert getattr(other, "problems", None) == getattr(error, "problems", None)
