"""The checks of inputs on plain arrays; tests/equivalence passes the same bad inputs to the models."""

from __future__ import annotations

import numpy as np
import pytest
from cases import CONFIGS

from clipmb.common.checks import check_ids, check_pixels

VISION = CONFIGS["plain"].vision_config  # 20 pixels, patches of 4


@pytest.mark.parametrize(
    ("shape", "interpolate", "message"),
    [
        ((1, 3, 0, 20), False, r"\(0\*20\) doesn't match model \(20\*20\)"),
        ((1, 3, 20, 0), False, r"\(20\*0\) doesn't match model"),
        ((1, 3, 0, 20), True, r"at least one patch of 4\*4"),
        ((1, 3, 20, 3), True, r"at least one patch of 4\*4"),
        ((1, 20, 20, 3), True, "Put the channels first"),
        ((3, 20, 20), True, r"must have the shape \(batch, 3, height, width\).*Received: \(3, 20, 20\)"),
    ],
)
def test_pixels_that_do_not_fit(shape, interpolate, message):
    with pytest.raises(ValueError, match=message):
        check_pixels(np.zeros(shape), VISION, interpolate)


def test_pixels_that_fit():
    for shape, interpolate in (((0, 3, 20, 20), False), ((2, 3, 4, 31), True)):
        pixels = np.zeros(shape)
        assert check_pixels(pixels, VISION, interpolate) is pixels


def test_ids():
    check_ids(np.array([[0, 98]]), 99, "input_ids")
    check_ids(np.zeros((0, 3), np.int32), 99, "input_ids")
    for ids in ([-1, 3], [3, 99]):
        with pytest.raises(ValueError, match=rf"must lie in \[0, 99\).*values from {min(ids)} to {max(ids)}"):
            check_ids(np.array(ids), 99, "input_ids")
    with pytest.raises(TypeError, match=r"position_ids must be integers\. Received: float64"):
        check_ids(np.array([0.0]), 99, "position_ids")
