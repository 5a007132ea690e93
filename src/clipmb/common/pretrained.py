"""``from_pretrained`` and ``save_pretrained``, once, for the models of all frameworks."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar, Unpack, overload

import numpy as np

from clipmb.common.checkpoint import LoadingInfo, OwnArrays, fit, formats, write_safetensors
from clipmb.common.checkpoint.fitting import mapped
from clipmb.common.checkpoint.tensors import Deferred, Loaded, not_finite
from clipmb.common.config import CONFIG_NAME, BaseConfig
from clipmb.common.dtypes import DTYPES, dtype_name
from clipmb.common.errors import bad_input, log_once, logger, one_of
from clipmb.common.former import SavingOptions, check_saving, drop_unneeded
from clipmb.common.hub import Source
from clipmb.common.parameters import HEADS, Spec, specs
from clipmb.common.saving import Transaction, read_whole
from clipmb.common.uploading import Uploadable, uploaded

Method = TypeVar("Method", bound=Callable[..., Any])

_VOCABULARY = 49408  # CLIP's, whose last token is the end token


class _Read(NamedTuple):
    """What `from_pretrained` reads before it makes a model of it.

    Attributes:
        config: That of the head.
        arrays: Canonical name to array.
        info: How the file differed from the model.
        initialised: The parameters that are to be drawn.
        options: Those that belong to the framework.
    """

    config: Any
    arrays: dict[str, np.ndarray]
    info: LoadingInfo
    initialised: list[Spec]
    options: dict[str, Any]


def called_like(method: Method) -> Callable[[Callable[..., Any]], Method]:
    """Gives ``__call__``, which frameworks leave untyped, the signature of a model's own method."""
    return lambda _: method


