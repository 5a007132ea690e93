"""Names of dtypes, and bfloat16, which numpy has from ml_dtypes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = ("float32", "float16", "bfloat16", "float64")  # what models compute in and checkpoints are saved in


def numpy_dtype(name: str) -> np.dtype:
    """Returns numpy's dtype of this name, bfloat16 included."""
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def dtype_name(value: Any) -> str | None:
    """Returns the plain name of a dtype of any framework: of ``torch.float32``, ``jnp.float32``, ``"float32"`` ….

    None stays None.
    """
    if value is None or isinstance(value, str):
        return value if value is None else value.removeprefix("torch.")
    name = getattr(value, "name", None) or getattr(value, "__name__", None) or str(value)
    return str(name).removeprefix("torch.")
