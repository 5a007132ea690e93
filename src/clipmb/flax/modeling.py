"""CLIP in Flax: the classes of transformers 4, each a linen module with its config, its parameters and its files.

Parameters are the nested dicts of the msgpack files of transformers 4. ``dtype`` is what a model computes in; its
parameters are cast where they are used. Those of a 16-bit file are float32 in a model that computes in float32, and
otherwise keep the dtype of the file; ``param_dtype=``, `to_bf16`, `to_fp16` and `to_fp32` change it.
Source of every behaviour not explained here: the Flax models of transformers 4.57.6 for the interface, its PyTorch
models for values.
`clipmb.flax.modules` says what becomes of ids outside the vocabulary under ``jax.jit``, and how to use NNX.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Self, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.linen import Module
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from clipmb.common import checks
from clipmb.common.checkpoint import LoadingInfo
from clipmb.common.checkpoint.tensors import Deferred
from clipmb.common.config import BaseConfig, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from clipmb.common.errors import bad_input, whole_number
from clipmb.common.former import SavingOptions, check_saving
from clipmb.common.outputs import (
    BaseModelOutputWithPooling,
    CLIPOutput,
    CLIPTextModelOutput,
    CLIPVisionModelOutput,
    ImageClassifierOutput,
)
from clipmb.common.parameters import KINDS, Spec, specs
from clipmb.common.pretrained import PretrainedMixin, normal_dtype
from clipmb.common.uploading import uploaded
from clipmb.common.vocabulary import resized, rows_around_mean
from clipmb.flax.modules import (
    FlaxCLIPForImageClassificationModule,
    FlaxCLIPModule,
    FlaxCLIPTextModelWithProjectionModule,
    FlaxCLIPTextModule,
    FlaxCLIPVisionModelWithProjectionModule,
    FlaxCLIPVisionModule,
)
from clipmb.flax.tensors import from_numpy, lazy_numpy, to_numpy

Params = Mapping[str, Any]


class FlaxCLIPPreTrainedModel(PretrainedMixin):
    """What the six heads share: construction, files, parameters, checkpointing.

    Args:
        config: The config of the head.
        input_shape: Accepted and unneeded: parameters follow from the config alone.
        seed: Random seed of the initialisation.
        dtype: What the model computes in: float32, float16, bfloat16, or float64 (which needs ``jax_enable_x64``).
        _do_init: Initialise the parameters. Otherwise the model has none and every call needs ``params=``.
        gradient_checkpointing: As `enable_gradient_checkpointing`; so does that field of the config.

    Raises:
        TypeError: The config is not of the class that the head needs.
        ValueError: The dtype is not one that the model can compute in.
    """

    head = ""
    framework = "flax"
    config_class: ClassVar[type[BaseConfig]] = CLIPConfig
    module_class: ClassVar[type[Module]]
    base_model_prefix = "clip"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
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
        self.config: Any = config
        self.key = jax.random.PRNGKey(seed)
        self.dtype = compute_dtype(dtype, type(self).__name__)
        self.input_shape = input_shape
        checkpointing = gradient_checkpointing or getattr(config, "gradient_checkpointing", False)
        self.module: Module = self.module_class(config, self.dtype, bool(checkpointing))
        self._is_initialized = _do_init
        self._params: dict[str, Any] = self.init_weights(self.key) if _do_init else {}

    @classmethod
    def _from_config(cls, config: BaseConfig, **options: Any) -> Self:  # the name that transformers' Auto classes call
        return cls(config, **options)

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
            params = _plain(_cast(params, compute_dtype(param_dtype, f"A parameter of {cls.__name__}"), None))
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
        leaves = self._checked(self.params if params is None else params)
        table = specs(self.config, self.head)
        return Deferred({spec.name: lazy_numpy(leaves[spec.path("flax")], spec) for spec in table})

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        params: Params | None = None,
        *,
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
        **options: Unpack[SavingOptions],
    ) -> None:
        """Writes ``config.json`` and ``model.safetensors``: `PretrainedMixin.save_pretrained` for a tree of parameters.

        Args:
            save_directory: The folder; made when it is missing.
            params: The parameters to save; the model's own when None.
            max_shard_size: Files larger than this are split and given an index.
            variant: Write ``model.<variant>.safetensors``.
            **options: The arguments of transformers 4's `save_pretrained`.

        Raises:
            ValueError: ``params`` do not fit the model, ``safe_serialization=False`` was asked for, or the folder is a
                file.
            TypeError: An option is unknown.
        """
        if check_saving(options):
            with uploaded(self, save_directory, options):
                self.save_arrays(self.to_arrays(params), save_directory, max_shard_size=max_shard_size, variant=variant)

    def _checked(self, params: Params) -> dict[tuple[str, ...], Any]:
        """Returns the leaves of a tree by path, once it fits the model."""
        leaves = _leaves(params)
        found = {".".join(map(str, path)): np.shape(leaf) for path, leaf in leaves.items()}
        expected = {".".join(spec.path("flax")): _shape(spec) for spec in specs(self.config, self.head)}
        if problems := LoadingInfo.between(found, expected).problems():
            raise ValueError("\n  - ".join([f"params do not fit {type(self).__name__}. Problems:", *problems]))
        return leaves

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
        given = {} if params is None else _leaves(params)
        table = specs(self.config, self.head)
        arrays = {}
        for spec in table:
            shape, path = _shape(spec), spec.path("flax")
            if path in given:
                arrays[spec.name] = given[path]
            elif spec.std:
                key = jax.random.fold_in(rng, zlib.crc32(spec.name.encode()))
                arrays[spec.name] = _normal(key, spec.mean, spec.std, shape)
            else:
                arrays[spec.name] = jnp.full(shape, spec.mean, jnp.float32)
        return _tree(arrays, table)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters; what is assigned must fit the model.

        Raises:
            ValueError: It does not fit, or the model was made with ``_do_init=False``.
        """
        if not self._is_initialized:
            raise bad_input(
                "A model made with _do_init=False has no params",
                type(self).__name__,
                "Keep the params outside (init_weights makes them) and pass params= to every call",
                shown=True,
            )
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        if not self._is_initialized:
            raise bad_input(
                "A model made with _do_init=False keeps no params",
                type(self).__name__,
                "Pass params= to every call, or make the model with _do_init=True",
                shown=True,
            )
        self._checked(params)
        self._params = _plain(params)

    @property
    def required_params(self) -> set[tuple[str, ...]]:
        """The path of every parameter."""
        return {spec.path("flax") for spec in specs(self.config, self.head)}

    @property
    def params_shape_tree(self) -> dict[str, Any]:
        """The shape of every parameter, as ``jax.ShapeDtypeStruct``."""
        table = specs(self.config, self.head)
        return _tree({spec.name: jax.ShapeDtypeStruct(_shape(spec), jnp.float32) for spec in table}, table)

    def to_bf16(self, params: Params, mask: Any = None) -> Params:
        """Returns the tree with its floating-point leaves in bfloat16 where ``mask`` is True; everywhere when None."""
        return _cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Params, mask: Any = None) -> Params:
        """Returns the tree with its floating-point leaves in float16; ``mask`` as in `to_bf16`."""
        return _cast(params, jnp.float16, mask)

    def to_fp32(self, params: Params, mask: Any = None) -> Params:
        """Returns the tree with its floating-point leaves in float32; ``mask`` as in `to_bf16`."""
        return _cast(params, jnp.float32, mask)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Counts parameters.

        Args:
            only_trainable: Changes nothing: what is frozen is the optimizer's choice in Flax.
            exclude_embeddings: Leave out the tables of embeddings.
        """
        table = specs(self.config, self.head)
        return sum(math.prod(spec.shape) for spec in table if not (exclude_embeddings and spec.kind == "embedding"))

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Array:
        """Grows or shrinks the vocabulary of the model and its own parameters, whose optimizer state is made again.

        Args:
            new_num_tokens: The new number of tokens; None leaves it.
            pad_to_multiple_of: Round it up to a multiple of this.
            mean_resizing: Draw new rows around the mean of the old ones; otherwise from the initial distribution.

        Returns:
            The table, (tokens, width), which is in `params`.

        Raises:
            ValueError: The model has no text tower or no parameters, or a number is not positive.
        """
        path = ("text_model", "embeddings", "token_embedding", "embedding")
        leaves = _leaves(self.params)
        if path not in leaves:
            raise bad_input(
                "Only models with a text tower have token embeddings",
                type(self).__name__,
                "Use a model with a text tower",
            )
        old = leaves[path]
        size = resized(len(old), new_num_tokens, pad_to_multiple_of)
        config = getattr(self.config, "text_config", self.config)
        if size != len(old):
            config.vocab_size = size
            self.key, key = jax.random.split(self.key)
            kept = {place: leaf for place, leaf in leaves.items() if place != path}
            fresh = _leaves(self.init_weights(key, params=unflatten_dict(kept)))[path][len(old) :]
            if mean_resizing and len(fresh):
                seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
                fresh = rows_around_mean(to_numpy(old), len(fresh), seed)
            leaves[path] = jnp.concatenate([old[:size], jnp.asarray(fresh, old.dtype)])
            self.params = unflatten_dict(leaves)
        return leaves[path]

    def enable_gradient_checkpointing(self, every_n_layers: int = 1) -> None:
        """Recomputes blocks in the backward pass of training instead of keeping their intermediate results.

        Args:
            every_n_layers: Recompute the first block of every so many.

        Raises:
            ValueError: ``every_n_layers`` is not a positive number.
        """
        every_n_layers = whole_number("every_n_layers", every_n_layers)
        self.module = self.module.clone(gradient_checkpointing=every_n_layers)

    def disable_gradient_checkpointing(self) -> None:
        """Undoes `enable_gradient_checkpointing`."""
        self.module = self.module.clone(gradient_checkpointing=False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether gradient checkpointing is on."""
        return bool(self.module.gradient_checkpointing)  # type: ignore[attr-defined]

    def set_attn_implementation(self, attn_implementation: str | dict[str, str]) -> None:
        """Chooses "eager" or "sdpa" attention, for the whole or by tower."""
        self.config.attn_implementation = attn_implementation

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


