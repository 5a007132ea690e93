"""open_clip's ViT checkpoints: weights with OpenAI's names, and a config that says what the weights do not."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clipmb.common.checkpoint import pytorch
from clipmb.common.checkpoint.fitting import foreign
from clipmb.common.checkpoint.openai import (
    CONFIG,
    METADATA,
    find_weights,
    from_canonical,
    is_openai,
    names,
    plain,
    sizes_of,
    to_canonical,
)
from clipmb.common.checkpoint.pickled import inspect
from clipmb.common.checkpoint.safetensors import find, map_file, write_file
from clipmb.common.checkpoint.sniffing import kind_of
from clipmb.common.checkpoint.tensors import Deferred, Loaded
from clipmb.common.checkpoint.wrapping import explain_stripping
from clipmb.common.config import BaseConfig, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from clipmb.common.errors import CheckpointError
from clipmb.common.hub import Source
from clipmb.common.json_files import json_text, read_json
from clipmb.common.saving import Transaction

__all__ = ["names", "packages", "patterns", "read", "streams", "whole_only", "write"]

FILE = "open_clip_model.safetensors"
_OWN = (FILE, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
patterns = (*_OWN, CONFIG)
whole_only, streams, packages = True, True, ("torch",)
_MODEL_KEYS = {"embed_dim", "vision_cfg", "text_cfg"}

# What open_clip takes where its config is silent, as far as it concerns a CLIP.
_VISION = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}
# Keys that say nothing about what the model computes, or only about its training or its tokenizer.
_SILENT = {
    "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "patch_dropout", "output_tokens", "output_dict",
    "nonscalar_logit_scale", "custom_text", "init_logit_scale", "attn_pooler_queries", "attn_pooler_heads",
    "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path",
    "hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "pad_id", "eos_id",
}  # fmt: skip
# Values of the other keys that mean the same as CLIP. Other values, and keys that are not here, are refused.
_AS_IN_CLIP: dict[str, tuple[Any, ...]] = {
    "ls_init_value": (None,),
    "attentional_pool": (False, None),
    "no_ln_pre": (False,),
    "pos_embed_type": ("learnable",),
    "final_ln_after_pool": (False,),
    "block_type": (None, "default"),
    "qk_norm": (False,),
    "scaled_cosine_attn": (False,),
    "scale_heads": (False,),
    "scale_attn_inner": (False,),
    "scale_attn": (False,),
    "scale_fc": (False,),
    "timm_model_name": (None, ""),
    "hf_model_name": (None, ""),
    "embed_cls": (False,),
    "no_causal_mask": (False,),
    "proj_bias": (False,),
    "proj_type": ("linear",),
    "init_logit_bias": (None,),
    "act_kwargs": (None, {}, {"approximate": "none"}, {"approximate": "tanh"}),
}


def read(source: Source, variant: str | None = None) -> Loaded | None:
    """Reads open_clip's weights with their config.

    The config is ``open_clip_config.json``, or in a local folder the only JSON file with a model's part of one. The
    weights are ``open_clip_model.safetensors``, ``open_clip_pytorch_model.bin``, the only ``*.pt``, a source that is a
    file, or shards as accelerate writes them; training checkpoints and their prefixes are understood.

    Args:
        source: Where they are.
        variant: The format has none; with one, nothing is found.

    Returns:
        The weights under canonical names, and the config, if there is one: without it the activation is unknown. None
        when there are no weights with OpenAI's names.

    Raises:
        CheckpointError: The config describes something other than a CLIP, or a file is damaged or hostile.
        MissingBackendError: PyTorch is not installed, and the file is pickled.
    """
    stored = None if variant else _stored(source)
    if stored is None:
        return None
    found = _find_config(source)
    tensors = {
        name.removeprefix("text."): stored.tensors[full]
        for name, full in plain(stored.tensors).items()
        if name not in METADATA and name != "attn_mask"
    }
    loaded = Loaded("open_clip", to_canonical(tensors), stored.files)
    loaded.decisions, loaded.packages = stored.decisions, stored.packages
    if len(found) != 1:
        loaded.undescribed = (
            f"{source} has the names of OpenAI's and open_clip's models, but nothing says whether its activation is "
            "QuickGELU (as OpenAI's) or GELU (as most of open_clip's), nor the number of heads, and clipmb does not "
            f"guess. Pass config=, or put the model's {CONFIG}, or its one file from open_clip's model_configs, into a "
            "folder with the weights and pass the folder. Found there: "
            f"{', '.join(path.name for path in found) or 'none'}."
        )
        return loaded
    ((config_path, content),) = found.items()
    loaded.config, decisions = _read_config(_model_part(config_path, content), tensors, config_path)
    loaded.decisions |= decisions
    loaded.files.append(config_path.name)
    return loaded


def _stored(source: Source) -> Loaded | None:
    """Reads the weights under the names that they have in their files; None where these are not OpenAI's.

    Raises:
        CheckpointError: They are not, in a file that is called as open_clip's.
    """
    path = find_weights(source, (*_OWN, "model.safetensors", "pytorch_model.bin", "model.pt"))
    kind = None if path is None else kind_of(path)
    loaded = Loaded("open_clip", {}, [], packages=("safetensors",))
    if path is None and (found := find(source)) is not None:  # shards, which have the names of transformers' files
        loaded.tensors, loaded.files = Deferred(found[0]), found[1]
    elif path is None:
        loaded = pytorch.find(source) or loaded
    elif kind == "safetensors":
        loaded.tensors, loaded.files = map_file(path), [path.name]
    elif kind == "pickle":
        pickled = inspect(path)
        loaded.tensors, loaded.files = pickled.layouts(), [path.name]
        if is_openai(loaded.tensors):
            loaded.tensors = pickled.arrays()
        loaded.decisions = explain_stripping(loaded.tensors, pickled.wrapper)
        loaded.packages = () if pickled.is_mapped else packages
    if is_openai(loaded.tensors):
        loaded.decisions = loaded.decisions or explain_stripping(loaded.tensors)
        return loaded
    if path is not None and path.name in _OWN and loaded.tensors:
        raise CheckpointError(foreign(list(loaded.tensors), "CLIPModel", path))
    return None


def _find_config(source: Source) -> dict[Path, dict[str, Any]]:
    """Returns the configs of open_clip that a source has: path to content."""
    found = {}
    if (path := source.find(CONFIG)) is not None:
        found[path] = read_json(path)
    elif source.folder is not None and source.file is None:
        for path in sorted(source.folder.glob("*.json")):
            with contextlib.suppress(CheckpointError):  # files of others need not be objects
                if (content := read_json(path)).keys() >= _MODEL_KEYS:
                    found[path] = content
    return found


def _model_part(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    model = content.get("model_cfg", content)
    if not isinstance(model, dict) or not all(isinstance(model.get(key), dict) for key in ("vision_cfg", "text_cfg")):
        raise CheckpointError(f"{path} must hold a model_cfg with embed_dim, vision_cfg and text_cfg.")
    return model


def _read_config(
    model: dict[str, Any], tensors: Mapping[str, np.ndarray], path: Path
) -> tuple[CLIPConfig, dict[str, str]]:
    given_vision, given_text = _VISION | model["vision_cfg"], _TEXT | model["text_cfg"]
    problems = _foreign(model, {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}, "")
    problems += _foreign(given_vision, {*_VISION, "norm_kwargs", "pool_type"}, "vision_cfg.")
    problems += _foreign(given_text, {*_TEXT, "norm_kwargs", "pool_type"}, "text_cfg.")
    if given_vision.get("pool_type", "tok") != "tok":
        problems.append(f"vision_cfg.pool_type is {given_vision['pool_type']!r}, and CLIP's is 'tok'")
    if "logit_bias" in tensors:
        problems.append("the weights have a logit_bias, as SigLIP's")
    quick = model.get("quick_gelu", False)
    if type(quick) is not bool:
        problems.append(f"quick_gelu is {quick!r}, and must be true or false")
    eos, pooling = _pooling(given_text, problems)
    if problems:
        raise CheckpointError(
            f"{path} describes a model that is not a CLIP of a vision and a text transformer:", problems
        )

    text, vision, proj = sizes_of(tensors, path.parent)
    described = {
        "embed_dim": (model.get("embed_dim"), proj),
        "vision_cfg.width": (given_vision["width"], vision["hidden_size"]),
        "vision_cfg.layers": (given_vision["layers"], vision["num_hidden_layers"]),
        "vision_cfg.patch_size": (given_vision["patch_size"], vision["patch_size"]),
        "vision_cfg.image_size": (given_vision["image_size"], vision["image_size"]),
        "text_cfg.width": (given_text["width"], text["hidden_size"]),
        "text_cfg.layers": (given_text["layers"], text["num_hidden_layers"]),
        "text_cfg.vocab_size": (given_text["vocab_size"], text["vocab_size"]),
        "text_cfg.context_length": (given_text["context_length"], text["max_position_embeddings"]),
    }
    problems = [
        f"{key} is {said!r} in the config and {seen} in the weights"
        for key, (said, seen) in described.items()
        if said not in (seen, [seen, seen])
    ]
    for part, given, label in ((vision, given_vision, "vision_cfg"), (text, given_text, "text_cfg")):
        width = part["hidden_size"]
        heads = given["heads"] if label == "text_cfg" else _whole_ratio(width, given["head_width"])
        if type(heads) is not int or heads < 1 or width % heads:
            problems.append(f"{label} has a width of {width}, which its heads do not divide")
        tanh = (given.get("act_kwargs") or {}).get("approximate") == "tanh"
        if quick and given.get("act_kwargs"):
            problems.append(f"{label}.act_kwargs does not go with quick_gelu")
        norm = given.get("norm_kwargs") or {}
        if not isinstance(norm, dict) or norm.keys() - {"eps"} or not isinstance(norm.get("eps", 1e-5), float):
            problems.append(f"{label}.norm_kwargs is {norm!r}, and may hold eps")
            norm = {}
        part |= {
            "num_attention_heads": heads,
            "hidden_act": "quick_gelu" if quick else "gelu_pytorch_tanh" if tanh else "gelu",
            "layer_norm_eps": norm.get("eps", 1e-5),
            "projection_dim": proj,
        }
    if problems:
        raise CheckpointError(f"{path} does not fit the weights:", problems)
    text |= {"bos_token_id": 0, "eos_token_id": eos, "pad_token_id": 1}
    said = "says" if "quick_gelu" in model else "does not say, and open_clip's default is false"
    decisions = {
        "activation": f"{vision['hidden_act']} for images and {text['hidden_act']} for texts: {path.name} {said}",
        "pooling": pooling,
        "sizes": f"from the shapes of the tensors, with which {path.name} agrees; heads and epsilons from {path.name}",
    }
    if tokenizer := given_text.get("hf_tokenizer_name"):
        decisions["tokenizer"] = f"{tokenizer}, which is not CLIP's: the ids have to come from it"
    return CLIPConfig(text, vision, projection_dim=proj), decisions


def _foreign(given: dict[str, Any], own: set[str], prefix: str) -> list[str]:
    """Lists the keys of a config that no CLIP can have, or that clipmb does not know."""
    problems = []
    for key, value in given.items():
        if key in own or key in _SILENT:
            continue
        if key not in _AS_IN_CLIP:
            problems.append(f"{prefix}{key} is unknown, or belongs to another kind of model (CoCa, for example)")
        elif value not in _AS_IN_CLIP[key]:
            problems.append(f"{prefix}{key} is {value!r:.80}")
    return problems


def _pooling(given: dict[str, Any], problems: list[str]) -> tuple[int, str]:
    kind, eos = given.get("pool_type", "argmax"), given.get("eos_id", 2)
    if kind == "argmax":
        return 2, "2, which means: pool at the largest id, as open_clip does"
    if kind != "eos":
        problems.append(f"text_cfg.pool_type is {kind!r}, and CLIP's is 'argmax' or 'eos'")
    elif type(eos) is not int or eos < 0 or eos == 2:
        problems.append(f"text_cfg.eos_id is {eos!r}, which in a CLIP's config means the largest id")
    return eos, f"{eos}: the config pools at the first token of this id"


def _whole_ratio(width: int, part: Any) -> Any:
    return width // part if type(part) is int and 0 < part <= width else None


def write(
    save: Transaction,
    arrays: Mapping[str, np.ndarray],
    config: BaseConfig,
    head: str,
    *,
    max_shard_size: int | str = "5GB",
) -> list[str]:
    """Writes ``open_clip_model.safetensors`` and ``open_clip_config.json``, which open_clip loads as a local folder.

    The preprocessing in the config is that of every CLIP of OpenAI's (their mean and standard deviation, bicubic).

    Args:
        save: The transaction of the folder.
        arrays: Canonical name to array.
        config: A `CLIPConfig` that open_clip can express.
        head: CLIPModel.
        max_shard_size: Ignored: the format has no shards.

    Returns:
        The names of the files.

    Raises:
        CheckpointError: open_clip cannot hold this model.
    """
    model = _write_config(config)
    write_file(save.path(FILE), from_canonical(arrays).lazy)
    preprocess = {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    save.write(CONFIG, json_text({"model_cfg": model, "preprocess_cfg": preprocess}))
    return [FILE, CONFIG]


def _write_config(config: BaseConfig) -> dict[str, Any]:
    if not isinstance(config, CLIPConfig):
        raise CheckpointError(f"open_clip has CLIPModel only. Received: a {type(config).__name__}.")
    text, vision = config.text_config, config.vision_config
    problems: list[str] = []
    text_cfg: dict[str, Any] = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        **_options(text, "text_config", problems),
    }
    vision_cfg: dict[str, Any] = {
        "image_size": vision.image_size,
        "layers": vision.num_hidden_layers,
        "width": vision.hidden_size,
        "head_width": vision.head_dim,
        "patch_size": vision.patch_size,
        **_options(vision, "vision_config", problems),
    }
    if text.eos_token_id not in (2, text.vocab_size - 1):
        text_cfg |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    quick = {part.hidden_act == "quick_gelu" for part in (text, vision)}
    if len(quick) != 1:
        problems.append(
            f"hidden_act is {text.hidden_act} for texts and {vision.hidden_act} for images; one must serve both"
        )
    if vision.num_channels != 3:
        problems.append(f"vision_config.num_channels is {vision.num_channels}, and open_clip has 3")
    if problems:
        raise CheckpointError("open_clip cannot hold this model:", problems)
    model = {"embed_dim": config.projection_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    return model | ({"quick_gelu": True} if quick == {True} else {"quick_gelu": False})


def _options(part: CLIPTextConfig | CLIPVisionConfig, label: str, problems: list[str]) -> dict[str, Any]:
    """Returns what open_clip's config says only where it deviates from the default."""
    found: dict[str, Any] = {}
    if part.intermediate_size != 4 * part.hidden_size:
        ratio = part.intermediate_size / part.hidden_size
        if int(part.hidden_size * ratio) != part.intermediate_size:  # as open_clip computes it
            ratio = (part.intermediate_size + 0.5) / part.hidden_size
        found["mlp_ratio"] = ratio
    if part.layer_norm_eps != 1e-5:
        found["norm_kwargs"] = {"eps": part.layer_norm_eps}
    if part.hidden_act == "gelu_pytorch_tanh":
        found["act_kwargs"] = {"approximate": "tanh"}
    elif part.hidden_act not in ("quick_gelu", "gelu", "gelu_python"):
        problems.append(f"{label}.hidden_act is {part.hidden_act!r}, and open_clip has quick_gelu and gelu")
    return found
