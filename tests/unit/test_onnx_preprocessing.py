"""Image preprocessing in an ONNX graph: the bits of the image processor."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image

from clipmb import CLIPImageProcessor, CLIPVisionConfig
from clipmb.common.image import resampling
from clipmb.onnx.graph import Graph
from clipmb.onnx.preprocessing import FILTERS, ORDERS, preprocess
from clipmb.verification import demo_photos

pytestmark = pytest.mark.backend("onnx")
SIDE = 32
SIZES = [
    (1, 1),
    (1, 50),
    (50, 1),
    (3, 4),
    (32, 32),
    (33, 31),
    (31, 90),
    (64, 64),
    (97, 35),
    (300, 41),
    (41, 300),
    (3, 310),
]


def build(processor, side=SIDE):
    graph = Graph({})
    images = graph.input("images", np.uint8, ["batch", "height", "width", 3])
    pixels = preprocess(graph, images, processor, CLIPVisionConfig(image_size=side))
    graph.output("pixel_values", pixels, ["batch", 3, side, side])
    model = graph.model(embedded=True)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda pictures: session.run(None, {"images": pictures})[0]


def pictures(height, width, batch=2):
    """Noise, and noise of extremes, which saturates."""
    values = np.random.default_rng(height * 1000 + width).integers(0, 256, (batch, height, width, 3), np.uint8)
    values[1::2] = (values[1::2] >= 128) * np.uint8(255)
    return values


def expected(processor, given):
    return processor(given, input_data_format="channels_last", return_tensors="np")["pixel_values"].astype(np.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pass_order": "horizontal"},
        {"resample": Image.Resampling.BILINEAR},
        {"size": {"shortest_edge": 45}},
        {"size": 21},
        {"size": (20, 50)},
        {"size": (50, 21)},
        {"size": (32, 32), "do_center_crop": False},
        {"do_resize": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"image_mean": 0.5, "image_std": [0.1, 0.2, 0.3], "rescale_factor": 1 / 127.5},
    ],
    ids=str,
)
def test_every_setting(settings):
    processor = CLIPImageProcessor(**{"size": SIDE, "crop_size": SIDE, **settings})
    computed = build(processor)
    for size in SIZES:
        given = pictures(*size)
        np.testing.assert_array_equal(computed(given), expected(processor, given), err_msg=str(size))


@pytest.mark.parametrize("rule", ORDERS)
def test_every_order_of_the_passes(monkeypatch, rule):
    """Against Pillow, one pass after the other."""
    monkeypatch.setattr("clipmb.onnx.preprocessing.rule_name", lambda order: rule)
    computed = build(CLIPImageProcessor(size=SIDE, crop_size=SIDE))
    vertical = 0
    for height, width in (*SIZES, (310, 3), (70, 34), (68, 34), (105, 32), (3300, 33), (3301, 33), (3301, 32)):
        given = pictures(height, width)
        target = SIDE * width // min(height, width), SIDE * height // min(height, width)
        first = resampling._RULES[rule]((width, height), target)
        middle = (width, target[1]) if first else (target[0], height)
        resized = [np.asarray(Image.fromarray(picture).resize(middle, 3).resize(target, 3)) for picture in given]
        wanted = expected(CLIPImageProcessor(do_resize=False, crop_size=SIDE), np.stack(resized))
        np.testing.assert_array_equal(computed(given), wanted, err_msg=str((height, width)))
        vertical += first
    assert (vertical > 0) == (rule != "horizontal first")


def test_random_sizes():
    rng = np.random.default_rng(0)
    processor = CLIPImageProcessor(size=40, crop_size=40)
    computed = build(processor, 40)
    for _ in range(60):
        given = pictures(*(int(side) for side in np.exp(rng.uniform(0, np.log(500), 2))), batch=1)
        np.testing.assert_array_equal(computed(given), expected(processor, given), err_msg=str(given.shape))


def test_photographs_at_the_size_of_published_models():
    processor = CLIPImageProcessor()
    computed = build(processor, 224)
    for path in demo_photos():
        photo = Image.open(path).convert("RGB")
        for size in (photo.size, photo.size[::-1], (180, 120), (400, 1000), (1000, 230)):
            given = np.asarray(photo.resize(size))[None]
            np.testing.assert_array_equal(computed(given), expected(processor, given), err_msg=f"{path} {size}")


@pytest.mark.parametrize(
    ("settings", "channels", "message"),
    [
        ({"resample": 1}, 3, "has the filters 2 .* and 3 .*Received: resample=1"),
        ({"crop_size": 31}, 3, "3 channels of 32 x 32 pixels. Received: .*'height': 31"),
        ({"do_center_crop": False}, 3, "3 channels of 32 x 32 pixels. Received: .*do_center_crop=False"),
        ({"do_resize": False, "do_center_crop": False}, 3, "3 channels of 32 x 32 pixels. Received: do_resize=False"),
        ({}, 1, "3 channels of 32 x 32 pixels. Received: .*1 channels"),
    ],
)
def test_what_is_refused(settings, channels, message):
    processor = CLIPImageProcessor(**{"size": SIDE, "crop_size": SIDE, **settings})
    with pytest.raises(ValueError, match=message):
        preprocess(Graph({}), "images", processor, CLIPVisionConfig(image_size=SIDE, num_channels=channels))


def test_every_order_and_no_other_filter_is_known():
    assert list(ORDERS) == list(resampling._RULES)
    assert set(FILTERS) == {Image.Resampling.BILINEAR, Image.Resampling.BICUBIC}
