"""JPEG files by simplejpeg against Pillow alone, bit for bit and word for word."""

from __future__ import annotations

import io
import os
from importlib import resources

import numpy as np
import pytest
from PIL import Image

from clipmb import CLIPImageProcessor
from clipmb.common.image import jpeg, pixels

INSTALLED = jpeg.simplejpeg is not None
if os.environ.get("CLIPMB_REQUIRE_KERNEL") == "1" and not INSTALLED:
    raise RuntimeError("CLIPMB_REQUIRE_KERNEL=1 says that simplejpeg must be there: install clipmb[fast]")
installed = pytest.mark.skipif(not INSTALLED, reason="simplejpeg is not installed")
SIZES = [
    (1, 1),
    (7, 3),
    (3, 7),
    (16, 16),
    (17, 33),
    (64, 48),
    (166, 125),
]  # larger noise is too much for Pillow's buffer


def encoded(size=(64, 48), mode="RGB", **options):
    random = np.random.default_rng(size)
    values = random.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    image = Image.fromarray(values).resize(size).convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found


@pytest.fixture
def by_pillow(monkeypatch):
    """Reads with Pillow alone."""

    def read(content):
        with monkeypatch.context() as patch:
            patch.setattr(jpeg, "serves", lambda: False)
            return read_or_error(content)

    return read


def read_or_error(content):
    try:
        return np.asarray(pixels.read_image("The image", content))
    except ValueError as error:
        return str(error)


def assert_equal(found, expected):
    assert type(found) is type(expected), (found, expected)
    assert found == expected if isinstance(found, str) else np.array_equal(found, expected)


@installed
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1", "L"])
def test_plain_files_are_decoded_to_the_bits_of_pillow(subsampling, progressive, by_pillow):
    for size in SIZES:
        for quality in (20, 75, 95):
            how = {"mode": "L"} if subsampling == "L" else {"subsampling": subsampling}
            content = encoded(size, quality=quality, progressive=progressive, **how)
            found = pixels.read_image("The image", content)
            assert isinstance(found, np.ndarray), "Pillow decoded it"
            assert_equal(found, by_pillow(content))


@installed
@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_every_orientation(orientation, by_pillow):
    content = encoded((40, 24), exif=exif(orientation))
    found = pixels.read_image("The image", content)
    assert isinstance(found, np.ndarray)
    assert found.flags.c_contiguous
    assert_equal(found, by_pillow(content))


@installed
def test_photos_from_paths_bytes_and_base64(by_pillow):
    for name in ("chelsea.jpg", "coffee.jpg", "rocket.jpg"):
        with resources.as_file(resources.files("clipmb") / "data" / "photos" / name) as path:
            found = pixels.read_image("The image", str(path))
            assert isinstance(found, np.ndarray)
            assert_equal(found, by_pillow(path.read_bytes()))
            assert_equal(pixels.read_image("The image", path), found)


def special():
    """Files that are not plain, by name."""
    cmyk = encoded(mode="CMYK")
    stored_rgb = encoded(keep_rgb=True)
    appended = encoded() + bytes(3 << 20)
    several = io.BytesIO()
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "blue")]
    frames[0].save(several, "MPO", save_all=True, append_images=frames[1:])
    png = io.BytesIO()
    frames[0].save(png, "PNG")
    return {"cmyk": cmyk, "rgb": stored_rgb, "appended": appended, "mpo": several.getvalue(), "png": png.getvalue()}


@pytest.mark.parametrize("kind", special())
def test_other_files_are_left_to_pillow(kind, by_pillow):
    content = special()[kind]
    assert isinstance(pixels.read_image("The image", content), Image.Image)
    assert_equal(read_or_error(content), by_pillow(content))


def test_truncated_and_damaged_files_keep_their_pixels_and_errors(by_pillow):
    whole = encoded((120, 90), progressive=False)
    scans = encoded((120, 90), progressive=True)
    cut = [content[:length] for content in (whole, scans) for length in range(0, len(content), len(content) // 40)]
    random = np.random.default_rng(0)
    for content in (whole, scans):
        for _ in range(150):
            damaged = bytearray(content)
            for place in random.integers(0, len(content), random.integers(1, 4)):
                damaged[place] = random.integers(0, 256)
            cut.append(bytes(damaged))
    outcomes = set()
    for content in [*cut, whole + b"more", whole[:-2], whole[:-2] + whole]:
        found = read_or_error(content)
        assert_equal(found, by_pillow(content))
        outcomes.add(type(found))
    assert outcomes == {str, np.ndarray}


def test_bombs_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(jpeg, "decode_jpeg", lambda image: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="must be of a reasonable size"):
        pixels.read_image("The image", encoded((40, 40)))


def test_pillow_decodes_where_simplejpeg_is_missing_or_differs(monkeypatch, caplog):
    jpeg.serves.cache_clear()
    content = encoded()
    expected = CLIPImageProcessor()(content, return_tensors="np")["pixel_values"]
    try:
        monkeypatch.setattr(jpeg, "simplejpeg", None)
        jpeg.serves.cache_clear()
        assert isinstance(pixels.read_image("The image", content), Image.Image)
        assert not caplog.records

        class Other:
            """A decoder of other bits."""

            decode_jpeg_header = staticmethod(lambda content: (47, 61, "YCbCr", "444"))
            decode_jpeg = staticmethod(lambda content, space: np.zeros((47, 61, 3), np.uint8))

        monkeypatch.setattr(jpeg, "simplejpeg", Other)
        jpeg.serves.cache_clear()
        for _ in range(2):
            found = CLIPImageProcessor()(content, return_tensors="np")["pixel_values"]
            np.testing.assert_array_equal(found, expected)
        assert [record.message.partition(":")[2] for record in caplog.records] == [" simplejpeg has other bits."]
    finally:
        jpeg.serves.cache_clear()


@installed
def test_a_narrow_image_is_not_taken_for_rows_of_channels(by_pillow):
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False, do_normalize=False, do_rescale=False)
    content = encoded((50, 3))  # as an array: 3 x 50 x 3
    found = processor(content, return_tensors="np")["pixel_values"][0]
    assert_equal(found.transpose(1, 2, 0), by_pillow(content))
