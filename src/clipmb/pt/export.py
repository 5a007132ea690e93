"""Programs of torch.export, which PyTorch alone runs, in Python and, compiled by AOTInductor, without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from clipmb.common.outputs import EXPORTED
from clipmb.pt.losses import normalize as normalized
from clipmb.pt.modeling import CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

RUN = Path(__file__).with_name("run.py")


class _Exported(nn.Module):
    """A tower as a function of tensors, in float32 outside."""

    def __init__(self, model: CLIPModel, tower: str, normalize: bool) -> None:
        super().__init__()
        self.model, self.tower, self.normalize = _part(model, tower), tower, normalize

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if self.tower == "both":
            output = self.model(input_ids, pixel_values, attention_mask)
            return {name: output[name].float() for name in EXPORTED[self.tower]}
        text = self.tower == "text"
        embeds = (self.model(input_ids, attention_mask) if text else self.model(pixel_values))[0]
        return {f"{self.tower}_embeds": (normalized(embeds) if self.normalize else embeds).float()}


def _part(model: CLIPModel, tower: str) -> nn.Module:
    """Returns a model of one tower around that of the whole, so that the other's weights are not written."""
    if tower == "both":
        return model
    with torch.device("meta"):
        if tower == "text":
            part: Any = CLIPTextModelWithProjection(model.config.text_config)
            part.text_model, part.text_projection = model.text_model, model.text_projection
        else:
            part = CLIPVisionModelWithProjection(model.config.vision_config)
            part.vision_model, part.visual_projection = model.vision_model, model.visual_projection
    return part.eval()


def write(
    model: CLIPModel,
    tower: str,
    path: Path,
    *,
    normalize: bool,
    ids: str,
    length: int | None,
    **other: Any,
) -> list[Path]:
    """Writes a tower, as `clipmb.exporting.Writer` describes it.

    Args:
        model: The model, in the dtype that is asked for.
        tower: "image", "text" or "both".
        path: The file without its ending.
        normalize: Return embeddings of length 1.
        ids: dtype of ``input_ids`` and ``attention_mask``.
        length: Tokens of each text; any number up to the model's context when None.
        **other: What the model has done, or other targets do.

    Returns:
        ``….pt2``.
    """
    text, vision = model.config.text_config, model.config.vision_config
    both, inputs, shapes = tower == "both", {}, {}
    if tower != "image":
        batch, seq = Dim("text_batch" if both else "batch"), Dim("seq", max=text.max_position_embeddings)
        sizes = (2, length or min(3, text.max_position_embeddings))
        for name in ("input_ids", "attention_mask"):
            inputs[name] = torch.ones(sizes, dtype=getattr(torch, ids))
            shapes[name] = {0: batch} if length else {0: batch, 1: seq}
    if tower != "text":
        inputs["pixel_values"] = torch.zeros(2, vision.num_channels, vision.image_size, vision.image_size)
        shapes["pixel_values"] = {0: Dim("image_batch" if both else "batch")}
    module = _Exported(model, tower, normalize).eval()
    with torch.no_grad():
        program = torch.export.export(module, (), inputs, dynamic_shapes=shapes, strict=False)
    file = path.with_name(f"{path.name}.pt2")
    torch.export.save(program, file)
    return [file]
