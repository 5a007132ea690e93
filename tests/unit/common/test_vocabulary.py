"""The size of a resized vocabulary, and the distribution of its new rows."""

from __future__ import annotations

import numpy as np
import pytest

from clipmb.common.vocabulary import resized, rows_around_mean


@pytest.mark.parametrize(
    ("asked", "expected"),
    [((None, None), 99), ((105, None), 105), ((105, 8), 112), ((None, 8), 104), ((104, 8), 104), ((np.int64(3), 1), 3)],
)
def test_size(asked, expected):
    assert resized(99, *asked) == expected


@pytest.mark.parametrize("asked", [(0, None), (-1, None), (2.5, None), (True, None), (9, 0), (9, 1.5), ("9", None)])
def test_impossible_sizes(asked):
    with pytest.raises(ValueError, match=r"(new_num_tokens|pad_to_multiple_of) must be a whole number of at least 1"):
        resized(99, *asked)


def test_new_rows_have_the_mean_and_the_covariance_of_the_old_ones():
    generator = np.random.default_rng(0)
    table = generator.standard_normal((500, 4)) @ np.diag([1.0, 2.0, 3.0, 4.0]) + [5, 6, 7, 8]
    rows = rows_around_mean(table.astype(np.float32), 20_000, seed=1)
    assert rows.shape == (20_000, 4)
    deviations = rows - table.mean(axis=0)
    assert np.abs(deviations.mean(axis=0)).max() < 1e-5
    assert np.allclose(np.cov(deviations, rowvar=False), 1e-9 * np.cov(table, rowvar=False), rtol=0.1, atol=1e-9)
    assert np.array_equal(rows, rows_around_mean(table.astype(np.float32), 20_000, seed=1))