def _array(value: Any) -> Any:
    return value if value is None or isinstance(value, Array) else np.asarray(value)


def _shape(spec: Spec) -> tuple[int, ...]:
    axes = KINDS[spec.kind].axes
    return tuple(spec.shape[axis] for axis in axes) if axes else spec.shape


@partial(jax.jit, static_argnums=3)
def _normal(key: Array, mean: float, std: float, shape: tuple[int, ...]) -> Array:
    return mean + std * jax.random.normal(key, shape, jnp.float32)


def _plain(params: Params) -> dict[str, Any]:
    """Returns a tree as plain dicts."""
    return unfreeze(cast("dict[str, Any]", params))


def _leaves(params: Params) -> dict[tuple[str, ...], Any]:
    """Returns the leaves of a tree by path."""
    return cast("dict[tuple[str, ...], Any]", flatten_dict(_plain(params)))


def _tree(leaves: Mapping[str, Any], table: list[Spec]) -> dict[str, Any]:
    """Arranges leaves that are in the framework's layout already; keys are canonical names."""
    return unflatten_dict({spec.path("flax"): leaves[spec.name] for spec in table})


def _cast(params: Params, dtype: Any, mask: Any) -> Params:
    def cast(leaf: Any, chosen: bool = True) -> Any:
        return leaf.astype(dtype) if chosen and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, params) if mask is None else jax.tree.map(cast, params, mask)


