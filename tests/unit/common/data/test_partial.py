"""Pairs of which either half may be missing, and the other columns of their files."""

from __future__ import annotations

import json
import os
import sys

import pytest
from data_cases import jpeg, tar_of

from clipmb import Pairs


def found(pairs):
    return [
        (pairs.id(i), pairs.has_image(i), pairs.captions(i), pairs.label(i), pairs.fields(i)) for i in range(len(pairs))
    ]


def test_a_folder_of_images_alone(tmp_path):
    (tmp_path / "trip" / "day 1").mkdir(parents=True)
    for name in ("a.jpg", "trip/b.PNG", "trip/day 1/c.jpg"):
        (tmp_path / name).write_bytes(jpeg())
    (tmp_path / "a.txt").write_text("a caption", "utf-8")
    pairs = Pairs.open(tmp_path, partial=True)
    assert found(pairs) == [
        ("a.jpg", True, ["a caption"], None, {}),
        ("trip/b.PNG", True, [], None, {}),
        ("trip/day 1/c.jpg", True, [], None, {}),
    ]
    assert pairs.path(1) == str(tmp_path / "trip" / "b.PNG")
    with pytest.raises(ValueError, match="There must be at least one pair"):
        Pairs.open(tmp_path / "trip" / "day 1")


def test_image_files_and_text_files(tmp_path):
    for name in ("b.jpg", "a.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(jpeg())
    (tmp_path / "texts.txt").write_text("one\n\n two \n", "utf-8")
    given = [tmp_path / "b.jpg", tmp_path / "texts.txt", tmp_path / "a.jpg"]
    pairs = Pairs.open(given, partial=True)
    assert found(pairs) == [
        (str(tmp_path / "b.jpg"), True, [], None, {}),
        (str(tmp_path / "a.jpg"), True, [], None, {}),
        ("texts.txt/0", False, ["one"], None, {}),
        ("texts.txt/1", False, ["two"], None, {}),
    ]
    assert pairs.path(2) is None
    assert len(Pairs.open(str(tmp_path / "*.jpg"), partial=True)) == 3
    for path in given[:2]:
        with pytest.raises(ValueError, match=r"Expected a \.csv"):
            Pairs.open(path)


ROWS = [
    {"image": "a.jpg", "caption": "one", "label": "x", "width": 7, "note": "first"},
    {"image": "a.jpg", "caption": "two", "label": "x", "width": 7, "note": "first"},
    {"image": "a.jpg", "caption": "three", "label": "x", "width": 8, "note": None},
    {"image": "b.jpg", "caption": "", "label": None, "width": 9, "note": "alone"},
    {"image": None, "caption": "no image", "label": None, "width": 10, "note": ""},
    {"image": "", "caption": "no image", "label": None, "width": 10, "note": ""},
    {"image": "", "caption": " ", "label": "x", "width": 0, "note": ""},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_the_other_columns_of_tables(tmp_path, suffix):
    path = tmp_path / f"table{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)), "utf-8")
    elif suffix == ".csv":
        lines = [",".join("" if value is None else str(value) for value in row.values()) for row in ROWS]
        path.write_text("\n".join([",".join(ROWS[0]), *lines]), "utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(ROWS), path)
    pairs = Pairs.open(path, partial=True)
    number = str if suffix == ".csv" else int
    none = "" if suffix == ".csv" else None
    assert found(pairs) == [
        ("a.jpg", True, ["one", "two", "three"], "x", {"width": number(7), "note": "first"}),
        ("b.jpg", True, [], None, {"width": number(9), "note": "alone"}),
        (f"table{suffix}/4", False, ["no image"], None, {"width": number(10), "note": ""}),
        (f"table{suffix}/5", False, ["no image"], None, {"width": number(10), "note": ""}),
    ]
    first = {"width": number(7), "note": "first"}
    assert pairs.caption_fields(0) == [first, first, {"width": number(8), "note": none}]
    assert (pairs.caption_fields(1), pairs.caption_fields(2)) == ([], [pairs.fields(2)])
    assert len(pairs.left_out) == 1
    assert "A row needs an image or a caption" in pairs.left_out[0][1]
    kinds = {"width": {number.__name__}, "note": {"str"} if suffix == ".csv" else {"str", "NoneType"}}
    assert pairs.kinds == kinds
    whole = Pairs.open(path)
    assert [whole.captions(i) for i in range(len(whole))] == [["one", "two", "three"]]
    assert whole.kinds == {}
    assert whole.fingerprint != pairs.fingerprint


@pytest.mark.parametrize("only", ["image", "caption"])
def test_tables_of_one_column(tmp_path, only):
    (tmp_path / "table.csv").write_text(f"{only}\na.jpg\nb.jpg\n", "utf-8")
    pairs = Pairs.open(tmp_path / "table.csv", partial=True)
    assert [pairs.has_image(i) for i in range(2)] == [only == "image"] * 2
    assert [pairs.captions(i) for i in range(2)] == ([[], []] if only == "image" else [["a.jpg"], ["b.jpg"]])
    with pytest.raises(ValueError, match="A table needs a column of"):
        Pairs.open(tmp_path / "table.csv")


def test_shards(tmp_path):
    about = json.dumps({"caption": "from json", "width": 5, "tags": ["a"]}).encode()
    members = [
        ("1.jpg", jpeg()), ("1.json", about), ("2.jpg", jpeg()), ("3.txt", b"text"), ("4.json", b"{"),
        ("5.png", jpeg()),
        ("5.json", b'{"width": 2.5}'), ("6.xml", b"neither"),
    ]  # fmt: skip
    pairs = Pairs.open(tar_of(tmp_path / "s.tar", members), partial=True)
    shown = [(pairs.id(i), pairs.has_image(i), pairs.fields(i)) for i in range(len(pairs))]
    assert shown == [
        ("s.tar/1", True, {"width": 5, "tags": ["a"]}),
        ("s.tar/2", True, {}),
        ("s.tar/3", False, {}),
        ("s.tar/4", False, {}),
        ("s.tar/5", True, {"width": 2.5}),
    ]
    assert pairs.captions(0) == ["from json"]
    assert pairs.kinds == {"width": {"int", "float"}, "tags": {"list"}}
    assert [name for name, _ in pairs.left_out] == ["s.tar/6"]
    assert pairs.path(0) is None


def test_coco_without_captions(tmp_path):
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": "x", "file_name": "b.jpg"}]
    content = {"images": images, "annotations": [{"image_id": 1, "caption": "one"}]}
    (tmp_path / "captions_val.json").write_text(json.dumps(content), "utf-8")
    pairs = Pairs.open(tmp_path / "captions_val.json", partial=True)
    assert [(pairs.id(i), pairs.captions(i)) for i in range(2)] == [("b.jpg", []), ("a.jpg", ["one"])]


def test_images_inside_a_parquet_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"image": {"bytes": jpeg(i), "path": None}, "width": i} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    pairs = Pairs.open(tmp_path / "t.parquet", partial=True)
    assert found(pairs) == [(f"t.parquet/{i}", True, [], None, {"width": i}) for i in range(3)]
    assert pairs.image(2).tobytes() == pairs.image(2).tobytes() != pairs.image(1).tobytes()


def test_times_that_python_does_not_have(tmp_path, monkeypatch):
    """Nanoseconds, without pandas, and years after 9999."""
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    monkeypatch.setitem(sys.modules, "pandas", None)
    moment = pa.array([1577840523123456789], pa.timestamp("ns"))
    columns = {
        "image": ["a.jpg"], "moment": moment, "far": pa.array([2**60], pa.timestamp("us")),
        "length": pa.array([1234567891], pa.duration("ns")), "day": pa.array([123456789], pa.time64("ns")),
        "list": pa.ListArray.from_arrays([0, 1], moment), "pair": pa.StructArray.from_arrays([moment], ["at"]),
        "fixed": pa.FixedSizeListArray.from_arrays(moment, 1), "named": moment.dictionary_encode(),
        "map": pa.MapArray.from_arrays([0, 1], ["k"], moment),
    }  # fmt: skip
    pa.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    shown = "2020-01-01 01:02:03.123456789"
    fields = Pairs.open(tmp_path / "a.parquet", partial=True).fields(0)
    assert fields.pop("far").startswith("<value out of range")
    assert fields == {
        "moment": shown, "length": 1234567891, "day": "00:00:00.123456789", "list": [shown], "pair": {"at": shown},
        "fixed": [shown], "named": shown, "map": [["k", shown]],
    }  # fmt: skip


def test_further_kinds_of_images_are_not_passed_over(tmp_path):
    """Pillow reads some of them; of the others, an error says so."""
    for name in ("a.jfif", "b.HEIC", "c.avif"):
        (tmp_path / name).write_bytes(jpeg())
    for given in (tmp_path, str(tmp_path / "*"), [tmp_path / "a.jfif", tmp_path / "b.HEIC", tmp_path / "c.avif"]):
        pairs = Pairs.open(given, partial=True)
        assert [pairs.has_image(i) for i in range(len(pairs))] == [True] * 3
        assert pairs.image(0).mode == "RGB"
    members = [("1.gif", jpeg()), ("1.txt", b"one"), ("2.bmp", jpeg()), ("2.jpg", b"jpg"), ("3.heic", b"x")]
    pairs = Pairs.open(tar_of(tmp_path / "s.tar", members), partial=True)
    assert [(pairs.id(i), pairs.has_image(i), pairs.captions(i)) for i in range(len(pairs))] == [
        ("s.tar/1", True, ["one"]), ("s.tar/2", True, []), ("s.tar/3", True, []),
    ]  # fmt: skip
    assert pairs.image(0).mode == "RGB"
    with pytest.raises(ValueError, match=r"s\.tar/2 must be a readable image. Received: 3 bytes"):
        pairs.image(1)
    with pytest.raises(ValueError, match=r"must hold \.tar shards or images.*s\.tar and [abc]\."):
        Pairs.open(tmp_path, partial=True)
    assert len(Pairs.open([tmp_path / "s.tar", tmp_path / "a.jfif"], partial=True)) == 4


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_linked_folders_are_followed_once_and_broken_links_are_items(tmp_path):
    (tmp_path / "other" / "deep").mkdir(parents=True)
    (tmp_path / "pictures" / "sub").mkdir(parents=True)
    for name in ("pictures/a.jpg", "pictures/sub/b.jpg", "other/c.jpg", "other/deep/d.jpg"):
        (tmp_path / name).write_bytes(jpeg())
    links = {
        "pictures/other": "../other", "pictures/sub/up": "..", "pictures/sub/far": "../..",
        "other/back": "../pictures", "pictures/gone.jpg": "nowhere",
    }  # fmt: skip
    for name, target in links.items():
        (tmp_path / name).symlink_to(target, target_is_directory=True)
    pairs = Pairs.open(tmp_path / "pictures", partial=True)
    names = ["a.jpg", "gone.jpg", "other/c.jpg", "other/deep/d.jpg", "sub/b.jpg"]
    assert [pairs.id(i) for i in range(len(pairs))] == names
    pairs = Pairs.open(str(tmp_path / "pictures" / "*.jpg"), partial=True)
    assert len(pairs) == 2
    with pytest.raises(ValueError, match=r"gone\.jpg must be an image that exists"):
        pairs.image(1)


def test_patterns_match_folders(tmp_path, monkeypatch):
    for name in ("trip 1/a.jpg", "trip 1/sub/b.jpg", "trip 2/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg())
    monkeypatch.chdir(tmp_path)
    pairs = Pairs.open("trip*", partial=True)
    assert [pairs.id(i) for i in range(len(pairs))] == ["trip 1/a.jpg", "trip 1/sub/b.jpg", "trip 2/a.jpg"]
    assert len(Pairs.open("**", partial=True)) == 3
    for nested in (["trip 1", "trip 1/a.jpg"], ["trip 1", "trip 1/sub"], [".", "trip 2"]):
        with pytest.raises(ValueError, match="A file may be given only once"):
            Pairs.open(nested, partial=True)


def test_ids_of_images_and_folders_differ(tmp_path, monkeypatch):
    for name in ("pictures/a.jpg", "more/pictures/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(jpeg())
    monkeypatch.chdir(tmp_path)
    pairs = Pairs.open(["more/pictures", "pictures/a.jpg"], partial=True)
    assert {pairs.id(i) for i in range(2)} == {"pictures/a.jpg", "more/pictures/a.jpg"}


def test_columns_of_bytes_are_named_in_the_log(tmp_path, caplog):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    hashes = pa.array([b"\xff\0"], pa.binary(2))
    pq.write_table(pa.table({"image": ["a.jpg"], "hash": hashes, "x": [1]}), tmp_path / "a.parquet")
    assert Pairs.open(tmp_path / "a.parquet", partial=True).fields(0) == {"x": 1}
    assert "columns of bytes are not kept: hash" in caplog.text


def test_rows_without_captions_are_one_pair_where_they_agree(tmp_path):
    lines = ["image,box,caption", "a.jpg,1,", "a.jpg,2,", "a.jpg,1,", "a.jpg,1,one", "a.jpg,2,one", "a.jpg,1,one"]
    (tmp_path / "a.csv").write_text("\n".join(lines), "utf-8")
    pairs = Pairs.open(tmp_path / "a.csv", partial=True)
    assert [(pairs.captions(i), pairs.fields(i)["box"]) for i in range(len(pairs))] == [
        ([], "1"), ([], "2"), (["one", "one"], "1"),
    ]  # fmt: skip
    assert pairs.caption_fields(2) == [{"box": "1"}, {"box": "2"}]
