"""Between numpy and jax, with bfloat16."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from clipmb.common.checkpoint import OwnArrays
from clipmb.common.checkpoint.tensors import Lazy
from clipmb.common.dtypes import BFLOAT16, dtype_name, numpy_dtype
from clipmb.common.outputs import ModelOutput
from clipmb.common.parameters import KINDS, Spec

_CHUNK = 2**25  # bytes that are copied before their file's pages are given back


def from_numpy(arrays: dict[str, np.ndarray], table: list[Spec], widened: bool = False) -> dict[str, jax.Array]:
    """Puts canonical arrays on the default device in linen's layouts, a few at a time.

    Arrays of float64 become float32 unless ``jax_enable_x64`` is on, as everywhere in JAX.

    Args:
        arrays: Canonical name to array; the pages of `OwnArrays` are given back on the way.
        table: The parameters wanted.
        widened: Make those of 16 bits float32.

    Returns:
        Canonical name to array.
    """
    placed: dict[str, jax.Array] = {}
    chunk: list[Spec] = []
    for spec in table:
        chunk.append(spec)
        if spec is not table[-1] and sum(arrays[part.name].nbytes for part in chunk) < _CHUNK:
            continue
        copies = jax.device_put([KINDS[part.kind].to_framework(arrays[part.name]) for part in chunk])
        if widened:
            copies = [copy.astype("float32") if copy.dtype.itemsize == 2 else copy for copy in copies]
        placed.update(zip([part.name for part in chunk], jax.block_until_ready(copies), strict=True))
        if isinstance(arrays, OwnArrays):
            for part in chunk:
                arrays.release(part.name)
        chunk = []
    return placed


def lazy_numpy(array: Any, spec: Spec) -> Lazy:
    """Returns an array as one of numpy in canonical layout that is copied from its device when it is asked for."""
    lazy = Lazy(tuple(np.shape(array)), numpy_dtype(dtype_name(array.dtype) or ""), lambda: to_numpy(array))
    return lazy.viewed(KINDS[spec.kind].to_canonical)


def to_numpy(array: Any) -> np.ndarray:
    """Returns an array, or a tensor of another framework, as numpy, gathered from all its devices."""
    if hasattr(array, "detach"):  # PyTorch's, which numpy cannot take with gradients or in bfloat16
        array = array.detach().cpu()
        if str(array.dtype) == "torch.bfloat16":
            return array.float().numpy().astype(BFLOAT16)
    return np.asarray(array)


def register_output(kind: type[ModelOutput]) -> None:
    """Lets JAX look inside outputs of a type for arrays."""

    def flatten(output: Any) -> tuple[tuple[Any, ...], tuple[str, ...]]:
        return tuple(output.values()), tuple(output)

    def flatten_with_keys(output: Any) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
        return [(jax.tree_util.DictKey(key), value) for key, value in output.items()], tuple(output)

    def unflatten(keys: Any, values: Any) -> Any:
        return kind(zip(keys, values, strict=True))

    jax.tree_util.register_pytree_with_keys(kind, flatten_with_keys, unflatten, flatten)
