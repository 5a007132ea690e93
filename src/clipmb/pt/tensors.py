"""Between numpy and torch, without a copy where that is possible, with bfloat16."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """Wraps an array; only layouts that torch cannot share are copied."""
    if array.dtype == ml_dtypes.bfloat16:
        return from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if not array.flags.writeable or any(step < 0 for step in array.strides):
        array = array.copy()
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Shares the memory of a tensor on the CPU; tensors elsewhere are copied."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
