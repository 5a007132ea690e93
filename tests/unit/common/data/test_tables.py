"""Tables of images and captions: CSV, TSV, JSON Lines and Parquet."""

from __future__ import annotations

import csv
import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import jpeg, tar_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipmb.common.data.pairs import Pairs


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.csv", 'image,caption\na.jpg,"eins, ""zwei"""\nb.jpg,日本 🐈\n'),
        ("captions.csv", '\ufeffimage,caption\r\na.jpg,"eins, ""zwei"""\r\n\r\nb.jpg,日本 🐈'),
        ("metadata.tsv", 'caption\tfile_name\n"eins, ""zwei"""\ta.jpg\n日本 🐈\tb.jpg\n'),
        ("pairs.CSV", 'filepath,title\na.jpg,"eins, ""zwei"""\nb.jpg, 日本 🐈 \n'),
        (
            "captions.jsonl",
            '\ufeff{"image": "a.jpg", "text": "eins, \\"zwei\\""}\n\n{"image": "b.jpg", "text": ["日本 🐈"]}',
        ),
    ],
    ids=["csv", "csv-bom-crlf", "tsv", "names", "jsonl"],
)
def test_text_tables(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode("utf-8"))
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "b.jpg").write_bytes(jpeg(2))
    for path in (tmp_path, str(tmp_path / name), [tmp_path / name]):
        pairs = Pairs.open(path)
        assert [pairs.id(i) for i in range(len(pairs))] == ["a.jpg", "b.jpg"]
        assert pairs.captions(0) == ['eins, "zwei"']
        assert pairs.captions(1) == ["日本 🐈"]
        assert pairs.label(0) is None
        assert not pairs.left_out
    picture = pairs.image(1)
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(Image.open(io.BytesIO(jpeg(2)))))


def test_a_quoted_caption_may_have_lines(tmp_path):
    (tmp_path / "x.csv").write_text('image,caption\na.jpg,"one\ntwo"\nb.jpg,three\n', "utf-8")
    pairs = Pairs.open(tmp_path / "x.csv")
    assert [pairs.captions(i) for i in range(len(pairs))] == [["one\ntwo"], ["three"]]


def test_columns_and_separator_can_be_named(tmp_path):
    (tmp_path / "x.csv").write_text("image;foto;caption;wort;art\nno;a.jpg;no;yes;7\n", "utf-8")
    pairs = Pairs.open(
        tmp_path / "x.csv", image_column="foto", caption_column="wort", label_column="art", separator=";"
    )
    assert (pairs.id(0), pairs.captions(0), pairs.label(0)) == ("a.jpg", ["yes"], "7")
    with pytest.raises(
        ValueError, match=r"label_column must name a column\. Received: 'kind'; there are 'image', 'foto'"
    ):
        Pairs.open(tmp_path / "x.csv", label_column="kind", separator=";")


def test_named_columns_may_be_optional(tmp_path):
    (tmp_path / "a.csv").write_text("image,words,caption\na.jpg,yes,no\n", "utf-8")
    (tmp_path / "b.csv").write_text("image,caption\nb.jpg,yes\n", "utf-8")
    lines = ['{"image": "c.jpg", "words": "yes", "caption": "no"}', '{"image": "d.jpg", "caption": "yes"}']
    (tmp_path / "c.jsonl").write_text("\n".join(lines), "utf-8")
    members = [("e.jpg", b""), ("e.json", b'{"words": "yes", "kind": "7"}'), ("e.txt", b"no"), ("e.cls", b"no")]
    members += [("f.jpg", b""), ("f.json", b'{"caption": "no", "label": "no"}'), ("f.txt", b"yes"), ("f.cls", b"7")]
    members += [("g.jpg", b""), ("g.json", b'{"caption": "yes", "label": "7"}')]
    tar_of(tmp_path / "s.tar", members)
    files = [tmp_path / name for name in ("a.csv", "b.csv", "c.jsonl", "s.tar")]
    named = {"caption_column": "words", "label_column": "kind"}
    pairs = Pairs.open(files, **named, optional=("caption", "label"))
    assert [pairs.captions(i) for i in range(7)] == [["yes"]] * 7
    assert [pairs.label(i) for i in range(4, 7)] == ["7"] * 3
    strict = Pairs.open(files[3], **named)
    assert [strict.captions(i) for i in range(3)] == [["yes"], [], []]
    assert [strict.label(i) for i in range(3)] == ["7", None, None]
    with pytest.raises(ValueError, match="caption_column must name a column"):
        Pairs.open(files, **named, optional=("label",))
    with pytest.raises(ValueError, match="optional must be one of 'image', 'caption', 'label'"):
        Pairs.open(files, optional=("text",))


