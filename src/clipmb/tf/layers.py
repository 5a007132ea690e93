"""What the TensorFlow models are made of: activations, layers, look-ups and the interpolation of positions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from clipmb.common import checks
from clipmb.tf.tensors import plain_errors, sizes


def statistics_dtype(dtype: tf.DType) -> tf.DType:
    """Returns the dtype of softmax and of sums over many numbers: float32 for 16 bits, else the dtype itself."""
    return tf.float32 if dtype.size < 4 else dtype


def quick_gelu(x: Tensor) -> Tensor:
    """Sigmoid approximation of GELU, ``x * sigmoid(1.702 * x)``; (…) to the same.

    In 16 bits the factor is not rounded.
    """
    wide = tf.cast(x, statistics_dtype(x.dtype))
    return tf.cast(wide * tf.sigmoid(1.702 * wide), x.dtype)


def gelu(x: Tensor) -> Tensor:
    """GELU, ``x`` times the normal distribution function; (…) to the same.

    ``tf.nn.gelu`` rounds its constants to float32, also in float64.
    """
    wide = tf.cast(x, statistics_dtype(x.dtype))
    return tf.cast(0.5 * wide * (1 + tf.math.erf(wide * 0.5**0.5)), x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """Approximation of GELU by the hyperbolic tangent; (…) to the same."""
    wide = tf.cast(x, statistics_dtype(x.dtype))
    inner = (2 / math.pi) ** 0.5 * (wide + 0.044715 * wide * wide * wide)
    return tf.cast(0.5 * wide * (1 + tf.tanh(inner)), x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_10": lambda x: tf.clip_by_value(gelu(x), -10, 10),
    "gelu_accurate": gelu_tanh,
    "gelu_fast": lambda x: 0.5 * x * (1 + tf.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    "gelu_new": gelu_tanh,
    "gelu_python": gelu,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "laplace": lambda x: 0.5 * (1 + tf.math.erf((x - 0.707107) / (0.282095 * 2.0**0.5))),
    "leaky_relu": lambda x: tf.maximum(x, 0.01 * x),  # tf.nn.leaky_relu rounds its slope to float32
    "linear": lambda x: x,
    "mish": lambda x: x * tf.tanh(tf.nn.softplus(x)),
    "quick_gelu": quick_gelu,
    "relu": tf.nn.relu,
    "relu2": lambda x: tf.square(tf.nn.relu(x)),
    "relu6": tf.nn.relu6,
    "sigmoid": tf.sigmoid,
    "silu": tf.nn.silu,
    "swish": tf.nn.silu,
    "tanh": tf.tanh,
}


class Module(keras.layers.Layer):
    """A layer that builds its parts with itself, so that all weights exist before the first call."""

    def __init__(self) -> None:
        super().__init__()
        self._allow_non_tensor_positional_args = True  # as Keras' preprocessing layers do

    def build(self, input_shape: Any = None) -> None:
        """Creates the weights of every part."""
        build_parts(self)


def build_parts(layer: keras.layers.Layer) -> None:
    """Names the parts of a layer or a model by their attributes, gives them its dtype policy, and builds them."""
    for attribute, value in list(vars(layer).items()):
        several = isinstance(value, list)
        for place, part in enumerate(value if several else [value]):
            if isinstance(part, keras.layers.Layer) and not attribute.startswith("_") and not part.built:
                part.name = f"{attribute}.{place}" if several else attribute
                part.dtype_policy = layer.dtype_policy
                part.build(None)


def build_at(layer: keras.layers.Layer, path: str) -> None:
    """Builds a layer whose weights get the names that they have at a path inside a model."""
    with contextlib.ExitStack() as scopes:
        for name in path.split("/")[:-1]:
            scopes.enter_context(keras.name_scope(name))
        layer.build(None)


def replace_part(owner: keras.layers.Layer, name: str, part: keras.layers.Layer) -> None:
    """Puts a layer in the place of another one, although Keras locks the parts of a layer that is built.

    It takes the other's place among the parts, too: the order of weights is that of a fresh model.
    """
    owner._tracker.replace_tracked_value("layers", getattr(owner, name), part)
    setattr(owner, name, part)


class Linear(keras.layers.Dense):
    """A dense layer that knows its input width."""

    def __init__(self, inputs: int, units: int, bias: bool = True) -> None:
        super().__init__(units, use_bias=bias)
        self.inputs = inputs

    def build(self, input_shape: Any = None) -> None:
        """Creates kernel (inputs, units) and bias (units,)."""
        super().build((None, self.inputs))

    def quantize(self, mode: str | None = None, type_check: bool = True, config: Any = None) -> None:
        """Quantizes like Keras' own dense layers, whose subclasses Keras would silently skip."""
        super().quantize(mode, type_check=False, config=config)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """(…, inputs) to (…, units), as a product of two matrices.

        The bias comes after the reshape, where graphs do not fuse it: oneDNN's fused kernel is slower for few rows, and
        in 16 bits rounds once where eager execution rounds twice.
        """
        shape = (*sizes(inputs)[:-1], self.units)
        outputs = tf.reshape(tf.matmul(tf.reshape(inputs, (-1, self.inputs)), self.kernel), shape)
        return tf.nn.bias_add(outputs, self.bias) if self.use_bias else outputs


