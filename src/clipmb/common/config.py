"""The configuration of the two towers and of the full model, read from and written to ``config.json``."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np

from clipmb.common.dtypes import dtype_name
from clipmb.common.errors import bad_input, boolean, one_of, whole_number
from clipmb.common.former import check_saving
from clipmb.common.hub import Source
from clipmb.common.json_files import JsonSettings, read_json
from clipmb.common.saving import Transaction
from clipmb.common.uploading import Uploadable, uploaded

CONFIG_NAME = "config.json"

# Every activation of the PyTorch models of transformers 4 that has no parameters of its own.
ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
    "gelu_pytorch_tanh", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6",
    "sigmoid", "silu", "swish", "tanh",
)  # fmt: skip

_ATTENTIONS = ("eager", "sdpa")
_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# Bounds on what a small file may claim: far beyond every CLIP, and far below what would fill the memory.
_MOST = 2**31 - 1
_MOST_LAYERS = 1_000
_MOST_LABELS = 500_000

ConfigT = TypeVar("ConfigT", bound="BaseConfig")


class BaseConfig(JsonSettings, Uploadable):
    """What the three configs share: generic fields, dictionaries, files, comparison.

    Keyword arguments that the class does not know become attributes and are written back.

    Args:
        dtype: Name of the dtype the weights were saved in ("float32", "bfloat16", …); ``torch_dtype`` is the same.
        attn_implementation: "eager", "sdpa" (fused) or None for the default, which is fused.
        output_attentions: Default of the argument of the same name.
        output_hidden_states: Default of the argument of the same name.
        return_dict: Default of the argument of the same name.
        torchscript: Let PyTorch's models return tuples, which is all that ``torch.jit.trace`` takes.
        id2label: Class index to name; read only by image classification.
        label2id: The inverse; made from ``id2label`` when missing.
        num_labels: Number of classes; names are LABEL_0, … when ``id2label`` is missing.
        problem_type: Which loss image classification uses.
        **extra: Kept as attributes.

    Raises:
        ValueError: A value is impossible; the message names the field.
    """

    model_type: ClassVar[str] = ""
    attribute_map: ClassVar[dict[str, str]] = {}
    sub_configs: ClassVar[dict[str, type[BaseConfig]]] = {}
    base_config_key: ClassVar[str] = ""

    def __init__(self, /, **extra: Any) -> None:
        legacy_dtype = extra.pop("torch_dtype", None)
        self._dtype = _dtype(extra.pop("dtype", None) or legacy_dtype)
        self.return_dict: bool = boolean("return_dict", extra.pop("return_dict", True))
        self.torchscript: bool = boolean("torchscript", extra.pop("torchscript", False))
        self.output_attentions: bool = boolean("output_attentions", extra.pop("output_attentions", False))
        self.output_hidden_states: bool = boolean("output_hidden_states", extra.pop("output_hidden_states", False))
        self.architectures: list[str] | None = _names("architectures", extra.pop("architectures", None))
        self.problem_type: str | None = extra.pop("problem_type", None)
        if self.problem_type not in (None, *_PROBLEM_TYPES):
            raise one_of("problem_type", self.problem_type, _PROBLEM_TYPES)
        self._name_or_path: str = str(extra.pop("_name_or_path", None) or extra.pop("name_or_path", ""))
        self._commit_hash: str | None = extra.pop("_commit_hash", None)
        private = extra.pop("_attn_implementation", None)
        self._attn_implementation_internal: str | None = None
        attention = extra.pop("attn_implementation", None) or private
        if attention is not None:  # otherwise towers keep their own
            self.attn_implementation = attention
        self._set_labels(extra.pop("id2label", None), extra.pop("label2id", None), extra.pop("num_labels", None))
        extra.pop("model_type", None)
        self._keep(extra)

    def _set_labels(self, id2label: Any, label2id: Any, num_labels: Any) -> None:
        if num_labels is not None:
            num_labels = whole_number("num_labels", num_labels, 0, _MOST_LABELS)
        given = None if id2label is None else _labels(id2label)
        if given is not None and num_labels is not None and len(given) != num_labels:
            raise bad_input(
                "num_labels must be the number of entries of id2label",
                f"num_labels={num_labels}, id2label with {len(given)} entries",
                "Pass one of the two",
                shown=True,
            )
        if given is None:
            given = {i: f"LABEL_{i}" for i in range(2 if num_labels is None else num_labels)}
        self.id2label: dict[int, str] = given
        self.label2id: dict[str, int] = (
            {name: key for key, name in given.items()} if label2id is None else _label_numbers(label2id)
        )

    @property
    def num_labels(self) -> int:
        """Number of classes of image classification."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        if value != self.num_labels:
            self._set_labels(None, None, value)

    if not TYPE_CHECKING:  # which goes on finding misspelt names

        def __getattr__(self, name: str) -> Any:
            if name in _OF_OTHER_MODELS:
                return copy.copy(_OF_OTHER_MODELS[name])
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def dtype(self) -> Any:
        """Dtype of the saved weights, or None: PyTorch's own where PyTorch is in use, otherwise its name."""
        return None if self._dtype is None else getattr(sys.modules.get("torch"), self._dtype, self._dtype)

    @dtype.setter
    def dtype(self, value: Any) -> None:
        self._dtype = _dtype(value)

    @property
    def torch_dtype(self) -> Any:
        """``dtype``, by its name in transformers 4."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, value: Any) -> None:
        self.dtype = value

    @property
    def attn_implementation(self) -> str | None:
        """How attention is computed: "eager", "sdpa" (fused), or None for the default.

        The full model's is set in its towers too, or one by one: {"text_config": …, "vision_config": …}.

        Raises:
            ValueError: Something else is assigned, or for something that is not a tower.
        """
        return self._attn_implementation_internal

    @attn_implementation.setter
    def attn_implementation(self, value: str | dict[str, str | None] | None) -> None:
        parts = ("", *self.sub_configs)
        choices = value if isinstance(value, dict) else dict.fromkeys(parts, value)
        for part, choice in choices.items():
            if part not in parts:
                raise one_of("A key of attn_implementation", part, parts)
            if choice not in (None, *_ATTENTIONS):
                raise one_of("attn_implementation", choice, _ATTENTIONS)
        for part, choice in choices.items():
            (getattr(self, part) if part else self)._attn_implementation_internal = choice

    @property
    def _attn_implementation(self) -> str | None:
        """``attn_implementation``, by its name in transformers 4."""
        return self.attn_implementation

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict[str, str | None] | None) -> None:
        self.attn_implementation = value

    def attn_choices(self) -> dict[str, str | None]:
        """Returns the choices by tower, to be assigned to another config's `attn_implementation`."""
        parts = {"": self, **{name: getattr(self, name) for name in self.sub_configs}}
        return {name: part.attn_implementation for name, part in parts.items()}

    @property
    def use_return_dict(self) -> bool:
        """``return_dict``, unless ``torchscript`` is set."""
        return self.return_dict and not self.torchscript

    @property
    def name_or_path(self) -> str:
        """Where the config was read from."""
        return self._name_or_path

    @name_or_path.setter
    def name_or_path(self, value: str) -> None:
        self._name_or_path = str(value)

    def to_dict(self) -> dict[str, Any]:
        """Returns every field, with ``model_type``, as JSON values; the generic ones only where they deviate."""
        fields = {key: copy.deepcopy(value) for key, value in self.__dict__.items() if not key.startswith("_")}
        fields["dtype"] = self._dtype
        for key, default in _GENERIC_DEFAULTS.items():
            if key in fields and fields[key] == default:
                del fields[key]
        if self.id2label == {i: f"LABEL_{i}" for i in range(2)}:
            del fields["id2label"], fields["label2id"]
        for key, value in fields.items():
            if isinstance(value, BaseConfig):
                fields[key] = value.to_dict()
        return {**fields, **copy.deepcopy(self._kept), "model_type": self.model_type}

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **options: Any
    ) -> None:
        """Writes ``config.json``.

        Args:
            save_directory: A folder; made when it is missing.
            push_to_hub: Also upload the file, with the options of `push_to_hub`; ``repo_id`` may be left out.
            **options: The arguments of transformers 4's `save_pretrained`.
        """
        options["push_to_hub"] = push_to_hub
        if not check_saving(options):
            return
        with uploaded(self, save_directory, options), Transaction(save_directory) as save:
            save.write(CONFIG_NAME, self.to_json_string())

    @classmethod
    def _build(
        cls, entries: dict[str, Any], changes: dict[str, Any], return_unused: bool
    ) -> Self | tuple[Self, dict[str, Any]]:
        fields = cls._own_part(copy.deepcopy(dict(entries)))
        unused = {}
        if return_unused:
            aliases = {"torch_dtype", "num_labels", "attn_implementation", "_attn_implementation"}
            known = set(cls()) | set(fields) | aliases
            unused = {key: changes[key] for key in changes if key not in known}
        changes = {key: value for key, value in changes.items() if key not in unused}
        for key, value in changes.items():
            nested = fields.get(key)
            fields[key] = {**nested, **value} if isinstance(nested, dict) and isinstance(value, dict) else value
        if "torch_dtype" in changes:
            fields.pop("dtype", None)
        if "num_labels" in changes and "id2label" not in changes:
            if len(fields.get("id2label") or ()) == changes["num_labels"]:
                del fields["num_labels"]
            else:
                fields.pop("id2label", None)
                fields.pop("label2id", None)
        config = cls(**fields)
        return (config, unused) if return_unused else config

    @classmethod
    def _own_part(cls, fields: dict[str, Any]) -> dict[str, Any]:
        kind = fields.get("model_type")
        if isinstance(kind, str) and kind.startswith("metaclip_2"):
            raise bad_input(
                "MetaCLIP 2 is not a CLIP model: it pools texts at the first end token, and has another tokenizer",
                f"model_type {kind!r}",
                "Load it with transformers' MetaClip2Model",
                shown=True,
            )
        nested = fields.get(cls.base_config_key)
        if cls.base_config_key and isinstance(nested, dict) and kind != cls.model_type:
            generic = {key: fields[key] for key in ("dtype", "torch_dtype") if key in fields}
            nested = {**generic, **nested}
            nested.pop("model_type", None)
            return nested
        if kind is not None and kind != cls.model_type:
            raise bad_input(
                f"{cls.__name__} reads configs of model_type {cls.model_type!r}",
                f"model_type {kind!r}",
                "Load it with the class of that type, or correct model_type in the file",
                shown=True,
            )
        return fields

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | Source, **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads the content of ``config.json`` and returns it with the options that are not about where it is."""
        entries, changes, _ = cls._read(pretrained_model_name_or_path, options)
        return entries, changes

    @classmethod
    def _read(
        cls, name_or_path: str | os.PathLike[str] | Source, options: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any], str]:
        changes = dict(options)
        path = Path(name_or_path) if isinstance(name_or_path, str | os.PathLike) else None
        commit = None
        if path is None or not path.is_file() or path.suffix != ".json":
            source = Source.of(name_or_path, changes)
            path, commit = source.require(CONFIG_NAME), source.commit()
        entries = read_json(path)
        return {**entries, "_name_or_path": str(name_or_path), "_commit_hash": commit}, changes, str(path)

    def update(self, config_dict: dict[str, Any]) -> None:
        """Sets several fields, with the same checks as at construction."""
        kept = {
            "_name_or_path": self._name_or_path,
            "_commit_hash": self._commit_hash,
            "attn_implementation": self.attn_choices(),
        }
        changed = type(self).from_dict(self.to_dict(), **{**kept, **config_dict})
        self.__dict__.update(changed.__dict__)

    def update_from_string(self, update_str: str) -> None:
        """Sets several fields that are given as text, ``"projection_dim=256,hidden_act=gelu"``.

        Raises:
            ValueError: The text has another form, a field is missing, or a value is impossible.
        """
        changes = {}
        for part in update_str.split(","):
            name, equals, value = part.partition("=")
            if not equals or name not in set(self):
                raise bad_input(
                    "Fields are given as name=value, separated by commas", part, "Name fields of the config"
                )
            try:
                changes[name] = json.loads(value.lower() if value.lower() in ("true", "false") else value)
            except ValueError:
                changes[name] = value
        self.update(changes)

    def get_text_config(self, decoder: bool = False, encoder: bool = False) -> BaseConfig:
        """Returns the config of the text tower, which for a single tower is the config itself."""
        return getattr(self, "text_config", self)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        skipped = dict.fromkeys(("_name_or_path", "_commit_hash", "_attn_implementation_internal"))  # no part of it
        return {**self.__dict__, **skipped} == {**other.__dict__, **skipped}

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[str]:
        return iter(["dtype", *(key for key in self.__dict__ if not key.startswith("_"))])

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


_GENERIC_DEFAULTS = {
    "dtype": None,
    "return_dict": True,
    "torchscript": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "architectures": None,
    "problem_type": None,
}


# Fields of other models that configs of transformers 4 have too; written only where a file or the caller has them.
_OF_OTHER_MODELS = {
    **dict.fromkeys(
        ("is_encoder_decoder", "is_decoder", "add_cross_attention", "output_scores", "has_no_defaults_at_init"), False
    ),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"), None),
    **dict.fromkeys(
        ("tokenizer_class", "prefix", "task_specific_params", "finetuning_task", "transformers_version"), None
    ),
    "tie_word_embeddings": True,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
}


class _TowerConfig(BaseConfig):
    """What the text and the vision tower share."""

    hidden_size: int
    intermediate_size: int
    projection_dim: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float
    attention_dropout: float
    initializer_range: float
    initializer_factor: float

    def _check(self, *counts: str) -> None:
        for field in ("hidden_size", "intermediate_size", "projection_dim", "num_attention_heads", *counts):
            setattr(self, field, whole_number(field, getattr(self, field), 1, _MOST))
        self.num_hidden_layers = whole_number("num_hidden_layers", self.num_hidden_layers, 0, _MOST_LAYERS)
        if self.hidden_size % self.num_attention_heads:
            raise bad_input(
                "hidden_size must be divisible by num_attention_heads",
                f"hidden_size={self.hidden_size}, num_attention_heads={self.num_attention_heads}",
                "Change one of them",
                shown=True,
            )
        if self.hidden_act not in ACTIVATIONS:
            raise one_of("hidden_act", self.hidden_act, ACTIVATIONS)
        _require_number("layer_norm_eps", self.layer_norm_eps, above=0.0)
        _require_number("initializer_range", self.initializer_range)
        _require_number("initializer_factor", self.initializer_factor)
        _require_number("attention_dropout", self.attention_dropout, below=1.0)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


class CLIPTextConfig(_TowerConfig):
    """Configuration of the text tower; the defaults are those of ViT-B/32.

    Args:
        vocab_size: Number of token embeddings.
        hidden_size: Width of the tower.
        intermediate_size: Width inside the MLP.
        projection_dim: Width of the shared space, for the text model with projection alone.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Number of heads; divides ``hidden_size``.
        max_position_embeddings: Longest sequence.
        hidden_act: One of `ACTIVATIONS`.
        layer_norm_eps: Epsilon of every layer normalisation.
        attention_dropout: Probability of dropping an attention weight in training, in [0, 1).
        initializer_range: Standard deviation scale of the initialisation; text embeddings do not use it.
        initializer_factor: Factor on every standard deviation of the initialisation.
        pad_token_id: Id of padding.
        bos_token_id: Id of the start token.
        eos_token_id: Id of the end token, at whose first position the text is pooled; 2 stands for "the largest id of
            each row", as the OpenAI checkpoints' configs say.
        **kwargs: See `BaseConfig`.
    """

    model_type = "clip_text_model"
    base_config_key = "text_config"

    def __init__(
        self,
        /,
        vocab_size: int = 49408,
        hidden_size: int = 512,
        intermediate_size: int = 2048,
        projection_dim: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        initializer_factor: float = 1.0,
        pad_token_id: int | None = 1,
        bos_token_id: int | None = 49406,
        eos_token_id: int = 49407,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.projection_dim = projection_dim
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.initializer_factor = initializer_factor
        self.pad_token_id = None if pad_token_id is None else whole_number("pad_token_id", pad_token_id, -1)
        self.bos_token_id = None if bos_token_id is None else whole_number("bos_token_id", bos_token_id, -1)
        self.eos_token_id = whole_number("eos_token_id", eos_token_id, 0)
        self._check("vocab_size", "max_position_embeddings")


class CLIPVisionConfig(_TowerConfig):
    """Configuration of the vision tower; the defaults are those of ViT-B/32.

    Args:
        hidden_size: Width of the tower.
        intermediate_size: Width inside the MLP.
        projection_dim: Width of the shared space, for the vision model with projection alone.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Number of heads; divides ``hidden_size``.
        num_channels: Colour channels of an image.
        image_size: Height and width in pixels. What is left of it beyond a multiple of ``patch_size`` is not seen.
        patch_size: Height and width of a patch in pixels.
        hidden_act: One of `ACTIVATIONS`.
        layer_norm_eps: Epsilon of every layer normalisation.
        attention_dropout: Probability of dropping an attention weight in training, in [0, 1).
        initializer_range: Standard deviation of patch and position embeddings at initialisation.
        initializer_factor: Factor on every standard deviation of the initialisation.
        **kwargs: See `BaseConfig`.

    Raises:
        ValueError: A value is impossible; the message names the field.
    """

    model_type = "clip_vision_model"
    base_config_key = "vision_config"

    def __init__(
        self,
        /,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        projection_dim: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_channels: int = 3,
        image_size: int = 224,
        patch_size: int = 32,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        initializer_factor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.projection_dim = projection_dim
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.initializer_factor = initializer_factor
        self._check("num_channels", "image_size", "patch_size")
        if self.image_size < self.patch_size:
            raise bad_input(
                "image_size must be at least patch_size",
                f"image_size={image_size}, patch_size={patch_size}",
                "Change one of them",
                shown=True,
            )

    @property
    def num_patches(self) -> int:
        """Number of whole patches of an image of ``image_size``."""
        return (self.image_size // self.patch_size) ** 2


class CLIPConfig(BaseConfig):
    """Configuration of the full model: two towers and the space they share.

    Args:
        text_config: A `CLIPTextConfig` or a dictionary of its fields.
        vision_config: A `CLIPVisionConfig` or a dictionary of its fields.
        projection_dim: Width of the shared space.
        logit_scale_init_value: Initial logarithm of the factor on the cosine similarities.
        **kwargs: See `BaseConfig`. The legacy ``text_config_dict`` and ``vision_config_dict``, when not None, replace
            *every* field of their part: keys that they lack are reset to the defaults, as in transformers 4.
    """

    model_type = "clip"
    sub_configs: ClassVar[dict[str, type[BaseConfig]]] = {
        "text_config": CLIPTextConfig,
        "vision_config": CLIPVisionConfig,
    }

    def __init__(
        self,
        /,
        text_config: CLIPTextConfig | dict[str, Any] | None = None,
        vision_config: CLIPVisionConfig | dict[str, Any] | None = None,
        projection_dim: int = 512,
        logit_scale_init_value: float = 2.6592,
        **kwargs: Any,
    ) -> None:
        text_config = _with_legacy(CLIPTextConfig, text_config, kwargs.pop("text_config_dict", None))
        vision_config = _with_legacy(CLIPVisionConfig, vision_config, kwargs.pop("vision_config_dict", None))
        kwargs.pop("initializer_factor", None)  # always 1 for the full model, as in transformers 4
        self.text_config: CLIPTextConfig = text_config
        self.vision_config: CLIPVisionConfig = vision_config
        super().__init__(**kwargs)
        self.projection_dim = whole_number("projection_dim", projection_dim, 1, _MOST)
        self.logit_scale_init_value = logit_scale_init_value
        self.initializer_factor = 1.0
        _require_number("logit_scale_init_value", logit_scale_init_value, above=-math.inf)

    @classmethod
    def from_text_vision_configs(
        cls, text_config: CLIPTextConfig, vision_config: CLIPVisionConfig, **kwargs: Any
    ) -> Self:
        """Builds the config of the full model from those of its towers.

        Args:
            text_config: Config of the text tower; copied.
            vision_config: Config of the vision tower; copied.
            **kwargs: Other arguments of `CLIPConfig`.
        """
        return cls(text_config=text_config.to_dict(), vision_config=vision_config.to_dict(), **kwargs)

    @classmethod
    def _own_part(cls, fields: dict[str, Any]) -> dict[str, Any]:
        fields = super()._own_part(fields)
        for key in ("text_config", "vision_config"):
            if isinstance(fields.get(key), dict):
                fields[key].pop("transformers_version", None)
        return fields


def _dtype(value: Any) -> str | None:
    if isinstance(value, bool | int | float | list | tuple | Mapping):
        raise bad_input("dtype must be the name of a dtype", value, 'Pass for example "float32"')
    return dtype_name(value)


def _names(field: str, value: Any) -> list[str] | None:
    if value is not None and not (isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)):
        raise bad_input(f"{field} must be a list of names", value, f"Correct {field}")
    return None if value is None else list(value)


def _label_number(field: str, value: Any) -> int:
    """Returns the number of a class, which in JSON is a text where it is a key."""
    return whole_number(field, int(value) if isinstance(value, str) and value.isdecimal() else value, 0)


def _labels(id2label: Any) -> dict[int, str]:
    if not isinstance(id2label, Mapping) or not all(isinstance(name, str) for name in id2label.values()):
        raise bad_input("id2label must map numbers to names", id2label, "Correct id2label")
    return {_label_number("A key of id2label", key): name for key, name in id2label.items()}


def _label_numbers(label2id: Any) -> dict[str, int]:
    if not isinstance(label2id, Mapping) or not all(isinstance(name, str) for name in label2id):
        raise bad_input("label2id must map names to numbers", label2id, "Correct label2id")
    return {name: _label_number("A value of label2id", key) for name, key in label2id.items()}


def _with_legacy(cls: type[ConfigT], given: Any, legacy: dict[str, Any] | None) -> ConfigT:
    if isinstance(given, cls):
        given = {**given.to_dict(), "attn_implementation": given.attn_choices()}
    elif given is not None and getattr(given, "model_type", None) == cls.model_type:  # transformers' own
        given = given.to_dict()
    if given is not None and not isinstance(given, dict):
        raise bad_input(
            f"{cls.base_config_key} must be a {cls.__name__} or a dict", given, "Pass one of them", TypeError
        )
    fields = dict(given or {})
    if legacy is not None and not isinstance(legacy, Mapping):
        raise bad_input(f"{cls.base_config_key}_dict must be a dict", legacy, "Pass one", TypeError)
    if legacy is not None:
        fields.update(cls(**legacy).to_dict())
    return cls(**fields)


def _require_number(field: str, value: Any, *, above: float | None = None, below: float = math.inf) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value < below
    if not ok or (value <= above if above is not None else value < 0):
        low = "at least 0" if above is None else f"above {above:g}"
        limit = "" if below == math.inf else f" and below {below:g}"
        raise bad_input(f"{field} must be a finite number {low}{limit}", value, f"Correct {field}")


class CLIPOnnxConfig:
    """Names and free axes of an exported CLIPModel, as exporters written for transformers 4 ask for them.

    Args:
        config: The config of the model.
        task: "default"; CLIP has no other.
        patching_specs: None; what transformers patches while it exports.

    Raises:
        ValueError: Another task, or something to patch.
    """

    default_onnx_opset = 14
    atol_for_validation = 1e-4
    default_fixed_batch, default_fixed_sequence = 2, 8

    def __init__(self, config: CLIPConfig, task: str = "default", patching_specs: Any = None) -> None:
        if task != "default":
            raise one_of("task", task, ("default",))
        if patching_specs:
            raise bad_input("These models need no patching for an export", patching_specs, "Leave it out")
        self.config = config
        self.task = task

    @classmethod
    def from_model_config(cls, config: CLIPConfig, task: str = "default") -> Self:
        """Makes one for the config of a model."""
        return cls(config, task)

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Name of each input to its free axes."""
        text = {0: "batch", 1: "sequence"}
        pixels = {0: "batch", 1: "num_channels", 2: "height", 3: "width"}
        return {"input_ids": text, "pixel_values": pixels, "attention_mask": dict(text)}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Name of each output to its free axes."""
        return {name: {0: "batch"} for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")}

    def generate_dummy_inputs(
        self, processor: Any, batch_size: int = -1, seq_length: int = -1, framework: Any = None
    ) -> dict[str, Any]:
        """Returns inputs to export with.

        Args:
            processor: A `CLIPProcessor`.
            batch_size: How many of each; 2 at -1.
            seq_length: Tokens of a text, the special ones included; 8 at -1.
            framework: "np", "pt", "tf" or "jax"; lists when None.
        """
        batch = self.default_fixed_batch if batch_size < 1 else batch_size
        words = (self.default_fixed_sequence if seq_length < 1 else seq_length) - 2
        grey = np.full((3, 40, 40), 128, np.uint8)
        texts = processor.tokenizer([" ".join(["a"] * words)] * batch, return_tensors=framework)
        return {**texts, **processor.image_processor([grey] * batch, return_tensors=framework)}
