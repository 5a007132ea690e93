"""OpenAI's ViT checkpoints: a state dict, or the TorchScript archives of their release, which are read but never run.

open_clip's files have the same names; the mapping between them and the canonical ones is here, in both directions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clipmb.common.checkpoint.pickled import inspect, write_pickle
from clipmb.common.checkpoint.sniffing import kind_of
from clipmb.common.checkpoint.tensors import Deferred, Lazy, Loaded, lazy, rounded
from clipmb.common.checkpoint.wrapping import explain_stripping, stripped
from clipmb.common.config import CONFIG_NAME, BaseConfig, CLIPConfig
from clipmb.common.errors import CheckpointError
from clipmb.common.hub import Source
from clipmb.common.json_files import read_json
from clipmb.common.parameters import Spec
from clipmb.common.saving import Transaction

FILE = "model.pt"
CONFIG = "open_clip_config.json"  # where a source has it, the files are open_clip's
_RELEASED = ("ViT-B-32.pt", "ViT-B-16.pt", "ViT-L-14.pt", "ViT-L-14-336px.pt")
patterns = (FILE, *_RELEASED)
whole_only, streams, packages = True, False, ("torch",)
METADATA = ("input_resolution", "context_length", "vocab_size")
# Long-CLIP's second table of positions, which counts from this row on; its first one keeps OpenAI's rows before it.
# Source: github.com/beichenzbc/Long-CLIP, model/model_longclip.py.
_LONG, _LONG_FROM = "positional_embedding_res", 20

# -- the mapping ------------------------------------------------------------------------------------------------------

_OUTER = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_TOWERS = {
    "transformer.resblocks": "text_model.encoder.layers",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_CANONICAL_OUTER = {canonical: name for name, canonical in (_OUTER | _TRANSPOSED).items()}
_CANONICAL_TOWERS = {canonical: name for name, canonical in _TOWERS.items()}
_CANONICAL_BLOCK = {canonical: name for name, canonical in _BLOCK.items()}
_QKV = ("q_proj", "k_proj", "v_proj")  # in the order in which attn.in_proj_weight stacks their rows
_IN_BLOCK = re.compile(r"((?:visual\.)?transformer\.resblocks)\.(\d+)\.(.+)")
_OUT_OF_BLOCK = re.compile(r"((?:text|vision)_model\.encoder\.layers)\.(\d+)\.(.+)\.(weight|bias)")
# Kept in float32 by OpenAI's `convert_weights`; everything else of a ViT is float16.
_FLOAT32 = re.compile(
    r"(.*\.)?(ln_\w+\.(weight|bias)|\w*positional_embedding|class_embedding|token_embedding\.weight|logit_scale)"
)


def is_openai(names: Iterable[str]) -> bool:
    """Whether these are OpenAI's and open_clip's names, rather than canonical ones."""
    return any(stripped(name).startswith(("visual.", "text.transformer.", "transformer.resblocks.")) for name in names)


def plain(names: Iterable[str]) -> dict[str, str]:
    """Maps names without the prefixes of training to those in the file.

    Raises:
        CheckpointError: Two names differ in their prefixes only.
    """
    found: dict[str, str] = {}
    for name in names:
        short = stripped(name)
        if short in found:
            raise CheckpointError("The file has two tensors for one parameter:", [f"{found[short]} and {name}"])
        found[short] = name
    return found


def to_canonical(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Maps OpenAI's tensors to canonical ones, all of them views; names that are not OpenAI's stay as they are.

    The two tables of positions of Long-CLIP become one, which is a copy.

    Raises:
        CheckpointError: A packed projection cannot be divided by three.
    """
    arrays: dict[str, np.ndarray] = {}
    tensors = _with_long_positions(tensors)
    for name, tensor in tensors.items():
        match = _IN_BLOCK.fullmatch(name)
        if name in _OUTER:
            arrays[_OUTER[name]] = tensor
        elif name in _TRANSPOSED:
            arrays[_TRANSPOSED[name]] = tensor.T  # (width, proj) -> (proj, width)
        elif match is not None and match[3] in ("attn.in_proj_weight", "attn.in_proj_bias"):
            leaf = match[3].removeprefix("attn.in_proj_")
            if not tensor.shape or tensor.shape[0] % 3:
                raise CheckpointError(f"{name} must stack three matrices of equal size, and has shape {tensor.shape}.")
            for part, rows in zip(_QKV, np.split(tensor, 3), strict=True):  # (3 * width, width) -> 3 of (width, width)
                arrays[f"{_TOWERS[match[1]]}.{match[2]}.self_attn.{part}.{leaf}"] = rows
        elif match is not None and (stem := _BLOCK.get(match[3].rpartition(".")[0])):
            arrays[f"{_TOWERS[match[1]]}.{match[2]}.{stem}.{name.rpartition('.')[2]}"] = tensor
        else:
            arrays[name] = tensor
    return arrays


