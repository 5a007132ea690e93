"""Which frameworks are installed, and the engine of each."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from clipmb.common.errors import MissingBackendError, one_of

# In the order in which one is chosen when none is named: what each needs.
BACKENDS = {"pt": ("torch",), "tf": ("tensorflow", "keras"), "flax": ("jax", "flax")}


def installed() -> list[str]:
    """Returns the backends whose packages are installed, without importing them."""
    return [name for name, needs in BACKENDS.items() if all(importlib.util.find_spec(need) for need in needs)]


def engine(backend: str | None) -> Any:
    """Returns the ``Engine`` class of a backend, or of the first installed one.

    Raises:
        MissingBackendError: It is not installed.
        ValueError: There is no such backend.
    """
    if backend is None:
        found = installed()
        if not found:
            raise MissingBackendError("pt", cause="neither PyTorch nor TensorFlow nor Flax is installed")
        backend = found[0]
    if backend not in BACKENDS:
        raise one_of("backend", backend, tuple(BACKENDS))
    return importlib.import_module(f"clipmb.{backend}.engine").Engine
