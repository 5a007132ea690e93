"""Between numpy and torch, without a copy where that is possible, with bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from clipmb.common.checkpoint.tensors import Lazy
from clipmb.common.dtypes import BFLOAT16, numpy_dtype
from clipmb.common.outputs import ModelOutput


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """Wraps an array; only layouts that torch cannot share are copied."""
    if array.dtype == BFLOAT16:
        return from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if not array.flags.writeable or any(step < 0 for step in array.strides):
        array = array.copy()
    return torch.from_numpy(array)


def lazy_numpy(tensor: torch.Tensor) -> Lazy:
    """Returns a tensor as an array that is copied from its device when it is asked for."""
    return Lazy(tuple(tensor.shape), numpy_dtype(str(tensor.dtype).removeprefix("torch.")), lambda: to_numpy(tensor))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Shares the memory of a tensor on the CPU; tensors elsewhere are copied."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def register_output(kind: type[ModelOutput]) -> None:
    """Lets PyTorch look inside outputs of a type for tensors, as torch.export and torch.func do."""

    def flatten(output: Any) -> tuple[list[Any], list[str]]:
        return list(output.values()), list(output)

    def flatten_with_keys(output: Any) -> tuple[list[tuple[Any, Any]], list[str]]:
        return [(pytree.MappingKey(key), value) for key, value in output.items()], list(output)

    def unflatten(values: Any, keys: Any) -> Any:
        return kind(zip(keys, values, strict=True))

    name = f"clipmb.{kind.__name__}"
    pytree.register_pytree_node(
        kind, flatten, unflatten, flatten_with_keys_fn=flatten_with_keys, serialized_type_name=name
    )
