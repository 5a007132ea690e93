"""An assertion for your own tests: every backend computes the same from your checkpoint.

>>> from clipmb.testing import assert_backends_agree
>>> assert_backends_agree("my-clip", backends=("pt", "flax"))  # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from clipmb.verification import Report, compare


def assert_backends_agree(
    checkpoint: str | os.PathLike[str], backends: Sequence[str] | None = None, dtype: Any = "float32", **options: Any
) -> Report:
    """Raises unless every backend computes the same from a checkpoint, at every stage.

    Args:
        checkpoint: Folder or Hub id of a full CLIP model.
        backends: Which; every installed one when None.
        dtype: "float32", "float64", "bfloat16" or "float16".
        **options: The other arguments of `compare`.

    Returns:
        The report, when they agree.

    Raises:
        AssertionError: They do not; the message names the first stage and tensor that diverges.
    """
    report = compare(checkpoint, backends, dtype=dtype, **options)
    if not report.agrees:
        raise AssertionError(report.explain())
    return report
