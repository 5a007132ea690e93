"""The size of a resized table of embeddings, its new rows, and the error of models without one."""

from __future__ import annotations

import numpy as np

from clipmb.common.errors import bad_input, whole_number


def resized(current: int, new_num_tokens: int | None, pad_to_multiple_of: int | None) -> int:
    """Returns the number of tokens that ``resize_token_embeddings`` is asked for.

    Args:
        current: The number of tokens there are.
        new_num_tokens: The new number; None leaves it.
        pad_to_multiple_of: Round it up to a multiple of this.

    Raises:
        ValueError: One of them is not a positive whole number.
    """
    size = whole_number("new_num_tokens", current if new_num_tokens is None else new_num_tokens)
    return size + -size % (1 if pad_to_multiple_of is None else whole_number("pad_to_multiple_of", pad_to_multiple_of))


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


def no_text_tower(model: str) -> Exception:
    """Returns the error of a model, given by the name of its class, that has no token embeddings."""
    return bad_input("Only models with a text tower have token embeddings", model, "Use a model with a text tower")
