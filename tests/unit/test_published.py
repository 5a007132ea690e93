"""Published values of OpenAI's ViT-B/32, with its published weights: `pytest -m hub`, which downloads 600 MB.

Sources: transformers' integration test of CLIP (the photo of two cats), Bumblebee's tests (constant inputs), which are
rounded to four decimals.
"""

from __future__ import annotations

import io
import urllib.request

import numpy as np
import pytest
from conftest import BACKENDS
from PIL import Image

from clipmb import backends, convert
from clipmb.common.hub import Source
from clipmb.pipeline import processor_for

pytestmark = pytest.mark.hub

NAME = "openai/clip-vit-base-patch32"
PHOTO = "http://images.cocodataset.org/val2017/000000039769.jpg"
IDS = np.array([[49406, 320, 1125, 539, 320, 2368, 49407], [49406, 320, 1125, 539, 320, 1929, 49407]])  # a cat, a dog
SIZE = 224


@pytest.fixture(scope="module", params=["published", "converted"])
def checkpoint(request, tmp_path_factory):
    """The repository, and the same through two conversions."""
    if request.param == "published":
        return NAME
    base = tmp_path_factory.mktemp("converted")
    convert(NAME, base / "openai", "openai")
    convert(base / "openai", base / "safetensors")
    return str(base / "safetensors")


@pytest.fixture(scope="module", params=BACKENDS)
def engine(request, checkpoint):
    return backends.engine(request.param).load(checkpoint)


def constant(*values: float) -> np.ndarray:
    """Pixels that are already normalised: one picture for each value."""
    return np.stack([np.full((3, SIZE, SIZE), value, np.float32) for value in values])


def test_two_cats(engine, checkpoint):
    with urllib.request.urlopen(PHOTO, timeout=60) as answer:
        photo = Image.open(io.BytesIO(answer.read()))
    processor = processor_for(Source(checkpoint), engine.config)
    inputs = processor(text=["a photo of a cat", "a photo of a dog"], images=photo, return_tensors="np", padding=True)
    assert inputs["input_ids"].tolist() == IDS.tolist()
    logits = engine.stages(inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"])["logits"]
    np.testing.assert_allclose(logits, [[24.5701, 19.3049]], atol=1e-3)


def test_constant_inputs(engine):
    stages = engine.stages(IDS[:1], None, constant(0.5))
    published = {
        "vision.last_hidden_state": [
            [0.3465, -0.3939, -0.5297], [0.3588, -0.2529, -0.5606], [0.3958, -0.2688, -0.5367],
        ],
        "vision.pooled": [0.3602, 0.3658, -0.2337],
        "vision.projected": [-0.3381, -0.0196, -0.4053],
        "text.last_hidden_state": [[-0.5844, 0.3685, -2.0744], [-0.96, 1.0018, -0.2415], [-0.5957, -0.1719, 0.4689]],
        "text.pooled": [0.1658, 0.8876, 10.6313],
        "text.projected": [0.0733, -0.2448, -0.2212],
    }  # fmt: skip
    for stage, values in published.items():
        found = stages[stage][0, 1:4, 1:4] if stage.endswith("state") else stages[stage][0, 1:4]
        np.testing.assert_allclose(found, values, atol=1e-4, err_msg=stage)


def test_constant_logits(engine):
    logits = engine.stages(IDS, None, constant(0.25, 0.75))["logits"]
    np.testing.assert_allclose(logits.T, [[22.7866, 22.8397], [23.2389, 22.8406]], atol=1e-4)
