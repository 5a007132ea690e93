"""The CLIP model of keras-hub with the weights of a checkpoint, to be measured beside ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from clipmb import CLIPConfig


def load(folder: Path, backend: str) -> dict[str, Callable[..., Any]]:
    """Makes the model on Keras' backend of this process, and compiles it as our model is in this benchmark.

    It takes images with channels last, and has no attention mask.

    Args:
        folder: The checkpoint.
        backend: Which framework of ours it stands beside.

    Returns:
        Functions of NumPy arrays for the image tower, the text tower, and both.
    """
    import keras

    backbone = build(CLIPConfig.from_pretrained(folder))
    fill(backbone, load_file(folder / "model.safetensors"))
    images, ids = backbone.input["images"], backbone.input["token_ids"]
    models = {
        "image": keras.Model(images, backbone.get_vision_embeddings(images)),
        "text": keras.Model(ids, backbone.get_text_embeddings(ids)),
        "both": keras.Model([ids, images], backbone({"images": images, "token_ids": ids})["vision_logits"]),
    }
    calls = {tower: {"pt": _torch, "tf": _tensorflow, "flax": _jax}[backend](model) for tower, model in models.items()}
    return {
        "image": lambda pixel_values: calls["image"](pixel_values),
        "text": lambda input_ids, attention_mask: calls["text"](input_ids),
        "both": lambda pixel_values, input_ids, attention_mask: calls["both"]([input_ids, pixel_values]),
    }


def build(config: CLIPConfig) -> Any:
    """Makes the model of this size, with random weights."""
    import keras_hub

    def sizes(tower: Any) -> dict[str, int]:
        return {
            "hidden_dim": tower.hidden_size,
            "num_layers": tower.num_hidden_layers,
            "num_heads": tower.num_attention_heads,
            "intermediate_dim": tower.intermediate_size,
        }

    vision, text = config.vision_config, config.text_config
    return keras_hub.models.CLIPBackbone(
        keras_hub.models.CLIPVisionEncoder(
            patch_size=vision.patch_size, image_shape=(vision.image_size, vision.image_size, 3), **sizes(vision)
        ),
        keras_hub.models.CLIPTextEncoder(
            vocabulary_size=text.vocab_size, embedding_dim=text.hidden_size, **sizes(text)
        ),
        config.projection_dim,
    )


def fill(backbone: Any, arrays: dict[str, np.ndarray]) -> None:
    """Sets the weights, in the order in which Keras lists those of each layer."""
    blocks = ["layer_norm1", *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "layer_norm2"]
    blocks += ["mlp.fc1", "mlp.fc2"]
    vision, text = backbone.vision_encoder, backbone.text_encoder
    places = [
        (vision.pre_layer_norm, _both("vision_model.pre_layrnorm")),
        (vision.layer_norm, _both("vision_model.post_layernorm")),
        (text.embedding, [f"text_model.embeddings.{name}_embedding.weight" for name in ("token", "position")]),
        (text.layer_norm, _both("text_model.final_layer_norm")),
        (backbone.vision_projection, ["visual_projection.weight"]),
        (backbone.text_projection, ["text_projection.weight"]),
        (backbone.clip_head, ["logit_scale"]),
    ]
    for encoder, tower in ((vision, "vision_model"), (text, "text_model")):
        for number, block in enumerate(encoder.encoder_layers):
            prefix = f"{tower}.encoder.layers.{number}."
            places.append((block, [full for name in blocks for full in _both(prefix + name)]))
    for layer, names in places:
        embeddings = layer is text.embedding
        _set(layer.weights, [arrays[name] if embeddings else arrays[name].T for name in names])
    prefix = "vision_model.embeddings."
    positions = arrays[prefix + "position_embedding.weight"]
    embedding = vision.embedding
    _set(embedding.patch_embedding.weights, [arrays[prefix + "patch_embedding.weight"].transpose(2, 3, 1, 0)])
    _set(embedding.position_embedding.weights, [positions])
    _set([embedding.class_embedding], [arrays[prefix + "class_embedding"]])
    _set([embedding.position_ids], [np.arange(len(positions))])


def _both(name: str) -> list[str]:
    return [f"{name}.weight", f"{name}.bias"]


def _set(variables: list[Any], values: list[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value.reshape(variable.shape))


def _torch(model: Any) -> Callable[..., Any]:
    import torch

    def call(inputs: Any) -> Any:
        with torch.inference_mode():
            several = isinstance(inputs, list)
            return model([torch.from_numpy(part) for part in inputs] if several else torch.from_numpy(inputs))

    return call


def _tensorflow(model: Any) -> Callable[..., Any]:
    import tensorflow

    shapes = [tensorflow.TensorSpec(part.shape, part.dtype) for part in model.inputs]
    signature = [shapes if len(shapes) > 1 else shapes[0]]
    compiled = tensorflow.function(model, input_signature=signature)
    return lambda inputs: compiled(inputs).numpy()


def _jax(model: Any) -> Callable[..., Any]:
    import jax

    weights = [
        [variable.value for variable in group] for group in (model.trainable_variables, model.non_trainable_variables)
    ]
    compiled = jax.jit(lambda trained, other, inputs: model.stateless_call(trained, other, inputs)[0])
    return lambda inputs: compiled(*weights, inputs).block_until_ready()
