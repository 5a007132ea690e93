import base64
import io
import json
import struct
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import output

from clipmb import (
    CheckpointError,
    CLIPFeatureExtractor,
    CLIPImageProcessor,
    CLIPImageProcessorFast,
    CLIPProcessor,
    CLIPTokenizerFast,
)
from clipmb.common.image import pixels as px

MODES = ["1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "F"]
MODES += ["I", "I;16", "I;16B", "I;16L", "I;16N"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def noise(width=40, height=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def picture(width=40, height=30, seed=0):
    return Image.fromarray(noise(width, height, seed))


def pixel_values(images, *args, return_tensors="np", **call):
    return CLIPImageProcessor()(images, *args, return_tensors=return_tensors, **call)["pixel_values"]


def png(width, height):
    """The header of a PNG file of any size, with no pixels behind it."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
    )


# ---- values ----------------------------------------------------------------------------------------------------------


def test_the_default_is_resize_crop_rescale_normalise():
    image = picture(300, 200)
    resized = np.asarray(image.resize((336, 224), Image.Resampling.BICUBIC))[:, 56:280]
    expected = (resized / 255 - MEAN) / STD
    done = pixel_values(image)
    assert done.shape == (1, 3, 224, 224)
    assert done.dtype == np.float32
    np.testing.assert_allclose(done[0].transpose(1, 2, 0), expected, atol=1e-6)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_cropping_and_padding_keep_the_centre(height, width, crop_height, crop_width):
    image = np.arange(1, height * width + 1).reshape(1, height, width)
    done = px.crop(image, crop_height, crop_width)
    assert done.shape == (1, crop_height, crop_width)
    kept = min(height, crop_height), min(width, crop_width)
    assert np.count_nonzero(done) == kept[0] * kept[1]
    rows, columns = np.nonzero(done[0])
    assert rows.min() == max(0, -((height - crop_height) // 2))
    assert columns.min() == max(0, -((width - crop_width) // 2))
    assert (
        done[0, rows.min(), columns.min()]
        == image[0, max(0, (height - crop_height) // 2), max(0, (width - crop_width) // 2)]
    )


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 400))
@settings(max_examples=200, deadline=None)
def test_the_short_side_becomes_what_was_asked_for(height, width, edge):
    from clipmb.common.image.processor import _Target

    new_height, new_width = _Target({"shortest_edge": edge})(height, width)
    assert min(new_height, new_width) == edge
    long, short = max(height, width), min(height, width)
    assert max(new_height, new_width) == int(edge * long / short)
    assert (new_height >= new_width) == (height >= width) or new_height == new_width


@given(st.one_of(st.none(), st.floats(1e-3, 10)), st.one_of(st.none(), st.tuples(st.floats(-5, 5), st.floats(0.1, 5))))
@settings(max_examples=60, deadline=None)
def test_the_table_holds_what_arithmetic_gives(factor, normal):
    mean, std = normal or (None, None)
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    table = px.lookup_table(1, False, factor, mean, std)
    direct = px.arithmetic(every, factor, mean, std)
    assert table.dtype == direct.dtype
    assert table.tobytes() == direct.tobytes()


def test_the_table_cannot_be_spoilt():
    with pytest.raises(ValueError, match="read-only"):
        px.lookup_table(3, False, 1 / 255, MEAN, STD)[0, 0] = 1


def test_all_steps_off_give_the_pixels_as_they_are_and_a_copy():
    image = noise()
    off = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), False)
    for given_image in (image, image.astype(np.float64)):
        done = pixel_values([given_image], return_tensors=None, **off)[0]
        assert done.dtype == given_image.dtype
        assert np.array_equal(done, image.transpose(2, 0, 1))
        assert not np.shares_memory(done, given_image)


# ---- inputs ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_input_gives_the_same_pixels(tmp_path):
    image = picture()
    path = tmp_path / "a.png"
    image.save(path)
    array, text = np.asarray(image), base64.b64encode(path.read_bytes()).decode()
    expected = pixel_values(image)
    same = [
        image, path, str(path), path.read_bytes(), text, f"data:image/png;base64,{text}", array,
        array.transpose(2, 0, 1), array[None], array.astype(np.int64), array.astype(np.float32),
    ]  # fmt: skip
    for one in same:
        assert np.array_equal(pixel_values(one), expected)
    together = pixel_values([same[:4], (same[4], [same[5:8]]), tuple(same[8:])])
    assert np.array_equal(together, np.repeat(expected, len(same), 0))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow(mode):
    assert pixel_values(Image.new(mode, (30, 20))).shape == (1, 3, 224, 224)


def test_premultiplied_grey_is_unmultiplied_first():
    straight = Image.merge("LA", [Image.new("L", (9, 9), 200), Image.new("L", (9, 9), 128)])
    assert np.array_equal(pixel_values(straight.convert("La")), pixel_values(straight.convert("La").convert("LA")))


def test_a_pillow_image_of_three_rows_is_no_array_with_channels_first():
    for height in (1, 3):
        flat = Image.fromarray(np.repeat(noise(50, 1), height, 0))
        assert np.array_equal(pixel_values(flat), pixel_values(np.asarray(flat), input_data_format="channels_last"))


def test_layouts_mix_in_one_list():
    image = noise()
    mixed = pixel_values([image, image.transpose(2, 0, 1), Image.fromarray(image)])
    assert np.array_equal(mixed[0], mixed[1])
    assert np.array_equal(mixed[0], mixed[2])


def test_an_ambiguous_array_is_channels_first_unless_told_or_led():
    image = noise(3, 20).transpose(2, 0, 1)  # 3 x 20 x 3
    assert np.array_equal(pixel_values(image), pixel_values(image, input_data_format="channels_first"))
    last = pixel_values(image, input_data_format="channels_last")
    assert not np.array_equal(pixel_values(image), last)
    assert np.array_equal(pixel_values([noise(), image])[1:], last)


def test_output_layouts():
    image = noise()
    first = pixel_values(image)
    last = pixel_values(image, data_format="channels_last")
    assert np.array_equal(first.transpose(0, 2, 3, 1), last)
    assert last.flags.c_contiguous
    assert np.array_equal(pixel_values(image, data_format=None), last)
    assert np.array_equal(pixel_values(image.transpose(2, 0, 1), data_format=None), first)
    rows = pixel_values([image, image.transpose(2, 0, 1)], data_format=None, return_tensors=None)
    assert [row.shape for row in rows] == [(224, 224, 3), (3, 224, 224)]


def test_a_batch_is_written_once():
    batch = pixel_values([picture(seed=seed) for seed in range(3)])
    assert batch.base is None or batch.base.shape == batch.shape
    assert batch.flags.c_contiguous
    assert batch.flags.writeable


def test_images_of_different_sizes_need_a_list():
    images = [picture(40, 30), picture(90, 30)]
    assert [row.shape for row in pixel_values(images, do_center_crop=False, return_tensors=None)] == [
        (3, 224, 298),
        (3, 224, 672),
    ]
    with pytest.raises(ValueError, match="one size"):
        pixel_values(images, do_center_crop=False)


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_threads_keep_the_order():
    images = [picture(20 + 7 * number, 200 - 7 * number, number) for number in range(20)]
    expected = pixel_values(images, num_workers=1)
    for workers in (None, 2, 5, 64):
        assert np.array_equal(pixel_values(images, num_workers=workers), expected)


def test_one_image_starts_no_thread(monkeypatch):
    def forbidden(*_):
        raise AssertionError("a thread was started")

    monkeypatch.setattr(threading.Thread, "start", forbidden)
    assert pixel_values([picture()], num_workers=8).shape == (1, 3, 224, 224)
    assert pixel_values([picture()] * 2, num_workers=1).shape == (2, 3, 224, 224)
    with pytest.raises(AssertionError, match="a thread"):
        pixel_values([picture()] * 2, num_workers=2)


def test_one_undecoded_image_given_twice(tmp_path):
    picture(900, 800).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        done = pixel_values([image] * 8, num_workers=8)
    assert np.array_equal(done, np.repeat(done[:1], 8, 0))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_bad_image_is_named(workers):
    images = [picture(), picture(), np.zeros((5, 5, 7)), b"bad", picture()]
    with pytest.raises(ValueError, match=r"^Image 2 must have 1 or 3 channels.*Received: shape \(5, 5, 7\)"):
        pixel_values(images, num_workers=workers)


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, "2"])
def test_bad_worker_counts(workers):
    with pytest.raises(ValueError, match="num_workers"):
        pixel_values(picture(), num_workers=workers)


# ---- bad inputs ------------------------------------------------------------------------------------------------------


def test_a_truncated_file(tmp_path):
    path = tmp_path / "cut.jpg"
    picture(300, 300).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"^Image 1 must be a readable image\. Received: .*cut\.jpg \(OSError: "):
        pixel_values([picture(), path])
    with Image.open(path) as image, pytest.raises(ValueError, match=r"^Image 0 must be a readable image"):
        pixel_values(image)


def test_something_that_is_no_image():
    for bad in (b"", b"no image", b"\x89PNG\r\n\x1a\n", png(30, 30)):
        with pytest.raises(ValueError, match=r"^Image 0 must be a readable image") as caught:
            pixel_values(bad)
        assert " at 0x" not in str(caught.value)


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000)])  # Pillow warns of the first, refuses the second
@pytest.mark.parametrize("strict", [False, True])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(size, strict, recwarn):
    import warnings

    with warnings.catch_warnings():
        if strict:
            warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"^Image 0 must be of a reasonable size\..* Raise PIL\.Image\.MAX"):
            pixel_values(png(*size))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_opened_bomb_is_refused_and_a_decoded_image_is_not(monkeypatch):
    with Image.open(io.BytesIO(png(10_000, 10_000))) as image, pytest.raises(ValueError, match="reasonable size"):
        pixel_values(image)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)
    assert pixel_values(picture(300, 300)).shape == (1, 3, 224, 224)
    file = io.BytesIO()
    picture(300, 300).save(file, "PNG")
    with pytest.raises(ValueError, match="reasonable size"):
        pixel_values(file.getvalue())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert pixel_values(file.getvalue()).shape == (1, 3, 224, 224)


def test_a_sliver_that_would_grow_beyond_all_bounds():
    with pytest.raises(ValueError, match=r"^Image 0 must be of a reasonable size"):
        pixel_values(Image.new("RGB", (1, 60_000)))
    with pytest.raises(ValueError, match=r"^Image 0 must be of a reasonable size"):
        pixel_values(np.zeros((60_000, 1, 3), np.uint8), input_data_format="channels_last")


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_images_without_pixels(size):
    with pytest.raises(ValueError, match=r"^Image 0 must be a readable image.*no pixels"):
        pixel_values(Image.new("RGB", size))
    with pytest.raises(ValueError, match=r"^Image 0 must have three non-empty axes"):
        pixel_values(np.zeros((*size, 3), np.uint8))


@pytest.mark.parametrize("shape", [(), (5,), (5, 5), (2, 2, 2, 3, 3)])
def test_arrays_of_other_ranks(shape):
    with pytest.raises(ValueError, match=r"^Image 0 must have three non-empty axes.*Received: shape \("):
        pixel_values(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("dtype", [complex, object, "U3"])
def test_arrays_of_other_types(dtype):
    with pytest.raises(ValueError, match=r"^Image 0 must have three non-empty axes of numbers"):
        pixel_values(np.zeros((5, 5, 3), dtype))


@pytest.mark.parametrize("bad", [None, 3, {"image": 1}, {1}, object()])
def test_things_that_are_no_images(bad):
    with pytest.raises(TypeError, match=r"^Image 0 must be a Pillow image"):
        pixel_values(bad)


def test_strings_that_are_no_images(tmp_path):
    with pytest.raises(ValueError, match=r"^Image 0 must be local; nothing is downloaded"):
        pixel_values("https://example.org/cat.jpg")
    for bad in ("no such file.jpg", str(tmp_path), ""):
        with pytest.raises(ValueError, match=r"^Image 0 must be"):
            pixel_values(bad)


@pytest.mark.parametrize("empty", [[], (), [[]], np.zeros((0, 3, 5, 5))])
def test_no_images_at_all(empty):
    with pytest.raises(ValueError, match="at least one image"):
        pixel_values(empty)


@pytest.mark.parametrize("value", [-0.1, 300.0, 1.5, np.nan, np.inf])
def test_float_values_that_are_no_8_bit_image(value):
    image = noise() / 255
    image[0, 0, 0] = value
    with pytest.raises(ValueError, match=r"^Image 0 must hold integers in .* or floats"):
        pixel_values(image)
    assert pixel_values(image, do_resize=False).shape == (1, 3, 224, 224)


def test_channels_and_means_have_to_agree():
    with pytest.raises(
        ValueError, match=r"^Image 0 must have as many channels as image_mean has numbers, 3.*1 channels"
    ):
        pixel_values(noise()[..., :1])
    with pytest.raises(ValueError, match="image_std has numbers, 2"):
        pixel_values(noise(), image_std=[1, 2])
    with pytest.raises(ValueError, match="at most 4 channels"):
        pixel_values(np.zeros((5, 8, 8), np.uint8), input_data_format="channels_first")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("size", 0), ("size", -3), ("size", 2.5), ("size", True), ("size", "224"), ("size", (1, 2, 3)), ("size", {}),
        ("size", {"height": 3}), ("size", {"longest_edge": 3}), ("size", {"max_height": 3, "max_width": 3}),
        ("size", {"shortest_edge": None}), ("crop_size", {"shortest_edge": 3}), ("crop_size", 0), ("crop_size", 12_000),
        ("size", (4_096, 4_097)), ("resample", 9),
        ("resample", "bicubic"), ("rescale_factor", "x"), ("image_mean", "abc"), ("image_std", 0),
        ("image_std", [1, 0, 1]), ("image_mean", [None] * 3), ("return_tensors", "foo"), ("data_format", "HWC"),
        ("input_data_format", "none"),
    ],
)  # fmt: skip
def test_bad_options(option, value):
    with pytest.raises(ValueError, match=option):
        pixel_values(picture(), **{option: value})


def test_unknown_arguments_of_a_call():
    with pytest.raises(TypeError, match="do_resise"):
        pixel_values(picture(), do_resise=False)


# ---- settings and files ----------------------------------------------------------------------------------------------


def test_files_of_the_first_hub_checkpoints_load():
    old = {
        "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": list(MEAN), "image_std": list(STD),
    }  # fmt: skip
    processor = CLIPImageProcessor.from_dict(old)
    assert processor.size == {"shortest_edge": 224}
    assert processor.crop_size == {"height": 224, "width": 224}
    assert "feature_extractor_type" not in processor.to_dict()
    assert processor.to_dict() == CLIPImageProcessor().to_dict()


def test_a_square_size():
    processor = CLIPImageProcessor(size=30, use_square_size=True)
    assert processor.size == {"height": 30, "width": 30}
    assert CLIPImageProcessor.from_dict(processor.to_dict()).size == {"height": 30, "width": 30}


def test_unknown_settings_survive(tmp_path):
    CLIPImageProcessor(novel={"a": [1]}, image_mean=np.array([0.5, 0.25, 0.125])).save_pretrained(tmp_path)
    loaded = CLIPImageProcessor.from_pretrained(tmp_path)
    assert loaded.novel == {"a": [1]}
    assert loaded.image_mean == [0.5, 0.25, 0.125]


def test_settings_are_not_shared_between_instances():
    CLIPImageProcessor().image_mean[0] = 9
    assert CLIPImageProcessor().image_mean[0] == MEAN[0]


def test_both_layouts_of_files(tmp_path):
    newer = {"image_processor": {"size": {"shortest_edge": 31}, "_processor_class": "CLIPProcessor"}}
    (tmp_path / "processor_config.json").write_text(json.dumps(newer))
    assert CLIPImageProcessor.from_pretrained(tmp_path).size == {"shortest_edge": 31}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 29}))
    assert CLIPImageProcessor.from_pretrained(tmp_path).size == {"shortest_edge": 31}  # as transformers 5
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert CLIPImageProcessor.from_pretrained(tmp_path).size == {"shortest_edge": 29}
    assert CLIPImageProcessor.from_pretrained(tmp_path / "preprocessor_config.json").size == {"shortest_edge": 29}


def test_saving_beside_the_other_layout_changes_both(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"size": 31}, "other": 1}))
    CLIPImageProcessor(size=17).save_pretrained(tmp_path)
    assert CLIPImageProcessor.from_pretrained(tmp_path).size == {"shortest_edge": 17}
    assert json.loads((tmp_path / "processor_config.json").read_text())["other"] == 1


def test_json_files_and_subfolders(tmp_path):
    (tmp_path / "inside").mkdir()
    processor = CLIPImageProcessor(size=(3, 4), resample=Image.Resampling.NEAREST)
    processor.to_json_file(tmp_path / "inside" / "preprocessor_config.json")
    again = CLIPImageProcessor.from_json_file(tmp_path / "inside" / "preprocessor_config.json")
    assert again.to_dict() == processor.to_dict()
    assert CLIPImageProcessor.from_pretrained(tmp_path, subfolder="inside").resample == 0


@pytest.mark.parametrize("content", ["", "[1]", "{", "\xff"])
def test_broken_files(tmp_path, content):
    (tmp_path / "preprocessor_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        CLIPImageProcessor.from_pretrained(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        CLIPImageProcessor.from_pretrained(tmp_path)


def test_overrides_and_unused_arguments(tmp_path):
    CLIPImageProcessor(size=50).save_pretrained(tmp_path)
    processor, unused = CLIPImageProcessor.from_pretrained(
        tmp_path, size=20, do_rescale=False, foo=1, return_unused_kwargs=True
    )
    assert (processor.size, processor.do_rescale, unused) == ({"shortest_edge": 20}, False, {"foo": 1})
    assert not hasattr(CLIPImageProcessor.from_pretrained(tmp_path, foo=1), "foo")


def test_attributes_set_later_count():
    processor = CLIPImageProcessor()
    processor.size, processor.crop_size, processor.do_normalize = 20, 10, False
    assert processor(picture(), return_tensors="np").pixel_values.shape == (1, 3, 10, 10)


def test_the_feature_extractor_warns_once_at_the_callers_line():
    with pytest.warns(FutureWarning, match="CLIPImageProcessor") as caught:
        extractor = CLIPFeatureExtractor(size=20, crop_size=20)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert isinstance(extractor, CLIPImageProcessor)
    assert extractor(picture(), return_tensors="np").pixel_values.shape == (1, 3, 20, 20)


def test_fetch_images_reads_files_and_leaves_the_rest(tmp_path):
    picture().save(tmp_path / "a.png")
    array = noise()
    fetched = CLIPImageProcessor().fetch_images([str(tmp_path / "a.png"), [array]])
    assert fetched[0].mode == "RGB"
    assert fetched[1][0] is array


def test_no_framework_is_imported():
    code = (
        "import sys\n"
        "for name in ('torch', 'tensorflow', 'jax', 'transformers'): sys.modules[name] = None\n"
        "import numpy, clipmb\n"
        "print(clipmb.CLIPImageProcessor()(numpy.zeros((5, 6, 3), 'uint8'), return_tensors='np').pixel_values.shape)\n"
    )
    assert output("-c", code).strip() == "(1, 3, 224, 224)"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"size": float("nan")}, "size must be"),
        ({"size": {"shortest_edge": 10**9}}, "whole number from 1 to 65535"),
        ({"crop_size": {"height": "8", "width": 8}}, "crop_size['height'] must be"),
        ({"crop_size": {"height": 12_000, "width": 12_000}}, "crop_size must have at most 16,777,216 pixels"),
        ({"do_resize": "no"}, "do_resize must be True or False"),
        ({"resample": 9}, "resample must be"),
        ({"rescale_factor": float("inf")}, "rescale_factor must be a finite number"),
        ({"image_mean": [0.5, None, 0.5]}, "image_mean must be a finite number"),
        ({"image_std": [float("nan")] * 3}, "image_std must be a finite number"),
    ],
)
def test_wrong_content_names_file_and_field(tmp_path, settings, told):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError) as caught:
        CLIPImageProcessor.from_pretrained(tmp_path)
    assert told in str(caught.value)
    assert str(tmp_path / "preprocessor_config.json") in str(caught.value)


def test_no_key_of_a_file_becomes_an_attribute_that_exists(tmp_path):
    entries = {"__class__": "x", "preprocess": 1, "self": 2, "to_dict": 3, "note": "kept"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(entries))
    processor = CLIPImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is CLIPImageProcessor
    assert processor.note == "kept"
    assert {name: processor.to_dict()[name] for name in entries} == entries


def test_a_deviation_that_is_zero_in_float32_is_refused():
    with pytest.raises(ValueError, match="image_std must not hold zeros"):
        CLIPImageProcessor(image_std=1e-320)(Image.new("RGB", (9, 9)))


def test_the_settings_of_a_folder_as_a_dict(tmp_path):
    CLIPImageProcessor(size=20).save_pretrained(tmp_path)
    settings, options = CLIPImageProcessor.get_image_processor_dict(tmp_path, local_files_only=True, colour="red")
    assert (settings["size"], options) == ({"shortest_edge": 20}, {"colour": "red"})


def test_the_fast_one_has_the_same_pixels_and_its_own_arguments(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (3, 30, 40), np.uint8)
    settings = {"size": 20, "crop_size": 16}
    fast = CLIPImageProcessorFast(**settings)
    expected = CLIPImageProcessor(**settings)(image, return_tensors="np")["pixel_values"]
    made = fast(image, return_tensors="np", device="cpu", disable_grouping=True)["pixel_values"]
    assert np.array_equal(made, expected)
    assert fast.is_fast
    fast.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"] == type(fast).__name__
    )
    for reader in (CLIPImageProcessorFast, CLIPImageProcessor):
        assert np.array_equal(reader.from_pretrained(tmp_path)(image, return_tensors="np")["pixel_values"], expected)
    with pytest.raises(ValueError, match="Only PyTorch's tensors"):
        fast(image, return_tensors="np", device="cuda")
    whole = CLIPProcessor(fast, CLIPTokenizerFast())
    assert np.array_equal(whole(images=image, return_tensors="np", device="cpu")["pixel_values"], expected)