def test_the_first_known_name_wins(tmp_path):
    (tmp_path / "x.csv").write_text("path,title,Image,TEXT,class,label\np,t,i,x,c,l\n", "utf-8")
    pairs = Pairs.open(tmp_path / "x.csv")
    assert (pairs.id(0), pairs.captions(0), pairs.label(0)) == ("i", ["x"], "l")


def test_rows_of_one_picture_are_one_pair(tmp_path):
    (tmp_path / "x.csv").write_text("image,caption\na,1\nb,2\na,3\na,1\nb,4\n", "utf-8")
    pairs = Pairs.open(tmp_path / "x.csv")
    assert [pairs.id(i) for i in range(len(pairs))] == ["a", "b"]
    assert [pairs.captions(i) for i in range(2)] == [["1", "3"], ["2", "4"]]


def test_json_objects_need_not_be_alike(tmp_path):
    lines = [
        '{"image": "a", "label": 1}',
        '{"text": "x", "IMAGE": "b"}',
        '{"image": "c", "caption": "y", "class": "z"}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines), "utf-8")
    pairs = Pairs.open(tmp_path)
    assert [pairs.captions(i) for i in range(3)] == [[], ["x"], ["y"]]
    assert [pairs.label(i) for i in range(3)] == ["1", None, "z"]


PATHS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(
    lambda path: path.strip() and not path.startswith("http")
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip)


@given(st.dictionaries(PATHS, TEXTS, min_size=1, max_size=5), st.sampled_from(["csv", "tsv", "jsonl", "parquet"]))
@settings(max_examples=200, deadline=None)
def test_any_text_is_read_as_it_was_written(tmp_path_factory, pairs, kind):
    path = tmp_path_factory.getbasetemp() / f"any.{kind}"
    if kind == "jsonl":
        path.write_text(
            "\n".join(json.dumps({"image": i, "text": t}, ensure_ascii=len(i) % 2) for i, t in pairs.items()), "utf-8"
        )
    elif kind == "parquet":
        pq.write_table(pa.table({"image": list(pairs), "text": list(pairs.values())}), path)
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t" if kind == "tsv" else ",").writerows([("image", "text"), *pairs.items()])
    read = Pairs.open(path)
    assert {read.id(i): read.captions(i) for i in range(len(read))} == {i: [t.strip()] for i, t in pairs.items()}


def test_labels_alone_are_enough(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"image": "a", "label": 3}\n{"image": "b", "label": "cat"}\n', "utf-8")
    pairs = Pairs.open(tmp_path / "x.jsonl")
    assert [pairs.label(i) for i in range(2)] == ["3", "cat"]
    assert pairs.captions(0) == []


def test_rows_that_say_nothing_are_left_out_with_their_lines(tmp_path, caplog):
    (tmp_path / "x.csv").write_text("image,caption\na,fine\n,none\nb,\nc,un,quoted\nd,fine\n", "utf-8")
    pairs = Pairs.open(tmp_path / "x.csv")
    assert [pairs.id(i) for i in range(len(pairs))] == ["a", "d"]
    assert [name for name, _ in pairs.left_out] == ["x.csv:3", "x.csv:4", "x.csv:5"]
    assert "as many cells as the first line, 2. Received: 3: ['c', 'un', 'quoted']" in pairs.left_out[2][1]
    assert "3 items are left out; the first, x.csv:3: A row needs the path" in caplog.text


def test_lines_that_are_no_json_objects_are_left_out(tmp_path):
    lines = [
        '{"image": "a", "caption": "x"}',
        "{",
        "[]",
        '{"image": 3, "caption": "x"}',
        '{"image": "b", "caption": 3}',
    ]
    lines += [
        '{"caption": "x"}',
        "[" * 100_000,
        '{"image": "c", "caption": ["y", null]}',
        '{"image": "d", "texts": "z"}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines), "utf-8")
    pairs = Pairs.open(tmp_path / "x.jsonl")
    assert len(pairs) == 1
    assert [name for name, _ in pairs.left_out] == [f"x.jsonl:{line}" for line in range(2, 10)]


def written(table):
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


PARQUET_TWICE = written(pa.Table.from_arrays([["a"], ["b"], ["c"]], ["image", "text", "text"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"", "must have at least one row"),
        ("x.csv", b"\xef\xbb\xbf\r\n", "must have at least one row"),
        ("x.csv", b"image,caption\n", "must have at least one row"),
        ("x.jsonl", b"\n", "must have at least one row"),
        ("x.csv", b"image,caption\n,\n", "at least one pair"),
        ("x.csv", b"image,words\na,b\n", "column of captions, called caption, .*the columns 'image', 'words'"),
        ("x.csv", b"caption\na\n", "column of images, called image, "),
        ("x.csv", b"url,caption\nhttp://x,a\n", r"nothing is downloaded\. Received: only the column 'url'"),
        ("x.csv", b"image,caption\nhttps://x/a.jpg,a\n", "nothing is downloaded"),
        ("x.csv", b"image,image,caption\na,b,c\n", "different names"),
        ("x.csv", b'image,caption\na,"never closed\n', "line 2: unexpected end of data"),
        ("x.csv", "image,caption\na,b\n".encode("utf-16"), "must be UTF-8"),
        ("x.csv", b"image,caption\na,\xff\n", "must be UTF-8"),
        ("x.parquet", b"PAR1 is not enough", "must be a readable Parquet file"),
        ("x.parquet", PARQUET_TWICE, "different names"),
        ("x.parquet", b"", "must be a readable Parquet file"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Pairs.open(tmp_path / name)
    assert name in str(caught.value)


def test_missing_and_broken_pictures_are_named(tmp_path):
    (tmp_path / "x.csv").write_text("image,caption\ngone.jpg,a\ntext.jpg,b\ncut.jpg,c\n,d\nsub,e\n", "utf-8")
    (tmp_path / "text.jpg").write_text("no picture", "utf-8")
    (tmp_path / "cut.jpg").write_bytes(jpeg(size=(64, 64))[:-900])
    (tmp_path / "sub").mkdir()
    pairs = Pairs.open(tmp_path)
    for index, name in enumerate(("gone.jpg", "text.jpg", "cut.jpg", "sub")):
        with pytest.raises(ValueError, match=f"{name} must be an? (readable image|file|image that exists)"):
            pairs.image(index)
    for index in (-1, 4):
        with pytest.raises(IndexError, match="There are 4 pairs"):
            pairs.id(index)


def parquet_of(path, groups=2, **columns):
    table = pa.table(columns)
    pq.write_table(table, path, row_group_size=-(-table.num_rows // groups))
    return path


def test_parquet_with_paths(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    captions = pa.array([["x", "y"], ["z"], []])
    path = parquet_of(tmp_path / "x.parquet", image=["a.jpg", "b.jpg", "c.jpg"], captions=captions, label=[1, 2, 1])
    pairs = Pairs.open(path)
    assert [pairs.captions(i) for i in range(3)] == [["x", "y"], ["z"], []]
    assert [pairs.label(i) for i in range(3)] == ["1", "2", "1"]
    assert pairs.image(0).size == (24, 18)


@pytest.mark.parametrize("kind", ["struct", "binary", "large_binary"])
def test_parquet_with_pictures(tmp_path, kind):
    pictures = [jpeg(i) for i in range(7)]
    values = pa.array(pictures, pa.large_binary() if kind == "large_binary" else pa.binary())
    if kind == "struct":
        (tmp_path / "beside.jpg").write_bytes(pictures[6])
        entries = [{"bytes": picture, "path": f"{i}.jpg"} for i, picture in enumerate(pictures)]
        entries[6] = {"bytes": None, "path": "beside.jpg"}
        entries[3] = None
        values = pa.array(entries, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    texts = [f"text {i}" for i in range(7)]
    texts[2] = None
    pairs = Pairs.open(parquet_of(tmp_path / "x.parquet", groups=3, image=values, text=texts))
    numbers = [0, 1, 3, 4, 5, 6]
    assert [pairs.id(i) for i in range(len(pairs))] == [f"x.parquet/{number}" for number in numbers]
    assert [name for name, _ in pairs.left_out] == ["x.parquet/2"]
    for index, number in reversed(list(enumerate(numbers))):
        if kind == "struct" and number == 3:
            with pytest.raises(ValueError, match="A row needs an image"):
                pairs.image(index)
            continue
        expected = np.asarray(Image.open(io.BytesIO(pictures[number])))
        np.testing.assert_array_equal(np.asarray(pairs.image(index)), expected)


def test_class_names_of_hugging_face_files(tmp_path):
    table = pa.table({"image": ["a", "b"], "label": [1, 0]})
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "x.parquet")
    pairs = Pairs.open(tmp_path)
    assert [pairs.label(i) for i in range(2)] == ["dog", "cat"]


def test_only_some_row_groups_are_in_memory(tmp_path, monkeypatch):
    from clipmb.common.data import tables as module

    pictures = [np.random.default_rng(i).bytes(10_000) for i in range(40)]
    path = parquet_of(tmp_path / "x.parquet", groups=10, image=pictures, text=[str(i) for i in range(40)])
    monkeypatch.setattr(module, "_KEPT", 100_000)
    pairs = Pairs.open(path)
    source = pairs._sources[0]
    for index in (5, 39, 6, 0, 20, 12, 4, 38):
        assert source.image(index) == pictures[index]
        assert sum(part.nbytes for part in source._embedded._kept.values()) <= 100_000
    assert len(source._embedded._kept) == 2
    monkeypatch.setattr(module, "_LARGEST_GROUP", 20_000)
    with pytest.raises(ValueError, match="A row group may hold at most 1 GiB"):
        Pairs.open(path)


def test_without_pyarrow_parquet_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "clipmb\[train\]"'):
        Pairs.open(tmp_path)
