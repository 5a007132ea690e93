"""``clipmb info``: what a checkpoint is, without loading a framework."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from clipmb.cli import common
from clipmb.common.checkpoint.fitting import canonical_names
from clipmb.common.config import CONFIG_NAME, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from clipmb.common.errors import CheckpointError
from clipmb.common.hub import Source
from clipmb.common.json_files import read_json
from clipmb.common.parameters import is_known
from clipmb.common.pretrained import load_weights

_CONFIGS = {config.model_type: config for config in (CLIPConfig, CLIPTextConfig, CLIPVisionConfig)}


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of a CLIP checkpoint.")],
    subfolder: Annotated[str, typer.Option(help="Folder inside it.")] = "",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    as_json: common.Json = False,
) -> None:
    """Show the config, parameters, files and sizes of a checkpoint."""
    found = describe(Source(model, subfolder=subfolder, revision=revision))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    facts = [[key, str(value)] for key, value in found["config"].items()]
    common.table(f"{model}: {found['head']}, {found['format']}", ["config", "value"], facts)
    counts = [[part, f"{entry['tensors']:,}", f"{entry['parameters']:,}"] for part, entry in found["parts"].items()]
    counts.append(["total", f"{found['tensors']:,}", f"{found['parameters']:,}"])
    common.table(f"dtype {', '.join(found['dtypes'])}", ["part", "tensors", "parameters"], counts, right=(1, 2))
    common.table("", ["file", "bytes"], [[name, f"{size:,}"] for name, size in found["files"].items()], right=(1,))


def describe(source: Source) -> dict[str, Any]:
    """Returns what is known of a checkpoint from its files alone.

    Raises:
        CheckpointError: It has no readable config and weights, or is not a CLIP.
    """
    path = source.find(CONFIG_NAME)
    loaded = load_weights(source)
    if path is None and loaded.config is None:
        path = source.require(CONFIG_NAME)  # raises, with the list of what is there
    fields = loaded.config.to_dict() if path is None and loaded.config is not None else read_json(path)
    kind = fields.get("model_type", "clip")
    if kind not in _CONFIGS:
        raise CheckpointError(f"{source} holds a model of type {kind!r}; CLIP's types are {', '.join(_CONFIGS)}.")
    config = _CONFIGS[kind].from_dict(fields)
    tensors = loaded.tensors
    head = (
        config.architectures
        or [{"clip": "CLIPModel"}.get(kind, "CLIPTextModel" if "text" in kind else "CLIPVisionModel")]
    )[0]
    names = canonical_names(tensors, "CLIPVisionModel" if "vision" in kind else "CLIPTextModel")
    parts: dict[str, dict[str, int]] = {}
    for canonical, name in names.items():
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
        "tensors": len(names),
        "dtypes": sorted({tensors[name].dtype.name for name in names.values()}),
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
            if key != "projection_dim"  # the whole has its own
        }
        return {"projection_dim": config.projection_dim, **nested}
    return {key: getattr(config, key) for key in keys if hasattr(config, key)}


def _files(source: Source, config: Path | None) -> dict[str, int]:
    """Returns the bytes of the files beside the config, which on the hub are those in the cache."""
    if config is None:
        found = [path for name in source.names() if (path := source.find(name)) is not None]
    else:
        found = [path for path in config.parent.iterdir() if path.is_file()]
    return {path.name: path.stat().st_size for path in sorted(found)}
