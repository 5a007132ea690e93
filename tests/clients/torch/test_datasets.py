"""Hugging Face's datasets: objects and saved folders, decoded by us."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow

from clipmb import Pairs


@pytest.fixture
def made(tmp_path) -> Dataset:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        Pillow.new("RGB", (8, 6), (number, 0, 0)).save(path)
    columns = {"image": [str(path) for path in paths], "caption": ["a", "b", None], "label": [0, 1, 0]}
    features = Features({"image": Image(), "caption": Value("string"), "label": ClassLabel(names=["cat", "dog"])})
    return Dataset.from_dict(columns, features=features)


def check(pairs: Pairs) -> None:
    assert [pairs.captions(i) for i in range(3)] == [["a"], ["b"], []]
    assert [pairs.label(i) for i in range(3)] == ["cat", "dog", "cat"]
    assert [int(np.asarray(pairs.image(i))[0, 0, 0]) for i in range(3)] == [0, 1, 2]


def test_objects(made):
    check(Pairs.open(made))
    check(Pairs.open(made.select([2, 1, 0]).select([2, 1, 0])))
    with pytest.raises(TypeError, match="one split"):
        Pairs.open(DatasetDict(train=made))


@pytest.mark.parametrize("shards", [1, 2])
def test_saved_folders(made, tmp_path, shards):
    made.save_to_disk(tmp_path / "saved", num_shards=shards)
    check(Pairs.open(tmp_path / "saved"))


def test_parquet(made, tmp_path):
    (tmp_path / "data").mkdir()
    made.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    check(Pairs.open(tmp_path))
