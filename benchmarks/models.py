"""Throughput of the towers beside transformers 4.57.6: same weights, same threads, one process for each framework.

Where they are installed, keras-hub takes part with each framework as Keras' backend, and open_clip with PyTorch.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _keras_hub
import numpy as np
from _checkpoint import for_each_backend
from _compare import compare, row

from clipmb import backends


def pt(folder: Path) -> tuple[dict[str, Callable[..., Any]], dict[str, Callable[..., Any]]]:
    import torch
    import transformers

    from clipmb import CLIPModel

    def adapter(model: Any) -> dict[str, Callable[..., Any]]:
        def run(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(**inputs: np.ndarray) -> Any:
                with torch.inference_mode():
                    return function(**{name: torch.from_numpy(value) for name, value in inputs.items()})

            return call

        return {
            "image": run(model.get_image_features),
            "text": run(model.get_text_features),
            "both": run(model),
        }

    ours = CLIPModel.from_pretrained(folder)
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    return adapter(ours), adapter(theirs)


def open_clip(folder: Path) -> dict[str, Callable[..., Any]]:
    """The towers of open_clip with the same weights; its text tower has no mask."""
    import torch
    from open_clip import create_model

    from clipmb import convert

    with tempfile.TemporaryDirectory() as name:
        convert(folder, Path(name, "out"), to="open_clip")
        file = Path(name, "out", "open_clip_model.safetensors")
        model = create_model("ViT-B-32-quickgelu", pretrained=str(file)).eval()

    def image(pixel_values: np.ndarray) -> Any:
        with torch.inference_mode():
            return model.encode_image(torch.from_numpy(pixel_values))

    def text(input_ids: np.ndarray, attention_mask: np.ndarray) -> Any:
        with torch.inference_mode():
            return model.encode_text(torch.from_numpy(input_ids))

    return {"image": image, "text": text}


def tf(folder: Path) -> tuple[dict[str, Callable[..., Any]], dict[str, Callable[..., Any]]]:
    import tensorflow

    from clipmb import TFCLIPModel

    def adapter(model: Any) -> dict[str, Callable[..., Any]]:
        ids = tensorflow.TensorSpec((None, None), tensorflow.int32)
        pixels = tensorflow.TensorSpec((None, 3, 224, 224), tensorflow.float32)
        # Both through tf.function, which is how either library is run for speed.
        image = tensorflow.function(lambda p: model.get_image_features(pixel_values=p), input_signature=[pixels])
        text = tensorflow.function(
            lambda i, m: model.get_text_features(input_ids=i, attention_mask=m), input_signature=[ids, ids]
        )
        both = tensorflow.function(
            lambda i, m, p: model({"input_ids": i, "attention_mask": m, "pixel_values": p}).logits_per_image,
            input_signature=[ids, ids, pixels],
        )
        return {
            "image": lambda pixel_values: image(pixel_values).numpy(),
            "text": lambda input_ids, attention_mask: text(input_ids, attention_mask).numpy(),
            "both": lambda pixel_values, input_ids, attention_mask: both(
                input_ids, attention_mask, pixel_values
            ).numpy(),
        }

    ours = TFCLIPModel.from_pretrained(folder)
    import transformers

    theirs = transformers.TFCLIPModel.from_pretrained(folder, from_pt=True)
    return adapter(ours), adapter(theirs)


def flax(folder: Path) -> tuple[dict[str, Callable[..., Any]], dict[str, Callable[..., Any]]]:
    import jax
    import transformers

    from clipmb import FlaxCLIPModel

    def adapter(model: Any) -> dict[str, Callable[..., Any]]:
        # Both through jax.jit with the parameters as an argument, which is how either library is run for speed.
        image = jax.jit(lambda params, p: model.get_image_features(p, params=params))
        text = jax.jit(lambda params, i, m: model.get_text_features(i, m, params=params))
        both = jax.jit(lambda params, i, m, p: model(i, p, m, params=params).logits_per_image)
        params = jax.tree.map(jax.numpy.asarray, model.params)
        return {
            "image": lambda pixel_values: image(params, pixel_values).block_until_ready(),
            "text": lambda input_ids, attention_mask: text(params, input_ids, attention_mask).block_until_ready(),
            "both": lambda pixel_values, input_ids, attention_mask: both(
                params, input_ids, attention_mask, pixel_values
            ).block_until_ready(),
        }

    return adapter(FlaxCLIPModel.from_pretrained(folder)), adapter(transformers.FlaxCLIPModel.from_pretrained(folder))


def cases(batch: int) -> dict[str, tuple[dict[str, np.ndarray], str]]:
    rng = np.random.default_rng(0)
    pixels = {"pixel_values": rng.standard_normal((batch, 3, 224, 224), np.float32)}
    ids = rng.integers(1000, 40000, (batch, 77), np.int64)
    ids[:, 0], ids[:, -1] = 49406, 49407
    text = {"input_ids": ids.astype(np.int32), "attention_mask": np.ones((batch, 77), np.int32)}
    return {"image": (pixels, "images"), "text": (text, "texts"), "both": ({**pixels, **text}, "pairs")}


def peers(backend: str, folder: Path) -> dict[str, dict[str, Callable[..., Any]]]:
    """The towers of the other libraries that are installed, by the library's name."""
    found = {}
    if importlib.util.find_spec("keras_hub"):
        found["keras-hub"] = _keras_hub.load(folder, backend)
    if backend == "pt" and importlib.util.find_spec("open_clip"):
        found["open_clip"] = open_clip(folder)
    return found


