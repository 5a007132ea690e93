"""Data as people have them: COCO and Flickr30k, class folders, img2dataset's outputs, Hugging Face's datasets."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipmb.common.data import layouts
from clipmb.common.data.pairs import Pairs


def encoded(value: int = 0, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (value, 10, 20)).save(file, format)
    return file.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def shown(pairs: Pairs) -> list[tuple[list[str], str | None, int]]:
    """Captions, label and red value of every pair."""
    return [(pairs.captions(i), pairs.label(i), pairs.image(i).getpixel((0, 0))[0]) for i in range(len(pairs))]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "captions.json",
            '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]}',
        ),
        ("results.csv", "image_name| comment_number| comment\na.jpg| 0| x\n"),
        ("results.token", "a.jpg#0\ta cat\n"), ("x.csv", "image,caption\na.jpg,x\n"),
        ("x.jsonl", '{"image": "a.jpg", "caption": "x"}\n'),
    ],
)  # fmt: skip
def test_images_that_are_not_found_name_the_option_that_says_where_they_are(tmp_path, name, content):
    pairs = Pairs.open(write(tmp_path / name, content))
    with pytest.raises(
        ValueError, match=r"a\.jpg must be an image that exists.*a\.jpg\. Pass image_root= \(--image-root\)"
    ):
        pairs.image(0)
    write(tmp_path / "elsewhere" / "a.jpg", "no image")
    with pytest.raises(ValueError, match=r"a\.jpg must be a readable image\."):
        Pairs.open(tmp_path / name, image_root=tmp_path / "elsewhere").image(0)


# -- COCO and Flickr30k -----------------------------------------------------------------------------------------------


def coco(images: object, annotations: object) -> str:
    return json.dumps({"info": {}, "images": images, "annotations": annotations})


CAPTIONS = coco(
    [{"id": 7, "file_name": "7.png"}, {"id": 8, "file_name": "8.png"}],
    [
        {"image_id": 8, "id": 1, "caption": "a dog"},
        {"image_id": 7, "id": 2, "caption": "a cat "},
        {"image_id": 8, "id": 3, "caption": "the dog"},
        {"image_id": 9, "id": 4, "caption": "no picture"},
        {"id": 5},
        None,
    ],
)


@pytest.mark.parametrize(
    "pictures",
    [
        "annotations",
        "annotations/images",
        "val2017",
        "images",
        "images/val2017",
        "annotations/val2017",
        "annotations/images/val2017",
    ],
)
def test_coco_captions(tmp_path, pictures):
    for number in (7, 8):
        write(tmp_path / pictures / f"{number}.png", encoded(number))
    pairs = Pairs.open(write(tmp_path / "annotations" / "captions_val2017.json", CAPTIONS))
    assert shown(pairs) == [(["a dog", "the dog"], None, 8), (["a cat"], None, 7)]
    assert [name for name, _ in pairs.left_out] == [f"captions_val2017.json/annotations/{i}" for i in (3, 4, 5)]
    assert len(Pairs.open(tmp_path / "annotations")) == 2  # the folder alone says it too


def test_one_missing_picture_does_not_hide_the_folder_of_the_others(tmp_path):
    write(tmp_path / "val2017" / "7.png", encoded(7))  # and not 8.png, which the first caption is about
    pairs = Pairs.open(write(tmp_path / "annotations" / "captions_val2017.json", CAPTIONS))
    assert pairs.path(1) == str(tmp_path / "val2017" / "7.png")
    with pytest.raises(ValueError, match=r"8\.png must be an image that exists"):
        pairs.image(0)
    rows = "caption,image\na text alone,\na cat,7.png\n"
    partial = Pairs.open(write(tmp_path / "val2017.csv", rows), partial=True)
    assert partial.path(1) == str(tmp_path / "val2017" / "7.png")


def test_pictures_elsewhere_are_named_by_their_root(tmp_path):
    write(tmp_path / "elsewhere" / "7.png", encoded(7))
    path = write(tmp_path / "captions.json", coco([{"id": 7, "file_name": "7.png"}], [{"image_id": 7, "caption": "x"}]))
    assert shown(Pairs.open(path, image_root=tmp_path / "elsewhere")) == [(["x"], None, 7)]
    with pytest.raises(ValueError, match="image_root must be a folder"):
        Pairs.open(path, image_root=tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["[]", "{", '{"images": 3, "annotations": []}', "[" * 100_000, "\xff"])
def test_other_json_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"must be COCO's.*Save rows as \.jsonl"):
        Pairs.open(write(tmp_path / "x.json", content.encode("latin-1")))


@pytest.mark.parametrize("pictures", [".", "flickr30k-images", "Images"])
def test_flickr30k_tokens(tmp_path, pictures):
    write(tmp_path / pictures / "1.png", encoded(1))
    lines = ["1.png#0\tTwo men .", "1.png#1\tTwo “friends” .", "nonsense", "", "2.png#0\t"]
    pairs = Pairs.open(write(tmp_path / "results.token", "\n".join(lines)))
    assert shown(pairs) == [(["Two men .", "Two “friends” ."], None, 1)]
    assert [name for name, _ in pairs.left_out] == ["results.token:3", "results.token:5"]


def test_flickr30k_results(tmp_path):
    """Bars between padded cells, quotes that are only text, and a row without its second bar, as published."""
    write(tmp_path / "flickr30k_images" / "1.png", encoded(1))
    table = 'image_name| comment_number| comment\n1.png| 0| A "tall man\n1.png| 1| Two, men\n1.png| 4   A dog runs .\n'
    pairs = Pairs.open(write(tmp_path / "results.csv", table))
    assert shown(pairs) == [(['A "tall man', "Two, men"], None, 1)]
    assert [name for name, _ in pairs.left_out] == ["results.csv:4"]


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("given", ["captions.txt", "."])
def test_flickr8k_captions(tmp_path, partial, given):
    """A table although it is called .txt; another text file stays one text per line."""
    write(tmp_path / "Images" / "1.png", encoded(1))
    write(tmp_path / "captions.txt", 'image,caption\n1.png,"A child , in a dress"\n1.png,A girl goes .\n')
    assert shown(Pairs.open(tmp_path / given, partial=partial)) == [
        (["A child , in a dress", "A girl goes ."], None, 1)
    ]
    named = write(tmp_path / "named.txt", "photo;words\n1.png;A child\n")
    columns = {"image_column": "photo", "caption_column": "words", "separator": ";"}
    assert shown(Pairs.open(named, partial=partial, **columns)) == [(["A child"], None, 1)]
    texts = write(tmp_path / "texts.txt", "an image, a caption\nimage\n")
    if not partial:
        with pytest.raises(ValueError, match=r"Expected a .* file\. Received: .*texts\.txt"):
            Pairs.open(texts)
    else:
        found = Pairs.open(texts, partial=True)
        assert [found.captions(i) for i in range(len(found))] == [["an image, a caption"], ["image"]]


# -- text tables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("names", [("filepath", "title"), ("img", "caption"), ("Image", "label")])
def test_the_separator_is_found(tmp_path, separator, names):
    write(tmp_path / "1.png", encoded(1))
    path = write(tmp_path / "x.csv", f"{separator.join(names)}\n1.png{separator}a cat\n")
    captions = [] if names[1] == "label" else ["a cat"]
    assert shown(Pairs.open(path)) == [(captions, "a cat" if not captions else None, 1)]


def test_a_named_separator_is_taken(tmp_path):
    path = write(tmp_path / "x.csv", "image,caption;text\n1,2;3\n")
    with pytest.raises(ValueError, match=r"separator= \(--separator\)"):
        Pairs.open(path, separator=";")


def test_paths_that_windows_wrote(tmp_path):
    write(tmp_path / "images" / "1.png", encoded(1))
    assert shown(Pairs.open(write(tmp_path / "x.csv", "image,caption\nimages\\1.png,a\n"))) == [(["a"], None, 1)]


def test_a_broken_row_costs_no_other(tmp_path):
    rows = [
        b"image,caption",
        b"a,one",
        b'b,"never closed',
        b"c,three",
        b'd,"closed"wrongly',
        b"e,\xff",
        b"f,six,and more",
        b'g,"over',
        b'two lines"',
        b"h,eight",
    ]
    pairs = Pairs.open(write(tmp_path / "x.csv", b"\n".join(rows)))
    assert [pairs.id(i) for i in range(len(pairs))] == ["a", "c", "g", "h"]
    assert pairs.captions(2) == ["over\ntwo lines"]
    assert [name for name, _ in pairs.left_out] == ["x.csv:3", "x.csv:5", "x.csv:6", "x.csv:7"]


def test_many_broken_rows_take_no_long_time(tmp_path):
    rows = ["image,caption", *(f'{i},"never closed' if i % 2 else f"{i},fine" for i in range(5000))]
    pairs = Pairs.open(write(tmp_path / "x.csv", "\n".join(rows)))
    assert len(pairs) + len(pairs.left_out) >= 4999


# -- folders ----------------------------------------------------------------------------------------------------------


def test_class_folders(tmp_path):
    for name, number in (("cats/1.png", 1), ("cats/deep/2.PNG", 2), ("dogs/3.png", 3), ("4.png", 4)):
        write(tmp_path / name, encoded(number))
    write(tmp_path / ".hidden" / "5.png", encoded(5))
    pairs = Pairs.open(tmp_path)
    assert shown(pairs) == [([], "cats", 1), ([], "cats", 2), ([], "dogs", 3)]
    assert [pairs.id(i) for i in range(3)] == ["cats/1.png", "cats/deep/2.PNG", "dogs/3.png"]
    assert pairs.left_out == [(f"{tmp_path.name}/4.png", "It is not in the folder of a class.")]
    assert pairs.fingerprint == Pairs.open(tmp_path).fingerprint


def test_splits_are_no_classes(tmp_path):
    for name in ("train/cats/1.png", "train/dogs/2.png", "Val/cats/3.png"):
        write(tmp_path / name, encoded(1))
    with pytest.raises(ValueError, match=r"must hold one split. Received: Val, train in .*Pass one of them, .*Val"):
        Pairs.open(tmp_path)
    assert [Pairs.open(tmp_path / "train").label(i) for i in range(2)] == ["cats", "dogs"]
    write(tmp_path / "cats" / "deep" / "4.png", encoded(4))  # where not all are splits, they are classes
    assert [Pairs.open(tmp_path).label(i) for i in range(4)] == ["Val", "cats", "train", "train"]


def test_files_of_img2dataset(tmp_path):
    for shard, key, number in (("00000", "000000000", 1), ("00001", "000010000", 2)):
        write(tmp_path / shard / f"{key}.jpg", encoded(number, "JPEG"))
        write(tmp_path / shard / f"{key}.txt", f"caption {number}")
        write(tmp_path / shard / f"{key}.json", json.dumps({"caption": f"caption {number}", "status": "success"}))
        pq.write_table(pa.table({"url": ["u"], "caption": ["c"]}), tmp_path / f"{shard}.parquet")
        write(tmp_path / f"{shard}_stats.json", "{}")
    write(tmp_path / "00001" / "000010001.jpg", encoded(3, "JPEG"))
    pairs = Pairs.open(tmp_path)
    assert [pairs.captions(i) for i in range(2)] == [["caption 1"], ["caption 2"]]
    assert pairs.left_out == [
        (f"{tmp_path.name}/00001/000010001.jpg", "There is no text (.txt, .json or .cls) beside it.")
    ]
    assert pairs.image(1).size == (6, 5)


def test_texts_beside_pictures(tmp_path):
    write(tmp_path / "a.png", encoded(1))
    write(tmp_path / "a.json", json.dumps({"caption": ["x", "y"], "label": 3}))
    write(tmp_path / "b.png", encoded(2))
    write(tmp_path / "b.cls", "4\n")
    write(tmp_path / "c.png", encoded(3))
    write(tmp_path / "c.json", "[]")
    pairs = Pairs.open(tmp_path)
    assert shown(pairs) == [(["x", "y"], "3", 1), ([], "4", 2)]
    assert pairs.left_out[0][0].endswith("/c.png")


@pytest.mark.parametrize("place", [".", "data"])
@pytest.mark.parametrize(
    "stems",
    [
        ("train-00000-of-00002", "train-00001-of-00002"),
        ("train-00000-of-00002-b513d9e388d56453", "train-00001-of-00002-6242383510343be0"),
        ("00000", "00001"),
    ],
)
def test_folders_of_parquet_files(tmp_path, place, stems):
    """As Hugging Face's data sets and img2dataset's "parquet" output are written."""
    for number, stem in enumerate(stems):
        path = tmp_path / place / f"{stem}.parquet"
        path.parent.mkdir(exist_ok=True)
        columns = {"jpg": [encoded(number), None], "caption": [f"c{number}", "failed"], "status": ["success", "failed"]}
        pq.write_table(pa.table(columns), path)
    pairs = Pairs.open(tmp_path)
    assert [pairs.captions(i) for i in range(4)] == [["c0"], ["failed"], ["c1"], ["failed"]]
    assert pairs.image(2).getpixel((0, 0))[0] == 1
    with pytest.raises(ValueError, match="A row needs an image"):
        pairs.image(1)


def test_several_splits_are_not_mixed(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        table = pa.table({"image": [encoded()], "caption": ["c"]})
        pq.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"must hold one split. Received: test, train.*test-\*\.parquet"):
        Pairs.open(tmp_path)
    assert len(Pairs.open(tmp_path / "data" / "train-*.parquet")) == 1


# -- datasets ---------------------------------------------------------------------------------------------------------


class Feature:
    names = ("cat", "dog")


class Split:
    """What is used of a datasets.Dataset, which needs no library here."""

    split = "train"

    def __init__(self, columns: dict[str, list]) -> None:
        self._columns = columns
        self.column_names = list(columns)
        self.features = {name: Feature() if name == "label" else object() for name in columns}

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), []))

    def __getitem__(self, index: int) -> dict:
        return {name: values[index] for name, values in self._columns.items()}

    def select_columns(self, names: list[str]) -> Split:
        return Split({name: self._columns[name] for name in names} or {"": [None] * len(self)})


Split.__module__ = "datasets.arrow_dataset"


def test_data_set_objects(tmp_path):
    write(tmp_path / "3.png", encoded(3))
    pictures = [Image.new("RGB", (4, 4), (1, 0, 0)), {"bytes": encoded(2), "path": None}, str(tmp_path / "3.png")]
    made = Split({"image": [*pictures, None], "caption": ["a", ["b", "c"], None, None], "label": [0, 1, 1, None]})
    pairs = Pairs.open(made)
    assert shown(pairs) == [(["a"], "cat", 1), (["b", "c"], "dog", 2), ([], "dog", 3)]
    assert [pairs.id(i) for i in range(3)] == [f"dataset-train/{i}" for i in range(3)]
    assert [name for name, _ in pairs.left_out] == ["dataset-train/3"]
    assert Pairs.open(made).fingerprint == pairs.fingerprint
    changed = Split({"image": [*pictures, None], "caption": ["a", ["b", "d"], None, None], "label": [0, 1, 1, None]})
    assert Pairs.open(changed).fingerprint != pairs.fingerprint


def test_a_dictionary_of_splits_is_refused():
    splits = type("DatasetDict", (dict,), {"__module__": "datasets.dataset_dict"})(train=1, test=2)
    with pytest.raises(TypeError, match=r"must be one split.*DatasetDict of train, test.*dataset\['train'\]"):
        Pairs.open(splits)


def saved(folder: Path, table: pa.Table, **state: object) -> Path:
    """A folder as ``save_to_disk`` writes it."""
    folder.mkdir(exist_ok=True)
    names = []
    for number, batch in enumerate(table.to_batches(max_chunksize=2)):
        names.append({"filename": f"data-{number:05d}-of-00002.arrow"})
        with pa.ipc.new_stream(folder / names[-1]["filename"], table.schema) as writer:
            writer.write_batch(batch)
    write(folder / "state.json", json.dumps({"_data_files": names, "_fingerprint": "x", **state}))
    write(folder / "dataset_info.json", "{}")
    return folder


def test_saved_data_sets(tmp_path):
    pictures = [{"bytes": encoded(number), "path": None} for number in range(3)]
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": pictures, "text": ["a", "b", None], "label": [0, 1, 0]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pairs = Pairs.open(saved(tmp_path / "set", table))
    assert shown(pairs) == [(["a"], "cat", 0), (["b"], "dog", 1), ([], "cat", 2)]
    with pytest.raises(ValueError, match=r"must be a data set that save_to_disk wrote.*flatten_indices"):
        Pairs.open(saved(tmp_path / "set", table, _indices_data_files=[{"filename": "x"}]))
    (tmp_path / "set" / "data-00001-of-00002.arrow").write_bytes(b"cut")
    with pytest.raises(ValueError, match="must be a data set that save_to_disk wrote"):
        Pairs.open(tmp_path / "set")


def test_a_saved_data_set_cannot_lead_outside_its_folder(tmp_path):
    table = pa.table({"image": [{"bytes": encoded(1), "path": None}], "text": ["a"]})
    outside = saved(tmp_path / "outside", table)
    folder = saved(tmp_path / "set", table)
    state = {"_data_files": [{"filename": str(outside / "data-00000-of-00002.arrow")}]}
    write(folder / "state.json", json.dumps(state))
    (outside / "data-00000-of-00002.arrow").unlink()
    assert len(Pairs.open(folder)) == 1


def test_pipes_are_refused_at_once(tmp_path):
    """Opening one would wait for a writer."""
    for suffix in (".txt", ".json"):
        folder = tmp_path / suffix[1:]
        write(folder / "a.png", encoded())
        os.mkfifo(folder / f"a{suffix}")
        with pytest.raises(ValueError, match=f"Expected a file. Received: .*a{suffix}"):
            Pairs.open(folder)
    folder = saved(tmp_path / "set", pa.table({"image": [{"bytes": encoded(1), "path": None}], "text": ["a"]}))
    (folder / "data-00000-of-00002.arrow").unlink()
    os.mkfifo(folder / "data-00000-of-00002.arrow")
    with pytest.raises(ValueError, match=r"Expected a file. Received: .*arrow"):
        Pairs.open(folder)


def test_modules_of_datasets_are_known_by_their_name():
    assert layouts.is_dataset(Split({"image": []}))
    assert not layouts.is_dataset(np.zeros(3))
