"""Pairs on disk and the batches made of them."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import logging
import sys
import tarfile
import threading
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import python

from clipmb import CLIPImageProcessor, CLIPProcessor, CLIPTokenizerFast
from clipmb.common.data.augment import random_part, random_resized_crop
from clipmb.common.data.batches import Batches
from clipmb.common.data.pairs import Pairs

SIZE = (12, 16)
PROCESSOR = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SIZE), CLIPTokenizerFast())
BOS, EOS = 49406, 49407


def jpeg(seed=0, size=(24, 18), form="JPEG", **options):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, form, **options)
    return file.getvalue()


def folder_of(path, count, caption="picture {}", **more):
    """A folder with captions.jsonl and pictures; returns its path."""
    path.mkdir(exist_ok=True)
    lines = []
    for i in range(count):
        (path / f"{i:03d}.jpg").write_bytes(jpeg(i))
        lines.append(json.dumps({"image": f"{i:03d}.jpg", "caption": caption.format(i)} | more))
    (path / "captions.jsonl").write_text("\n".join(lines), "utf-8")
    return path


def tar_of(path, members, form=tarfile.PAX_FORMAT):
    """A .tar file of (name, bytes) or TarInfo members; returns its path."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pair(key, caption, seed=0):
    return [(f"{key}.jpg", jpeg(seed)), (f"{key}.txt", caption.encode())]


def batches(pairs, **options):
    return Batches(pairs, PROCESSOR, **{"batch_size": 4, "context": 77, "seed": 3, "workers": 0} | options)


