"""What a conversion will do: the head, the config, and the path of every parameter from source to result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from clipmb.common.checkpoint import formats
from clipmb.common.checkpoint.fitting import canonical_names, fit
from clipmb.common.checkpoint.formats import config_of
from clipmb.common.checkpoint.tensors import Lazy, Loaded, lazy
from clipmb.common.checkpoint.wrapping import explain_stripping
from clipmb.common.config import CONFIG_NAME, BaseConfig, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from clipmb.common.errors import CheckpointError
from clipmb.common.hub import Source
from clipmb.common.json_files import read_json
from clipmb.common.parameters import HEADS, Spec, specs

_ABOUT_FILES = ("dialect", "encoder", "prefix", "wrapper")  # the decisions of a format that are not about the config


class Mapped(NamedTuple):
    """One parameter of a conversion.

    Attributes:
        source: Its name in the source.
        canonical: Its canonical name.
        target: Its name in the result.
        shape: Its canonical shape.
        dtype: Name of its dtype in the result.
    """

    source: str
    canonical: str
    target: str
    shape: tuple[int, ...]
    dtype: str


@dataclass
class Conversion:
    """What was converted, or would be.

    Attributes:
        source: Where from.
        folder: Where to.
        source_format: Key of `formats.FORMATS`.
        target_format: Key of `formats.FORMATS`.
        head: Key of `HEADS`.
        config: The config of the result.
        mapping: Every parameter.
        decisions: What was chosen and why.
        record: The content of ``conversion.json``; empty for a dry run.
    """

    source: Source
    folder: Path
    source_format: str
    target_format: str
    head: str
    config: BaseConfig
    mapping: list[Mapped]
    decisions: dict[str, str]
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def dtypes(self) -> set[str]:
        """The names of the dtypes in the result."""
        return {entry.dtype for entry in self.mapping}


def plan(
    source: Source, folder: Path, loaded: Loaded, to: str, dtype: str | None, head: str | None, config: Any = None
) -> tuple[Conversion, dict[str, Lazy]]:
    """Chooses head and config, and maps every parameter; no array is made.

    Args:
        source: Where from.
        folder: Where to.
        loaded: The weights of the source, which nobody else uses.
        to: Key of `formats.FORMATS`.
        dtype: The dtype of the result; each tensor's own when None.
        head: Key of `HEADS`; what the source is when None.
        config: A config, its fields, or where to read one; the source's own when None.

    Returns:
        The conversion, and the source's arrays by their canonical names and in their own dtypes.

    Raises:
        CheckpointError: There is no config, the source does not fit it, or the format cannot hold this head.
    """
    if head is not None:
        loaded = loaded.of(head)
    fields, origin, decisions = _config_fields(source, loaded, config)
    tensors = lazy(loaded.tensors, own=True)
    if head is None:
        head, decisions["head"] = _head(fields, canonical_names(tensors, "CLIPModel"), origin)
    else:
        decisions["head"] = f"{head}: asked for"
    own: BaseConfig = _config_class(head).from_dict(fields)
    table = specs(own, head)
    try:
        fit({name: tensor.stand_in() for name, tensor in tensors.items()}, table, head, origin=source)
    except CheckpointError as error:
        raise CheckpointError(
            f"{source} does not fit {head} with the config of {origin}; head= (--head) chooses another one. Problems:",
            error.problems or [str(error)],
        ) from None
    target = formats.format_of(to)
    if target.whole_only and head != "CLIPModel":
        raise CheckpointError(
            f"The {to} format holds a full CLIPModel, with both towers and projections. Received: {head}. "
            f"Write single towers and classifiers in another format, for example {formats.OWN}."
        )
    names = canonical_names(tensors, head)
    stored = (loaded.names or formats.format_of(loaded.format).names)(table)
    stored |= {canonical: name for canonical, name in names.items() if name != canonical}
    targets = target.names(table)
    found = {spec.name: _shaped(tensors[names[spec.name]], spec) for spec in table}
    mapping = [
        Mapped(stored[s.name], s.name, targets[s.name], s.shape, dtype or found[s.name].dtype.name) for s in table
    ]
    decisions |= explain_stripping(name for canonical, name in names.items() if canonical in found)
    if left := sorted(tensors.keys() - {names[spec.name] for spec in table}):
        decisions["left out"] = f"{', '.join(left)}: not part of {head}"
    _explain_config(own, origin, decisions)
    return Conversion(source, folder, loaded.format, to, head, own, mapping, decisions), found


def _config_fields(source: Source, loaded: Loaded, given: Any) -> tuple[dict[str, Any], str, dict[str, str]]:
    """Returns the fields of the config, where it comes from, and the decisions about the source."""
    decisions = dict(loaded.decisions)
    if isinstance(given, BaseConfig):
        given = given.to_dict()
    elif given is not None and not isinstance(given, dict):
        given = CLIPConfig.get_config_dict(given)[0]
    if given is not None:
        return given, "the config given", {key: why for key, why in decisions.items() if key in _ABOUT_FILES}
    if (path := source.find(CONFIG_NAME)) is not None:  # which then decides these, whatever the file's own config says
        own = {key: why for key, why in decisions.items() if key not in ("activation", "pooling")}
        return read_json(path), CONFIG_NAME, own
    config, decisions = config_of(loaded, source)
    return config.to_dict(), f"the {loaded.format} file", decisions


def _shaped(tensor: Lazy, spec: Spec) -> Lazy:
    """Returns a tensor that fits with exactly the shape of its parameter: old files have scalars of shape (1,)."""
    return tensor if tensor.shape == spec.shape else tensor.viewed(lambda array: array.reshape(spec.shape))


def _head(fields: dict[str, Any], names: Mapping[str, str], origin: str) -> tuple[str, str]:
    """Returns what a source is, and why: what its config declares, or else what its tensors make up."""
    declared = fields.get("architectures")
    for name in declared if isinstance(declared, list) else ():
        if (head := str(name).removeprefix("TF").removeprefix("Flax")) in HEADS:
            return head, f"{head}: {origin} declares it"
    text = any(name.startswith("text_model.") for name in names)
    vision = any(name.startswith("vision_model.") for name in names)
    if text and vision:
        head, why = "CLIPModel", "both towers are there"
    elif vision and "classifier.weight" in names:
        head, why = "CLIPForImageClassification", "the vision tower and a classifier are there"
    elif text or vision:
        tower, projection = ("Text", "text_projection") if text else ("Vision", "visual_projection")
        projected = f"{projection}.weight" in names
        head = f"CLIP{tower}Model{'WithProjection' if projected else ''}"
        why = f"only the {tower.lower()} tower is there, {'with' if projected else 'without'} its projection"
    else:
        raise CheckpointError("There is neither a text nor a vision tower of CLIP. The names:", list(names)[:20])
    return head, f"{head}: {why}"


def _config_class(head: str) -> type[BaseConfig]:
    text, vision, others = HEADS[head]
    if (text and vision) or "classifier.weight" in others:
        return CLIPConfig
    return CLIPTextConfig if text else CLIPVisionConfig


def _explain_config(config: BaseConfig, origin: str, decisions: dict[str, str]) -> None:
    """Adds what the config decides about the computation, unless the format already gave its reasons."""
    text = config.text_config if isinstance(config, CLIPConfig) else config
    vision = config.vision_config if isinstance(config, CLIPConfig) else config
    towers: dict[str, Any] = {"text": text, "vision": vision} if text is not vision else {"": config}
    acts = ", ".join(f"{tower} {part.hidden_act}".strip() for tower, part in towers.items())
    decisions.setdefault("activation", f"{acts}: {origin}")
    if isinstance(text, CLIPTextConfig):
        end = text.eos_token_id
        rule = "at the largest id" if end == 2 else f"at the first token {end}"
        decisions.setdefault("pooling", f"{rule}: eos_token_id is {end} in {origin}")
