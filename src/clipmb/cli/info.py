"""``clipmb info``: what is in a checkpoint, without loading a framework."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from clipmb.cli import common
from clipmb.common.checkpoint.fitting import canonical_names
from clipmb.common.checkpoint.formats import config_of
from clipmb.common.checkpoint.tensors import lazy
from clipmb.common.config import CONFIG_NAME, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from clipmb.common.errors import CheckpointError
from clipmb.common.hub import Source
from clipmb.common.json_files import read_json
from clipmb.common.parameters import is_known
from clipmb.common.pretrained import load_weights
from clipmb.common.saving import current, names, read_whole

_CONFIGS = {config.model_type: config for config in (CLIPConfig, CLIPTextConfig, CLIPVisionConfig)}


def run(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a CLIP checkpoint.")],
    subfolder: common.Subfolder = "",
    revision: common.Revision = None,
    as_json: common.Json = False,
) -> None:
    """Show the config, parameters, files and sizes of a checkpoint."""
    if os.path.exists(model):
        common.refuse(context, {"revision"}, "has no effect on local files.")
    source = Source(model, subfolder=subfolder, revision=revision)
    found = read_whole(source.folder, lambda: describe(source))
    if as_json:
        common.print_json(found)
        return
    facts = [[key, str(value)] for key, value in found["config"].items()]
    common.table(f"{model}: {found['head']}, {found['format']}", ["config", "value"], facts)
    counts = [[part, f"{entry['tensors']:,}", f"{entry['parameters']:,}"] for part, entry in found["parts"].items()]
    counts.append(["total", f"{found['tensors']:,}", f"{found['parameters']:,}"])
    common.table(f"dtype {', '.join(found['dtypes'])}", ["part", "tensors", "parameters"], counts, right=(1, 2))
    common.table("", ["file", "bytes"], [[name, f"{size:,}"] for name, size in found["files"].items()], right=(1,))


def describe(source: Source) -> dict[str, Any]:
    """Describes a checkpoint from its files alone.

    Raises:
        CheckpointError: There is no readable config, there are no readable weights, or the model is not a CLIP.
    """
    path = source.find(CONFIG_NAME)
    loaded = load_weights(source)
    fields = config_of(loaded, source)[0].to_dict() if path is None else read_json(path)
    kind = fields.get("model_type", "clip")
    if kind not in _CONFIGS:
        raise CheckpointError(f"{source} has a model of type {kind!r}, expected one of {', '.join(_CONFIGS)}.")
    config = _CONFIGS[kind].from_dict(fields)
    tensors = lazy(loaded.tensors)
    head = (
        config.architectures
        or [{"clip": "CLIPModel"}.get(kind, "CLIPTextModel" if "text" in kind else "CLIPVisionModel")]
    )[0]
    found = canonical_names(tensors, "CLIPVisionModel" if "vision" in kind else "CLIPTextModel")
    parts: dict[str, dict[str, int]] = {}
    for canonical, name in found.items():
        part = canonical.split(".")[0] if is_known(canonical) else "unknown"
        entry = parts.setdefault(part, {"tensors": 0, "parameters": 0})
        entry["tensors"] += 1
        entry["parameters"] += tensors[name].size
    return {
        "model": str(source),
        "head": head,
        "format": loaded.format,
        "config": _facts(config),
        "parameters": sum(entry["parameters"] for entry in parts.values()),
        "tensors": len(found),
        "dtypes": sorted({tensors[name].dtype.name for name in found.values()}),
        "parts": parts,
        "files": _files(source, path),
    }


def _facts(config: Any) -> dict[str, Any]:
    keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps",
        "vocab_size", "max_position_embeddings", "eos_token_id", "image_size", "patch_size", "projection_dim",
    )  # fmt: skip
    if isinstance(config, CLIPConfig):
        parts = {"text": config.text_config, "vision": config.vision_config}
        nested = {
            f"{part}.{key}": value
            for part, tower in parts.items()
            for key, value in _facts(tower).items()
            if key != "projection_dim"  # a tower's own is not used in the full model
        }
        return {"projection_dim": config.projection_dim, **nested}
    return {key: getattr(config, key) for key in keys if hasattr(config, key)}


def _files(source: Source, config: Path | None) -> dict[str, int]:
    """Returns the sizes in bytes of the files beside the config; for a model on the Hub, of those in the cache."""
    if source.folder is not None:
        found = [current(source.folder, name) for name in names(source.folder)]
    elif config is None:
        found = [source.find(name) for name in source.names()]
    else:
        found = [path for path in config.parent.iterdir() if path.is_file()]
    return {path.name: path.stat().st_size for path in sorted(filter(None, found))}
