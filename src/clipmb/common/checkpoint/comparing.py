"""Whether the result of a conversion holds the source's values: to the bit, or to the bit of their rounding."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from clipmb.common.checkpoint.fitting import canonical_names
from clipmb.common.checkpoint.planning import Conversion
from clipmb.common.checkpoint.tensors import Lazy, Loaded, lazy, rounded
from clipmb.common.dtypes import numpy_dtype
from clipmb.common.errors import CheckpointError
from clipmb.common.progress import Advance

_CHUNK = 1 << 20  # values compared at a time: what is rounded for it stays in the processor's cache


def compare(written: Loaded, originals: Mapping[str, Lazy], plan: Conversion, advance: Advance) -> float:
    """Compares every tensor of a result that was read back.

    Args:
        written: The result, which nobody else uses.
        originals: Canonical name to array of the source.
        plan: What was to be done.
        advance: Called after each tensor.

    Returns:
        The largest relative difference to the source, max|a - b| / max|b| of one tensor; 0 unless the dtype changed.

    Raises:
        CheckpointError: A tensor differs from the source's, rounded to the dtype asked for, or does not fit that dtype.
    """
    if written.format != plan.target_format:
        raise CheckpointError(f"The result is read as {written.format}, expected {plan.target_format}.")
    tensors = lazy(written.tensors, own=True)
    names = canonical_names(tensors, plan.head)
    problems = [f"missing: {entry.canonical}" for entry in plan.mapping if entry.canonical not in names]
    worst = 0.0
    for entry in [] if problems else plan.mapping:
        got, original = tensors[names[entry.canonical]], originals[entry.canonical]
        difference, problem = _difference(got.make(), original.make(), numpy_dtype(entry.dtype))
        worst = max(worst, difference)
        if problem:
            problems.append(f"{entry.canonical} {problem}")
        got.release()
        original.release()
        advance()
    if problems:
        raise CheckpointError("The converted weights differ from the source; nothing was changed. Problems:", problems)
    return worst


def _difference(got: np.ndarray, original: np.ndarray, dtype: np.dtype) -> tuple[float, str]:
    """Compares one tensor in chunks: its relative difference to the original, and what is wrong with it."""
    if got.shape not in (original.shape, original.shape or (1,)):  # some formats have no scalars
        return np.inf, f"has shape {got.shape}, expected {original.shape}"
    flat = [np.ascontiguousarray(array).reshape(-1) for array in (got, original)]
    gap = scale = 0.0
    for start in range(0, original.size, _CHUNK):
        mine, exact = (array[start : start + _CHUNK] for array in flat)
        mine, expected = rounded(mine, dtype), rounded(exact, dtype)  # without bfloat16 a format holds float32
        bits = f"u{dtype.itemsize}"
        if not np.array_equal(mine.view(bits), expected.view(bits)):
            return np.inf, "has other values than the source"
        if dtype != exact.dtype:
            # The difference of a number and its rounding is exact in the wider of their dtypes.
            wide = np.float64 if np.float64 in (exact.dtype, dtype) else np.float32
            before, after = exact.astype(wide, copy=False), expected.astype(wide, copy=False)
            if not np.isfinite(after).all():
                finite = np.isfinite(before)
                before, after = before[finite], after[finite]
                if not np.isfinite(after).all():
                    return np.inf, f"has values too large for {dtype}, for example {np.abs(before).max():.3g}"
            gap = max(gap, float(np.abs(after - before).max(initial=0.0)))
            scale = max(scale, float(np.abs(before).max(initial=0.0)))
    return gap / scale if scale else 0.0, ""