def assert_same_batches(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.ids == other.ids
        assert one.skipped == other.skipped
        for name in ("input_ids", "pixel_values", "indices"):
            a, b = getattr(one, name), getattr(other, name)
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def ledger_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    return Pairs.open(folder_of(tmp_path_factory.mktemp("ten"), 10))


# ---- tables ----------------------------------------------------------------------------------------------------------


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
        with pytest.raises(ValueError, match=f"{name} must be a readable image"):
            pairs.image(index)
    for index in (-1, 4):
        with pytest.raises(IndexError, match="There are 4 pairs"):
            pairs.id(index)


# ---- Parquet ---------------------------------------------------------------------------------------------------------


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


# ---- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards(tmp_path, form):
    long = "x" * 90 + "/" + "y" * 60 + "/" + "z" * (100 if form != tarfile.USTAR_FORMAT else 20)
    members = [
        *pair("a/000", " one \n", 1),
        ("a/001.PNG", jpeg(2, form="PNG")),
        ("a/001.json", b'{"caption": "two", "label": "cat", "url": "x"}'),
        ("b/000.webp", jpeg(3, form="WEBP", lossless=True)),
        ("b/000.cls", b"7\n"),
        ("b/000.seg.png", b"not used"),
        ("ünï.jpeg", jpeg(4)),
        ("ünï.txt", "vier 🐈".encode()),
        ("ünï.json", b'{"text": ["not", "used"]}'),
        *pair(long, "long", 5),
    ]
    pairs = Pairs.open(tar_of(tmp_path / "s.tar", members, form))
    assert [pairs.id(i) for i in range(len(pairs))] == [
        f"s.tar/{key}" for key in ("a/000", "a/001", "b/000", "ünï", long)
    ]
    assert [pairs.captions(i) for i in range(5)] == [["one"], ["two"], [], ["vier 🐈"], ["long"]]
    assert [pairs.label(i) for i in range(5)] == [None, "cat", "7", None, None]
    for index, content in enumerate(
        (jpeg(1), jpeg(2, form="PNG"), jpeg(3, form="WEBP", lossless=True), jpeg(4), jpeg(5))
    ):
        np.testing.assert_array_equal(np.asarray(pairs.image(index)), np.asarray(Image.open(io.BytesIO(content))))
    assert not pairs.left_out
    assert Pairs.open(tmp_path / "s.tar", caption_column="text").captions(3) == ["not", "used"]


def test_members_that_are_no_pair_are_left_out(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:

        def add(name, content=b"", kind=tarfile.REGTYPE):
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, "0.jpg"
            tar.addfile(info, io.BytesIO(content))

        add("folder", kind=tarfile.DIRTYPE)
        for name, content in pair("./0", "fine"):
            add(name, content)
        add("picture.jpg", jpeg())
        add("text.txt", b"text")
        add("link.jpg", kind=tarfile.LNKTYPE)
        add("link.txt", b"text")
        add("my.photo.jpg", jpeg())
        add(".hidden.jpg", jpeg())
        add("__meta__.json", b"{}")
        add("late.txt", b"late")
        add("twice.jpg", jpeg(1))
        add("twice.png", jpeg(2, form="PNG"))
        add("twice.txt", b"twice")
        add("late.jpg", jpeg(3))
        add("twice.txt", b"again")
    pairs = Pairs.open(path)
    assert [pairs.id(i) for i in range(len(pairs))] == ["s.tar/0", "s.tar/late", "s.tar/twice"]
    assert [pairs.captions(i) for i in range(3)] == [["fine"], ["late"], ["twice"]]
    np.testing.assert_array_equal(np.asarray(pairs.image(2)), np.asarray(Image.open(io.BytesIO(jpeg(1)))))
    reasons = {}
    for name, why in pairs.left_out:
        reasons.setdefault(name.removeprefix("s.tar/"), []).append(why)
    assert reasons == {
        "picture": ["The members of this key hold no text (.txt, .json or .cls)."],
        "text": ["The members of this key hold no image."],
        "link": ["The members of this key hold no image; they hold .jpg (a link or special file)."],
        "my": ["The members of this key hold no image; they hold .photo.jpg."],
        "twice": [f"This key has more than one {kind}; the first is used." for kind in ("image", ".txt")],
    }


def test_members_that_cannot_be_read_are_named(tmp_path):
    members = []
    for key, name, content in [
        ("0", "txt", b"\xff"),
        ("1", "json", b"{"),
        ("2", "json", b"[1]"),
        ("3", "json", b'{"caption": 4}'),
    ]:
        members += [(f"{key}.jpg", b""), (f"{key}.{name}", content)]
    pairs = Pairs.open(tar_of(tmp_path / "s.tar", members))
    for index, message in enumerate(("must be UTF-8", "must be JSON", "must be a JSON object", "must be a text")):
        with pytest.raises(ValueError, match=f"of s.tar/{index} {message}"):
            pairs.captions(index)
        with pytest.raises(ValueError, match=f"s.tar/{index} must be"):
            pairs.image(index)
    whole = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[:512])
    with pytest.raises(ValueError, match="must not change while it is open"):
        pairs.captions(0)


def test_damaged_shards_are_refused(tmp_path):
    path = tar_of(tmp_path / "s.tar", [*pair("0", "a"), *pair("1", "b")])
    whole = path.read_bytes()
    end = whole.rindex(b"1.txt") + 1024
    for size in range(0, end + 511, 100):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"s\.tar must be a (complete )?tar file\. Received: .*shard again"):
            Pairs.open(path)
    path.write_bytes(whole[:end] + bytes(512))
    assert len(Pairs.open(path)) == 2
    second = whole.index(b"0.txt")
    for place in (second, second + 124, second + 148, second + 300):
        path.write_bytes(whole[:place] + b"\x07" + whole[place + 1 :])
        with pytest.raises(ValueError, match=f"a complete tar file. Received: a damaged header at byte {second}"):
            Pairs.open(path)
    path.write_bytes(whole + whole)
    with pytest.raises(ValueError, match=r"end-of-archive block\. Received: data behind byte"):
        Pairs.open(path)
    import gzip

    path.write_bytes(gzip.compress(whole))
    with pytest.raises(ValueError, match="must be an uncompressed tar file"):
        Pairs.open(path)
    path.write_bytes(bytes(10240))
    with pytest.raises(ValueError, match="There must be at least one pair"):
        Pairs.open(path)


SHARD = None


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_to_a_shard_gives_pairs_or_one_error(tmp_path_factory, data):
    global SHARD
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    if SHARD is None:
        names = ["y" * 120, "ü" * 90, "0"]
        SHARD = tar_of(path, [(f"{name}.{kind}", b"content") for name in names for kind in ("jpg", "txt")]).read_bytes()
    content = bytearray(SHARD)
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, len(SHARD) - 1), st.integers(0, 255)), max_size=4)):
        content[place] = value
    del content[data.draw(st.integers(0, len(SHARD))) :]
    path.write_bytes(content)
    with contextlib.suppress(ValueError):  # anything else is a failure
        pairs = Pairs.open(path)
        for i in range(len(pairs)):
            pairs.id(i).encode()
            pairs.captions(i)
            pairs.image(i)


