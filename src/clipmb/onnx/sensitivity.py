"""Which products lose the most when their weights have 8 bits, and what stays in float so that little is lost."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from clipmb.onnx.engine import ONNXModel


def ranked(model: ONNXModel, tower: str, names: Collection[str], batch: Mapping[str, Any]) -> list[tuple[float, str]]:
    """Quantises each product alone, and measures what the embeddings of a tower lose.

    Args:
        model: Config and weights.
        tower: "image" or "text".
        names: Canonical names of the weights of the tower that can be quantised.
        batch: The inputs, and under the name of the tower its right embeddings, (batch, proj).

    Returns:
        (1 - the smallest cosine of a row, name), the largest first; by name where they are equal.
    """
    found = [(1 - _cosine(model, tower, frozenset(names) - {name}, batch), name) for name in names]
    return sorted(found, key=lambda entry: (-entry[0], entry[1]))


def fewest(
    model: ONNXModel, tower: str, names: Collection[str], batches: list[Mapping[str, Any]], min_cosine: float
) -> list[str]:
    """Chooses the products that stay in float: the fewest of those that lose the most with which a cosine is reached.

    Args:
        model: As in `ranked`.
        tower: As in `ranked`.
        names: As in `ranked`.
        batches: As in `ranked`, each; the first of them ranks the products, and all of them have to reach the cosine.
        min_cosine: Of every row.
    """
    keep: list[str] = []
    order: list[str] | None = None
    while min(_cosine(model, tower, keep, batch) for batch in batches) < min_cosine and len(keep) < len(names):
        order = order or [name for _, name in ranked(model, tower, names, batches[0])]
        keep = order[: len(keep) + 1]
    return keep


def _cosine(model: ONNXModel, tower: str, keep: Collection[str], batch: Mapping[str, Any]) -> float:
    """Returns the smallest cosine of a row where all products but some are quantised; -1 where it is not finite."""
    inputs = {name: array for name, array in batch.items() if name in _INPUTS[tower]}
    found = ONNXModel(model.config, model.arrays, quantised=True, keep=keep).run(tower, inputs)[f"{tower}_embeds"]
    found, right = found.astype(np.float64), batch[tower].astype(np.float64)
    with np.errstate(all="ignore"):
        cosines = (found * right).sum(1) / (np.linalg.norm(found, axis=1) * np.linalg.norm(right, axis=1))
    return float(np.nan_to_num(cosines, nan=-1).min())


_INPUTS = {"image": ("pixel_values",), "text": ("input_ids", "attention_mask")}
