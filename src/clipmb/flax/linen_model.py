"""What CLIP's Flax models have in common: parameters by the weight table, their dtypes, calls of the module."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import Module
from flax.traverse_util import unflatten_dict
from jax import Array

from clipmb.common import checks
from clipmb.common.checkpoint.tensors import Deferred
from clipmb.common.config import BaseConfig
from clipmb.common.errors import bad_input
from clipmb.common.parameters import HEADS, Spec, specs
from clipmb.common.pretrained import PretrainedMixin, normal_dtype
from clipmb.flax.pretrained import FlaxPreTrainedModel, Params, cast_leaves, leaves_of, linen_shape, plain
from clipmb.flax.tensors import from_numpy, to_numpy


class LinenModel(PretrainedMixin, FlaxPreTrainedModel):
    """A linen module with its config and its parameters; arguments as in `FlaxCLIPPreTrainedModel`."""

    framework = "flax"
    config: Any
    module_class: ClassVar[type[Module]]
    load_options: ClassVar[tuple[str, ...]] = (
        "seed",
        "input_shape",
        "_do_init",
        "gradient_checkpointing",
        "param_dtype",
    )

    def __init__(
        self,
        config: BaseConfig,
        input_shape: Any = None,
        seed: int = 0,
        dtype: Any = jnp.float32,
        _do_init: bool = True,
        *,
        gradient_checkpointing: bool = False,
    ) -> None:
        config = checks.config_of(type(self).__name__, self.config_class, config)
        dtype = compute_dtype(dtype, type(self).__name__)
        checkpointing = gradient_checkpointing or getattr(config, "gradient_checkpointing", False)
        module = self.module_class(config, dtype, bool(checkpointing))
        input_shape = _input_shape(config, self.head) if input_shape is None else input_shape
        super().__init__(config, module, input_shape, seed, dtype, _do_init)

    @classmethod
    def from_arrays(
        cls,
        config: Any,
        arrays: dict[str, np.ndarray],
        initialised: list[Spec],
        dtype: str | None,
        seed: int = 0,
        input_shape: Any = None,
        _do_init: bool = True,
        gradient_checkpointing: bool = False,
        param_dtype: Any = None,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Builds the model around canonical arrays, and draws the parameters that have none.

        Args:
            config: As in `PretrainedMixin.from_arrays`.
            arrays: As in `PretrainedMixin.from_arrays`.
            initialised: As in `PretrainedMixin.from_arrays`.
            dtype: As in `PretrainedMixin.from_arrays`.
            seed: Seed of the parameters that are drawn.
            input_shape: Accepted and unneeded.
            _do_init: Keep the parameters in the model; otherwise return ``(model, params)``.
            gradient_checkpointing: As in the constructor.
            param_dtype: The dtype of every parameter; "auto" for that of the file. By default that of the file, but
                float32 instead of 16 bits in a model that computes in float32, in which training would lose its steps.
        """
        model = cls(
            config, input_shape, seed, dtype or "float32", _do_init=False, gradient_checkpointing=gradient_checkpointing
        )
        table = [spec for spec in specs(config, cls.head) if spec.name in arrays]
        widened = param_dtype is None and model.dtype == jnp.float32
        params = _tree(from_numpy(arrays, table, widened), table)
        if initialised:
            params = model.init_weights(model.key, params=params)
        if param_dtype not in (None, "auto"):
            params = plain(cast_leaves(params, compute_dtype(param_dtype, f"A parameter of {cls.__name__}"), None))
        if not _do_init:
            return model, params
        model._is_initialized = True
        model._params = params
        return model

    @classmethod
    def canonical_array(cls, value: Any) -> np.ndarray:
        """Returns one value of a ``state_dict`` as numpy."""
        return np.array(to_numpy(value))  # a copy: jax may share memory with what it is given

    def to_arrays(self, params: Params | None = None) -> Deferred:
        """Returns every parameter by its canonical name, in canonical layout, each made when it is asked for."""
        return FlaxPreTrainedModel.to_arrays(self, params)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], params: Params | None = None, **options: Any
    ) -> None:
        """Writes ``config.json`` and ``model.safetensors``: `PretrainedMixin.save_pretrained` for a tree of parameters.

        Args:
            save_directory: The folder; made when it is missing.
            params: The parameters to save; the model's own when None.
            **options: As in `PretrainedMixin.save_pretrained`.

        Raises:
            ValueError: As in `FlaxPreTrainedModel.save_pretrained`.
            TypeError: An option is unknown.
        """
        FlaxPreTrainedModel.save_pretrained(self, save_directory, params, **options)

    def _table(self) -> list[Spec]:
        return specs(self.config, self.head)

    def init_weights(
        self, rng: Array, input_shape: Any = None, params: Params | None = None, eval_only: bool = False
    ) -> dict[str, Any]:
        """Draws parameters from their initial normal distributions.

        Args:
            rng: A key; the same one gives the same parameters whatever else is drawn.
            input_shape: Accepted and unneeded.
            params: A tree of which only what is missing is drawn.
            eval_only: Draw nothing and return `params_shape_tree`, as maxdiffusion asks for.

        Returns:
            The whole tree, in float32 where it was drawn.
        """
        if eval_only:
            return self.params_shape_tree
        given = {} if params is None else leaves_of(params)
        table = self._table()
        arrays = {}
        for spec in table:
            shape, path = linen_shape(spec), spec.path("flax")
            if path in given:
                arrays[spec.name] = given[path]
            elif spec.std:
                key = jax.random.fold_in(rng, zlib.crc32(spec.name.encode()))
                arrays[spec.name] = _normal(key, spec.mean, spec.std, shape)
            else:
                arrays[spec.name] = jnp.full(shape, spec.mean, jnp.float32)
        return _tree(arrays, table)

    @property
    def params_shape_tree(self) -> dict[str, Any]:
        """The shape of every parameter, as ``jax.ShapeDtypeStruct``."""
        table = self._table()
        return _tree({spec.name: jax.ShapeDtypeStruct(linen_shape(spec), jnp.float32) for spec in table}, table)

    def _apply(
        self,
        inputs: tuple[Any, ...],
        options: tuple[Any, ...],
        params: Params | None,
        dropout_rng: Array | None,
        train: bool,
        method: str | None = None,
    ) -> Any:
        """Calls a method of the module, which has ``deterministic`` between its inputs and its options."""
        if train and dropout_rng is None and (rate := self.dropout):
            raise bad_input(
                f"train=True needs dropout_rng, since attention_dropout is {rate}",
                None,
                "Pass dropout_rng=jax.random.key(0), a new key in every step",
            )
        rngs = None if dropout_rng is None else {"dropout": dropout_rng}
        variables = {"params": self.params if params is None else params}
        return self.module.apply(variables, *map(_array, inputs), not train, *options, rngs=rngs, method=method)

    @property
    def dropout(self) -> float:
        """The largest rate of attention dropout of its towers, which ``train=True`` needs a ``dropout_rng`` for."""
        towers = (getattr(self.config, name, self.config) for name in ("text_config", "vision_config"))
        return max(getattr(tower, "attention_dropout", 0.0) for tower in towers)

    def _pixels(self, pixel_values: Any, interpolate: bool) -> Any:
        """Checks images and moves their channels last."""
        pixel_values = _array(pixel_values)
        checks.check_pixels(pixel_values, getattr(self.config, "vision_config", self.config), interpolate)
        return pixel_values.transpose(0, 2, 3, 1)


