"""The base of Flax models, which programs subclass around modules of their own: parameters outside the module, files.

Source: the interface of transformers 4.57.6's ``FlaxPreTrainedModel``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.linen import Module
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from clipmb.common.checkpoint import LoadingInfo, OwnArrays
from clipmb.common.checkpoint.linen_trees import read_tree, tree_specs
from clipmb.common.checkpoint.tensors import Deferred, not_finite
from clipmb.common.config import BaseConfig
from clipmb.common.errors import bad_input
from clipmb.common.former import SavingOptions, check_saving, drop_unneeded
from clipmb.common.hub import Source
from clipmb.common.parameters import KINDS, Spec
from clipmb.common.pretrained import save_model, warn_not_finite
from clipmb.common.saving import read_whole
from clipmb.common.uploading import Uploadable, uploaded
from clipmb.flax.tensors import from_numpy, lazy_numpy

Params = Mapping[str, Any]


class FlaxPreTrainedModel(Uploadable):
    """A linen module with its config and its parameters: what a program's own model is made from.

    A subclass sets ``config_class``, writes `init_weights`, and calls this constructor with its module. Its files are
    ``config.json`` and ``model.safetensors``; ``flax_model.msgpack`` of transformers 4 is read too.

    Args:
        config: The config.
        module: What computes; `module` later.
        input_shape: What `init_weights` gets.
        seed: Random seed of the initialisation.
        dtype: What the module computes in.
        _do_init: Initialise the parameters. Otherwise the model has none and every call needs ``params=``.

    Raises:
        ValueError: ``config`` or ``module`` is None.
    """

    config_class: ClassVar[Any] = None
    base_model_prefix = ""
    main_input_name = "input_ids"
    framework = "flax"
    _auto_class = None
    generation_config = None

    def __init__(
        self,
        config: Any,
        module: Module,
        input_shape: Any = (1, 1),
        seed: int = 0,
        dtype: Any = jnp.float32,
        _do_init: bool = True,
    ) -> None:
        for name, value in (("config", config), ("module", module)):
            if value is None:
                raise bad_input(f"{type(self).__name__} needs a {name}", None, "Pass one")
        self.config = config
        self._module: Any = module
        self.key = jax.random.PRNGKey(seed)
        self.dtype = dtype
        self.input_shape = input_shape
        self._shapes: dict[str, Any] | None = None
        self._is_initialized = _do_init
        self._params: dict[str, Any] = plain(self.init_weights(self.key, input_shape)) if _do_init else {}

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> Any:  # the name that transformers' Auto classes call
        return cls(config, **options)

    @property
    def module(self) -> Any:
        """The linen module; assigning ``_module`` replaces it."""
        return self._module

    @module.setter
    def module(self, module: Module) -> None:
        self._module = module

    def init_weights(self, rng: Array, input_shape: Any, params: Params | None = None) -> Any:
        """Draws the parameters: each subclass writes it.

        Args:
            rng: A key.
            input_shape: That of the constructor.
            params: A tree of which only what is missing is drawn.

        Returns:
            The tree, usually ``self.module.init(rng, …)["params"]``.

        Raises:
            NotImplementedError: The subclass does not.
        """
        raise NotImplementedError(f"{type(self).__name__} has no init_weights(self, rng, input_shape, params=None).")

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes parts of the module in the backward pass: a subclass that can do so writes it.

        Raises:
            NotImplementedError: The subclass cannot.
        """
        raise NotImplementedError(f"{type(self).__name__} has no enable_gradient_checkpointing(self).")

    @classmethod
    def can_generate(cls) -> bool:
        """Returns False: models of clipmb generate no text."""
        return False

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
        self._params = plain(params)

    @property
    def params_shape_tree(self) -> dict[str, Any]:
        """The shape of every parameter, as ``jax.ShapeDtypeStruct``."""
        if self._shapes is None:
            drawn = jax.eval_shape(lambda key: self.init_weights(key, self.input_shape), self.key)
            self._shapes = plain(drawn)
        return self._shapes

    @property
    def required_params(self) -> set[tuple[str, ...]]:
        """The path of every parameter."""
        return {spec.path("flax") for spec in self._table()}

    def _table(self) -> list[Spec]:
        """Lists the parameters."""
        return tree_specs({path: leaf.shape for path, leaf in leaves_of(self.params_shape_tree).items()})

    def to_bf16(self, params: Params, mask: Any = None) -> Params:
        """Returns the tree with its floating-point leaves in bfloat16 where ``mask`` is True; everywhere when None."""
        return cast_leaves(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Params, mask: Any = None) -> Params:
        """Returns the tree with its floating-point leaves in float16; ``mask`` as in `to_bf16`."""
        return cast_leaves(params, jnp.float16, mask)

    def to_fp32(self, params: Params, mask: Any = None) -> Params:
        """Returns the tree with its floating-point leaves in float32; ``mask`` as in `to_bf16`."""
        return cast_leaves(params, jnp.float32, mask)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | Source,
        dtype: Any = jnp.float32,
        *model_args: Any,
        config: Any = None,
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        variant: str | None = None,
        _do_init: bool = True,
        **options: Any,
    ) -> Any:
        """Loads a model from a folder, a file of weights or the Hub.

        Where the names in the file begin with ``base_model_prefix`` and those of the model do not, or the other way
        round, the base model is what is loaded.

        Args:
            pretrained_model_name_or_path: Folder, file of weights or Hub id.
            dtype: What the module computes in. In float32, weights of 16 bits become float32.
            *model_args: Given to the constructor after the config.
            config: A config, or where to read one; the default is the ``config.json`` beside the weights.
            strict: Raise for missing and unexpected weights; otherwise initialise the missing ones and ignore the
                unexpected ones.
            ignore_mismatched_sizes: Initialise weights of another shape instead of raising.
            output_loading_info: Return the lists missing_keys, unexpected_keys, mismatched_keys and error_msgs too.
            variant: Read ``model.<variant>.safetensors``.
            _do_init: Keep the parameters in the model; otherwise return ``(model, params)``.
            **options: ``subfolder``, ``revision``, ``cache_dir``, ``token``, ``local_files_only`` and
                ``force_download`` belong to the source; fields of the config override it; the constructor gets the
                others.

        Returns:
            The model, or ``(model, params)``; with ``output_loading_info`` that and the lists.

        Raises:
            CheckpointError: The files cannot be found or read, or do not fit the model.
            ValueError: There is no config to read.
        """
        source = Source.of(pretrained_model_name_or_path, options)
        drop_unneeded(options)
        config, options = cls._config_for(source, config, options)
        model = cls(config, *model_args, dtype=dtype, _do_init=False, **options)
        table = model._table()

        def read() -> tuple[dict[str, np.ndarray], LoadingInfo]:
            return read_tree(
                source, table, cls.__name__, base=cls.base_model_prefix, variant=variant,
                strict=strict, ignore_mismatched_sizes=ignore_mismatched_sizes,
            )  # fmt: skip

        arrays, info = read_whole(None if source.file is not None else source.folder, read)
        warn_not_finite(source, not_finite(arrays))
        found = [spec for spec in table if spec.name in arrays]
        leaves = from_numpy(OwnArrays(arrays), found, widened=jnp.dtype(dtype) == jnp.float32)
        params = {spec.path("flax"): leaves[spec.name] for spec in found}
        if len(found) < len(table):
            params = {**leaves_of(model.init_weights(model.key, model.input_shape)), **params}
        tree = cast("dict[str, Any]", unflatten_dict(params))
        if _do_init:
            model._is_initialized, model._params = True, tree
        loaded = model if _do_init else (model, tree)
        return (loaded, info.to_dict()) if output_loading_info else loaded

    @classmethod
    def _config_for(cls, source: Source, config: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Returns the config, with its fields among the options applied where it is read, and the other options."""
        if config is not None and not isinstance(config, str | os.PathLike):
            return config, options
        if cls.config_class is None:
            raise bad_input(f"{cls.__name__} has no config_class", config, "Set it, or pass config=")
        place: dict[str, Any] = {}
        if not issubclass(cls.config_class, BaseConfig):  # but of transformers, which does not know a Source
            place = {"subfolder": source.subfolder, "revision": source.revision}
        where = config or (source.name_or_path if place else source)
        return cls.config_class.from_pretrained(where, return_unused_kwargs=True, **place, **options)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        params: Params | None = None,
        *,
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
        **options: Unpack[SavingOptions],
    ) -> None:
        """Writes ``config.json`` and ``model.safetensors``.

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

    def save_arrays(self, arrays: Deferred, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Writes the config and the weights given.

        Args:
            arrays: As in `clipmb.common.pretrained.save_model`.
            save_directory: As there.
            **options: As there.
        """
        save_model(self.config, type(self).__name__.removeprefix("Flax"), arrays, save_directory, **options)

    def to_arrays(self, params: Params | None = None) -> Deferred:
        """Returns every parameter by its canonical name, in canonical layout, each made when it is asked for."""
        leaves = self._checked(self.params if params is None else params)
        return Deferred({spec.name: lazy_numpy(leaves[spec.path("flax")], spec) for spec in self._table()})

    def _checked(self, params: Params) -> dict[tuple[str, ...], Any]:
        """Returns the leaves of a tree by path, once it fits the model."""
        leaves = leaves_of(params)
        found = {".".join(map(str, path)): np.shape(leaf) for path, leaf in leaves.items()}
        expected = {".".join(spec.path("flax")): linen_shape(spec) for spec in self._table()}
        if problems := LoadingInfo.between(found, expected).problems():
            raise ValueError("\n  - ".join([f"params do not fit {type(self).__name__}. Problems:", *problems]))
        return leaves


def linen_shape(spec: Spec) -> tuple[int, ...]:
    """Returns the shape of a parameter in linen's layout."""
    axes = KINDS[spec.kind].axes
    return tuple(spec.shape[axis] for axis in axes) if axes else spec.shape


def plain(params: Params) -> dict[str, Any]:
    """Returns a tree as plain dicts."""
    return unfreeze(cast("dict[str, Any]", params))


def leaves_of(params: Params) -> dict[tuple[str, ...], Any]:
    """Returns the leaves of a tree by path."""
    return cast("dict[tuple[str, ...], Any]", flatten_dict(plain(params)))


def cast_leaves(params: Params, dtype: Any, mask: Any) -> Params:
    """Returns a tree with its floating-point leaves in a dtype where ``mask`` is True; everywhere when None."""

    def cast_leaf(leaf: Any, chosen: bool = True) -> Any:
        return leaf.astype(dtype) if chosen and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast_leaf, params) if mask is None else jax.tree.map(cast_leaf, params, mask)