def _with_long_positions(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Puts Long-CLIP's two tables of positions together; tensors without them stay as they are."""
    short, long = tensors.get("positional_embedding"), tensors.get(_LONG)
    if short is None or long is None or short.shape != long.shape:
        return tensors
    others = {name: tensors[name] for name in tensors if name != _LONG}
    return {**others, "positional_embedding": np.concatenate([short[:_LONG_FROM], long[_LONG_FROM:]])}


def from_canonical(arrays: Mapping[str, np.ndarray]) -> Deferred:
    """Maps the canonical arrays of a CLIPModel to OpenAI's names: the inverse of `to_canonical`.

    Raises:
        CheckpointError: An array is of no CLIPModel, or one of a q, k, v is missing.
    """
    given = lazy(arrays)
    tensors: dict[str, Lazy] = {}
    problems = []
    for name in given:
        target = openai_name(name)
        if target is None:
            problems.append(f"{name} has no place in the format")
        elif ".attn.in_proj_" in target:
            stem, _, leaf = name.rsplit(".", 2)
            parts = [f"{stem}.{part}.{leaf}" for part in _QKV]
            if missing := [part for part in parts if part not in given]:
                problems.append(f"{missing[0]} is missing")
            elif target not in tensors:
                tensors[target] = _stacked([given[part] for part in parts])
        else:
            tensors[target] = given[name].viewed(np.transpose) if target in _TRANSPOSED else given[name]
    if problems:
        raise CheckpointError("The weights do not make a CLIPModel of OpenAI's layout:", sorted(set(problems)))
    return Deferred(tensors)


def _stacked(parts: list[Lazy]) -> Lazy:
    rows, *others = parts[0].shape

    def release() -> None:
        for part in parts:
            part.release()

    # 3 of (width, width) -> (3 * width, width)
    shape = (len(parts) * rows, *others)
    return Lazy(shape, parts[0].dtype, lambda: np.concatenate([part.make() for part in parts]), release)


def openai_name(name: str) -> str | None:
    """Returns the name of OpenAI's tensor that holds a canonical one, alone or with others; None when there is none."""
    match = _OUT_OF_BLOCK.fullmatch(name)
    if match is None:
        return _CANONICAL_OUTER.get(name)
    tower, layer, stem, leaf = match.groups()
    if stem in _CANONICAL_BLOCK:
        return f"{_CANONICAL_TOWERS[tower]}.{layer}.{_CANONICAL_BLOCK[stem]}.{leaf}"
    packed = stem.removeprefix("self_attn.") in _QKV
    return f"{_CANONICAL_TOWERS[tower]}.{layer}.attn.in_proj_{leaf}" if packed else None


def names(table: list[Spec]) -> dict[str, str]:
    """Maps the canonical names of CLIPModel and its towers to those in the file; q, k and v share one tensor."""
    return {spec.name: name for spec in table if (name := openai_name(spec.name)) is not None}


def sizes_of(tensors: Mapping[str, np.ndarray], origin: Any) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Reads the sizes of a model off the shapes of OpenAI's tensors.

    Returns:
        Fields of the text config, fields of the vision config, and the width of the shared space.

    Raises:
        CheckpointError: It is not a ViT, or the tensors that show the sizes are missing or of other shapes.
    """
    if any(name.startswith(("visual.layer1.", "visual.attnpool.")) for name in tensors):
        raise CheckpointError(
            f"{origin} is a ResNet model (RN50, RN101, RN50x4 …). clipmb has CLIP's vision transformers: use a ViT."
        )
    wanted = {"token_embedding.weight": 2, "positional_embedding": 2, "text_projection": 2, "visual.proj": 2}
    wanted |= {"visual.conv1.weight": 4, "visual.positional_embedding": 2}
    shapes = {name: tensors[name].shape if name in tensors else None for name in wanted}
    if problems := [
        f"{name} is missing" if shape is None else f"{name} has shape {shape}"
        for name, shape in shapes.items()
        if shape is None or len(shape) != wanted[name] or not all(shape)
    ]:
        raise CheckpointError(
            f"{origin} does not have the tensors that show the sizes of a CLIP vision transformer:", problems
        )
    vocab_size, text_width = shapes["token_embedding.weight"] or (0, 0)
    width, channels, patch, _ = shapes["visual.conv1.weight"] or (0, 0, 0, 0)
    cells = (shapes["visual.positional_embedding"] or (0,))[0] - 1
    if cells < 1 or math.isqrt(cells) ** 2 != cells:
        raise CheckpointError(
            f"{origin} has {cells + 1} image positions, which must be a square number of patches plus one."
        )
    text = {
        "vocab_size": vocab_size,
        "hidden_size": text_width,
        "max_position_embeddings": (shapes["positional_embedding"] or (0,))[0],
        **_depth(tensors, "transformer", text_width),
    }
    vision = {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": math.isqrt(cells) * patch,
        **_depth(tensors, "visual.transformer", width),
    }
    return text, vision, (shapes["text_projection"] or (0, 0))[1]


def _depth(tensors: Mapping[str, np.ndarray], tower: str, width: int) -> dict[str, int]:
    found = {int(match[2]) for name in tensors if (match := _IN_BLOCK.fullmatch(name)) and name.startswith(f"{tower}.")}
    inner = tensors.get(f"{tower}.resblocks.{min(found, default=0)}.mlp.c_fc.bias")
    return {
        "num_hidden_layers": len(found),
        "intermediate_size": 4 * width if inner is None or not inner.size else inner.size,
    }


# -- the format -------------------------------------------------------------------------------------------------------


def find_weights(source: Source, names: Iterable[str]) -> Path | None:
    """Returns the source's own file, the first of the names that it has, or the only ``*.pt`` that it has."""
    if source.file is not None:
        return source.file
    for name in names:
        if (path := source.find(name)) is not None:
            return path
    only = [name for name in source.names() if name.endswith(".pt")]
    return source.find(only[0]) if len(only) == 1 else None


def read(source: Source, variant: str | None = None) -> Loaded | None:
    """Reads OpenAI's file: ``model.pt``, one with a name of the release, the only ``*.pt``, or a source that is a file.

    A TorchScript archive is taken apart without PyTorch, and nothing in it is run.

    Args:
        source: Where it is.
        variant: The format has none; with one, nothing is found.

    Returns:
        The weights under canonical names, and the config, inferred from the shapes, unless there is a ``config.json``
        of a CLIP. None when there is no such file or an ``open_clip_config.json``, or the file may as well be
        open_clip's: there is no ``config.json``, the metadata of the release (``input_resolution`` …) is missing, and
        it is no TorchScript archive.

    Raises:
        CheckpointError: The file is damaged or hostile, or of a ResNet.
        MissingBackendError: PyTorch is not installed, and it is not a TorchScript archive.
    """
    path = None if variant else find_weights(source, (FILE, *_RELEASED, "pytorch_model.bin"))
    if path is None or kind_of(path) != "pickle":
        return None
    pickled = inspect(path)
    names = plain(pickled.layouts())
    if not is_openai(names) or source.find(CONFIG) is not None:
        return None
    canonical = source.find(CONFIG_NAME)
    described = canonical is not None and read_json(canonical).get("model_type") == "clip"
    if not (described or pickled.scripted or any(name in names for name in (*METADATA, _LONG))):
        return None
    arrays = pickled.arrays()
    tensors = {name: arrays[stored] for name, stored in names.items() if name not in METADATA}
    text, vision, proj = sizes_of(tensors, path)
    needed = () if pickled.is_mapped else packages
    stripping = explain_stripping(names.values(), pickled.wrapper)
    if _LONG in names:
        stripping["positions"] = f"from row {_LONG_FROM} on those of {_LONG}, as in Long-CLIP's code"
    if described:
        decisions = {"config": f"{CONFIG_NAME}, which is beside the weights", **stripping}
        return Loaded("openai", to_canonical(tensors), [path.name], None, decisions, needed)
    for part in (text, vision):
        if part["hidden_size"] % 64:
            return Loaded(
                "openai", to_canonical(tensors), [path.name], decisions=stripping, packages=needed,
                undescribed=f"{path} has a tower of width {part['hidden_size']}, but OpenAI's heads are 64 wide. For "
                f"another number of heads pass config=, or put {CONFIG} beside it, with head_width in vision_cfg and "
                "heads in text_cfg.",
            )  # fmt: skip
        part |= {
            "num_attention_heads": part["hidden_size"] // 64,
            "hidden_act": "quick_gelu",
            "projection_dim": proj,
        }
    text |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    decisions = {
        **stripping,
        "num_attention_heads": "width // 64 in both towers, as in OpenAI's code; the file does not say",
        "activation": "quick_gelu, which all of OpenAI's models have; the file does not say",
        "pooling": "eos_token_id 2, which means: pool at the largest id, as OpenAI's code and its hub configs have it",
        "sizes": "from the shapes of the tensors",
        "dtype": "every tensor as in the file; OpenAI's have matrices in float16 and the rest in float32",
    }
    config = CLIPConfig(text, vision, projection_dim=proj)
    return Loaded("openai", to_canonical(tensors), [path.name], config, decisions, needed)


def write(
    save: Transaction,
    arrays: Mapping[str, np.ndarray],
    config: BaseConfig,
    head: str,
    *,
    max_shard_size: int | str = "5GB",
) -> list[str]:
    """Writes ``model.pt``: a state dict as OpenAI's ``clip.load`` reads it.

    The dtypes are those of OpenAI's files (matrices in float16, the rest in float32) where that changes no value;
    otherwise every tensor keeps its own. OpenAI's code converts to its dtypes when it loads.

    Args:
        save: The transaction of the folder.
        arrays: Canonical name to array.
        config: A `CLIPConfig` that OpenAI's code can express; for others open_clip's format has a config file.
        head: CLIPModel.
        max_shard_size: Ignored: the format has no shards.

    Returns:
        The name of the file.

    Raises:
        CheckpointError: OpenAI's format cannot hold this model.
        MissingBackendError: PyTorch is not installed.
    """
    problems = _inexpressible(config) if isinstance(config, CLIPConfig) else []
    if problems or not isinstance(config, CLIPConfig):
        problems = problems or [f"the config is a {type(config).__name__}, not a CLIPConfig"]
        raise CheckpointError("OpenAI's format cannot hold this model; open_clip's may. Problems:", problems)
    tensors = dict(from_canonical(arrays))
    original = {
        name: rounded(array, np.dtype(np.float32 if _FLOAT32.fullmatch(name) else np.float16))
        for name, array in tensors.items()
    }
    if all(_same(original[name], array) for name, array in tensors.items()):
        tensors = original
    text, vision = config.text_config, config.vision_config
    metadata = (vision.image_size, text.max_position_embeddings, text.vocab_size)
    tensors |= {name: np.asarray(value) for name, value in zip(METADATA, metadata, strict=True)}
    write_pickle(save.path(FILE), lazy(tensors))
    return [FILE]


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype or np.array_equal(a.astype(np.float64), b.astype(np.float64), equal_nan=True)


def _inexpressible(config: CLIPConfig) -> list[str]:
    text, vision = config.text_config, config.vision_config
    problems = []
    for part, label in ((text, "text_config"), (vision, "vision_config")):
        for name, value in {
            "hidden_act": "quick_gelu",
            "num_attention_heads": part.hidden_size / 64,
            "intermediate_size": 4 * part.hidden_size,
            "layer_norm_eps": 1e-5,
        }.items():
            if getattr(part, name) != value:
                problems.append(f"{label}.{name} is {getattr(part, name)!r}, and OpenAI's code has {value!r}")
    if vision.num_channels != 3:
        problems.append(f"vision_config.num_channels is {vision.num_channels}, and OpenAI's code has 3")
    if text.eos_token_id not in (2, text.vocab_size - 1):
        problems.append(f"text_config.eos_token_id is {text.eos_token_id}, and OpenAI's code pools at the largest id")
    return problems
