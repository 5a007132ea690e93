"""Pixels against transformers 4.57.6, bit for bit."""

import io
import itertools
import json

import numpy as np
import pytest
import torch  # before tensorflow
import transformers
from cases import assert_same
from PIL import Image

from clipmb import CLIPFeatureExtractor, CLIPImageProcessor

pytestmark = pytest.mark.filterwarnings(
    "ignore:Palette images with Transparency:UserWarning",  # Pillow's advice on one of the modes below
)

MODES = [
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "I;16",
    "F",
]
# (width, height); heights of 1 and 3 need the layout said to the reference, which else takes rows for channels
SIZES = [
    (1, 1),
    (2, 5),
    (5, 2),
    (7, 3),
    (3, 7),
    (1, 40),
    (40, 1),
    (31, 32),
    (64, 48),
    (224, 224),
    (225, 224),
    (333, 250),
]
SLIVERS = [(3000, 17), (17, 3000)]


def picture(mode, size, seed=0):
    """A random picture with smooth parts, so that resampling has something to get wrong."""
    random = np.random.default_rng([seed, *size, *map(ord, mode)])
    width, height = size
    if mode == "I":
        return Image.fromarray(random.integers(0, 70_000, (height, width), np.int32))
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 65_536, (height, width), np.uint16))
    if mode == "I;16B":
        return Image.frombytes(mode, size, random.integers(0, 65_536, (height, width), np.uint16).tobytes())
    if mode == "F":
        return Image.fromarray(random.uniform(-20, 300, (height, width)).astype(np.float32))
    noise = random.integers(0, 256, (height, width, 3)).astype(np.float64)
    waves = 127 + 127 * np.sin(
        np.arange(width)[None, :, None] / 9 + np.arange(height)[:, None, None] / 5 + np.arange(3)
    )
    rgb = Image.fromarray(np.where(random.random((height, width, 1)) < 0.5, noise, waves).astype(np.uint8))
    if mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX"):
        return rgb.convert(mode)
    if mode == "LAB":
        return Image.frombytes("LAB", size, rgb.tobytes())
    alpha = Image.fromarray(random.integers(0, 256, (height, width), np.uint8))
    if mode == "LA":
        return Image.merge("LA", [rgb.convert("L"), alpha])
    if mode == "PA":
        return Image.merge("LA", [rgb.convert("L"), alpha]).convert("PA")
    rgb.putalpha(alpha)
    return rgb if mode == "RGBA" else rgb.convert("RGBa")


def reference(images, *, options=None, **call):
    call.setdefault("return_tensors", "np")
    return transformers.CLIPImageProcessor(**(options or {}))(images, **call)["pixel_values"]