def test_the_index_of_a_shard_is_small(tmp_path):
    count = 4_000
    path = tmp_path / "big.tar"
    with open(path, "wb") as file:
        for i in range(3 * count):
            info = tarfile.TarInfo(f"{i // 3:09d}.{('jpg', 'seg.png', 'txt')[i % 3]}")
            info.size = 10
            file.write(info.tobuf(tarfile.USTAR_FORMAT) + b"0123456789" + bytes(502))
        file.write(bytes(1024))
    tracemalloc.start()
    pairs = Pairs.open(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pairs) == count
    assert kept < 120 * count + 20_000
    assert peak < 200 * count + 100_000


# ---- many files ------------------------------------------------------------------------------------------------------


def test_patterns_folders_and_lists(tmp_path):
    for i in range(3):
        tar_of(tmp_path / f"s-{i:03d}.tar", pair(str(i), "x"))
    (tmp_path / "s-000.parquet").write_bytes(b"what img2dataset writes beside its shards")
    expected = [f"s-{i:03d}.tar/{i}" for i in range(3)]
    for path in (
        tmp_path,
        str(tmp_path / "s-{000..002}.tar"),
        f"{tmp_path}/s-*.tar",
        f"{tmp_path}/*-{{000,001,002}}.t[a]r",
        [tmp_path / "s-000.tar", f"{tmp_path}/s-00[12].tar"],
    ):
        pairs = Pairs.open(path)
        assert [pairs.id(i) for i in range(len(pairs))] == expected, path
    assert Pairs.open(f"{tmp_path}/s-{{2..0}}.tar".replace("s-", "s-00")).id(0) == "s-002.tar/2"
    assert repr(pairs) == "Pairs(3 in s-000.tar, s-001.tar, s-002.tar)"


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tar_of(tmp_path / name / "s.tar", pair("0", name))
        (tmp_path / name / "captions.csv").write_text(f"image,caption\n0.jpg,{name}\n", "utf-8")
    pairs = Pairs.open([f"{tmp_path}/*/s.tar", tmp_path / "a", tmp_path / "b"])
    assert [pairs.id(i) for i in range(4)] == ["a/s.tar/0", "b/s.tar/0", "a/captions.csv/0.jpg", "b/captions.csv/0.jpg"]
    assert [pairs.captions(i) for i in range(4)] == [["a"], ["b"], ["a"], ["b"]]


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("none", FileNotFoundError, "none, which does not exist"),
        ("*.tar", FileNotFoundError, "which matches no file"),
        ("s-{0..2}.tar", FileNotFoundError, r"s-2\.tar \(of .*s-\{0\.\.2\}\.tar\), which does not exist"),
        ("{0..9999999}.tar", ValueError, "at most 1000000 files"),
        ("{0..999}{0..999}{0..9}.tar", ValueError, "at most 1000000 files"),
        ("x.tar.gz", ValueError, "Expected a .csv, .tsv, .jsonl, .parquet, .json, .token or uncompressed .tar file"),
        ("two", ValueError, "A folder must hold one table. Received: captions.csv, metadata.jsonl"),
        ("empty", FileNotFoundError, "A folder of pairs must hold a table .* Received: no files"),
    ],
)
def test_paths_that_name_no_pairs(tmp_path, path, kind, message):
    for i in range(2):
        tar_of(tmp_path / f"s-{i}.tar", pair("0", "x"))
    (tmp_path / "x.tar.gz").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "captions.csv").touch()
    (tmp_path / "two" / "metadata.jsonl").touch()
    path = path if path != "*.tar" else "empty/*.tar"
    with pytest.raises(kind, match=message):
        Pairs.open(f"{tmp_path}/{path}")