class PretrainedMixin(Uploadable):
    """Loading and saving of one head in one framework.

    A framework's base class implements `from_arrays` and `to_arrays`; everything else about files is here.
    """

    head: ClassVar[str] = ""
    config_class: ClassVar[type[BaseConfig]]
    base_model_prefix = "clip"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    generation_config = None  # CLIP generates no text
    _auto_class = None  # the Auto classes of transformers read the folders as they are
    load_options: ClassVar[tuple[str, ...]] = ()  # what `from_arrays` takes beyond the mixin's own options
    framework: ClassVar[str]  # "pt", "tf", "flax" or "onnx"
    config: Any

    @classmethod
    def _from_config(  # the name that transformers' Auto classes call
        cls, config: Any, *, attn_implementation: Any = None, dtype: Any = None, torch_dtype: Any = None, **options: Any
    ) -> Self:
        """Builds a model with new weights from a config, which stays as it is, with another attention or dtype."""
        config = copy.deepcopy(config)
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation  # the name that transformers' configs have too
        if (chosen := torch_dtype if dtype is None else dtype) is not None:
            options["dtype"] = chosen
        return cls(config, **options)  # pyright: ignore[reportCallIssue] - the constructors are those of the frameworks

    def set_attn_implementation(self, attn_implementation: str | dict[str, str]) -> None:
        """Chooses "eager" or "sdpa" attention, for the full model or per tower."""
        self.config.attn_implementation = attn_implementation

    @classmethod
    def can_generate(cls) -> bool:
        """Returns False: CLIP generates no text."""
        return False

    def get_output_embeddings(self) -> None:
        """Returns None: CLIP predicts no tokens."""

    @property
    def name_or_path(self) -> str:
        """Where the model was read from."""
        return self.config.name_or_path

    @name_or_path.setter
    def name_or_path(self, value: str) -> None:
        self.config.name_or_path = value

    @classmethod
    def from_arrays(cls, *args: Any, **options: Any) -> Any:
        """Builds the model around canonical arrays, and draws the parameters that have none.

        Args:
            *args: ``config``, that of the head; ``arrays``, canonical name to array in canonical layout;
                ``initialised``, the parameters that have no array and are drawn from their initial distribution;
                ``dtype``, the name of the dtype of the parameters, or None for the framework's default.
            **options: Those of ``load_options``.
        """
        raise NotImplementedError

    def to_arrays(self) -> Deferred:
        """Returns every parameter by its canonical name, in canonical layout, each made when it is asked for."""
        raise NotImplementedError

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | Source | None,
        *,
        config: Any = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: Literal[False] = False,
        variant: str | None = None,
        state_dict: Mapping[str, Any] | None = None,
        key_mapping: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | Source | None,
        *,
        output_loading_info: Literal[True],
        **options: Any,
    ) -> tuple[Self, dict[str, list]]: ...

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | Source | None,
        *,
        config: Any = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        variant: str | None = None,
        state_dict: Mapping[str, Any] | None = None,
        key_mapping: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Any:
        """Loads a model from a folder, a single file or the Hub, whichever framework wrote it and in which format.

        A single tower loads from the checkpoint of a CLIPModel. Whatever the model has and the checkpoint lacks, or the
        checkpoint has and no CLIP has, is listed in one error.

        Args:
            pretrained_model_name_or_path: Folder, file of weights or Hub id; None with ``config`` and ``state_dict``.
            config: A config, or where to read one. The default is the checkpoint's own: its ``config.json``, or
                without that file the config that its format holds or its shapes imply.
            dtype: "float32", "float16", "bfloat16", "float64" (or the framework's object for one), or "auto" for that
                of the file. The default is the framework's: float32 in PyTorch and TensorFlow.
            torch_dtype: An older name of ``dtype``.
            strict: Raise for missing and unexpected weights; otherwise initialise the missing ones and ignore the
                unexpected ones.
            ignore_mismatched_sizes: Initialise weights of another shape instead of raising.
            output_loading_info: Return ``(model, info)`` with the lists missing_keys, unexpected_keys, mismatched_keys
                and error_msgs.
            variant: Read ``model.<variant>.safetensors``.
            state_dict: Canonical name to array or tensor, instead of the files.
            key_mapping: Regular expression to replacement: in the name of each weight, the first that is found counts.
            **options: ``subfolder``, ``revision``, ``cache_dir``, ``token``, ``local_files_only`` and
                ``force_download`` belong to the source; fields of the config override it; the others go to the
                framework.

        Returns:
            The model, in PyTorch in evaluation mode; with ``output_loading_info`` the model and the lists.

        Raises:
            CheckpointError: The files cannot be found or read, or do not fit the model.
            ValueError: An option or a config value is impossible.
            TypeError: An option is unknown.
        """
        name_or_path = pretrained_model_name_or_path
        dtype = normal_dtype(torch_dtype if dtype is None else dtype, cls.__name__)
        source = None if name_or_path is None else Source.of(name_or_path, options)
        drop_unneeded(options)
        tensors = None
        if state_dict is not None:
            tensors = {name: cls.canonical_array(value) for name, value in state_dict.items()}

        def read() -> _Read:
            return cls._read(source, config, variant, tensors, key_mapping, options, strict, ignore_mismatched_sizes)

        saved_into = None if source is None or source.file is not None else source.folder
        found = read_whole(saved_into, read)
        if found.info.initialised:
            names = ", ".join(found.info.initialised)
            logger.warning("%s: newly initialised; train the model before using it: %s", cls.__name__, names)
        _check_pooling(found.config, cls.head)
        arrays = found.arrays
        if dtype == "auto":
            dtype = found.config.to_dict().get("dtype") or next((array.dtype.name for array in arrays.values()), None)
        warn_not_finite(source or "state_dict", not_finite(arrays, dtype), dtype)
        if state_dict is None:
            arrays = OwnArrays(arrays)
        model = cls.from_arrays(found.config, arrays, found.initialised, dtype, **found.options)
        return (model, found.info.to_dict()) if output_loading_info else model

    @classmethod
    def _read(
        cls,
        source: Source | None,
        config: Any,
        variant: str | None,
        tensors: Mapping[str, np.ndarray] | None,
        key_mapping: Mapping[str, str] | None,
        options: Mapping[str, Any],
        strict: bool,
        ignore_mismatched_sizes: bool,
    ) -> _Read:
        """Reads config and weights and compares them: the part that is repeated if another process saves meanwhile."""
        origin = source or "state_dict"
        if config is None and tensors is None and source is not None and source.find(CONFIG_NAME) is None:
            loaded = load_weights(source, variant).of(cls.head)
            tensors, config = loaded.tensors, _config_of(loaded, source)
        config, left = cls._config_for(source, config, dict(options))
        if unknown := left.keys() - set(cls.load_options):
            raise bad_input(
                f"{cls.__name__}.from_pretrained takes fields of its config and {', '.join(cls.load_options)}",
                ", ".join(sorted(unknown)),
                "Remove or correct them",
                TypeError,
                shown=True,
            )
        if tensors is None and source is None:
            raise bad_input(
                "Without a folder or Hub id a state_dict is needed", None, "Pass a name, or config= and state_dict="
            )
        if tensors is None and source is not None:
            tensors = load_weights(source, variant).of(cls.head).tensors
        table = specs(config, cls.head)
        tensors = tensors or {}
        arrays, info = fit(
            mapped(tensors, key_mapping) if key_mapping else tensors,
            table,
            cls.head,
            origin=origin,
            strict=strict,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
        )
        initialised = set(info.initialised)
        return _Read(config, arrays, info, [spec for spec in table if spec.name in initialised], left)

    @classmethod
    def _config_for(cls, source: Source | None, config: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Returns the config, with its fields among the options applied, and the other options."""
        given: Any = source if config is None else config
        if given is None:
            raise bad_input("Without a folder or Hub id a config is needed", None, "Pass config=")
        fields = given.to_dict() if hasattr(given, "to_dict") else cls.config_class.get_config_dict(given)[0]
        if isinstance(given, cls.config_class):  # which files do not hold
            fields["attn_implementation"] = given.attn_choices()
        fields["_name_or_path"] = str(source or "")
        return cls.config_class.from_dict(fields, return_unused_kwargs=True, **options)

    @classmethod
    def canonical_array(cls, value: Any) -> np.ndarray:
        """Returns one value of a ``state_dict`` as numpy."""
        return np.asarray(value)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
        **options: Unpack[SavingOptions],
    ) -> None:
        """Writes ``config.json`` and ``model.safetensors``, which every framework and transformers 4 and 5 read.

        One tensor at a time is taken from the model and its device. A process killed at any moment leaves the files
        that were there, or the new ones.

        Args:
            save_directory: The folder; made when it is missing.
            max_shard_size: Files larger than this are split and given an index.
            variant: Write ``model.<variant>.safetensors``.
            **options: The arguments of transformers 4's `save_pretrained`: ``push_to_hub=True`` also uploads the files,
                to ``repo_id`` or a repository of the folder's name, with the options of `push_to_hub`.

        Raises:
            OSError: The disk has no room for the weights, or the files cannot be written.
            ValueError: ``safe_serialization=False`` was asked for, or the folder is a file.
            TypeError: An option is unknown.
        """
        if check_saving(options):
            with uploaded(self, save_directory, options):
                self.save_arrays(self.to_arrays(), save_directory, max_shard_size=max_shard_size, variant=variant)

    def save_arrays(self, arrays: Deferred, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Writes the config and the weights given.

        Args:
            arrays: As in `save_model`.
            save_directory: As in `save_model`.
            **options: As in `save_model`.
        """
        save_model(self.config, self.head, arrays, save_directory, **options)


def save_model(
    config: Any,
    architecture: str,
    arrays: Deferred,
    save_directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
) -> None:
    """Writes a config and weights.

    Args:
        config: The model's config.
        architecture: What the config calls the model.
        arrays: Canonical name to array.
        save_directory: The folder; made when it is missing.
        max_shard_size: As in `PretrainedMixin.save_pretrained`.
        variant: As in `PretrainedMixin.save_pretrained`.

    Raises:
        ValueError: The folder is a file.
    """
    content = config_text(config, architecture, (tensor.dtype.name for tensor in arrays.lazy.values()))
    with Transaction(save_directory) as save:
        save.reserve(sum(tensor.nbytes for tensor in arrays.lazy.values()))
        save.write(CONFIG_NAME, content)
        write_safetensors(save, arrays, max_shard_size=max_shard_size, variant=variant)


def read_weights(source: Source, variant: str | None = None) -> Mapping[str, np.ndarray]:
    """Reads the weights of a source, in any format: name in the file to array.

    For a source without safetensors, the log says once which command converts it.

    Raises:
        CheckpointError: There are none, or they cannot be read.
    """
    return load_weights(source, variant).tensors


def warn_not_finite(source: Any, broken: Sequence[str], dtype: str | None = None) -> None:
    """Says which weights have NaN or infinity, if some have.

    Args:
        source: Where they are from.
        broken: Their names, as `not_finite` finds them.
        dtype: What they were rounded to, if not what they are in.
    """
    if broken:
        logger.warning(
            "%s: NaN or infinity%s in %s%s. Repair or replace the checkpoint.",
            source, " in float16" if dtype == "float16" else "",
            ", ".join(broken[:5]), f" and {len(broken) - 5} more weights" if len(broken) > 5 else "",
        )  # fmt: skip


def _config_of(loaded: Loaded, source: Source) -> BaseConfig:
    """Returns the config of weights without a ``config.json``, and says once what was inferred about the activation."""
    config, decisions = formats.config_of(loaded, source)
    if loaded.config is None:
        log_once(f"{source} has no config. Inferred: {decisions['activation']}. Pass config= for another.")
    return config


def load_weights(source: Source, variant: str | None = None) -> Loaded:
    """Reads as `read_weights` does, and returns the format, files and config with the weights."""
    loaded = formats.load(source, variant)
    if loaded.format != formats.OWN:
        log_once(
            f"{source} has no {formats.OWN} file; reading its {loaded.format} files instead, which is slower. "
            f"To convert them once: clipmb convert {source} NEW_FOLDER --to {formats.OWN}"
        )
    return loaded


def _check_pooling(config: BaseConfig, head: str) -> None:
    """Says once when texts are pooled at the largest id, and the largest one is not CLIP's end token."""
    text: Any = getattr(config, "text_config", config)
    if HEADS[head][0] and text.eos_token_id == 2 and text.vocab_size > _VOCABULARY:
        log_once(
            f"eos_token_id 2 means that texts are pooled at their largest id, which with {text.vocab_size} tokens may "
            "not be the end token. Set eos_token_id to the id of the end token: 49407 in CLIP's vocabulary."
        )


def dummy_arrays(config: Any, head: str, ids: Any = np.int64) -> dict[str, np.ndarray]:
    """Returns inputs that fit a head: ids as in transformers 4 (3, 5), and images (3, channels, size, size).

    Args:
        config: The model's config.
        head: A key of `HEADS`.
        ids: The dtype of the ids.
    """
    found: dict[str, np.ndarray] = {}
    if HEADS[head][0]:
        found["input_ids"] = np.array([[7, 6, 0, 0, 1], [1, 2, 3, 0, 0], [0, 0, 0, 4, 5]], ids)
    if HEADS[head][1]:
        vision = getattr(config, "vision_config", config)
        found["pixel_values"] = np.ones((3, vision.num_channels, vision.image_size, vision.image_size), np.float32)
    return found


def config_text(config: Any, head: str, dtypes: Iterable[str]) -> str:
    """Returns the text of the ``config.json`` of saved weights.

    Args:
        config: The model's config.
        head: What becomes its architecture: a key of `HEADS`, or the name of a program's own model.
        dtypes: Names of the weights' dtypes; a single one becomes the config's, several leave the config's alone.
    """
    fields = config.to_dict()
    fields["architectures"] = [head]
    names = set(dtypes)
    fields["dtype"] = names.pop() if len(names) == 1 else fields.get("dtype", "float32")
    return type(config).from_dict(fields).to_json_string()


def normal_dtype(value: Any, owner: str) -> str | None:
    """Returns the name of a dtype given as text or as an object of any framework; None and "auto" as they are.

    Raises:
        ValueError: It is not a dtype that a model can have.
    """
    name = dtype_name(value)
    if name is None:
        return None
    name = {"half": "float16", "float": "float32", "double": "float64"}.get(name, name)
    if name not in (*DTYPES, "auto"):
        raise one_of(f"dtype of {owner}", value, (*DTYPES, "auto"))
    return name
