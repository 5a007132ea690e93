"""The compiled kernel against the installed Pillow, bit for bit, and what happens where it does not serve."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from clipmb import CLIPImageProcessor
from clipmb.common.image import resampling
from clipmb.common.image.resampling import Window

COMPILED = resampling._resize is not None
if os.environ.get("CLIPMB_REQUIRE_KERNEL") == "1" and not COMPILED:
    raise RuntimeError("CLIPMB_REQUIRE_KERNEL=1 says that the kernel must be there: install with a C compiler")
compiled = pytest.mark.skipif(not COMPILED, reason="the kernel was not compiled")
MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
TALL = (30, 95)  # of which Pillow 13 takes the vertical pass first


@pytest.fixture
def fresh():
    """Lets a test see the self-check for the first time."""
    resampling.installed_rule.cache_clear()
    yield
    resampling.installed_rule.cache_clear()


def picture(mode, size, seed=0):
    """Noise, of which half are the extremes, so that sums leave the range of 8 bits."""
    random = np.random.default_rng([seed, *size])
    shape = (size[1], size[0], MODES[mode])
    values = np.where(random.random(shape) < 0.5, random.integers(0, 256, shape), random.integers(0, 2, shape) * 255)
    return Image.frombytes(mode, size, values.astype(np.uint8).tobytes())


def rule():
    return resampling._RULES[resampling.installed_rule()]


def assert_pillows_bits(image, target, resample, box=None, window=None):
    """Compares the window of a resized picture with Pillow's, from its own memory and from a copy, with the
    wide passes and in plain C."""
    left, top, width, height = window or (0, 0, *target)
    expected = np.asarray(image.resize(target, resample, box=box))[top : top + height, left : left + width]
    channels = MODES[image.mode]
    for source in (image, np.asarray(image).reshape(image.height, image.width, channels)):
        found = Window(source, target, resample, rule(), window, box).pixels()
        np.testing.assert_array_equal(found.transpose(1, 2, 0).reshape(expected.shape), expected)
    plain = np.empty((height, width, channels), np.uint8)
    resampling._resize.resize(
        np.asarray(image), image.size, channels, channels, target, resample, box or (0, 0, *image.size),
        (left, top, width, height), rule()(image.size, target), plain, None, False, False,
    )  # fmt: skip
    np.testing.assert_array_equal(plain.reshape(expected.shape), expected)


SIZES = [
    ((1, 1), (9, 7)), ((9, 7), (1, 1)), ((1, 50), (20, 3)), ((50, 1), (3, 20)), ((2, 3), (5, 4)), ((31, 32), (32, 31)),
    ((225, 224), (224, 224)), ((224, 225), (224, 224)), ((223, 300), (224, 301)), ((333, 250), (298, 224)),
    ((640, 480), (298, 224)), ((480, 640), (224, 298)), (TALL, (20, 40)), ((3, 700), (2, 90)), ((700, 3), (90, 2)),
    ((2000, 40), (7, 30)), ((40, 2000), (30, 7)), ((5000, 2), (1, 1)), ((60, 60), (60, 31)), ((60, 60), (31, 60)),
    ((60, 50), (60, 50)),
]  # fmt: skip


@compiled
@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_filter_and_size(mode, resample):
    for size, target in SIZES:
        assert_pillows_bits(picture(mode, size), target, resample)


sides = st.integers(1, 90)


@compiled
@given(st.data(), st.sampled_from(list(MODES)), st.integers(0, 5), st.tuples(sides, sides), st.tuples(sides, sides))
@settings(max_examples=300, deadline=None)
def test_any_window_of_any_box(data, mode, resample, size, target):
    box = None
    if data.draw(st.booleans()):
        ends = [sorted(data.draw(st.tuples(*[st.floats(0, side, width=32)] * 2))) for side in size]
        if all(end - start > 0.05 for start, end in ends):
            box = (ends[0][0], ends[1][0], ends[0][1], ends[1][1])
    width, height = (data.draw(st.integers(1, side)) for side in target)
    left, top = (data.draw(st.integers(0, side - part)) for side, part in zip(target, (width, height), strict=True))
    assert_pillows_bits(picture(mode, size), target, resample, box, (left, top, width, height))


@compiled
@given(st.tuples(sides, sides), st.tuples(sides, sides))
@example((100, 200), (50, 100))
@example((100, 201), (50, 100))
@settings(max_examples=300, deadline=None)
def test_the_order_of_the_passes(size, target):
    assert_pillows_bits(picture("RGB", size), target, Image.Resampling.BICUBIC)


@compiled
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(4000, 3000), (2900, 4100), (700, 9000), (9000, 700)])
def test_pictures_that_pillow_keeps_in_several_places(mode, size):
    image = picture(mode, size)
    for target, window in (((298, 224), (37, 0, 224, 224)), ((30, 50), (7, 11, 20, 30))):
        expected = np.asarray(image.resize(target, Image.Resampling.BICUBIC))
        left, top, width, height = window
        found = Window(image, target, Image.Resampling.BICUBIC, rule(), window).pixels().transpose(1, 2, 0)
        expected = expected[top : top + height, left : left + width]
        np.testing.assert_array_equal(found.reshape(expected.shape), expected)


@compiled
@pytest.mark.parametrize("planar", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_the_table_is_looked_up_in_both_layouts(mode, planar):
    channels = MODES[mode]
    table = np.random.default_rng(1).normal(size=(channels, 256)).astype(np.float32)
    window = Window(picture(mode, (40, 30)), (25, 20), Image.Resampling.BICUBIC, rule(), (3, 2, 11, 13))
    assert window.shape == (channels, 13, 11)
    expected = np.stack([table[i][plane] for i, plane in enumerate(window.pixels())])
    out = np.full(window.shape if planar else (13, 11, channels), np.nan, np.float32)
    window.write(out, table, planar)
    np.testing.assert_array_equal(out if planar else out.transpose(2, 0, 1), expected)


GOOD = {
    "source": bytes(5 * 4 * 3), "size": (5, 4), "pixel": 3, "channels": 3, "target": (3, 2), "filter": 3,
    "box": (0.0, 0.0, 5.0, 4.0), "window": (0, 0, 3, 2), "vertical_first": False, "out": None, "table": None,
    "planar": False, "wide": True,
}  # fmt: skip


def call(**changed):
    values = GOOD | {"out": bytearray(3 * 2 * 3)} | changed
    return resampling._resize.resize(*values.values())


@compiled
@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"source": bytes(59)}, ValueError, "source must hold the pixels"),
        ({"source": bytes(61)}, ValueError, "source must hold the pixels"),
        ({"source": np.zeros((4, 10, 3), np.uint8)[:, ::2]}, ValueError, "contiguous"),
        ({"source": "text"}, TypeError, "bytes-like"),
        ({"source": (1, 2)}, ValueError, "PyCapsule"),
        ({"source": Image.new("RGB", (4, 4)).__arrow_c_array__(), "pixel": 4}, ValueError, "one byte for each"),
        ({"source": Image.new("RGB", (5, 4)).__arrow_c_array__()}, ValueError, "one byte for each"),
        ({"source": Image.new("F", (5, 4)).__arrow_c_array__(), "pixel": 4}, ValueError, "one byte for each"),
        ({"source": Image.new("L", (5, 4)).__arrow_c_array__()}, ValueError, "one byte for each"),
        ({"size": (0, 4)}, ValueError, "sizes must be"),
        ({"size": (5, -4)}, ValueError, "sizes must be"),
        ({"size": (2**24 + 1, 4)}, ValueError, "sizes must be"),
        ({"size": (2**40, 4)}, OverflowError, None),
        ({"target": (0, 2)}, ValueError, "sizes must be"),
        ({"target": (2**24 + 1, 2)}, ValueError, "sizes must be"),
        ({"pixel": 4}, ValueError, "source must hold the pixels"),
        ({"pixel": 2}, ValueError, "pixel must fit"),
        ({"pixel": 0, "channels": 0}, ValueError, "channels must be"),
        ({"pixel": 5, "channels": 5}, ValueError, "channels must be"),
        ({"filter": 6}, ValueError, "filter must be"),
        ({"filter": -1}, ValueError, "filter must be"),
        ({"box": (0.0, 0.0, 5.5, 4.0)}, ValueError, "box must lie"),
        ({"box": (-0.5, 0.0, 5.0, 4.0)}, ValueError, "box must lie"),
        ({"box": (2.0, 0.0, 2.0, 4.0)}, ValueError, "box must lie"),
        ({"box": (0.0, float("nan"), 5.0, 4.0)}, ValueError, "box must lie"),
        ({"window": (1, 0, 3, 2)}, ValueError, "window must lie"),
        ({"window": (0, -1, 3, 2)}, ValueError, "window must lie"),
        ({"window": (0, 0, 0, 2)}, ValueError, "window must lie"),
        ({"window": (2**31 - 1, 0, 3, 2)}, ValueError, "window must lie"),
        ({"out": bytearray(17)}, ValueError, "out must hold"),
        ({"out": bytes(18)}, BufferError, "writable"),
        ({"table": bytes(3 * 256 * 4)}, ValueError, "out must hold"),
        ({"table": bytes(256 * 4), "out": bytearray(72)}, ValueError, "table must hold"),
        ({"table": memoryview(bytearray(3073))[1:], "out": bytearray(72)}, ValueError, "table must hold"),
        ({"table": bytes(3072), "out": memoryview(bytearray(73))[1:]}, ValueError, "out must hold"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # without addresses, which each process has its own of
)
def test_wrong_arguments_of_the_kernel(changed, kind, message):
    assert call() is None
    with pytest.raises(kind, match=message):
        call(**changed)


@compiled
def test_short_memory_is_an_error():
    script = """
