"""What the PyTorch models are made of: activations, look-ups and the interpolation of positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clipmb.common import checks


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of softmax and of sums over many numbers: float32 for 16 bits, else the dtype itself."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def quick_gelu(x: Tensor) -> Tensor:
    """Sigmoid approximation of GELU, ``x * sigmoid(1.702 * x)``; (…) to the same, with one temporary tensor less."""
    gate = 1.702 * x
    return x * gate.sigmoid_()


def gelu(x: Tensor) -> Tensor:
    """GELU, ``x`` times the normal distribution function; (…) to the same."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """Approximation of GELU by the hyperbolic tangent; (…) to the same."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_10": lambda x: gelu(x).clamp(-10, 10),
    "gelu_accurate": gelu_tanh,
    "gelu_fast": lambda x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    "gelu_new": gelu_tanh,
    "gelu_python": gelu,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "laplace": lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * 2.0**0.5))),
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


class Uninitialised(TorchFunctionMode):
    """Inside it, drawing initial values does nothing; on the meta device that would import half of the compiler."""

    skipped = frozenset((nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_, Tensor.uniform_, Tensor.fill_))

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return (args or (kwargs.get("tensor"),))[0] if func in self.skipped else func(*args, **kwargs)


def look_up(table: nn.Embedding, ids: Tensor, field: str) -> Tensor:
    """Looks ids up in a table of embeddings.

    Args:
        table: (size, width).
        ids: (batch, seq) integers; those outside the table raise where their values are known.
        field: What they are called in errors.

    Returns:
        (batch, seq, width).

    Raises:
        TypeError: They are not integers.
        ValueError: Some are outside the range.
    """
    if torch.compiler.is_compiling():
        return table(ids)
    checks.check_integers(ids, field)
    try:
        return table(ids if ids.dtype == torch.int else ids.long())
    except IndexError:
        checks.check_ids(ids.numpy(force=True), table.num_embeddings, field)
        raise


def interpolate_positions(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Resizes the grid of position embeddings by bicubic interpolation (a = -0.75, half-pixel centres, no antialias).

    Args:
        positions: (patches + 1, width); the first is that of the class token and stays.
        rows: Patches from top to bottom.
        columns: Patches from left to right.

    Returns:
        (rows * columns + 1, width).
    """
    side = math.isqrt(int(positions.shape[0]) - 1)
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage] - public all the same
    if rows == columns == side and not tracing:  # a trace would never interpolate again
        return positions
    grid = positions[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, width, side, side)
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid.flatten(2)[0].T])
