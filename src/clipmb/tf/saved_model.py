"""SavedModels of a tower; `TFCLIPModel.export_saved_model` writes one with more signatures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorflow as tf

from clipmb.common.outputs import EXPORTED
from clipmb.tf.losses import normalize as normalized
from clipmb.tf.modeling import TFCLIPModel

RUN = Path(__file__).with_name("run.py")


def write(
    model: TFCLIPModel,
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
        path: The folder of the SavedModel.
        normalize: Return embeddings of length 1.
        ids: dtype of ``input_ids`` and ``attention_mask``.
        length: Tokens of each text; any number up to the model's context when None.
        **other: What the model has done, or other targets do.

    Returns:
        The folder.
    """
    whole: Any = model  # type checkers know calls by keyword only

    def compute(**inputs: Any) -> dict[str, Any]:
        if tower == "both":
            output = whole(inputs, return_dict=True)
            return {name: tf.cast(output[name], tf.float32) for name in EXPORTED[tower]}
        features: Any = model.get_text_features if tower == "text" else model.get_image_features
        embeds = features(inputs)
        return {f"{tower}_embeds": tf.cast(normalized(embeds) if normalize else embeds, tf.float32)}

    text, image = (model.text_model, model.text_projection), (model.vision_model, model.visual_projection)
    kept = {"text": text, "image": image, "both": (model,)}[tower]
    signature = dict(model.input_signature)
    for name in ("input_ids", "attention_mask"):
        signature[name] = tf.TensorSpec((None, length), getattr(tf, ids), name)
    takes = {"text": ("input_ids", "attention_mask"), "image": ("pixel_values",), "both": tuple(signature)}[tower]
    function: Any = tf.function(compute, autograph=False)
    module: Any = tf.Module()
    module.weights = [variable.value for layer in kept for variable in layer.variables]
    served = function.get_concrete_function(**{name: signature[name] for name in takes})
    tf.saved_model.save(module, str(path), signatures=served)
    return [path]