class Convolution(keras.layers.Layer):
    """The convolution that embeds patches, which do not overlap: one product of matrices."""

    def __init__(self, channels: int, filters: int, size: int) -> None:
        super().__init__()
        self.shape = (size, size, channels, filters)

    def build(self, input_shape: Any = None) -> None:
        """Creates the kernel (size, size, channels, filters)."""
        self.kernel = self.add_weight(shape=self.shape, initializer=self.kernel_initializer, name="kernel")

    def call(self, pixel_values: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, rows, columns, filters); the remainder of a patch is dropped."""
        size, _, channels, filters = self.shape
        batch, _, height, width = sizes(pixel_values)
        rows, columns = height // size, width // size
        pixel_values = pixel_values[:, :, : rows * size, : columns * size]
        patches = tf.reshape(pixel_values, (batch, channels, rows, size, columns, size))
        patches = tf.reshape(tf.transpose(patches, (0, 2, 4, 3, 5, 1)), (-1, size * size * channels))
        return tf.reshape(tf.matmul(patches, tf.reshape(self.kernel, (-1, filters))), (batch, rows, columns, filters))


class LayerNorm(keras.layers.LayerNormalization):
    """Layer norm over the last axis; statistics in at least float32, as squares of differences from the mean."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(epsilon=eps)
        self.width = width

    def build(self, input_shape: Any = None) -> None:
        """Creates gamma (width,) and beta (width,)."""
        super().build((None, self.width))

    def call(self, inputs: Tensor) -> Tensor:
        """(…, width) to the same, in the compute dtype."""
        x = tf.cast(inputs, statistics_dtype(inputs.dtype))
        centred = x - tf.reduce_mean(x, axis=-1, keepdims=True)
        variance = tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True)
        gamma, beta = tf.cast(self.gamma, x.dtype), tf.cast(self.beta, x.dtype)
        return tf.cast(centred * tf.math.rsqrt(variance + self.epsilon) * gamma + beta, self.compute_dtype)


def look_up(table: keras.layers.Embedding, ids: Tensor, field: str) -> Tensor:
    """Looks ids up in a table of embeddings.

    Args:
        table: (size, width).
        ids: (batch, seq) integers; those outside the table raise, and under XLA, which cannot raise, become NaN.
        field: What they are called in errors.

    Returns:
        (batch, seq, width).

    Raises:
        TypeError: They are not integers.
        ValueError: Some are outside the range; in a graph an InvalidArgumentError is raised at the call.
    """
    with plain_errors():
        check_range(ids, table.input_dim, field)
    if tf.executing_eagerly():
        return table(ids)
    inside = (ids >= 0) & (ids < table.input_dim)
    embedded = table(tf.where(inside, ids, 0))  # so that no kernel raises before the check does
    return tf.where(tf.expand_dims(inside, -1), embedded, tf.constant(np.nan, embedded.dtype))