def test_a_file_is_given_once_and_by_a_path(tmp_path):
    path = tar_of(tmp_path / "s.tar", pair("0", "x"))
    with pytest.raises(ValueError, match="A file may be given only once"):
        Pairs.open([path, f"{tmp_path}/*.tar"])
    for wrong in ([3], 3, "", [""], None, b"s.tar"):
        with pytest.raises(TypeError, match="Files of pairs must be given as paths"):
            Pairs.open(wrong)
    with pytest.raises(ValueError, match="at least one file"):
        Pairs.open([])


def test_the_fingerprint_changes_with_the_pairs_only(tmp_path):
    prints = set()

    def add(new=True):
        before = len(prints)
        prints.add(Pairs.open(tmp_path / "d").fingerprint)
        assert len(prints) == before + new

    folder_of(tmp_path / "d", 3)
    add()
    table = tmp_path / "d" / "captions.jsonl"
    lines = table.read_text("utf-8")
    table.write_text(lines.replace("picture 1", "picture 7"), "utf-8")
    add()
    table.write_text(lines.replace("002.jpg", "012.jpg"), "utf-8")
    add()
    table.write_text("\n".join(lines.splitlines()[::-1]), "utf-8")
    add()
    table.write_text("\n".join(lines.splitlines()[:2]), "utf-8")
    add()
    table.write_text(lines.replace('"}', '", "label": "x"}'), "utf-8")
    add()
    table.write_text(lines, "utf-8")
    add(new=False)
    (tmp_path / "d").rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "d")
    assert Pairs.open([table]).fingerprint in prints
    table.unlink()
    for members in ([*pair("0", "a"), *pair("1", "b")], [*pair("0", "a")], [*pair("0", "aa")], [*pair("1", "a")]):
        tar_of(tmp_path / "d" / "s.tar", members)
        add()
    (tmp_path / "d" / "s.tar").rename(tmp_path / "d" / "t.tar")
    add()


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_holds_what_the_processor_makes(ten):
    loader = batches(ten, shuffle=False, batch_size=3)
    assert loader.per_epoch == 4
    seen = []
    for batch in loader.epoch(0):
        texts = [ten.captions(i)[0] for i in batch.indices]
        expected = PROCESSOR(texts, [ten.image(i) for i in batch.indices], padding=True, return_tensors="np")
        np.testing.assert_array_equal(batch.pixel_values, expected["pixel_values"])
        np.testing.assert_array_equal(batch.input_ids[:, : expected["input_ids"].shape[1]], expected["input_ids"])
        assert batch.input_ids.shape == (len(batch.ids), 8)
        assert batch.pixel_values.dtype == np.float32
        assert batch.input_ids.dtype == batch.indices.dtype == np.int64
        assert batch.ids == [ten.id(i) for i in batch.indices]
        assert (batch.skipped, batch.truncated) == (0, 0)
        seen += batch.ids
    assert seen == [ten.id(i) for i in range(10)]
    assert len(batch.ids) == 1


def test_every_epoch_has_each_pair_once_in_an_order_of_its_own(ten):
    loader = batches(ten)
    orders = [np.concatenate([batch.indices for batch in loader.epoch(epoch)]) for epoch in (0, 1)]
    orders += [np.concatenate([batch.indices for batch in batches(ten, seed=4).epoch(0)])]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(10))
    for first, second in itertools.combinations(orders, 2):
        assert not np.array_equal(first, second)
    np.testing.assert_array_equal(orders[0], loader.order(0))


def philox(key, counter, count):
    """Random 64-bit numbers, written from the paper's definition of Philox4x64-10; numpy counts before each block."""
    numbers = []
    while len(numbers) < count:
        counter = [counter[0] + 1, *counter[1:]]
        x, (k0, k1) = list(counter), key
        for _ in range(10):
            a, b = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
            x = [(b >> 64) ^ x[1] ^ k0, b % 2**64, (a >> 64) ^ x[3] ^ k1, a % 2**64]
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) % 2**64, (k1 + 0xBB67AE8584CAA73B) % 2**64
        numbers += x
    return numbers[:count]


class Many:
    """Pairs of which only the number is asked."""

    left_out = ()

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (1, 0), (2**63 - 1, 5), (5, 2**63 - 1)])
def test_the_order_is_the_same_for_good(seed, epoch):
    """It may never change, whatever numpy does: a run that was stopped could not be continued."""
    drawn = philox((seed, epoch), (0, 0, 0, 0), 1001)
    assert batches(Many(1001), seed=seed).order(epoch).tolist() == sorted(range(1001), key=drawn.__getitem__)


