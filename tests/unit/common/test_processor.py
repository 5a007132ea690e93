import json
from pathlib import Path

import numpy as np
import pytest
from cases import assert_same_features
from PIL import Image

from clipmb import (
    BatchEncoding,
    BatchFeature,
    CheckpointError,
    CLIPImageProcessor,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPTokenizerFast,
)

TEXTS = ["a photo of a cat", "dogs"]


@pytest.fixture(scope="module")
def processor():
    return CLIPProcessor(CLIPImageProcessor(size=20, crop_size=20))


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))


def test_the_default_parts():
    processor = CLIPProcessor()
    assert type(processor.tokenizer) is CLIPTokenizerFast
    assert processor.image_processor.to_dict() == CLIPImageProcessor().to_dict()
    assert processor.model_input_names == ["pixel_values", "input_ids", "attention_mask"]


def test_a_call_is_the_two_parts_calls(processor, image):
    done = processor(text=TEXTS, images=image, return_tensors="np", padding=True)
    assert type(done) is BatchFeature
    assert list(done) == processor.model_input_names
    tokens = CLIPTokenizerFast()(TEXTS, return_tensors="np", padding=True)
    assert np.array_equal(done.input_ids, tokens["input_ids"])
    assert np.array_equal(done.attention_mask, tokens["attention_mask"])
    assert done.attention_mask.sum(1).tolist() == [7, 3]
    assert np.array_equal(done.pixel_values, processor.image_processor(image, return_tensors="np").pixel_values)


def test_text_alone_and_images_alone(processor, image):
    text = processor(text="a cat")
    assert isinstance(text, BatchEncoding)
    assert text["input_ids"] == [49406, 320, 2368, 49407]
    assert list(processor(images=image)) == ["pixel_values"]
    with pytest.raises(ValueError, match="text, images or both"):
        processor()
    with pytest.raises(ValueError, match="text, images or both"):
        processor(padding=True)


def test_both_positional_orders(processor, image, tmp_path):
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    for picture in (image, array, [image, image], [[array]], tmp_path / "a.png", (tmp_path / "a.png").read_bytes()):
        expected = processor(text=TEXTS, images=picture, return_tensors="np", padding=True)
        assert_same_features(processor(TEXTS, picture, return_tensors="np", padding=True), expected)
        assert_same_features(processor(picture, TEXTS, return_tensors="np", padding=True), expected)
        assert_same_features(processor(picture, return_tensors="np"), processor(images=picture, return_tensors="np"))
    assert_same_features(
        processor("a cat", str(tmp_path / "a.png"), return_tensors="np"), processor("a cat", image, return_tensors="np")
    )
    with pytest.raises(TypeError, match="One input of CLIPProcessor must be text"):
        processor(image, image)


def test_flat_and_grouped_arguments(processor, image):
    flat = processor(
        text=TEXTS,
        images=image,
        return_tensors="np",
        padding="max_length",
        max_length=9,
        do_normalize=False,
        crop_size=11,
    )
    assert flat.input_ids.shape == (2, 9)
    assert flat.pixel_values.shape == (1, 3, 11, 11)
    assert flat.pixel_values.min() >= 0
    grouped = processor(
        text=TEXTS,
        images=image,
        text_kwargs={"padding": "max_length", "max_length": 9},
        images_kwargs={"do_normalize": False, "crop_size": 11},
        common_kwargs={"return_tensors": "np"},
    )
    assert_same_features(flat, grouped)
    with pytest.raises(ValueError, match=r"Received: \['padding'\]"):
        processor(text=TEXTS, padding=True, text_kwargs={"padding": True})


def test_a_flat_do_convert_rgb_reaches_the_image_processor(processor, image):
    with pytest.raises(ValueError, match="Image 0 must have"):
        processor(images=image.convert("L"), do_convert_rgb=False)
    assert processor(images=image.convert("L"), return_tensors="np").pixel_values.shape == (1, 3, 20, 20)


@pytest.mark.parametrize("call", [{"paddin": True}, {"text_kwargs": {"paddin": 1}}, {"images_kwargs": {"paddin": 1}}])
def test_unknown_arguments_are_named(processor, call):
    with pytest.raises(TypeError, match="Received: paddin"):
        processor(text="a", **call)


def test_videos_and_audio_are_refused_unless_none(processor):
    assert "input_ids" in processor(text="a", videos=None, audio=None)
    with pytest.raises(TypeError, match="Received: videos"):
        processor(text="a", videos=[1])


def test_bad_parts():
    for call in (
        {"image_processor": CLIPTokenizerFast()},
        {"tokenizer": CLIPImageProcessor()},
        {"image_processor": CLIPTokenizerFast(), "tokenizer": CLIPImageProcessor()},
        {"image_processor": CLIPImageProcessor},
        {"tokenizer": 3},
    ):
        with pytest.raises(TypeError, match="must be a"):
            CLIPProcessor(**call)
    with pytest.raises(TypeError, match="Received: foo"):
        CLIPProcessor(foo=1)


