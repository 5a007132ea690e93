"""Between numpy, Keras variables and TensorFlow: initial values, inputs, errors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import keras
import numpy as np
import optree
import tensorflow as tf
from tensorflow import Tensor

from clipmb.common.checkpoint import OwnArrays
from clipmb.common.checkpoint.tensors import Lazy
from clipmb.common.dtypes import numpy_dtype
from clipmb.common.errors import bad_input
from clipmb.common.outputs import ModelOutput
from clipmb.common.parameters import KINDS, Spec

_ARRAYS: ContextVar[Mapping[str, np.ndarray] | None] = ContextVar("arrays", default=None)
_SEEDS: ContextVar[Callable[[], tf.Tensor] | None] = ContextVar("seeds", default=None)

FLAGS = (
    "return_loss", "output_attentions", "output_hidden_states", "interpolate_pos_encoding", "return_dict", "training",
)  # fmt: skip


@contextmanager
def given(arrays: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Models built within take these canonical arrays as the initial values of their weights; no kernel draws any."""
    token = _ARRAYS.set(arrays)
    try:
        yield
    finally:
        _ARRAYS.reset(token)


def initializer(spec: Spec) -> Callable[..., tf.Tensor]:
    """Returns what makes the initial value of a parameter: its array if one is `given`, else its distribution."""
    arrays = _ARRAYS.get()
    if arrays is None or spec.name not in arrays:
        return distribution(spec)

    def loaded(shape: Any, dtype: str) -> tf.Tensor:
        tensor = from_numpy(arrays[spec.name], dtype, KINDS[spec.kind].axes)
        if isinstance(arrays, OwnArrays):
            arrays.release(spec.name)
        return tensor

    return loaded


def distribution(spec: Spec) -> keras.initializers.Initializer:
    """Returns the initial distribution of a parameter: normal, not truncated."""
    if spec.std:
        return keras.initializers.RandomNormal(spec.mean, spec.std)
    return keras.initializers.Constant(spec.mean)


def from_numpy(array: np.ndarray, dtype: str, axes: tuple[int, ...] = ()) -> tf.Tensor:
    """Copies an array into a tensor of a dtype, transposed."""
    tensor = tf.cast(tf.convert_to_tensor(array), dtype)
    return tf.transpose(tensor, axes) if axes else tensor


def fold_in(seed: Tensor, data: int | Tensor) -> Tensor:
    """Returns the seed, (2,) int32, that another seed and a number make; its types say less than TensorFlow takes."""
    return cast("Tensor", tf.random.fold_in(seed, cast("int", data)))


def gradients_of(tape: tf.GradientTape, target: Any, sources: Sequence[Any], weights: Any = None) -> list[Tensor]:
    """Returns the gradients of a target with respect to sources that it depends on, an embedding's as dense tensors.

    Args:
        tape: What recorded the computation.
        target: A tensor, or several.
        sources: Tensors or variables.
        weights: The gradients with respect to the target; 1 when None.
    """
    return [tf.convert_to_tensor(gradient) for gradient in tape.gradient(target, sources, weights)]


@contextmanager
def seeds(draw: Callable[[], tf.Tensor]) -> Iterator[None]:
    """Dropout within takes its seeds, (2,) int32, from this function instead of from the generators of the towers."""
    token = _SEEDS.set(draw)
    try:
        yield
    finally:
        _SEEDS.reset(token)


def next_seed(generator: keras.random.SeedGenerator) -> tf.Tensor:
    """Draws a seed of dropout, (2,) int32: from a generator, or within `seeds` from its function."""
    draw = _SEEDS.get()
    return tf.cast(generator.next(), tf.int32) if draw is None else draw()


def lazy_numpy(variable: keras.Variable, spec: Spec) -> Lazy:
    """Returns a variable as an array in canonical layout that is copied from its device when it is asked for."""
    array = Lazy(tuple(variable.shape), numpy_dtype(str(variable.dtype)), variable.numpy)
    return array.viewed(KINDS[spec.kind].to_canonical)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Keeps Keras from wrapping the errors raised within into "Exception encountered when calling …"."""
    try:
        yield
    except (TypeError, ValueError) as error:
        error._keras_call_info_injected = True  # type: ignore[attr-defined]
        raise


def bind(function: Callable, owner: str, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call by name, with arrays and lists as tensors.

    Args:
        function: A method that takes inputs by name.
        owner: Its name for messages.
        args: Positional arguments; the first may be a mapping from names to arguments.
        kwargs: Arguments by name.

    Raises:
        TypeError: A name is unknown or given twice.
    """
    names = list(inspect.signature(function).parameters)[1:]
    values: dict[str, Any] = {}
    if args and isinstance(args[0], Mapping):
        values, args = dict(args[0]), args[1:]
    extra = [f"positional {i}" for i in range(len(names), len(args))]
    positional = dict(zip(names, args, strict=False))
    received = [*values, *positional, *kwargs, *extra]
    if extra or len(set(received)) < len(received):
        raise bad_input(f"{owner} takes each input once", ", ".join(received), "Pass it once", TypeError, shown=True)
    values |= positional | kwargs
    if unknown := [str(name) for name in values if name not in names]:
        raise bad_input(
            f"{owner} takes {', '.join(names)}", ", ".join(unknown), "Remove or correct them", TypeError, shown=True
        )
    return {name: value if name in FLAGS else to_tensor(value) for name, value in values.items()}


def to_tensor(value: Any) -> Any:
    """Turns arrays and lists into tensors; leaves None, tensors, variables and symbolic tensors."""
    if value is None or tf.is_tensor(value) or keras.utils.is_keras_tensor(value):
        return value
    return tf.convert_to_tensor(value)


def sizes(tensor: Any) -> tuple[Any, ...]:
    """Returns the shape of a tensor: numbers where they are known before the call, else scalar tensors."""
    return cast("tuple[Any, ...]", keras.ops.shape(tensor))


def register_output(kind: type[ModelOutput]) -> None:
    """Lets Keras look inside outputs of a type for tensors."""

    def flatten(output: Any) -> tuple[Any, Any, Any]:
        return tuple(output.values()), tuple(output), tuple(output)

    def unflatten(keys: Any, values: Any) -> Any:
        return kind(zip(keys, values, strict=True))

    optree.register_pytree_node(kind, flatten, unflatten, namespace="keras")


def unpacking(method: Callable) -> Callable:
    """Lets a method of a model take its inputs as `bind` does."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, **bind(method, f"{type(self).__name__}.{method.__name__}", args, kwargs))

    return wrapper