def measure(backend: str, folder: Path, batches: list[int], rounds: int) -> None:
    os.environ["KERAS_BACKEND"] = {"pt": "torch", "tf": "tensorflow", "flax": "jax"}[backend]
    ours, theirs = globals()[backend](folder)
    others = peers(backend, folder)
    for batch in batches:
        for tower, (inputs, unit) in cases(batch).items():
            compare(
                f"{backend}: {tower}, batch {batch}",
                lambda tower=tower, inputs=inputs: ours[tower](**inputs),
                lambda tower=tower, inputs=inputs: theirs[tower](**inputs),
                count=batch,
                unit=unit,
                rounds=rounds,
                goal=1.0,
            )
            for peer, towers in others.items():
                if tower not in towers:
                    continue
                given = dict(inputs)
                if peer == "keras-hub" and "pixel_values" in given:  # channels last is its own order
                    given["pixel_values"] = np.ascontiguousarray(given["pixel_values"].transpose(0, 2, 3, 1))
                found = ours[tower](**inputs)
                found = np.asarray(found.logits_per_image if tower == "both" and backend == "pt" else found)
                if not np.allclose(found, np.asarray(towers[tower](**given)), atol=1e-4):
                    raise SystemExit(f"{peer} finds other values, so that the times mean nothing.")
                compare(
                    f"{backend}: {tower}, batch {batch}",
                    lambda tower=tower, inputs=inputs: ours[tower](**inputs),
                    lambda tower=tower, given=given, towers=towers: towers[tower](**given),
                    count=batch, unit=unit, rounds=rounds, peer=peer,
                )  # fmt: skip
    modes(backend, folder, rounds)


def modes(backend: str, folder: Path, rounds: int) -> None:
    """What the engine's options give over its plain float32 mode, for images in batches of 8."""
    inputs = cases(8)["image"][0]["pixel_values"]
    engine = backends.engine(backend)
    plain = engine.load(folder)
    reference = plain.image_features(inputs)
    for options in ({"compile": True}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "compile": True}):
        other = engine.load(folder, **options)
        found = other.image_features(inputs)
        cosine = (found * reference).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(reference, axis=1)
        name = ", ".join(f"{key}={value}" for key, value in options.items())
        compare(
            f"{backend}: engine, {name}",
            lambda other=other: other.image_features(inputs),
            lambda: plain.image_features(inputs),
            count=8,
            unit="images",
            rounds=rounds,
            peer="float32, eager",
        )
        row("  its smallest cosine to float32", clipmb=f"{cosine.min():.6f}")
        other.free()


if __name__ == "__main__":
    for_each_backend(
        measure,
        __doc__,
        batches={"type": int, "nargs": "+", "default": [1, 8, 32]},
        rounds={"type": int, "default": 7},
    )
