"""``from_pretrained`` and ``save_pretrained``, once, for the models of all frameworks."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from clipmb.common.checkpoint import OwnArrays, fit, read_safetensors, write_safetensors
from clipmb.common.config import CONFIG_NAME, BaseConfig
from clipmb.common.errors import CheckpointError, bad_input, one_of
from clipmb.common.hub import Source
from clipmb.common.parameters import Spec, specs
from clipmb.common.saving import Transaction

logger = logging.getLogger("clipmb")

DTYPES = ("float32", "float16", "bfloat16", "float64")
# Options of the former libraries that chose among file formats or loaders; there is one loader now, which needs none.
_UNNEEDED = (
    "from_pt", "from_tf", "from_flax", "use_safetensors", "weights_only", "low_cpu_mem_usage", "trust_remote_code",
    "_fast_init", "_from_auto", "_from_pipeline", "_commit_hash",
)  # fmt: skip


class PretrainedMixin:
    """Loading and saving of one head in one framework.

    A framework's base class implements `_from_arrays` and `_to_arrays`; everything else about files is here.
    """

    config_class: ClassVar[type[BaseConfig]]
    head: ClassVar[str]
    load_options: ClassVar[tuple[str, ...]] = ()  # what `_from_arrays` takes beyond the mixin's own options
    config: Any

    @classmethod
    def _from_arrays(
        cls, config: Any, arrays: dict[str, np.ndarray], initialised: list[Spec], dtype: str | None, **options: Any
    ) -> Any:
        """Builds the model around canonical arrays, and initialises the parameters that have none."""
        raise NotImplementedError

    def _to_arrays(self, **options: Any) -> dict[str, np.ndarray]:
        """Returns the canonical arrays of every parameter."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] | Source | None,
        *,
        config: Any = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        variant: str | None = None,
        state_dict: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Loads a model from a folder or the hub, whichever framework wrote it.

        A single tower loads from a checkpoint of the whole; a checkpoint that lacks something the model has, or has
        something that no CLIP has, is an error that lists all of it.

        Args:
            name_or_path: Folder or hub id; None with ``config`` and ``state_dict``.
            config: A config, or where to read one, instead of the checkpoint's own.
            dtype: "float32", "float16", "bfloat16", "float64" (or the framework's object for one), or "auto" for that
                of the file. The default is the framework's: float32 in PyTorch and TensorFlow.
            torch_dtype: The former name of ``dtype``.
            strict: Raise for missing and unexpected weights; otherwise initialise the missing ones anew.
            ignore_mismatched_sizes: Initialise weights of another shape anew instead of raising.
            output_loading_info: Return ``(model, info)`` with the lists missing_keys, unexpected_keys, mismatched_keys
                and error_msgs.
            variant: Read ``model.<variant>.safetensors``.
            state_dict: Canonical name to array or tensor, instead of the files.
            **options: ``subfolder``, ``revision``, ``cache_dir``, ``token``, ``local_files_only`` and
                ``force_download`` say where; fields of the config override it; the others go to the framework.

        Raises:
            CheckpointError: The files cannot be found or read, or do not fit the model.
            ValueError: An option or a config value is impossible.
            TypeError: An option is unknown.
        """
        for name in _UNNEEDED:
            options.pop(name, None)
        dtype = normal_dtype(torch_dtype if dtype is None else dtype, cls.__name__)
        source = None if name_or_path is None else Source.of(name_or_path, options)
        config, options = cls._config_for(source, config, options)
        if unknown := options.keys() - set(cls.load_options):
            raise bad_input(
                f"{cls.__name__}.from_pretrained takes fields of its config and {', '.join(cls.load_options)}",
                ", ".join(sorted(unknown)),
                "Remove or correct them",
                TypeError,
                shown=True,
            )
        if state_dict is not None:
            tensors: Mapping[str, np.ndarray] = {
                name: cls._canonical_array(value) for name, value in state_dict.items()
            }
        elif source is None:
            raise bad_input(
                "Without a folder or hub id a state_dict is needed",
                name_or_path,
                "Pass a name, or config= and state_dict=",
            )
        else:
            tensors = read_weights(source, variant)
        table = specs(config, cls.head)
        arrays, info = fit(
            tensors,
            table,
            cls.head,
            origin=source or "state_dict",
            strict=strict,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
        )
        if info.initialised:
            logger.warning("%s: initialised anew, train before use: %s", cls.__name__, ", ".join(info.initialised))
        if dtype == "auto":
            dtype = config.dtype or next((array.dtype.name for array in arrays.values()), None)
        initialised = [spec for spec in table if spec.name in set(info.initialised)]
        if state_dict is None:
            arrays = OwnArrays(arrays)
        model = cls._from_arrays(config, arrays, initialised, dtype, **options)
        return (model, info.to_dict()) if output_loading_info else model

    @classmethod
    def _config_for(cls, source: Source | None, config: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Returns the config, with the options that name its fields applied, and the other options."""
        given = source if config is None else config
        if given is None:
            raise bad_input("Without a folder or hub id a config is needed", None, "Pass config=")
        fields = given.to_dict() if isinstance(given, BaseConfig) else cls.config_class.get_config_dict(given)[0]
        if isinstance(given, cls.config_class):  # which files do not hold
            fields["attn_implementation"] = given.attn_choices()
        fields["_name_or_path"] = str(source or "")
        return cls.config_class.from_dict(fields, return_unused_kwargs=True, **options)

    @classmethod
    def _canonical_array(cls, value: Any) -> np.ndarray:
        """Turns one value of a ``state_dict`` into numpy."""
        return np.asarray(value)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
        **options: Any,
    ) -> None:
        """Writes ``config.json`` and ``model.safetensors``, which every framework and transformers 4 and 5 read.

        A kill at any moment leaves the files that were there, or the new ones.

        Args:
            folder: Where; made when it is missing.
            max_shard_size: Files larger than this are split and given an index.
            variant: Write ``model.<variant>.safetensors``.
            **options: ``params`` in Flax. ``safe_serialization`` is accepted when it is True, since safetensors is the
                only format that a model writes itself.

        Raises:
            ValueError: ``safe_serialization=False`` was asked for, or the folder is a file.
            TypeError: An option is unknown.
        """
        if not options.pop("safe_serialization", True):
            raise bad_input(
                "Models are written as safetensors", "safe_serialization=False", "Convert the saved folder", shown=True
            )
        arrays = self._to_arrays(**options)
        fields = self.config.to_dict()
        fields["architectures"] = [self.head]
        dtypes = {array.dtype.name for array in arrays.values()}
        fields["dtype"] = dtypes.pop() if len(dtypes) == 1 else fields.get("dtype", "float32")
        with Transaction(folder) as save:
            save.write(CONFIG_NAME, type(self.config).from_dict(fields).to_json_string())
            write_safetensors(save, arrays, max_shard_size=max_shard_size, variant=variant)


def read_weights(source: Source, variant: str | None = None) -> dict[str, np.ndarray]:
    """Reads the weights of a source: name in the file to array.

    Raises:
        CheckpointError: There are none, or they cannot be read.
    """
    if (tensors := read_safetensors(source, variant)) is not None:
        return tensors
    wanted = f"model.{variant}.safetensors" if variant else "model.safetensors"
    raise CheckpointError(f"{source} has no {wanted} and no index of shards.{source.listing()}")


def normal_dtype(value: Any, owner: str) -> str | None:
    """Returns the name of a dtype given as text or as an object of any framework; None and "auto" as they are.

    Raises:
        ValueError: It is not a dtype that a model can have.
    """
    if value is None:
        return None
    name = value if isinstance(value, str) else getattr(value, "name", None) or getattr(value, "__name__", str(value))
    name = str(name).removeprefix("torch.")
    name = {"half": "float16", "float": "float32", "double": "float64"}.get(name, name)
    if name not in (*DTYPES, "auto"):
        raise one_of(f"dtype of {owner}", value, (*DTYPES, "auto"))
    return name
