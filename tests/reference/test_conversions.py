"""Files of every writer, read directly and converted, give the writer's own features of real photographs and texts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from cases import random_arrays, relative
from conftest import BACKENDS
from openai_layout import as_released, model_config, random_model

import clipmb
from clipmb import CLIPConfig, CLIPImageProcessor, CLIPPipeline, CLIPTokenizerFast
from clipmb.verification import demo_photos

TEXTS = ["a photo of a cat", "two cups of coffee on a wooden table", "a rocket"]
SHAPE = {
    "embed_dim": 64, "vision_width": 128, "vision_layers": 2, "vision_heads": 2, "image_size": 224, "patch": 32,
    "context": 77, "vocab": 49408, "text_width": 64, "text_layers": 2, "text_heads": 1,
}  # fmt: skip
CONFIG = CLIPConfig(
    {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1},
    {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2},
    projection_dim=64,
)


@pytest.fixture(scope="module")
def inputs():
    pixels = CLIPImageProcessor()(demo_photos(), return_tensors="pt")["pixel_values"]
    tokens = CLIPTokenizerFast()(TEXTS, padding=True, return_tensors="pt")
    return pixels, tokens["input_ids"], tokens["attention_mask"]


def openai(folder, inputs):
    model = random_model(SHAPE)
    state = as_released(model, SHAPE)
    model.load_state_dict({name: value for name, value in state.items() if name in model.state_dict()})
    torch.save(state, folder / "ViT-B-32.pt")
    return model.visual(inputs[0]), model.text(inputs[1])


def open_clip(folder, inputs, quick=False):
    model = random_model(SHAPE, act=None if quick else torch.nn.GELU())
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, folder / "model.pt"
    )
    config = {"model_cfg": model_config(SHAPE, quick_gelu=quick), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return model.visual(inputs[0]), model.text(inputs[1])


def written_by(cls, **options):
    def write(folder, inputs):
        arrays = random_arrays(CONFIG, "CLIPModel")
        there = transformers.CLIPModel(transformers.CLIPConfig(**CONFIG.to_dict())).eval()
        there.load_state_dict(
            {name: torch.from_numpy(np.asarray(array * 0.4, np.float32)) for name, array in arrays.items()}
        )
        there.save_pretrained(folder)
        if cls != "CLIPModel" or options:
            load = {"from_pt": True} if cls == "TFCLIPModel" else {}
            model = getattr(transformers, cls).from_pretrained(folder, **load)
            (folder / "model.safetensors").unlink()
            model.save_pretrained(folder, **options)
        with torch.no_grad():
            return there.get_image_features(inputs[0]), there.get_text_features(*inputs[1:])

    return write


WRITERS = {
    "openai": openai,
    "open_clip": open_clip,
    "open_clip-quickgelu": lambda folder, inputs: open_clip(folder, inputs, quick=True),
    "transformers safetensors": written_by("CLIPModel"),
    "transformers sharded safetensors": written_by("CLIPModel", max_shard_size="5MB"),
    "transformers bin": written_by("CLIPModel", safe_serialization=False),
    "transformers h5": written_by("TFCLIPModel"),
    "transformers msgpack": written_by("FlaxCLIPModel"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_photographs(tmp_path, inputs, writer):
    source = tmp_path / "source"
    source.mkdir()
    with torch.no_grad():
        images, texts = WRITERS[writer](source, inputs)
    assert np.ptp(images.numpy()) > 0.1
    clipmb.convert(source, tmp_path / "converted", to="safetensors")
    for backend in BACKENDS:
        for folder in (source, tmp_path / "converted"):
            pipeline = CLIPPipeline.from_pretrained(folder, backend=backend)
            assert relative(pipeline.encode_image(demo_photos(), normalize=False), images) <= 2e-6
            assert relative(pipeline.encode_text(TEXTS, normalize=False), texts) <= 2e-6
