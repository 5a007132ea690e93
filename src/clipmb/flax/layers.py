"""What the Flax models are made of: activations, layers, look-ups, interpolation of positions and attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.core import Tracer

from clipmb.common import checks
from clipmb.common.config import BaseConfig, CLIPConfig, CLIPTextConfig
from clipmb.common.parameters import specs


def statistics_dtype(dtype: Any) -> jnp.dtype:
    """Returns the dtype of softmax and of sums over many numbers: float32 for 16 bits, else the dtype itself."""
    return jnp.promote_types(dtype, jnp.float32)


def quick_gelu(x: Array) -> Array:
    """Sigmoid approximation of GELU, ``x * sigmoid(1.702 * x)``; (…) to the same."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """GELU, ``x`` times the normal distribution function; (…) to the same."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Array) -> Array:
    """Approximation of GELU by the hyperbolic tangent; (…) to the same."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_10": lambda x: gelu(x).clip(-10, 10),
    "gelu_accurate": gelu_tanh,
    "gelu_fast": lambda x: 0.5 * x * (1 + jnp.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    "gelu_new": gelu_tanh,
    "gelu_python": gelu,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "laplace": lambda x: 0.5 * (1 + jax.lax.erf((x - 0.707107) / (0.282095 * 2.0**0.5))),
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def initial(config: BaseConfig, name: str) -> Callable[..., Array]:
    """Returns the initialiser of a parameter, given the end of its canonical name: the weight table's distribution."""
    if isinstance(config, CLIPConfig):
        heads = ("CLIPModel", "CLIPForImageClassification")
    else:
        heads = (
            "CLIPTextModelWithProjection" if isinstance(config, CLIPTextConfig) else "CLIPVisionModelWithProjection",
        )

    def draw(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        spec = next(spec for head in heads for spec in specs(config, head) if spec.name.endswith(name))
        return spec.mean + spec.std * jax.random.normal(key, shape, dtype)

    return draw


class Module(nn.Module):
    """A part of a model, which computes in its ``dtype``."""

    config: Any
    dtype: Any = jnp.float32


def linear(owner: Module, name: str, units: int, bias: bool = True) -> nn.Dense:
    """Returns the linear layer that becomes an attribute of its owner, (…, inputs) to (…, units)."""
    kernel_init = initial(owner.config, f"{name}.weight")
    return nn.Dense(units, use_bias=bias, dtype=owner.dtype, kernel_init=kernel_init)


def embedding(owner: Module, name: str, rows: int) -> nn.Embed:
    """Returns the table of (rows, width) that becomes an attribute of its owner."""
    embedding_init = initial(owner.config, f"{name}.weight")
    return nn.Embed(rows, owner.config.hidden_size, owner.dtype, embedding_init=embedding_init)


class LayerNorm(nn.Module):
    """Layer normalisation with PyTorch's arithmetic: two passes over the row, statistics in at least float32."""

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden_states: Array) -> Array:
        """(..., width) to the same."""
        width = hidden_states.shape[-1]
        statistics = statistics_dtype(self.dtype)
        scale = self.param("scale", nn.initializers.ones, (width,)).astype(self.dtype).astype(statistics)
        bias = self.param("bias", nn.initializers.zeros, (width,)).astype(self.dtype).astype(statistics)
        return layer_norm(hidden_states.astype(statistics), scale, bias, self.epsilon).astype(self.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def layer_norm(hidden_states: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """(..., width), (width,) and (width,) to (..., width): ``(x - mean) / sqrt(variance + epsilon) * scale + bias``."""
    return _normalised(hidden_states, epsilon)[0] * scale + bias


@layer_norm.defjvp
def _layer_norm_jvp(epsilon: float, primals: Any, tangents: Any) -> tuple[Array, Array]:
    # Written so that its transpose multiplies by the inverse deviation last. Otherwise XLA's CPU compiler puts the sum
    # of the gradients of all later blocks into each of its users, and a backward pass takes twice as long.
    hidden_states, scale, bias = primals
    normalised, inverse = _normalised(hidden_states, epsilon)
    tangent = tangents[0] * inverse
    tangent = tangent - tangent.mean(-1, keepdims=True) - normalised * (tangent * normalised).mean(-1, keepdims=True)
    return normalised * scale + bias, tangent * scale + normalised * tangents[1] + tangents[2]


def _normalised(hidden_states: Array, epsilon: float) -> tuple[Array, Array]:
    """Returns rows of mean 0 and variance 1, and by what they were multiplied: (..., width) and (..., 1)."""
    mean = hidden_states.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(hidden_states.var(axis=-1, keepdims=True) + epsilon)
    return (hidden_states - mean) * inverse, inverse


def patch_product(pixel_values: Array, kernel: Array, *_: Any, precision: Any, **__: Any) -> Array:
    """The convolution of patches that do not overlap, as one matrix product: faster than XLA's convolution on a CPU.

    Args:
        pixel_values: (batch, height, width, channels); what is left of a patch at the right and bottom is not seen.
        kernel: (patch, patch, channels, width).
        precision: Precision of the product, as in ``jax.lax.dot``.

    Returns:
        (batch, rows, columns, width).
    """
    batch, height, width, channels = pixel_values.shape
    size = kernel.shape[0]
    rows, columns = height // size, width // size
    pixel_values = pixel_values[:, : rows * size, : columns * size]
    patches = pixel_values.reshape(batch, rows, size, columns, size, channels).transpose(0, 1, 3, 2, 4, 5)
    flat = patches.reshape(batch * rows * columns, size * size * channels)
    product = jnp.dot(flat, kernel.reshape(size * size * channels, -1), precision=precision)
    return product.reshape(batch, rows, columns, kernel.shape[-1])


def look_up(table: nn.Embed, ids: Array, field: str) -> Array:
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
    ids = checked_ids(ids, table.num_embeddings, field)
    return jnp.take(table.embedding, ids, axis=0, mode="fill", fill_value=jnp.nan).astype(table.dtype)


def checked_ids(ids: Array, size: int, field: str) -> Array:
    """Returns ids for a table of ``size`` rows; under a transformation those outside of it are at ``size`` or above.

    Raises:
        TypeError: They are not integers.
        ValueError: Some are outside the range, and this is not under a transformation.
    """
    checks.check_integers(ids, field)
    if not isinstance(ids, Tracer):
        checks.check_ids(np.asarray(ids), size, field)  # JAX's operations would be traced, where this is inside a jit
        return jnp.asarray(ids)
    return jnp.where(ids < 0, size, ids)  # JAX would count negative ones from the end


def bicubic_weights(size: int, new_size: int) -> np.ndarray:
    """Returns the (new_size, size) matrix of a bicubic resize as PyTorch does it; `jax.image.resize` has another one.

    Source: Keys, Cubic convolution interpolation for digital image processing (1981), with a = -0.75; taps beyond the
    border repeat the border, as in torch.nn.functional.interpolate(mode="bicubic", align_corners=False).
    """
    a = -0.75
    centres = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    weights = np.zeros((new_size, size))
    for tap in range(-1, 3):
        taps = np.floor(centres) + tap
        x = np.abs(centres - taps)
        inner = ((a + 2) * x - (a + 3)) * x * x + 1
        outer = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        np.add.at(weights, (np.arange(new_size), taps.clip(0, size - 1).astype(int)), np.where(x <= 1, inner, outer))
    return weights


def interpolate_positions(positions: Array, rows: int, columns: int) -> Array:
    """Resizes the grid of position embeddings by bicubic interpolation (a = -0.75, half-pixel centres, no antialias).

    Args:
        positions: (patches + 1, width); the first is that of the class token and stays.
        rows: Patches from top to bottom.
        columns: Patches from left to right.

    Returns:
        (rows * columns + 1, width).
    """
    side = round((positions.shape[0] - 1) ** 0.5)
    if rows == columns == side:
        return positions
    dtype, statistics = positions.dtype, statistics_dtype(positions.dtype)
    grid = positions[1:].reshape(side, side, -1).astype(statistics)  # (side, side, width)
    vertical, horizontal = (jnp.asarray(bicubic_weights(side, size), statistics) for size in (rows, columns))
    grid = jnp.einsum("rs,ct,stw->rcw", vertical, horizontal, grid, precision="highest")
    return jnp.concatenate([positions[:1], grid.reshape(rows * columns, -1).astype(dtype)])


def attention_scores(query: Array, key: Array, **options: Any) -> Array:
    """(batch, seq, heads, head_dim) twice to (batch, heads, seq, seq), on a CPU faster than by einsum."""
    return jnp.matmul(query.transpose(0, 2, 1, 3), key.transpose(0, 2, 3, 1), **options)


def attention_context(weights: Array, value: Array) -> Array:
    """(batch, heads, seq, seq) and (batch, seq, heads, head_dim) to (batch, seq, heads, head_dim)."""
    return jnp.matmul(weights, value.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


@partial(jax.jit, static_argnames="scale")
def fused_attention(query: Array, key: Array, value: Array, bias: Array | None, *, scale: float) -> Array:
    """``jax.nn.dot_product_attention``; on a CPU the same arithmetic in the order of axes that is fast there.

    In float16 it is that arithmetic everywhere: JAX's asks for a product that CPUs lack, so that a program for CPUs and
    others could not be exported.

    Args:
        query: (batch, seq, heads, head_dim).
        key: The same shape.
        value: The same shape.
        bias: (batch or 1, 1, seq, seq), added to the scores.
        scale: Factor of the scores, which are in float32 at least.

    Returns:
        (batch, seq, heads, head_dim).
    """

    def ours(query: Array, key: Array, value: Array, *bias: Array) -> Array:
        statistics = statistics_dtype(query.dtype)
        scores = attention_scores(query, key, preferred_element_type=statistics) * scale
        for part in bias:
            scores = scores + part
        return attention_context(jax.nn.softmax(scores, axis=-1).astype(value.dtype), value)

    operands = (query, key, value) if bias is None else (query, key, value, bias)
    theirs = ours if query.dtype == jnp.float16 else partial(jax.nn.dot_product_attention, scale=scale)
    return jax.lax.platform_dependent(*operands, cpu=ours, default=theirs)