import importlib.machinery, importlib.util, resource, sys
loader = importlib.machinery.ExtensionFileLoader("_resize", sys.argv[1])
kernel = importlib.util.module_from_spec(importlib.util.spec_from_loader("_resize", loader))
loader.exec_module(kernel)
size, out = (4000, 3000), bytearray(4)
source = bytes(4000 * 3000 * 4)  # whose colours are multiplied by the opacity in a copy
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20),) * 2)
try:
    kernel.resize(source, size, 4, 4, (1, 1), 3, (0, 0, *size), (0, 0, 1, 1), False, out, None, False, True)
except MemoryError:
    print("MemoryError")
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    path = resampling._resize.__file__
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert done.stdout == "MemoryError\n"


# ---- the image processor ---------------------------------------------------------------------------------------------

OPTIONS = [
    {}, {"size": 40, "crop_size": (30, 50)}, {"size": (30, 50), "crop_size": (20, 60)}, {"size": 60, "crop_size": 301},
    {"do_center_crop": False, "size": (21, 33)}, {"do_rescale": False, "do_normalize": False}, {"resample": 0},
    {"resample": 1}, {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
]  # fmt: skip


@compiled
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_processor_gives_the_same_bits_with_either_backend(options):
    backends = [CLIPImageProcessor(resize_backend=name, **options) for name in ("pillow", "native")]
    images = [picture("RGB", size) for size in ((75, 60), (60, 75), TALL, (21, 20), (60, 60), (40, 40), (33, 21))]
    arrays = [np.asarray(image) for image in images]
    kinds = [images, arrays, [array.transpose(2, 0, 1).copy() for array in arrays]]
    kinds += [[(array / 255).astype(np.float32) for array in arrays], [array.astype(np.int64) for array in arrays]]
    for several in kinds:
        for layout in ("channels_first", "channels_last", None):
            rows = [backend(several, return_tensors="np", data_format=layout).pixel_values for backend in backends]
            assert rows[0].dtype == rows[1].dtype
            assert rows[0].flags.c_contiguous == rows[1].flags.c_contiguous
            np.testing.assert_array_equal(rows[0], rows[1])
    for name in ("L", "LA", "RGBA"):
        array = np.asarray(picture(name, (45, 37))).reshape(37, 45, MODES[name])
        size = {"height": 20, "width": 31}
        rows = [backend.resize(array, size, input_data_format="channels_last") for backend in backends]
        np.testing.assert_array_equal(rows[0], rows[1])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [TALL, (3, 700), (60, 40)])
