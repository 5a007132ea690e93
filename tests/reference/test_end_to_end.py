"""Photographs through checkpoints of ViT-B/32's size that transformers 4.57.6 and 5 saved: equal probabilities."""

from __future__ import annotations

import importlib.resources
import json

import numpy as np
import pytest
import torch
import transformers
from _transformers5 import run
from conftest import BACKENDS
from PIL import Image

from clipmb import CLIPPipeline
from clipmb.common.zero_shot import softmax

PHOTOS = sorted(
    str(path)
    for path in importlib.resources.files("clipmb").joinpath("data/photos").iterdir()
    if path.name.endswith((".jpg", ".png"))
)
LABELS = ["a cat", "a cup of coffee", "an astronaut", "a rocket at dawn, seen from afar"]
TEXTS = [f"a photo of {label}." for label in LABELS]

WRITE_5 = """
import json, sys, torch
from transformers import CLIPConfig, CLIPModel, CLIPImageProcessorPil, CLIPProcessor, CLIPTokenizer
from PIL import Image
source, folder, photos, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
model = CLIPModel.from_pretrained(source, dtype=torch.float32).eval()
processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(source), CLIPTokenizer.from_pretrained(source))
model.save_pretrained(folder)
processor.save_pretrained(folder)
images = [Image.open(photo).convert("RGB") for photo in photos]
inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
with torch.no_grad():
    print("PROBABILITIES", json.dumps(model(**inputs).logits_per_image.softmax(-1).tolist()))
"""


def spread(model):
    """Weights under which photographs and texts differ: fresh ones would give nearly equal logits."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "logit_scale":
                parameter.fill_(np.log(100.0))
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(1.5)
    return model


@pytest.fixture(scope="module")
def saved_by_4(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    torch.manual_seed(0)
    model = spread(transformers.CLIPModel(transformers.CLIPConfig()).eval())
    model.save_pretrained(folder)
    from clipmb import CLIPTokenizer

    CLIPTokenizer().save_vocabulary(folder)
    tokenizer = transformers.CLIPTokenizerFast(folder / "vocab.json", folder / "merges.txt", model_max_length=77)
    processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(), tokenizer)
    processor.save_pretrained(folder)
    inputs = processor(text=TEXTS, images=[Image.open(photo) for photo in PHOTOS], return_tensors="pt", padding=True)
    with torch.no_grad():
        probabilities = model(**inputs).logits_per_image.softmax(-1).numpy()
    assert np.ptp(probabilities) > 0.1
    return folder, probabilities


def check(folder, backend, expected):
    """PyTorch gives the reference's probabilities to 1e-6; the others its logits to 1e-5 of the largest."""
    pipeline = CLIPPipeline.from_pretrained(folder, backend=backend)
    found = pipeline.classify(PHOTOS, LABELS, "a photo of {}.")
    if backend == "pt":
        assert np.abs(found - expected).max() <= 1e-6
        assert np.abs(softmax(pipeline.similarity(PHOTOS, TEXTS)) - expected).max() <= 1e-6
    else:
        assert np.abs(found - expected).max() <= 1e-5
        logits = pipeline.similarity(PHOTOS, TEXTS)
        differences = np.log(expected) - np.log(expected).mean(axis=1, keepdims=True)
        assert np.abs(logits - logits.mean(axis=1, keepdims=True) - differences).max() <= 1e-5 * np.abs(logits).max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_by_transformers_4(saved_by_4, backend):
    folder, expected = saved_by_4
    check(folder, backend, expected)


def test_saved_by_transformers_5(saved_by_4, tmp_path):
    folder, by_4 = saved_by_4
    printed = run(WRITE_5, folder, tmp_path, json.dumps(PHOTOS), json.dumps(TEXTS))
    expected = np.array(json.loads(printed.split("PROBABILITIES")[1]))
    assert np.abs(expected - by_4).max() <= 1e-6
    for backend in BACKENDS:
        check(tmp_path, backend, expected)
