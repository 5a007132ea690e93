"""Random changes to training images."""

from __future__ import annotations

import io

import numpy as np
import pytest
from data_cases import PROCESSOR, SIZE, assert_same_batches, batches, folder_of, jpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipmb.common.data.augment import random_part, random_resized_crop
from clipmb.common.data.pairs import Pairs


def test_the_crop_is_resized_once_then_rescaled_and_normalised(tmp_path):
    folder_of(tmp_path, 6)
    pairs = Pairs.open(tmp_path)
    loader = batches(pairs, augment="crop", batch_size=6)
    (batch,) = loader.epoch(0)
    (plain,) = batches(pairs, batch_size=6).epoch(0)
    assert batch.ids == plain.ids
    np.testing.assert_array_equal(batch.input_ids, plain.input_ids)
    for index, pixels, other in zip(batch.indices.tolist(), batch.pixel_values, plain.pixel_values, strict=True):
        generator = np.random.Generator(
            np.random.Philox(key=np.array([3, 0], np.uint64), counter=np.array([0, 0, index, 2], np.uint64))
        )
        cut = random_resized_crop(pairs.image(index), generator, SIZE)
        assert cut.size == (16, 12)
        mean, std = (np.array(PROCESSOR.image_processor.to_dict()[name]) for name in ("image_mean", "image_std"))
        np.testing.assert_allclose(pixels, ((np.asarray(cut) / 255 - mean) / std).transpose(2, 0, 1), atol=1e-6)
        assert not np.array_equal(pixels, other)
    (later,) = loader.epoch(1)
    rows = [later.indices.tolist().index(index) for index in batch.indices]
    assert not np.array_equal(later.pixel_values[rows], batch.pixel_values)


@pytest.mark.parametrize("order", ["installed", "horizontal"])
@pytest.mark.parametrize("size", [(64, 48), (30, 95), (700, 2)])
def test_the_part_is_resized_as_pillow_does(size, order):
    image = Image.open(io.BytesIO(jpeg(0, size)))
    for seed in range(5):
        random = [np.random.default_rng(seed) for _ in range(2)]
        found = random_resized_crop(image, random[0], SIZE, (0.1, 1.0), pass_order=order)
        left, top, right, bottom = box = random_part(image.size, random[1], (0.1, 1.0))
        if order == "installed":
            expected = image.resize(SIZE[::-1], Image.Resampling.BICUBIC, box=box)
        else:
            across = image.resize((SIZE[1], size[1]), Image.Resampling.BICUBIC, box=(left, 0, right, size[1]))
            expected = across.resize(SIZE[::-1], Image.Resampling.BICUBIC, box=(0, top, SIZE[1], bottom))
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**32), st.floats(0.05, 1.0))
@settings(max_examples=200, deadline=None)
def test_crops_lie_inside_and_keep_scale_and_ratio(width, height, seed, least):
    left, top, right, bottom = random_part((width, height), np.random.default_rng(seed), scale=(least, 1.0))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    wide, tall = right - left, bottom - top
    slack = 1 / min(wide, tall) + 1e-9
    assert 3 / 4 * (1 - slack) <= wide / tall <= 4 / 3 * (1 + slack) or min(width, height) == 1


def test_area_and_place_of_crops_are_uniform():
    generator = np.random.default_rng(0)
    left, top, right, bottom = np.array([random_part((40, 40), generator, scale=(0.3, 0.5)) for _ in range(4000)]).T
    areas = (right - left) * (bottom - top) / 1600
    counts = np.histogram(areas, 4, (0.3, 0.5))[0]
    assert counts.min() > 850
    ratios = np.log((right - left) / (bottom - top)) / np.log(4 / 3)
    assert np.histogram(ratios, 4, (-1, 1))[0].min() > 850
    for place, room in ((left, 40 - (right - left)), (top, 40 - (bottom - top))):
        chosen = np.histogram(place / (room + 1), 4, (0, 1))[0]
        assert chosen.min() > 850
        assert 0 < (place == room).mean() < 0.15
        assert 0 < (place == 0).mean() < 0.15


def test_crops_are_spread_over_the_picture():
    image = Image.fromarray(np.mgrid[0:100, 0:100].transpose(1, 2, 0)[..., [0, 1, 1]].astype(np.uint8))
    generator = np.random.default_rng(0)
    means = np.array(
        [np.asarray(random_resized_crop(image, generator, (4, 4), (0.2, 0.3))).mean((0, 1)) for _ in range(300)]
    )
    assert means.min() < 33
    assert means.max() > 66
    np.testing.assert_allclose(means.mean(0), 49.5, atol=4)


def test_a_function_as_augmentation(ten):
    def augment(image, generator):
        return image.rotate(float(generator.integers(0, 4)) * 90)

    first = list(batches(ten, augment=augment).epoch(0))
    assert_same_batches(batches(ten, augment=augment, workers=4).epoch(0), first)
    for batch in first:
        for index, pixels in zip(batch.indices.tolist(), batch.pixel_values, strict=True):
            turned = [ten.image(index).rotate(angle) for angle in (0, 90, 180, 270)]
            possible = PROCESSOR.image_processor(turned, return_tensors="np")["pixel_values"]
            assert (possible == pixels).all(axis=(1, 2, 3)).any()


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_the_augmentation_come_out(ten, workers):
    def wrong(image, generator):
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong") as caught:
        list(batches(ten, augment=wrong, workers=workers).epoch(0))
    assert "The augment function raised this error for the image of 00" in caught.value.__notes__[0]
    with pytest.raises(TypeError, match=r"augment must return a Pillow image\. Received: <class 'NoneType'>"):
        list(batches(ten, augment=lambda image, generator: None, workers=workers).epoch(0))
