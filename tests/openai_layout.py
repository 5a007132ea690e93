"""OpenAI's and open_clip's model written from its description, over ``torch.nn.MultiheadAttention``.

It shares no line with clipmb: packed projections, their transpositions and the names are PyTorch's own here, so that a
converted checkpoint must give this model's outputs.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

SMALL = {
    "embed_dim": 24, "vision_width": 128, "vision_layers": 2, "vision_heads": 2, "image_size": 20, "patch": 4,
    "context": 13, "vocab": 99, "text_width": 64, "text_layers": 3, "text_heads": 1,
}  # fmt: skip
VIT_B_32 = {
    "embed_dim": 512, "vision_width": 768, "vision_layers": 12, "vision_heads": 12, "image_size": 224, "patch": 32,
    "context": 77, "vocab": 49408, "text_width": 512, "text_layers": 12, "text_heads": 8,
}  # fmt: skip


class QuickGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, act: nn.Module, eps: float, inner: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = [("c_fc", nn.Linear(width, inner)), ("gelu", act), ("c_proj", nn.Linear(inner, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, layers: int, *options: object) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(*options) for _ in range(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, c: dict, act: nn.Module, eps: float, inner: int) -> None:
        super().__init__()
        width = c["vision_width"]
        self.conv1 = nn.Conv2d(3, width, c["patch"], c["patch"], bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((c["image_size"] // c["patch"]) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.transformer = Transformer(c["vision_layers"], width, c["vision_heads"], act, eps, inner)
        self.proj = nn.Parameter(torch.empty(width, c["embed_dim"]))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)  # (batch, patches, width)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], 1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class Model(nn.Module):
    def __init__(self, c: dict, act: nn.Module | None = None, eps: float = 1e-5, ratio: float = 4.0) -> None:
        super().__init__()
        act = act or QuickGELU()
        width = c["text_width"]
        self.visual = Visual(c, act, eps, int(c["vision_width"] * ratio))
        self.transformer = Transformer(c["text_layers"], width, c["text_heads"], act, eps, int(width * ratio))
        self.token_embedding = nn.Embedding(c["vocab"], width)
        self.positional_embedding = nn.Parameter(torch.empty(c["context"], width))
        self.ln_final = nn.LayerNorm(width, eps=eps)
        self.text_projection = nn.Parameter(torch.empty(width, c["embed_dim"]))
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.eval().requires_grad_(False)

    def text(self, ids: torch.Tensor, eos: int | None = None) -> torch.Tensor:
        seq = ids.shape[1]
        mask = torch.full((seq, seq), -torch.inf).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding[:seq]
        x = self.ln_final(self.transformer(x, mask))
        at = ids.argmax(-1) if eos is None else (ids == eos).int().argmax(-1)
        return x[torch.arange(len(ids)), at] @ self.text_projection

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.visual(pixels), self.text(ids)


def random_model(c: dict, seed: int = 0, **options: object) -> Model:
    """A model in which no parameter has a special value."""
    model, generator = Model(c, **options), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = 0.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.normal_(0.0, scale, generator=generator)
        if "ln_" in name and name.endswith("weight"):
            parameter += 1.0
    model.logit_scale.fill_(2.0)
    return model


def as_released(model: Model, c: dict) -> dict[str, torch.Tensor]:
    """The state dict as OpenAI published it: matrices in float16, the three numbers beside the weights."""
    kept = ("ln_", "positional_embedding", "class_embedding", "token_embedding", "logit_scale")
    half = {
        name: value if any(part.startswith(kept) for part in name.split(".")) else value.half()
        for name, value in model.state_dict().items()
    }
    numbers = {"input_resolution": c["image_size"], "context_length": c["context"], "vocab_size": c["vocab"]}
    return {**half, **{name: torch.tensor(number) for name, number in numbers.items()}}


def model_config(c: dict, **changes: object) -> dict:
    """open_clip's config of the model."""
    vision = {"image_size": c["image_size"], "layers": c["vision_layers"], "width": c["vision_width"]}
    vision |= {"patch_size": c["patch"], "head_width": c["vision_width"] // c["vision_heads"]}
    text = {"context_length": c["context"], "vocab_size": c["vocab"], "width": c["text_width"]}
    text |= {"heads": c["text_heads"], "layers": c["text_layers"]}
    return {"embed_dim": c["embed_dim"], "vision_cfg": vision, "text_cfg": text, **changes}
