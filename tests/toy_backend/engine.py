"""CLIP in numpy, as `clipmb.backends.Engine` describes an engine; it computes in float32 and float64."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import numpy as np

from clipmb.common.config import CLIPConfig
from clipmb.common.hub import Source
from clipmb.common.pretrained import normal_dtype, read_weights

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: (x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2).astype(x.dtype),
}


class Engine:
    """A loaded CLIP; ``model`` is its canonical arrays."""

    backend: ClassVar[str] = "toy"

    def __init__(self, config: CLIPConfig, arrays: Mapping[str, np.ndarray]) -> None:
        self.config = config
        self.model: Any = dict(arrays)

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str] | Source | None,
        *,
        dtype: Any = None,
        device: Any = None,
        compile: bool = False,
        **options: Any,
    ) -> Self:
        if name_or_path is None:
            config, arrays = options["config"], options["state_dict"]
        else:
            source = Source.of(name_or_path, options)
            config, arrays = CLIPConfig.from_pretrained(source), read_weights(source)
        kind = normal_dtype(dtype, "toy") or "float32"
        return cls(config, {name: np.asarray(array, kind) for name, array in arrays.items()})

    @staticmethod
    def environment() -> dict[str, Any]:
        return {"versions": {"numpy": np.__version__}, "device": "cpu", "precision": "highest"}

    @property
    def logit_scale(self) -> float:
        return float(np.exp(self.model["logit_scale"].astype(np.float64)))

    def image_features(self, pixel_values: np.ndarray) -> np.ndarray:
        return self._vision(pixel_values)["vision.projected"]

    def text_features(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        return self._text(input_ids, attention_mask)["text.projected"]

    def stages(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None, pixel_values: np.ndarray
    ) -> dict[str, np.ndarray]:
        found = {**self._text(input_ids, attention_mask), **self._vision(pixel_values)}
        text, image = (unit(found[f"{tower}.projected"]) for tower in ("text", "vision"))
        return {**found, "logits": np.exp(self.model["logit_scale"]) * image @ text.T}

    def weights(self) -> dict[str, np.ndarray]:
        return dict(self.model)

    def free(self) -> None:
        del self.model

    def _text(self, ids: np.ndarray, mask: np.ndarray | None) -> dict[str, np.ndarray]:
        part, seq = self._part("text_model"), ids.shape[1]
        states = part("embeddings.token_embedding.weight")[ids] + part("embeddings.position_embedding.weight")[:seq]
        lowest = np.finfo(states.dtype).min
        bias = np.where(np.tri(seq, dtype=bool), 0, lowest)[None, None].astype(states.dtype)  # (1, 1, seq, seq)
        if mask is not None:
            with np.errstate(over="ignore"):  # a key hidden by both is at minus infinity
                bias = bias + np.where(mask[:, None, None] == 1, 0, lowest).astype(states.dtype)
        config = self.config.text_config
        found = self._blocks("text", states, bias)
        last = self._norm("text_model.final_layer_norm", list(found.values())[-1], config.layer_norm_eps)
        ends = ids.argmax(1) if config.eos_token_id == 2 else (ids == config.eos_token_id).argmax(1)
        pooled = last[np.arange(len(ids)), ends]  # (batch, width)
        projected = pooled @ self.model["text_projection.weight"].T
        return {**found, "text.last_hidden_state": last, "text.pooled": pooled, "text.projected": projected}

    def _vision(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        part, config = self._part("vision_model"), self.config.vision_config
        kernel, size = part("embeddings.patch_embedding.weight"), config.patch_size
        rows = config.image_size // size
        patches = pixels.astype(kernel.dtype).reshape(len(pixels), -1, rows, size, rows, size)
        patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(len(pixels), rows * rows, -1)
        patches = patches @ kernel.reshape(len(kernel), -1).T  # (batch, patches, width)
        first = np.broadcast_to(part("embeddings.class_embedding"), (len(pixels), 1, len(kernel)))
        states = np.concatenate([first, patches], axis=1) + part("embeddings.position_embedding.weight")
        states = self._norm("vision_model.pre_layrnorm", states, config.layer_norm_eps)
        found = self._blocks("vision", states, np.zeros((), states.dtype))
        last = list(found.values())[-1]
        pooled = self._norm("vision_model.post_layernorm", last[:, 0], config.layer_norm_eps)
        projected = pooled @ self.model["visual_projection.weight"].T
        return {**found, "vision.last_hidden_state": last, "vision.pooled": pooled, "vision.projected": projected}

    def _blocks(self, tower: str, states: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
        config = self.config.text_config if tower == "text" else self.config.vision_config
        found = {f"{tower}.embeddings": states}
        for i in range(config.num_hidden_layers):
            name = f"{tower}_model.encoder.layers.{i}"
            normed = self._norm(f"{name}.layer_norm1", states, config.layer_norm_eps)
            batch, seq, width = normed.shape
            query, key, value = (
                self._linear(f"{name}.self_attn.{which}_proj", normed)
                .reshape(batch, seq, config.num_attention_heads, -1)
                .transpose(0, 2, 1, 3)  # (batch, heads, seq, head_dim)
                for which in "qkv"
            )
            scores = query @ key.transpose(0, 1, 3, 2) / np.sqrt(np.asarray(query.shape[-1], query.dtype)) + bias
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            context = weights / weights.sum(-1, keepdims=True) @ value
            context = context.transpose(0, 2, 1, 3).reshape(batch, seq, width)
            states = states + self._linear(f"{name}.self_attn.out_proj", context)
            normed = self._norm(f"{name}.layer_norm2", states, config.layer_norm_eps)
            inner = ACTIVATIONS[config.hidden_act](self._linear(f"{name}.mlp.fc1", normed))
            states = states + self._linear(f"{name}.mlp.fc2", inner)
            found[f"{tower}.block.{i}"] = states
        return found

    def _part(self, prefix: str) -> Callable[[str], np.ndarray]:
        return lambda name: self.model[f"{prefix}.{name}"]

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.model[f"{name}.weight"].T + self.model[f"{name}.bias"]

    def _norm(self, name: str, x: np.ndarray, eps: float) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        normed = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + np.asarray(eps, x.dtype))
        return normed * self.model[f"{name}.weight"] + self.model[f"{name}.bias"]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)