@pytest.mark.parametrize("augment", [None, "crop"])
def test_workers_change_nothing(ten, augment):
    expected = list(batches(ten, augment=augment, workers=0).epoch(1))
    for workers in (1, 4):
        assert_same_batches(batches(ten, augment=augment, workers=workers).epoch(1), expected)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_processes_share_a_batch(tmp_path, count):
    folder_of(tmp_path, 11)
    (tmp_path / "004.jpg").unlink()
    pairs = Pairs.open(tmp_path)
    whole = list(batches(pairs, augment="crop").epoch(2))
    parts = [list(batches(pairs, augment="crop", rank=rank, count=count).epoch(2)) for rank in range(count)]
    for batch, *own in zip(whole, *parts, strict=True):
        assert [name for part in own for name in part.ids] == batch.ids
        np.testing.assert_array_equal(np.concatenate([part.pixel_values for part in own]), batch.pixel_values)
        for part, rows in zip(
            own, np.split(batch.input_ids, np.cumsum([len(part.ids) for part in own])[:-1]), strict=True
        ):
            np.testing.assert_array_equal(part.input_ids, rows[:, : part.input_ids.shape[1]])
        sizes = [len(part.ids) + part.skipped for part in own]
        assert max(sizes) - min(sizes) <= 1
        assert sum(part.skipped for part in own) == batch.skipped


@pytest.mark.parametrize("workers", [0, 3])
def test_an_epoch_can_start_in_its_middle(ten, workers):
    loader = batches(ten, workers=workers, augment="crop")
    whole = list(loader.epoch(5))
    for start in range(4):
        assert_same_batches(loader.epoch(5, start=start), whole[start:])


def test_what_was_passed_over_is_not_decoded(ten, monkeypatch):
    asked = []
    image = Pairs.image
    monkeypatch.setattr(Pairs, "image", lambda self, index: asked.append(index) or image(self, index))
    loader = batches(ten)
    list(loader.epoch(0, start=2))
    assert asked == loader.order(0)[8:].tolist()


def test_drop_last(ten):
    loader = batches(ten, drop_last=True)
    assert loader.per_epoch == 2
    assert [len(batch.ids) for batch in loader.epoch(0)] == [4, 4]
    assert batches(ten, drop_last=True, batch_size=5).per_epoch == 2


def test_one_of_several_captions_is_drawn_for_each_epoch(tmp_path):
    lines = [json.dumps({"image": f"{i}.jpg", "caption": [f"{i} {word}" for word in "abc"]}) for i in range(30)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines), "utf-8")
    for i in range(30):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    pairs = Pairs.open(tmp_path)

    def chosen(epoch, **options):
        found = {}
        for batch in batches(pairs, **options).epoch(epoch):
            for index, ids in zip(batch.indices.tolist(), batch.input_ids, strict=True):
                found[index] = PROCESSOR.tokenizer.decode(ids, skip_special_tokens=True).split()[-1]
        return [found[i] for i in range(30)]

    first = chosen(0)
    assert set(first) == {"a", "b", "c"}
    assert first == chosen(0, batch_size=7, workers=2) == chosen(0, shuffle=False)
    assert first == ["abc"[philox((3, 0), (0, 0, i, 1), 1)[0] % 3] for i in range(30)]
    assert first != chosen(1)
    assert first != chosen(0, seed=9)


@pytest.mark.parametrize(("pad_to", "seq"), [(None, 20), (20, 20), (10, 10)])
def test_long_captions_are_cut_and_counted(tmp_path, caplog, pad_to, seq):
    folder_of(tmp_path, 3, caption="word " * 30 + "{}")
    lines = (tmp_path / "captions.jsonl").read_text("utf-8").splitlines()
    lines[1] = json.dumps({"image": "001.jpg", "caption": "short"})
    (tmp_path / "captions.jsonl").write_text("\n".join(lines), "utf-8")
    loader = batches(Pairs.open(tmp_path), context=20, pad_to=pad_to, shuffle=False)
    for _ in range(2):
        (batch,) = loader.epoch(0)
        assert batch.input_ids.shape == (3, seq)
        assert batch.truncated == 2
        assert batch.input_ids[0, 0] == BOS
        np.testing.assert_array_equal(batch.input_ids[[0, 2], -1], EOS)
        assert EOS not in batch.input_ids[0, :-1]
        assert batch.input_ids[1].tolist() == [BOS, *batch.input_ids[1, 1:2], *[EOS] * (seq - 2)]
    assert caplog.text.count("are cut; the first belongs to 000.jpg and has 33") == 1


