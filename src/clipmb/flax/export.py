"""StableHLO programs of jax.export, which JAX runs without Flax, on the CPU, GPUs and TPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from clipmb.common.outputs import EXPORTED
from clipmb.flax.losses import normalize as normalized
from clipmb.flax.modeling import FlaxCLIPModel

RUN = Path(__file__).with_name("run.py")


def write(
    model: FlaxCLIPModel,
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
        model: The model, which computes in the dtype that is asked for.
        tower: "image", "text" or "both".
        path: The file without its ending.
        normalize: Return embeddings of length 1.
        ids: dtype of ``input_ids`` and ``attention_mask``.
        length: Tokens of each text; any number up to the model's context when None.
        **other: What the model has done, or other targets do.

    Returns:
        ``….stablehlo``.
    """
    text, vision = model.config.text_config, model.config.vision_config
    free = tower != "image" and length is None  # a constraint may be on sizes of inputs only
    limit = [f"seq <= {text.max_position_embeddings}"] if free else []
    texts, images, seq = export.symbolic_shape("text_batch, image_batch, seq", constraints=limit)

    def compute(**inputs: Any) -> dict[str, Any]:
        if tower == "both":
            output: Any = model(**inputs)
            return {name: output[name].astype(jnp.float32) for name in EXPORTED[tower]}
        features = model.get_text_features if tower == "text" else model.get_image_features
        embeds = features(**inputs)
        return {f"{tower}_embeds": (normalized(embeds) if normalize else embeds).astype(jnp.float32)}

    inputs = {}
    with jax.enable_x64(ids == "int64"):
        if tower != "image":
            for name in ("input_ids", "attention_mask"):
                inputs[name] = jax.ShapeDtypeStruct((texts, length or seq), ids)
        if tower != "text":
            sides = (vision.num_channels, vision.image_size, vision.image_size)
            inputs["pixel_values"] = jax.ShapeDtypeStruct((images, *sides), "float32")
        program = export.export(jax.jit(compute), platforms=("cpu", "cuda", "tpu"))(**inputs)
    file = path.with_name(f"{path.name}.stablehlo")
    file.write_bytes(program.serialize())
    return [file]