@pytest.mark.parametrize("resample", range(6))
def test_a_fixed_pass_order_does_not_depend_on_pillow(mode, size, resample, monkeypatch):
    """Each pass by itself is the same in every version."""
    image, target = picture(mode, size), (20, 30)
    straight = image.convert("RGBa") if mode == "RGBA" and resample else image
    expected = straight.resize((target[0], size[1]), resample).resize(target, resample).convert(mode)
    fixed = resampling.resize_pillow(image, target, resample, "horizontal")
    np.testing.assert_array_equal(np.asarray(fixed), np.asarray(expected))
    if COMPILED:
        for name in resampling._RULES:
            monkeypatch.setattr(resampling, "installed_rule", lambda name=name: name)
            found = Window(image, target, resample, resampling.rule_of("auto", "horizontal")).pixels()
            expected = np.asarray(expected).reshape(30, 20, MODES[mode])
            np.testing.assert_array_equal(found.transpose(1, 2, 0), expected)


def test_pass_orders_differ_for_tall_pictures():
    image = picture("RGB", TALL)
    rows = [
        CLIPImageProcessor(size=20, pass_order=order)(image, return_tensors="np").pixel_values
        for order in resampling.ORDERS
    ]
    tall_first = int(Image.__version__.split(".")[0]) >= 13
    assert np.array_equal(rows[0], rows[1]) != tall_first