def test_an_end_token_inside_a_caption_is_text(tmp_path):
    folder_of(tmp_path, 1, caption="a <|endoftext|> b")
    (batch,) = batches(Pairs.open(tmp_path)).epoch(0)
    ids = batch.input_ids[0].tolist()
    end = ids.index(EOS)
    assert set(ids[end:]) == {EOS}
    assert ids[1:end] == PROCESSOR.tokenizer("a <|endoftext|> b", split_special_tokens=True)["input_ids"][1:-1]


def test_padding_never_looks_like_a_later_end(ten):
    tokenizer = CLIPTokenizerFast(pad_token="<|padding|>")
    assert tokenizer.pad_token_id > EOS
    loader = Batches(ten, CLIPProcessor(PROCESSOR.image_processor, tokenizer), batch_size=4, context=77, workers=0)
    batch = next(loader.epoch(0))
    np.testing.assert_array_equal(batch.input_ids.max(axis=1), EOS)
    tokenizer = CLIPTokenizerFast(pad_token="!")
    loader = Batches(ten, CLIPProcessor(PROCESSOR.image_processor, tokenizer), batch_size=4, context=77, workers=0)
    assert next(loader.epoch(0)).input_ids[0, -1] == 0


# ---- broken items ----------------------------------------------------------------------------------------------------


@pytest.fixture
def partly(tmp_path):
    """Ten pairs of which three are broken, and one line that is none."""
    folder_of(tmp_path, 10)
    (tmp_path / "002.jpg").write_bytes(jpeg(size=(64, 64))[:-2000])
    (tmp_path / "003.jpg").write_text("text", "utf-8")
    (tmp_path / "007.jpg").unlink()
    with open(tmp_path / "captions.jsonl", "a", encoding="utf-8") as file:
        file.write("\n{}")
    return Pairs.open(tmp_path)