def whole_table(table: keras.layers.Embedding) -> Tensor:
    """Returns every row of a table of embeddings, (size, width), through its call, which knows adapters and int8."""
    return table(tf.range(table.input_dim))


def check_range(ids: Tensor, size: int, field: str) -> None:
    """Raises for ids outside [0, size): a ValueError eagerly, an InvalidArgumentError in a graph, nothing under XLA."""
    checks.check_integers(ids, field)
    if tf.executing_eagerly():
        checks.check_ids(ids.numpy(), size, field)
    else:
        message = f"{field} must lie in [0, {size}). Received:"
        tf.debugging.Assert(tf.reduce_all((ids >= 0) & (ids < size)), [message, ids], summarize=16)


def bicubic_weights(size: int, new_size: int | Tensor) -> Tensor:
    """Returns the weights of bicubic interpolation along one axis: (new_size, size) in float64.

    Source: R. Keys, Cubic convolution interpolation for digital image processing, 1981, with PyTorch's a = -0.75.
    """
    a = -0.75
    centres = (tf.range(new_size, dtype=tf.float64) + 0.5) * (size / tf.cast(new_size, tf.float64)) - 0.5
    first = tf.floor(centres)[:, None]
    taps = first + tf.constant([-1.0, 0.0, 1.0, 2.0], tf.float64)  # (new_size, 4)
    x = tf.abs(centres[:, None] - taps)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    weights = tf.where(x <= 1, near, far)
    inside = tf.cast(tf.clip_by_value(taps, 0, size - 1), tf.int32)  # the border is repeated
    return tf.reduce_sum(tf.expand_dims(weights, -1) * tf.one_hot(inside, size, dtype=tf.float64), axis=1)


def interpolate_positions(positions: Tensor, rows: int | Tensor, columns: int | Tensor) -> Tensor:
    """Resizes the grid of position embeddings by bicubic interpolation (a = -0.75, half-pixel centres, no antialias).

    ``tf.image.resize`` has a = -0.5 and drops taps outside the image, where PyTorch repeats the border.

    Args:
        positions: (patches + 1, width); the first is that of the class token and stays.
        rows: Patches from top to bottom; a tensor when it is not known before the call.
        columns: Patches from left to right, likewise.

    Returns:
        (rows * columns + 1, width).
    """
    side = round((sizes(positions)[0] - 1) ** 0.5)
    if isinstance(rows, int) and isinstance(columns, int) and rows == columns == side:
        return positions
    dtype = statistics_dtype(positions.dtype)
    grid = tf.reshape(tf.cast(positions[1:], dtype), (side, side, -1))  # (side, side, width)
    down, across = (tf.cast(bicubic_weights(side, size), dtype) for size in (rows, columns))
    grid = tf.einsum("ri,cj,ijw->rcw", down, across, grid)  # (rows, columns, width)
    grid = tf.cast(tf.reshape(grid, (-1, positions.shape[1])), positions.dtype)
    return tf.concat([positions[:1], grid], axis=0)


def recomputed(
    layer: Module, hidden_states: Tensor, bias: Tensor | None, fused: bool, seed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Calls a block so that the backward pass computes it again, instead of keeping its intermediate results."""

    def block(hidden_states: Tensor) -> Any:
        outputs = layer(hidden_states, bias, fused, seed)
        return outputs[0] if fused else outputs  # tf.recompute_grad takes no None

    outputs = tf.recompute_grad(block)(hidden_states)
    return (outputs, None) if fused else outputs