def test_former_names_warn():
    images = CLIPImageProcessor(size=9)
    with pytest.warns(FutureWarning, match="image_processor"):
        processor = CLIPProcessor(feature_extractor=images)
    assert processor.image_processor is images
    with pytest.warns(FutureWarning, match="image_processor"):
        assert processor.feature_extractor is images
    with pytest.warns(FutureWarning, match="image_processor_class"):
        assert processor.feature_extractor_class == processor.image_processor_class


def test_decoding(processor):
    ids = processor(text=TEXTS)["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == TEXTS
    assert processor.decode(ids[0], skip_special_tokens=True) == TEXTS[0]


def test_saved_and_loaded(processor, image, tmp_path):
    written = processor.save_pretrained(tmp_path / "new")
    assert [Path(path).name for path in written] == ["preprocessor_config.json", "processor_config.json"]
    assert not [path for path in (tmp_path / "new").iterdir() if path.name.startswith(".")]
    loaded = CLIPProcessor.from_pretrained(tmp_path / "new")
    call = {"text": TEXTS, "images": image, "return_tensors": "np", "padding": True}
    assert_same_features(loaded(**call), processor(**call))
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()


def test_overrides_reach_the_right_part(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = CLIPProcessor.from_pretrained(
        tmp_path, do_normalize=False, size=33, model_max_length=20, padding_side="left", use_fast=True
    )
    assert loaded.image_processor.do_normalize is False
    assert loaded.image_processor.size == {"shortest_edge": 33}
    assert loaded.tokenizer.model_max_length == 20
    assert loaded.tokenizer.padding_side == "left"
    assert not hasattr(loaded.image_processor, "padding_side")


@pytest.mark.parametrize("kept", ["preprocessor_config.json", "processor_config.json"])
def test_either_settings_file_is_enough(processor, tmp_path, kept):
    for path in map(Path, processor.save_pretrained(tmp_path)):
        if path.name != kept:
            path.unlink()
    assert CLIPProcessor.from_pretrained(tmp_path).image_processor.size == {"shortest_edge": 20}


def test_a_missing_part_is_named(processor, tmp_path):
    for path in processor.save_pretrained(tmp_path):
        Path(path).unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        CLIPProcessor.from_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path / "images")
    with pytest.raises(CheckpointError, match="tokenizer"):
        CLIPProcessor.from_pretrained(tmp_path / "images")


def test_a_failed_save_leaves_the_old_files(processor, tmp_path, monkeypatch):
    processor.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changed = CLIPProcessor(CLIPImageProcessor(size=99), processor.tokenizer)

    def fail():
        raise OSError("disk full")

    monkeypatch.setattr(changed.image_processor, "to_json_string", fail)
    with pytest.raises(OSError, match="disk full"):
        changed.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_removes_the_files_of_another_tokenizer(processor, tmp_path):
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": 49408}))
    (tmp_path / "model.safetensors").write_text("kept")
    processor.save_pretrained(tmp_path)
    assert not (tmp_path / "added_tokens.json").exists()
    assert (tmp_path / "model.safetensors").read_text() == "kept"
    assert len(CLIPProcessor.from_pretrained(tmp_path).tokenizer) == 49408


def test_repr_shows_both_parts(processor):
    assert "CLIPImageProcessor" in repr(processor)
    assert "CLIPTokenizerFast" in repr(processor)


def test_no_argument_of_from_pretrained_vanishes(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"from_pretrained has no arguments .* Received: do_rescal, frobnicate"):
        CLIPProcessor.from_pretrained(tmp_path, do_rescal=1, frobnicate=3)
    CLIPProcessor.from_pretrained(tmp_path, frobnicate=None, return_unused_kwargs=False)


def test_arguments_of_the_tokenizers_call_become_defaults_of_the_processors(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = CLIPProcessor.from_pretrained(tmp_path, max_length=40, padding="max_length")
    assert len(loaded(text="a cat")["input_ids"]) == 40
    assert len(loaded(text="a cat", padding=False)["input_ids"]) == 4
    assert len(loaded.tokenizer("a cat")["input_ids"]) == 4  # as in transformers 4


def test_use_fast_chooses_the_tokenizer(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert type(CLIPProcessor.from_pretrained(tmp_path, use_fast=False).tokenizer) is CLIPTokenizer
    assert type(CLIPProcessor.from_pretrained(tmp_path, use_fast=True).tokenizer) is CLIPTokenizerFast


def test_a_part_given_by_name_takes_the_place_of_the_one_in_the_files(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    given = CLIPTokenizer()
    assert CLIPProcessor.from_pretrained(tmp_path, tokenizer=given).tokenizer is given


def test_the_processors_own_file(processor, tmp_path):
    assert processor.to_dict() == {"processor_class": "CLIPProcessor"}
    whole = processor.to_dict(legacy_serialization=False)
    assert whole["image_processor"]["size"] == {"shortest_edge": 20}
    processor.to_json_file(tmp_path / "processor_config.json", legacy_serialization=False)
    assert json.loads((tmp_path / "processor_config.json").read_text()) == whole
    assert json.loads(processor.to_json_string()) == {"processor_class": "CLIPProcessor"}
