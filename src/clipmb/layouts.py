"""Where programs look for the files of an exported model, what they call its tensors, and what they read beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL.Image import Resampling

from clipmb.common.config import CONFIG_NAME, CLIPConfig
from clipmb.common.errors import bad_input
from clipmb.common.hub import Source
from clipmb.common.json_files import json_text
from clipmb.common.outputs import EXPORTED
from clipmb.common.pretrained import config_text
from clipmb.common.processor import CLIPImageProcessor, can_tokenize, image_processor_of, tokenizer_of

INPUTS = {"both": ("input_ids", "attention_mask", "pixel_values")}
INPUTS |= {"text": INPUTS["both"][:2], "image": INPUTS["both"][2:]}


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
        source: The checkpoint.
        config: Its config.
        towers: "image", "text" and "both", those that are written.
        ids: dtype of ``input_ids``.
        length: Tokens of each text; any number when None.
    """

    source: Source
    config: CLIPConfig
    towers: Sequence[str]
    ids: str
    length: int | None

    def save_config(self, folder: Path) -> None:
        """Writes config.json."""
        (folder / CONFIG_NAME).write_text(config_text(self.config, "CLIPModel", {"float32"}), encoding="utf-8")

    def save_tokenizer(self, folder: Path) -> None:
        """Writes the files of the tokenizer.

        Raises:
            CheckpointError: The checkpoint has none.
        """
        tokenizer_of(self.source, self.config.text_config).save_pretrained(folder)

    def image_processor(self) -> CLIPImageProcessor:
        """Returns the image processor."""
        return image_processor_of(self.source, self.config.vision_config)


@dataclass(frozen=True)
class Layout:
    """How a program expects a folder.

    Attributes:
        files: Tower to its file without the ending, for each tower that the program has; ``{to}`` is the target and
            ``{end}`` the mark of a dtype.
        save_beside: Writes what else the program reads into the folder.
        names: What it calls inputs and outputs that have other names; None for a mask that it does not pass, so that
            every token counts.
        ids: Dtypes of ids that it passes.
        normalize: Whether it takes embeddings to have length 1.
        whole_texts: Whether it pads every text to the same length.
        any_length: Whether it pads texts to the longest of a call, so that no length can be fixed.
    """

    files: Mapping[str, str]
    save_beside: Callable[[Path, Exported], None]
    names: Mapping[str, str | None] = field(default_factory=dict)
    ids: tuple[str, ...] = ("int64", "int32")
    normalize: bool = False
    whole_texts: bool = False
    any_length: bool = False


def _save_all(folder: Path, exported: Exported) -> None:
    exported.save_config(folder)
    if {*exported.towers} != {"image"} and can_tokenize(exported.source, exported.config.text_config):
        exported.save_tokenizer(folder)
    if {*exported.towers} != {"text"}:
        exported.image_processor().save_pretrained(folder)


def _save_for_fastembed(folder: Path, exported: Exported) -> None:
    for tower in exported.towers:
        exported.save_config(folder / tower)
        if tower == "text":
            exported.save_tokenizer(folder / tower)
        else:
            exported.image_processor().save_pretrained(folder / tower)


def _save_for_immich(folder: Path, exported: Exported) -> None:
    """Writes those fields of open_clip's configs that immich reads."""
    text, vision = exported.config.text_config, exported.config.vision_config
    model = {
        "embed_dim": exported.config.projection_dim,
        "vision_cfg": {"image_size": vision.image_size},
        "text_cfg": {"context_length": exported.length or text.max_position_embeddings, "vocab_size": text.vocab_size},
    }
    (folder / CONFIG_NAME).write_text(json_text(model), encoding="utf-8")
    if "text" in exported.towers:
        exported.save_tokenizer(folder / "textual")
    if "image" not in exported.towers:
        return
    processor, side = exported.image_processor(), vision.image_size
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    fixed = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    fixed |= {"resample": int(Resampling.BICUBIC), "rescale_factor": 1 / 255, **dict.fromkeys(steps, True)}
    given = processor.to_dict()
    if other := {name: given.get(name) for name, value in fixed.items() if given.get(name) != value}:
        raise bad_input(
            f"immich resizes the short side to {side} pixels, bicubically, crops and scales to 0 … 1",
            f"an image processor with {other}",
            "Export without a layout, and preprocess as the checkpoint says",
            shown=True,
        )
    settings = {
        "size": side,
        "mode": "RGB",
        "mean": _of_channels(processor.image_mean),
        "std": _of_channels(processor.image_std),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (folder / "visual/preprocess_cfg.json").write_text(json_text(settings), encoding="utf-8")


def _of_channels(value: float | list[float]) -> list[float]:
    return [value] * 3 if isinstance(value, int | float) else list(value)


def _save_for_triton(folder: Path, exported: Exported) -> None:
    """Writes each config.pbtxt.

    Source: Triton Inference Server, docs/user_guide/model_configuration.md. A tower is batched by the server, which
    leaves the batch out of the shapes; the model of both towers has two batches, which the server cannot join.
    """
    _save_all(folder, exported)
    vision, proj = exported.config.vision_config, exported.config.projection_dim
    texts = (exported.ids.upper(), [exported.length or -1])
    shapes: dict[str, tuple[str, list[int]]] = {
        "input_ids": texts,
        "attention_mask": texts,
        "pixel_values": ("FP32", [vision.num_channels, vision.image_size, vision.image_size]),
        "text_embeds": ("FP32", [proj]),
        "image_embeds": ("FP32", [proj]),
        "logits_per_image": ("FP32", [-1]),
        "logits_per_text": ("FP32", [-1]),
    }
    for tower in exported.towers:
        batched = tower != "both"
        lines = ['backend: "onnxruntime"', f"max_batch_size: {64 if batched else 0}"]
        for kind, names in (("input", INPUTS[tower]), ("output", EXPORTED[tower])):
            for name in names:
                dtype, sizes = shapes[name]
                dims = ", ".join(map(str, sizes if batched else [-1, *sizes]))
                lines.append(f'{kind} {{ name: "{name}" data_type: TYPE_{dtype} dims: [ {dims} ] }}')
        lines += ["dynamic_batching { }"] * batched
        path = folder / Path(TRITON.files[tower]).parents[1] / "config.pbtxt"
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")


PLAIN = Layout(
    {"both": "{to}/model{end}", "text": "{to}/text_model{end}", "image": "{to}/vision_model{end}"}, _save_all
)
"""That of transformers.js and Optimum."""

TRITON = Layout({"both": "clip/1/model", "text": "clip_text/1/model", "image": "clip_image/1/model"}, _save_for_triton)

LAYOUTS: dict[str, Layout] = {
    # Source: fastembed 0.9, fastembed/common/preprocessor_utils.py.
    "fastembed": Layout(
        {"text": "text/model", "image": "image/model"},
        _save_for_fastembed,
        ids=("int64",),
        normalize=True,
        any_length=True,
    ),
    # Source: immich 2, machine-learning/immich_ml/models/clip.
    "immich": Layout(
        {"text": "textual/model", "image": "visual/model"},
        _save_for_immich,
        names={
            "pixel_values": "image",
            "input_ids": "text",
            "attention_mask": None,
            "image_embeds": "embedding",
            "text_embeds": "embedding",
        },
        ids=("int32",),
        normalize=True,
        whole_texts=True,
    ),
    "triton": TRITON,
}
