"""CLIPProcessor against transformers 4.57.6, and its files against transformers 4 and 5."""

import json

import numpy as np
import pytest
import transformers
from _transformers5 import run
from cases import assert_same_features
from PIL import Image

from clipmb import CLIPImageProcessor, CLIPProcessor

TEXTS = ["A photo of a cat!", "two dogs", "", "naïve café 😀 " * 30]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    CLIPProcessor(CLIPImageProcessor(size=36, crop_size=(30, 34), image_mean=[0.5, 0.4, 0.3])).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(saved):
    return transformers.CLIPProcessor.from_pretrained(saved)


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8))


def test_transformers_4_reads_what_clipmb_saves(saved, theirs):
    assert type(theirs.image_processor) is transformers.CLIPImageProcessor
    assert type(theirs.tokenizer) is transformers.CLIPTokenizerFast
    assert theirs.image_processor.size == {"shortest_edge": 36}
    assert theirs.image_processor.crop_size == {"height": 30, "width": 34}
    auto = transformers.AutoProcessor.from_pretrained(saved)
    assert type(auto) is transformers.CLIPProcessor
    assert auto.image_processor.to_dict() == theirs.image_processor.to_dict()


@pytest.mark.parametrize("tensors", ["np", "pt", "tf", "jax"])
def test_calls(saved, theirs, image, tensors):
    mine = CLIPProcessor.from_pretrained(saved)
    for call in (
        {"padding": True, "truncation": True},
        {"padding": "max_length", "max_length": 12, "truncation": True, "do_rescale": False, "resample": 2},
        {"text_kwargs": {"padding": True}, "images_kwargs": {"do_convert_rgb": False, "size": 41}},
    ):
        call |= {"text": TEXTS, "images": [image, image.rotate(90)], "return_tensors": tensors}
        mine_done, theirs_done = mine(**call), theirs(**call)
        assert_same_features(mine_done, theirs_done)
        assert all(type(mine_done[name]) is type(theirs_done[name]) for name in theirs_done)


def test_one_part_alone(saved, theirs, image):
    mine = CLIPProcessor.from_pretrained(saved)
    assert_same_features(mine(text=TEXTS, padding=True), theirs(text=TEXTS, padding=True))
    assert mine(text=TEXTS)["input_ids"] == theirs(text=TEXTS)["input_ids"]
    assert_same_features(mine(images=image), theirs(images=image))
    assert_same_features(mine(image, TEXTS, padding=True), theirs(image, TEXTS, padding=True))  # the order of 4.57
    assert mine.model_input_names == theirs.model_input_names


@pytest.mark.parametrize("legacy", [True, False])
def test_clipmb_reads_what_transformers_4_saves(theirs, image, tmp_path, legacy):
    theirs.save_pretrained(tmp_path, legacy_serialization=legacy)
    assert (tmp_path / "preprocessor_config.json").exists() is legacy
    call = {"text": TEXTS, "images": image, "return_tensors": "np", "padding": True, "truncation": True}
    assert_same_features(CLIPProcessor.from_pretrained(tmp_path)(**call), theirs(**call))


def test_parts_of_transformers_work_inside(theirs, image, tmp_path):
    mixed = CLIPProcessor(theirs.image_processor, theirs.tokenizer)
    call = {"text": TEXTS, "images": image, "return_tensors": "np", "padding": True}
    assert_same_features(mixed(**call), theirs(**call))
    mixed.save_pretrained(tmp_path)
    assert_same_features(CLIPProcessor.from_pretrained(tmp_path)(**call), theirs(**call))


CALL_5 = """
import json, sys
import numpy as np
from PIL import Image
from transformers import AutoProcessor, CLIPProcessor

folder, out, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8))
processor = CLIPProcessor.from_pretrained(folder, backend="pil")
assert type(AutoProcessor.from_pretrained(folder)) is CLIPProcessor
done = processor(text=texts, images=image, return_tensors="np", padding=True, truncation=True)
np.savez(out + "/done.npz", **done)
processor.save_pretrained(out)
"""


def test_files_cross_with_transformers_5(saved, image, tmp_path):
    run(CALL_5, str(saved), str(tmp_path), json.dumps(TEXTS))
    with np.load(tmp_path / "done.npz") as done:
        theirs = dict(done)
    call = {"text": TEXTS, "images": image, "return_tensors": "np", "padding": True, "truncation": True}
    for folder in (saved, tmp_path):  # tmp_path: what transformers 5 saved
        mine = CLIPProcessor.from_pretrained(folder)(**call)
        assert set(mine) == set(theirs)
        for name in theirs:
            assert np.array_equal(mine[name], theirs[name]), name
    assert not (tmp_path / "preprocessor_config.json").exists()