@pytest.mark.parametrize("workers", [0, 4])
def test_broken_items_go_into_the_ledger(partly, tmp_path, workers):
    ledger = tmp_path / "out" / "ledger.jsonl"
    loader = batches(partly, ledger=ledger, workers=workers)
    whole = list(loader.epoch(0))
    assert sum(batch.skipped for batch in whole) == 3
    assert sorted(name for batch in whole for name in batch.ids) == [f"{i:03d}.jpg" for i in (0, 1, 4, 5, 6, 8, 9)]
    assert all(
        len(batch.ids) == len(batch.pixel_values) == len(batch.input_ids) == len(batch.indices) for batch in whole
    )
    entries = ledger_of(ledger)
    order = loader.order(0).tolist()
    assert entries[0] == {"id": "captions.jsonl:11", "error": partly.left_out[0][1], "epoch": None, "batch": None}
    assert sorted((entry["id"], entry["batch"]) for entry in entries[1:]) == [
        (f"{i:03d}.jpg", order.index(i) // 4) for i in (2, 3, 7)
    ]
    errors = {entry["id"]: entry["error"] for entry in entries}
    assert "truncated" in errors["002.jpg"]
    assert "cannot identify" in errors["003.jpg"]
    assert "FileNotFoundError" in errors["007.jpg"]
    assert all(entry["epoch"] == 0 for entry in entries[1:])
    list(loader.epoch(1))
    assert [entry["epoch"] for entry in ledger_of(ledger)] == [None, 0, 0, 0, 1, 1, 1]


def test_a_run_that_goes_on_repeats_nothing_in_the_ledger(partly, tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    list(batches(partly, ledger=ledger).epoch(0))
    content = ledger.read_bytes()
    list(batches(partly, ledger=ledger).epoch(0))
    assert ledger.read_bytes() == content
    for cut in (1, 2, 30, len(content.splitlines()[-1]) - 1):
        ledger.write_bytes(content[:-cut])
        list(batches(partly, ledger=ledger).epoch(0))
        lines = ledger.read_bytes().splitlines()
        assert lines[-1] + b"\n" == content.splitlines(keepends=True)[-1]
        assert len(lines) == (4 if cut == 1 else 5), cut


def test_without_a_ledger_broken_items_are_logged(partly, caplog):
    list(batches(partly).epoch(0))
    assert caplog.text.count("is broken and left out") == 3
    assert "003.jpg is broken and left out: 003.jpg must be a readable image" in caplog.text


def test_pairs_without_captions_are_broken(tmp_path):
    (tmp_path / "x.csv").write_text("image,caption,label\na.jpg,,cat\nb.jpg,text,dog\nc.jpg,text,dog\n", "utf-8")
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(jpeg())
    ledger = tmp_path / "ledger.jsonl"
    (batch,) = batches(Pairs.open(tmp_path), ledger=ledger).epoch(0)
    assert sorted(batch.ids) == ["b.jpg", "c.jpg"]
    assert ledger_of(ledger)[0]["error"].startswith("A pair needs a caption")


def test_half_a_character_is_broken(tmp_path):
    folder_of(tmp_path, 3)
    with open(tmp_path / "captions.jsonl", "a", encoding="utf-8") as file:
        file.write('\n{"image": "000.jpg", "label": "x", "caption": "\\ud83d"}')
    pairs = Pairs.open(tmp_path)
    (batch,) = batches(pairs, ledger=tmp_path / "ledger.jsonl").epoch(0)
    assert batch.skipped == 1
    assert "surrogate" in ledger_of(tmp_path / "ledger.jsonl")[0]["error"]


@pytest.mark.parametrize("workers", [0, 3])
def test_too_many_broken_items_are_an_error(tmp_path, workers):
    folder_of(tmp_path, 10)
    for i in range(5):
        (tmp_path / f"{i:03d}.jpg").unlink()
    pairs = Pairs.open(tmp_path)
    assert sum(batch.skipped for batch in batches(pairs, workers=workers, batch_size=2).epoch(0)) == 5
    (tmp_path / "005.jpg").unlink()
    with pytest.raises(ValueError, match=r"At most half of the items may be broken\. Received: 6 of 10 are; .*\.jpg"):
        list(batches(pairs, workers=workers, batch_size=2).epoch(0))
    order = batches(pairs).order(0).tolist()
    start = next(k for k in range(5) if set(order[: 2 * k]) & set(range(6)))
    list(batches(pairs, workers=workers, batch_size=2).epoch(0, start=start))  # it cannot know of those before


def test_too_many_broken_items_in_a_row_are_an_error(tmp_path, monkeypatch):
    from clipmb.common.data import ledger

    monkeypatch.setattr(ledger, "_WINDOW", 10)
    folder_of(tmp_path, 30)
    for i in (0, 1, 12, 13, 20, 21):
        (tmp_path / f"{i:03d}.jpg").unlink()
    assert sum(b.skipped for b in batches(Pairs.open(tmp_path), shuffle=False).epoch(0)) == 6  # not in a row
    for i in range(22, 26):
        (tmp_path / f"{i:03d}.jpg").unlink()
    loader = batches(Pairs.open(tmp_path), shuffle=False, batch_size=3)
    taken = []
    with pytest.raises(ValueError, match="6 of 10 are"):
        taken.extend(batch.skipped for batch in loader.epoch(0))
    assert taken == [2, 0, 0, 0, 2, 0, 1, 3]


def test_files_that_hold_mostly_something_else_are_refused(tmp_path):
    members = [*pair("0", "fine"), ("1.jpg", b""), ("2.jpg", b"")]
    pairs = Pairs.open(tar_of(tmp_path / "s.tar", members))
    with pytest.raises(ValueError, match=r"Most items of the files.*1 pairs and 2 unusable items; s\.tar/1"):
        batches(pairs)


# ---- augmentation ----------------------------------------------------------------------------------------------------


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


# ---- threads ---------------------------------------------------------------------------------------------------------


def running():
    return [thread for thread in threading.enumerate() if thread.name.startswith("clipmb-data")]


def test_closing_early_stops_the_threads(ten):
    iterator = batches(ten, workers=3, batch_size=1).epoch(0)
    next(iterator)
    assert running()
    iterator.close()
    assert not running()
    for _ in batches(ten, workers=3, batch_size=1).epoch(0):
        break
    assert not running()


def test_errors_in_a_worker_come_out_and_stop_the_threads(ten, monkeypatch):
    def fail(self, index):
        raise MemoryError("worker")

    monkeypatch.setattr(Pairs, "image", fail)
    with pytest.raises(MemoryError, match="worker"):
        list(batches(ten, workers=3).epoch(0))
    assert not running()


def test_only_some_batches_are_decoded_ahead(tmp_path, monkeypatch):
    pairs = Pairs.open(folder_of(tmp_path, 40))
    asked = []
    image = Pairs.image
    monkeypatch.setattr(Pairs, "image", lambda self, index: asked.append(index) or image(self, index))
    iterator = batches(pairs, workers=2, batch_size=5).epoch(0)
    assert not asked
    for taken in range(1, 4):
        next(iterator)
        wait = threading.Event()
        for _ in range(100):
            if len(asked) >= 5 * (taken + 2):
                break
            wait.wait(0.02)
        wait.wait(0.05)
        assert len(asked) == 5 * (taken + 2)
    iterator.close()


def test_an_interrupt_ends_the_process(tmp_path):
    folder_of(tmp_path, 30)
    script = """
import signal, sys, threading, time
from clipmb import CLIPProcessor
from clipmb.common.data.batches import Batches
from clipmb.common.data.pairs import Pairs
pairs = Pairs.open(sys.argv[1])
slow = lambda image, generator: time.sleep(0.05) or image
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process started in the background lacks
threading.Timer(0.4, signal.raise_signal, [signal.SIGINT]).start()
try:
    for batch in Batches(pairs, CLIPProcessor(), batch_size=30, context=77, workers=2, augment=slow).epoch(0):
        pass
except KeyboardInterrupt:
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("clipmb-data")]
    print("interrupted", names)
"""
    done = python("-c", script, tmp_path)
    assert done.stdout.strip() == "interrupted []", done.stderr


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"batch_size": 2.0}, "batch_size must be a whole number"),
        ({"context": 1}, "context must be a whole number of at least 2"),
        ({"seed": -1}, "seed must be a whole number from 0 to"),
        ({"seed": 2**63}, "seed must be a whole number from 0 to"),
        ({"rank": 2, "count": 2}, "rank must be a whole number from 0 to 1"),
        ({"count": 0}, "count must be a whole number of at least 1"),
        ({"workers": -1}, "workers must be a whole number from 0"),
        ({"pad_to": 78}, "pad_to must be a whole number from 2 to 77"),
        ({"augment": "crops"}, "augment must be None, 'crop', or a function"),
        ({"batch_size": 11, "drop_last": True}, "at least one full batch. Received: 10 pairs, batch_size 11"),
    ],
)
def test_wrong_arguments(ten, options, message):
    with pytest.raises(ValueError, match=message):
        batches(ten, **options)


def test_wrong_epochs_are_refused_before_anything_is_read(ten):
    for epoch, start in ((-1, 0), (0, -1), (0, 4), (2**63, 0)):
        with pytest.raises(ValueError, match="must be a whole number"):
            batches(ten).epoch(epoch, start)
    assert list(batches(ten).epoch(0, 3)) == []


def test_the_processor_must_give_one_size(ten):
    for options in ({"do_center_crop": False}, {"do_center_crop": False, "do_resize": False}):
        with pytest.raises(ValueError, match="must resize all images to one size"):
            Batches(ten, CLIPProcessor(CLIPImageProcessor(**options)), batch_size=2, context=77)
    squashed = CLIPImageProcessor(size={"height": 6, "width": 4}, do_center_crop=False)
    for augment in (None, "crop"):
        loader = Batches(ten, CLIPProcessor(squashed), batch_size=2, context=77, workers=0, augment=augment)
        assert next(loader.epoch(0)).pixel_values.shape == (2, 3, 6, 4)


def test_nothing_is_printed_or_warned(ten, caplog, capsys):
    caplog.set_level(logging.INFO)
    list(batches(ten, workers=2).epoch(0))
    assert capsys.readouterr() == ("", "")
    assert not caplog.records
