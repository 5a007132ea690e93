"""Between numpy and jax, with bfloat16."""

from __future__ import annotations

import mmap
from typing import Any

import jax
import ml_dtypes
import numpy as np

_CHUNK = 2**25  # bytes that are copied before their file's pages are given back


def from_numpy(arrays: Any) -> Any:
    """Puts a tree of arrays of any layout on the default device.

    The pages of mapped files are given back on the way, so that a file and its copy are never in memory together.
    Arrays of float64 become float32 unless ``jax_enable_x64`` is on, as everywhere in JAX.
    """
    leaves, structure = jax.tree.flatten(arrays)
    placed: list[jax.Array] = []
    while len(placed) < len(leaves):
        start, size = len(placed), 0
        end = start
        while end < len(leaves) and size < _CHUNK:
            size += leaves[end].nbytes
            end += 1
        placed += jax.block_until_ready(jax.device_put(leaves[start:end]))
        for mapping in {id(found): found for leaf in leaves[start:end] if (found := _mapping(leaf))}.values():
            mapping.madvise(mmap.MADV_DONTNEED)
    return jax.tree.unflatten(structure, placed)


def _mapping(array: np.ndarray) -> mmap.mmap | None:
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    return owner if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") else None


def to_numpy(array: Any) -> np.ndarray:
    """Returns an array, or a tensor of another framework, as numpy, gathered from all its devices."""
    if hasattr(array, "detach"):  # PyTorch's, which numpy cannot take with gradients or in bfloat16
        array = array.detach().cpu()
        if str(array.dtype) == "torch.bfloat16":
            return array.float().numpy().astype(ml_dtypes.bfloat16)
    return np.asarray(array)
