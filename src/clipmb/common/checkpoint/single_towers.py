"""Towers in one file without a config: text encoders inside diffusion models, and single towers as they are shared.

The sizes come from the shapes. Activation and heads are in no tensor; they are those of the one model with which the
programs that share such files use a tower of these sizes. Every other size needs a config.

Source: the tensor names of the released Stable Diffusion 1.5, 2.1, SDXL and 3 checkpoints; the configs of OpenAI's
ViT-L/14 and of LAION's ViT-H/14, ViT-g/14 and ViT-bigG/14.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from clipmb.common.checkpoint.fitting import canonical_names
from clipmb.common.checkpoint.openai import is_openai, to_canonical
from clipmb.common.checkpoint.tensors import Deferred, Lazy, Loaded, lazy
from clipmb.common.checkpoint.wrapping import stripped
from clipmb.common.config import BaseConfig, CLIPTextConfig, CLIPVisionConfig

# Where diffusion models keep their text encoders: transformers' names after transformer., open_clip's after model.
_PLACES = {
    "cond_stage_model.transformer.": "Stable Diffusion 1",
    "cond_stage_model.model.": "Stable Diffusion 2",
    "conditioner.embedders.0.transformer.": "SDXL, the first encoder",
    "conditioner.embedders.1.model.": "SDXL, the second encoder",
    "conditioner.embedders.0.model.": "the SDXL refiner",
    "text_encoders.clip_l.transformer.": "Stable Diffusion 3 or FLUX, CLIP L",
    "text_encoders.clip_g.transformer.": "Stable Diffusion 3, CLIP G",
}


class _Published(NamedTuple):
    """What the shapes of a published tower do not say."""

    model: str
    heads: int
    act: str


# By width and number of blocks.
_TEXT = {
    (768, 12): _Published("OpenAI's ViT-L/14", 12, "quick_gelu"),
    (1024, 24): _Published("LAION's ViT-H/14", 16, "gelu"),
    (1280, 32): _Published("LAION's ViT-bigG/14", 20, "gelu"),
}
_VISION = {
    (1024, 24): _Published("OpenAI's ViT-L/14", 16, "quick_gelu"),
    (1280, 32): _Published("LAION's ViT-H/14", 16, "gelu"),
    (1408, 40): _Published("LAION's ViT-g/14", 16, "gelu"),
    (1664, 48): _Published("LAION's ViT-bigG/14", 16, "gelu"),
}
_VOCABULARY, _PATCH = 49408, 14
_LAYER = re.compile(r"(?:text|vision)_model\.encoder\.layers\.(\d{1,9})\.")


def encoders_in(tensors: Mapping[str, Lazy], loaded: Loaded) -> Loaded | None:
    """Takes the text encoders out of the tensors of a diffusion model.

    Args:
        tensors: Name in the file to array.
        loaded: What is known of the file beside them.

    Returns:
        The first encoder with the others as its ``others``; None when the tensors are of no diffusion model.
    """
    short = {stripped(name): name for name in tensors}
    found = []
    for place, where in _PLACES.items():
        inside = {name.removeprefix(place): full for name, full in short.items() if name.startswith(place)}
        if not inside:
            continue
        part: Mapping[str, Any] = Deferred({name: tensors[full] for name, full in inside.items()})
        if is_openai(part):
            part = to_canonical(part)
        decisions = {**loaded.decisions, "encoder": f"the tensors below {place} ({where})"}
        found.append(Loaded(loaded.format, part, loaded.files, None, decisions, loaded.packages))
    if found:
        found[0].others = found[1:]
    return found[0] if found else None


def infer(loaded: Loaded) -> tuple[BaseConfig, dict[str, str]] | None:
    """Infers the config of a single tower from its shapes.

    Args:
        loaded: The weights of a source without a config.

    Returns:
        The config and the reasons for it; None unless there is one tower, of the sizes of one published model.
    """
    tensors = lazy(loaded.tensors)
    names = canonical_names(tensors, "CLIPModel")
    shapes = {canonical: tensors[name].shape for canonical, name in names.items()}
    text = any(name.startswith("text_model.") for name in shapes)
    vision = any(name.startswith("vision_model.") for name in shapes)
    if text == vision:
        return None
    known = _text_tower(shapes) if text else _vision_tower(shapes)
    if known is None:
        return None
    config, published = known
    reason = f"{published.act} and {published.heads} heads, as in {published.model}, whose sizes the tower has"
    return config, {"sizes": "from the shapes of the tensors", "activation": f"{reason}; the file does not say"}


def _text_tower(shapes: Mapping[str, tuple[int, ...]]) -> tuple[BaseConfig, _Published] | None:
    stem = "text_model.embeddings"
    tokens, positions = (shapes.get(f"{stem}.{name}_embedding.weight", ()) for name in ("token", "position"))
    if len(tokens) != 2 or len(positions) != 2 or tokens[0] != _VOCABULARY:
        return None
    fields = _common(shapes, tokens[1], "text_projection.weight")
    published = _TEXT.get((tokens[1], fields["num_hidden_layers"]))
    if published is None:
        return None
    config = CLIPTextConfig(
        vocab_size=tokens[0],
        max_position_embeddings=positions[0],
        num_attention_heads=published.heads,
        hidden_act=published.act,
        **fields,
    )
    return config, published


def _vision_tower(shapes: Mapping[str, tuple[int, ...]]) -> tuple[BaseConfig, _Published] | None:
    stem = "vision_model.embeddings"
    patches, positions = (shapes.get(f"{stem}.{name}_embedding.weight", ()) for name in ("patch", "position"))
    cells = math.isqrt(max(positions[0] - 1, 0)) if len(positions) == 2 else 0
    if len(patches) != 4 or patches[1:] != (3, _PATCH, _PATCH) or not cells or cells**2 != positions[0] - 1:
        return None
    fields = _common(shapes, patches[0], "visual_projection.weight")
    published = _VISION.get((patches[0], fields["num_hidden_layers"]))
    if published is None:
        return None
    config = CLIPVisionConfig(
        image_size=cells * _PATCH,
        patch_size=_PATCH,
        num_attention_heads=published.heads,
        hidden_act=published.act,
        **fields,
    )
    return config, published


def _common(shapes: Mapping[str, tuple[int, ...]], width: int, projection: str) -> dict[str, Any]:
    blocks = {match[1] for name in shapes if (match := _LAYER.match(name)) is not None}
    inner = next((shape for name, shape in shapes.items() if name.endswith(".layers.0.mlp.fc1.bias")), ())
    projected = shapes.get(projection, ())
    return {
        "hidden_size": width,
        "intermediate_size": inner[0] if len(inner) == 1 else 4 * width,
        "projection_dim": projected[0] if len(projected) == 2 else width,
        "num_hidden_layers": len(blocks),
    }