def ours(images, *, options=None, **call):
    call.setdefault("return_tensors", "np")
    return CLIPImageProcessor(**(options or {}))(images, **call)["pixel_values"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_size(mode):  # 17 modes by 14 sizes: 238 pictures
    for size in SIZES + (SLIVERS if mode in ("RGB", "L", "RGBA") else [(300, 5), (5, 300)]):
        image = picture(mode, size)
        assert_same(ours([image], num_workers=1), reference([image], input_data_format="channels_last"))


def test_a_batch_of_every_mode_in_threads():
    images = [picture(mode, size, seed=1) for mode in MODES for size in [(64, 48), (50, 333), (224, 224), (97, 61)]]
    expected = reference(images)
    for workers in (None, 1, 3):
        assert_same(ours(images, num_workers=workers), expected)


OPTIONS = [
    *({"resample": filter_} for filter_ in range(6)),
    *({"size": size} for size in (1, 7, 33, 225, 300, {"shortest_edge": 64, "longest_edge": 70}, (40, 90), [90, 40])),
    *({"size": {"height": height, "width": width}} for height, width in ((1, 1), (224, 224), (31, 402))),
    *({"crop_size": crop} for crop in (1, 2, 13, 223, 225, 301, (10, 400), {"height": 401, "width": 3})),
    *({"rescale_factor": factor} for factor in (1 / 127.5, 1, 2, 0.1, 1 / 256, np.float32(0.3))),
    {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 3.0]},
    {"image_mean": 0.5, "image_std": 0.3},
    {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    {"image_mean": np.array([0.1, 0.2, 0.3]), "image_std": (1, 2, 3)},
    {"size": 30, "use_square_size": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_at_construction_and_in_the_call(options):
    images = [picture("RGB", size, seed=2) for size in [(100, 75), (75, 100), (21, 20), (224, 224)]]
    whole = {"do_center_crop": True} | options
    for call in ({"options": whole}, {} if "use_square_size" in options else whole):
        assert_same(ours(images, **call), reference(images, **call))


FLAGS = ["do_resize", "do_center_crop", "do_rescale", "do_normalize"]


@pytest.mark.parametrize("values", list(itertools.product([True, False], repeat=4)), ids=str)
@pytest.mark.parametrize("kind", ["pillow", "uint8", "float32 in [0, 1]", "float64 in [0, 255]", "int64", "bool"])
def test_every_combination_of_steps(values, kind):
    flags = dict(zip(FLAGS, values, strict=True))
    flags |= {"size": 40, "crop_size": (36, 50)}
    images = [picture("RGB", (60, 45), seed) for seed in range(2)]
    images = {
        "pillow": lambda: images,
        "uint8": lambda: [np.asarray(image) for image in images],
        "float32 in [0, 1]": lambda: [np.asarray(image).astype(np.float32) / 255 for image in images],
        "float64 in [0, 255]": lambda: [np.asarray(image).astype(np.float64) for image in images],
        "int64": lambda: [np.asarray(image).astype(np.int64) for image in images],
        "bool": lambda: [np.asarray(image) > 127 for image in images],
    }[kind]()
    assert_same(ours(images, **flags), reference(images, **flags))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("scale", ["0 to 1", "0 to 255", "ones"])
@pytest.mark.parametrize("do_resize", [True, False])
def test_floating_arrays_are_quantised_as_the_reference_does(dtype, scale, do_resize):
    random = np.random.default_rng(5)
    image = {
        "0 to 1": random.random((3, 50, 60)),
        "0 to 255": random.integers(0, 256, (3, 50, 60)) * (1 + 5e-6 * random.random((3, 50, 60))),
        "ones": random.integers(0, 2, (3, 50, 60)),
    }[scale].astype(dtype)
    if scale == "0 to 255":
        image = np.minimum(image, dtype(255))
    for call in ({}, {"do_rescale": False}, {"do_rescale": False, "do_normalize": False}):
        assert_same(ours(image, do_resize=do_resize, **call), reference(image, do_resize=do_resize, **call))


def test_all_8_bit_fractions_survive_quantisation():
    levels = (np.arange(256) / 255).reshape(1, 16, 16)
    for dtype in (np.float32, np.float64, np.float16):
        image = np.repeat(levels, 3, 0).astype(dtype)
        call = {"size": 16, "crop_size": 16, "do_rescale": False}
        assert_same(ours(image, **call), reference(image, **call))


LAYOUTS = [(3, 40, 50), (40, 50, 3), (3, 40, 3), (3, 3, 3), (3, 1, 9), (9, 1, 3)]


@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
@pytest.mark.parametrize("given", [None, "channels_first", "channels_last"])
def test_layouts(shape, given):
    image = np.random.default_rng(6).integers(0, 256, shape, np.uint8)
    if given and shape[0 if given == "channels_first" else 2] != 3:
        with pytest.raises((ValueError, TypeError)):
            reference(image, input_data_format=given)
        with pytest.raises(ValueError, match="Image 0"):
            ours(image, input_data_format=given)
        return
    for wanted in ("channels_first", "channels_last", transformers.image_utils.ChannelDimension.LAST):
        call = {"input_data_format": given, "data_format": wanted}
        assert_same(ours(image, **call), reference(image, **call))


def test_an_ambiguous_array_has_the_layout_of_the_first_image():
    random = np.random.default_rng(7)
    first, last = random.integers(0, 256, (3, 20, 30), np.uint8), random.integers(0, 256, (20, 30, 3), np.uint8)
    both = random.integers(0, 256, (3, 30, 3), np.uint8)
    for images in ([first, both], [last, both], [both, first], [picture("RGB", (20, 30)), both]):
        assert_same(ours(images), reference(images))
    assert not np.array_equal(ours([first, both])[1], ours([last, both])[1])


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channel_counts(channels):
    image = np.random.default_rng(8).integers(0, 256, (channels, 30, 40), np.uint8)
    call = {"input_data_format": "channels_first", "image_mean": 0.4, "image_std": 0.2}
    assert_same(ours(image, **call), reference(image, **call))
    call |= {"image_mean": [0.4, 0.1, 0.3, 0.2][:channels], "image_std": [0.4, 0.1, 0.3, 0.2][:channels]}
    assert_same(ours(image, **call), reference(image, **call))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "HSV", "LAB", "YCbCr"])
def test_without_conversion_to_rgb(mode):
    image = picture(mode, (60, 50))
    call = {"do_convert_rgb": False, "image_mean": 0.4, "image_std": 0.2, "input_data_format": "channels_last"}
    assert_same(ours(image, **call), reference(image, **call))


def test_nesting_batches_and_kinds():
    random = np.random.default_rng(9)
    batch = random.integers(0, 256, (4, 3, 30, 40), np.uint8)
    images = list(batch)
    for given in (batch, images, [batch[:2], batch[2:]], [images[:1], images[1:]], [[], images]):
        assert_same(ours(given), reference(given))
    assert_same(ours(torch.from_numpy(batch)), reference(torch.from_numpy(batch)))
    halves = torch.from_numpy(batch).float().div(255).requires_grad_()
    assert_same(ours(halves), reference(halves))


def test_tensors_of_tensorflow_and_jax():
    import jax
    import tensorflow

    image = np.random.default_rng(10).integers(0, 256, (30, 40, 3), np.uint8)
    for tensor in (tensorflow.constant(image), jax.numpy.asarray(image)):
        assert_same(ours([tensor]), reference([tensor]))
    for name in ("pt", "tf", "jax"):
        mine, theirs = ours(image, return_tensors=name), reference(image, return_tensors=name)
        assert type(mine) is type(theirs)
        assert mine.dtype == theirs.dtype
        assert_same(mine, theirs)


def test_a_list_without_return_tensors():
    images = [picture("RGB", (60, 50)), picture("L", (50, 80))]
    for call in ({}, {"do_center_crop": False}, {"data_format": "channels_last"}):
        mine, theirs = ours(images, return_tensors=None, **call), reference(images, return_tensors=None, **call)
        assert isinstance(mine, list)
        for mine_one, theirs_one in zip(mine, theirs, strict=True):
            assert_same(mine_one, theirs_one)


@pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning")  # the reference leaves files open
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_files_are_upright_and_rgb(tmp_path, form, orientation):
    path = tmp_path / "picture"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture("RGB", (60, 41)).save(path, form, **({} if form == "GIF" else {"exif": exif}))
    assert_same(ours(str(path)), reference(str(path)))
    assert_same(ours([path]), reference([str(path)]))
    assert_same(ours(path.read_bytes()), reference(str(path)))
    with Image.open(path) as image:
        assert_same(ours(image), reference(image))


def test_base64_and_data_urls():
    import base64

    file = io.BytesIO()
    picture("RGBA", (33, 44)).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    for source in (text, f"data:image/png;base64,{text}", base64.encodebytes(file.getvalue()).decode()):
        assert_same(ours(source), reference(source))


def test_single_steps():
    mine, theirs = CLIPImageProcessor(), transformers.CLIPImageProcessor()
    random = np.random.default_rng(11)
    for image in (random.integers(0, 256, (40, 51, 3), np.uint8), random.random((3, 40, 51)), random.random((1, 9, 8))):
        for wanted in (None, "channels_first", "channels_last"):
            call = {"data_format": wanted}
            assert_same(
                mine.resize(image, {"shortest_edge": 17}, **call), theirs.resize(image, {"shortest_edge": 17}, **call)
            )
            assert_same(
                mine.center_crop(image, 33, **call), theirs.center_crop(image, {"height": 33, "width": 33}, **call)
            )
            assert_same(mine.rescale(image, 0.3, **call), theirs.rescale(image, 0.3, **call))
            assert_same(mine.normalize(image, 0.3, 0.7, **call), theirs.normalize(image, 0.3, 0.7, **call))


@pytest.mark.parametrize(
    "options",
    [{}, {"size": 224, "crop_size": 224}, {"size": {"height": 30, "width": 40}, "resample": 2, "extra": [1]}],
    ids=str,
)
def test_files_cross_both_ways(tmp_path, options):
    CLIPImageProcessor(**options).save_pretrained(tmp_path / "ours")
    transformers.CLIPImageProcessor(**options).save_pretrained(tmp_path / "theirs")
    written = [json.loads((tmp_path / who / "preprocessor_config.json").read_text()) for who in ("ours", "theirs")]
    assert written[0] == written[1]
    for who in ("ours", "theirs"):
        mine = CLIPImageProcessor.from_pretrained(tmp_path / who)
        theirs = transformers.CLIPImageProcessor.from_pretrained(tmp_path / who)
        assert mine.to_json_string() == theirs.to_json_string()
    auto = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours", use_fast=False)
    assert type(auto) is transformers.CLIPImageProcessor


def test_the_feature_extractors_file_loads_there(tmp_path):
    with pytest.warns(FutureWarning, match="CLIPImageProcessor"):
        CLIPFeatureExtractor(size=32).save_pretrained(tmp_path)
    assert transformers.CLIPImageProcessor.from_pretrained(tmp_path).size == {"shortest_edge": 32}


def test_overrides_in_from_pretrained(tmp_path):
    transformers.CLIPImageProcessor(size=50).save_pretrained(tmp_path)
    call = {"size": 30, "do_normalize": False, "foo": 1, "return_unused_kwargs": True}
    mine, unused = CLIPImageProcessor.from_pretrained(tmp_path, **call)
    theirs, theirs_unused = transformers.CLIPImageProcessor.from_pretrained(tmp_path, **call)
    assert unused == theirs_unused == {"foo": 1}
    assert mine.to_json_string() == theirs.to_json_string()
