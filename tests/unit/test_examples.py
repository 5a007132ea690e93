"""The short programs of examples/ do what they say, with the small model; each has fewer than 30 lines."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from processes import output

import clipmb

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = sorted(EXAMPLES.glob("*.py"))
NAMES = ("rocket", "panda", "pizza")


@pytest.fixture
def pictures(tmp_path):
    """Three pictures that the model never saw, and a smaller copy of the first."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    images, labels = clipmb.held_out_pictures()
    for name in NAMES:
        images[labels.index(name)].save(folder / f"{name}.png")
    images[labels.index("rocket")].save(folder / "again.jpg", quality=90)
    return folder


@pytest.mark.parametrize("path", SHORT, ids=lambda path: path.stem)
def test_they_are_short(path):
    assert len(path.read_text("utf-8").splitlines()) < 30


def test_every_short_program_is_listed_and_has_a_test():
    listed = (EXAMPLES / "README.md").read_text("utf-8")
    tests = Path(__file__).read_text("utf-8")
    assert len(SHORT) >= 3
    for path in SHORT:
        assert f"({path.name})" in listed
        assert f'EXAMPLES / "{path.name}"' in tests


def test_photo_search(pictures, tmp_path):
    (pictures / "broken.png").write_bytes(b"no image")
    for _ in range(2):  # the second time nothing is embedded
        first, *found = output(
            EXAMPLES / "photo_search.py", pictures, tmp_path / "out", "an emoji of pizza"
        ).splitlines()
        assert first == "4 images, 1 errors"
        assert len(found) == 4
        assert found[0].split()[1] == "pizza.png"


def test_near_duplicates(pictures, tmp_path):
    groups = output(EXAMPLES / "near_duplicates.py", pictures, tmp_path / "out", "0.9").splitlines()
    same = sorted((pictures / name for name in ("rocket.png", "again.jpg")), key=lambda path: -path.stat().st_size)
    assert [line.split("\t") for line in groups] == [[str(path) for path in same]]
    assert len(list(pictures.iterdir())) == 4


def test_label_csv(pictures, tmp_path):
    table = pictures / "table.csv"
    table.write_text("image,price\n" + "".join(f"{name}.png,{i}\n" for i, name in enumerate(NAMES)), "utf-8")
    output(
        EXAMPLES / "label_csv.py", table, tmp_path / "out.csv", ",".join(NAMES), clipmb.small_model(), "an emoji of {}"
    )
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["price"], row["label"]) for row in rows] == [
        (f"{name}.png", str(i), name) for i, name in enumerate(NAMES)
    ]
    assert all(0.5 < float(row["probability"]) <= 1 for row in rows)