def compute_dtype(value: Any, owner: str) -> jnp.dtype:
    """Returns the dtype that a model computes in.

    Raises:
        ValueError: It is not one that a model can have, or float64 without ``jax_enable_x64``.
    """
    dtype = jnp.dtype(normal_dtype(value, owner) or "float32")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise bad_input(
            f"{owner} computes in {dtype} only with jax_enable_x64",
            f"dtype={dtype}",
            'Call jax.config.update("jax_enable_x64", True) first',
            shown=True,
        )
    return dtype


def _input_shape(config: Any, head: str) -> Any:
    """Returns the ``input_shape`` that a model of transformers 4 has by default."""
    size = getattr(getattr(config, "vision_config", config), "image_size", 0)
    shapes = [shape for shape, has in zip(((1, 1), (1, size, size, 3)), HEADS[head], strict=False) if has]
    return shapes[0] if len(shapes) == 1 else tuple(shapes)


def _array(value: Any) -> Any:
    """Makes an array of this machine's byte order, as JAX needs it."""
    if value is None or isinstance(value, Array):
        return value
    array = np.asarray(value)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


@partial(jax.jit, static_argnums=3)
def _normal(key: Array, mean: float, std: float, shape: tuple[int, ...]) -> Array:
    return mean + std * jax.random.normal(key, shape, jnp.float32)


def _tree(leaves: Mapping[str, Any], table: list[Spec]) -> dict[str, Any]:
    """Arranges leaves that are in the framework's layout already; keys are canonical names."""
    return unflatten_dict({spec.path("flax"): leaves[spec.name] for spec in table})