# Of TALL and of a picture that is still taller, by the order of the passes.
GOLDEN = dict(zip(resampling._RULES, ("a80a3d4c3d90aebd", "fc738a7df62764f0", "2868cf51fc21c048"), strict=True))


def digest(resize) -> str:
    """Identifies the pixels of both pictures, resized."""
    pictures = [resize(picture("RGB", TALL), (20, 30)), resize(picture("RGB", (2, 300)), (20, 30))]
    return hashlib.sha256(b"".join(np.asarray(each).tobytes() for each in pictures)).hexdigest()[:16]


def test_tall_pictures_have_the_same_bits_everywhere():
    """Of Pillow in the order of its version, of a fixed order, and of the kernel in every order."""
    version = tuple(int(part) for part in Image.__version__.split(".")[:2])
    installed, fixed = list(resampling._RULES)[(version >= (12, 2)) + (version >= (13, 0))], "horizontal first"
    assert digest(lambda image, size: image.resize(size, Image.Resampling.BICUBIC)) == GOLDEN[installed]
    assert digest(lambda image, size: resampling.resize_pillow(image, size, 3, "horizontal")) == GOLDEN[fixed]
    if COMPILED:
        for name, first in resampling._RULES.items():
            found = digest(lambda image, size, first=first: Window(image, size, 3, first).pixels().transpose(1, 2, 0))
            assert found == GOLDEN[name], name


def test_without_the_kernel_pillow_resizes(monkeypatch, fresh):
    expected = CLIPImageProcessor(resize_backend="pillow")(picture("RGB", (75, 60)), return_tensors="np").pixel_values
    monkeypatch.setattr(resampling, "_resize", None)
    with pytest.raises(ValueError, match='resize_backend="native" needs the compiled kernel'):
        CLIPImageProcessor(resize_backend="native")
    found = CLIPImageProcessor()(picture("RGB", (75, 60)), return_tensors="np").pixel_values
    np.testing.assert_array_equal(found, expected)


@compiled
def test_a_kernel_with_other_bits_does_not_serve(monkeypatch, fresh, caplog):
    real = resampling._resize.resize

    class Other:
        """Off by one in one value of an RGBA picture."""

        @staticmethod
        def resize(*arguments):
            real(*arguments)
            if arguments[3] == 4:
                arguments[9][-1, -1, -1] ^= 1

    monkeypatch.setattr(resampling, "_resize", Other)
    for _ in range(2):
        assert resampling.rule_of("auto", "installed") is None
    assert caplog.text.count("the faster kernel has other bits") == 1
    assert resampling.rule_of("native", "installed") is not None


@compiled
def test_the_kernel_serves_here(fresh, caplog):
    assert resampling.rule_of("auto", "installed") is not None
    assert resampling.rule_of("pillow", "installed") is None
    assert caplog.text == ""


def test_what_is_saved(tmp_path):
    settings_ = CLIPImageProcessor(resize_backend="pillow").to_dict()
    assert not {"resize_backend", "pass_order"} & settings_.keys()
    CLIPImageProcessor(pass_order="horizontal").save_pretrained(tmp_path)
    loaded = CLIPImageProcessor.from_pretrained(tmp_path, resize_backend="pillow")
    assert (loaded.pass_order, loaded.resize_backend) == ("horizontal", "pillow")


@pytest.mark.parametrize("option", ["resize_backend", "pass_order"])
def test_unknown_choices(option):
    with pytest.raises(ValueError, match=f"{option} must be one of"):
        CLIPImageProcessor(**{option: "fast"})


def test_the_order_is_known_without_the_kernel(monkeypatch):
    name = resampling.rule_name("installed")
    assert resampling.rule_name("horizontal") == "horizontal first"
    monkeypatch.setattr(resampling, "installed_rule", lambda: None)
    resampling.rule_name.cache_clear()
    assert resampling.rule_name("installed") == name
    resampling.rule_name.cache_clear()
    monkeypatch.setattr(resampling, "_follows", lambda *probe: False)
    with pytest.raises(
        ValueError, match=r"a Pillow of which the order is known. Received: .*pass_order=\"horizontal\""
    ):
        resampling.rule_name("installed")
    resampling.rule_name.cache_clear()