class FlaxCLIPModel(FlaxCLIPPreTrainedModel):
    """Both towers, their projections, and the similarity of every text with every image."""

    head = "CLIPModel"
    config: CLIPConfig
    module_class = FlaxCLIPModule

    def get_text_features(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        params: Params | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Array:
        """Returns the projected texts, not normalised.

        Args:
            input_ids: (batch, seq) integers.
            attention_mask: (batch, seq), 1 for tokens that may be looked at; all when None.
            position_ids: (batch or 1, seq); 0, 1, … when None.
            params: As in `FlaxCLIPModel.__call__`.
            dropout_rng: As in `FlaxCLIPModel.__call__`.
            train: As in `FlaxCLIPModel.__call__`.
            output_attentions: Changes nothing here; part of the signature of every call.
            output_hidden_states: Like ``output_attentions``.
            return_dict: Like ``output_attentions``.

        Returns:
            (batch, proj).

        Raises:
            ValueError: A shape or a value does not fit.
        """
        inputs = (input_ids, attention_mask, position_ids)
        options = (output_attentions, output_hidden_states)
        return self._apply(inputs, options, params, dropout_rng, train, method="get_text_features")

    def get_image_features(
        self,
        pixel_values: Array | None = None,
        params: Params | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
    ) -> Array:
        """Returns the projected images, not normalised.

        Args:
            pixel_values: (batch, channels, height, width).
            params: As in `FlaxCLIPModel.__call__`.
            dropout_rng: As in `FlaxCLIPModel.__call__`.
            train: As in `FlaxCLIPModel.__call__`.
            output_attentions: Changes nothing here; part of the signature of every call.
            output_hidden_states: Like ``output_attentions``.
            interpolate_pos_encoding: Accept images of any size.
            return_dict: Like ``output_attentions``.

        Returns:
            (batch, proj).

        Raises:
            ValueError: A shape or a value does not fit.
        """
        pixels = self._pixels(pixel_values, interpolate_pos_encoding)
        inputs = (pixels,)
        options = (output_attentions, output_hidden_states, interpolate_pos_encoding)
        return self._apply(inputs, options, params, dropout_rng, train, method="get_image_features")

    def __call__(
        self,
        input_ids: Array | None = None,
        pixel_values: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        params: Params | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> CLIPOutput[Array] | Any:
        """Compares every text with every image.

        Args:
            input_ids: (texts, seq) integers.
            pixel_values: (images, channels, height, width).
            attention_mask: (texts, seq), 1 for tokens that may be looked at; all when None.
            position_ids: (texts or 1, seq); 0, 1, … when None.
            params: The parameters, instead of the model's own.
            dropout_rng: A key for dropout; needed with ``train=True`` when ``attention_dropout`` is not 0.
            train: Drop attention weights.
            output_attentions: Also return every block's attention weights.
            output_hidden_states: Also return every block's input and output.
            return_dict: Return a `CLIPOutput`; otherwise a tuple of what is not None.
            return_loss: Also return the contrastive loss, for as many texts as images, pair by pair.
            interpolate_pos_encoding: Accept images of any size.

        Raises:
            ValueError: A shape or a value does not fit.
        """
        pixels = self._pixels(pixel_values, interpolate_pos_encoding)
        inputs = (input_ids, pixels, attention_mask, position_ids)
        options = (output_attentions, output_hidden_states, return_dict, return_loss, interpolate_pos_encoding)
        return self._apply(inputs, options, params, dropout_rng, train)


class FlaxCLIPTextPreTrainedModel(FlaxCLIPPreTrainedModel):
    """What the two text heads share."""

    config_class = CLIPTextConfig
    config: CLIPTextConfig

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        params: Params | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling[Array] | CLIPTextModelOutput[Array] | Any:
        """Encodes texts; arguments and errors as in `FlaxCLIPModel.__call__`."""
        inputs = (input_ids, attention_mask, position_ids)
        options = (output_attentions, output_hidden_states, return_dict)
        return self._apply(inputs, options, params, dropout_rng, train)


class FlaxCLIPTextModel(FlaxCLIPTextPreTrainedModel):
    """The text tower alone."""

    head = "CLIPTextModel"
    module_class = FlaxCLIPTextModule


class FlaxCLIPTextModelWithProjection(FlaxCLIPTextPreTrainedModel):
    """The text tower with its projection."""

    head = "CLIPTextModelWithProjection"
    module_class = FlaxCLIPTextModelWithProjectionModule


class FlaxCLIPVisionPreTrainedModel(FlaxCLIPPreTrainedModel):
    """What the two vision heads share."""

    config_class = CLIPVisionConfig
    config: CLIPVisionConfig
    main_input_name = "pixel_values"

    def __call__(
        self,
        pixel_values: Array | None = None,
        params: Params | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> BaseModelOutputWithPooling[Array] | CLIPVisionModelOutput[Array] | Any:
        """Encodes images; arguments and errors as in `FlaxCLIPModel.__call__`."""
        pixels = self._pixels(pixel_values, interpolate_pos_encoding)
        inputs = (pixels,)
        options = (output_attentions, output_hidden_states, return_dict, interpolate_pos_encoding)
        return self._apply(inputs, options, params, dropout_rng, train)


class FlaxCLIPVisionModel(FlaxCLIPVisionPreTrainedModel):
    """The vision tower alone."""

    head = "CLIPVisionModel"
    module_class = FlaxCLIPVisionModule


class FlaxCLIPVisionModelWithProjection(FlaxCLIPVisionPreTrainedModel):
    """The vision tower with its projection."""

    head = "CLIPVisionModelWithProjection"
    module_class = FlaxCLIPVisionModelWithProjectionModule


class FlaxCLIPForImageClassification(FlaxCLIPPreTrainedModel):
    """The vision tower with a linear classifier over the mean of the patch states."""

    head = "CLIPForImageClassification"
    config: CLIPConfig
    main_input_name = "pixel_values"
    module_class = FlaxCLIPForImageClassificationModule

    def __call__(
        self,
        pixel_values: Array | None = None,
        labels: Array | None = None,
        params: Params | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> ImageClassifierOutput[Array] | Any:
        """Classifies images.

        Args:
            pixel_values: (batch, channels, height, width).
            labels: (batch,) class indices, or (batch,) numbers for one label, or (batch, num_labels) numbers in [0, 1].
            params: As in `FlaxCLIPModel.__call__`.
            dropout_rng: As in `FlaxCLIPModel.__call__`.
            train: As in `FlaxCLIPModel.__call__`.
            output_attentions: As in `FlaxCLIPModel.__call__`.
            output_hidden_states: As in `FlaxCLIPModel.__call__`.
            return_dict: As in `FlaxCLIPModel.__call__`.
            interpolate_pos_encoding: As in `FlaxCLIPModel.__call__`.

        Raises:
            TypeError: Class indices are not integers.
            ValueError: A shape or a value does not fit.
        """
        pixels = self._pixels(pixel_values, interpolate_pos_encoding)
        inputs = (pixels, labels)
        options = (output_attentions, output_hidden_states, return_dict, interpolate_pos_encoding)
        return self._apply(inputs, options, params, dropout_rng, train)
