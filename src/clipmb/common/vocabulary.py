"""New rows of a table of embeddings."""

from __future__ import annotations

import numpy as np


def rows_around_mean(table: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draws rows like the mean of a table: normal, with a billionth of the table's covariance.

    Args:
        table: (rows, width), of any dtype.
        count: How many to draw.
        seed: Random seed.

    Returns:
        (count, width) in float64.

    Source: J. Hewitt, Initializing New Word Embeddings for Pretrained Language Models, 2021, as in
    ``resize_token_embeddings(mean_resizing=True)`` of transformers 4.57.6.
    """
    table = table.astype(np.float64)
    covariance = np.cov(table, rowvar=False, bias=True).reshape(table.shape[1], table.shape[1])
    draw = np.random.default_rng(seed).multivariate_normal
    return draw(table.mean(axis=0), 1e-9 * covariance, count, check_valid="ignore", method="eigh")
