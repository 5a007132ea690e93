"""WebDataset shards."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import tracemalloc

import numpy as np
import pytest
from data_cases import jpeg, pair, tar_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipmb.common.data.pairs import Pairs
from clipmb.common.data.shards import Shard
from clipmb.common.data.tables import Columns


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


def test_a_pipe_is_refused_at_once(tmp_path):
    """Opening it would wait for a writer."""
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="A shard must be a file"):
        Shard(tmp_path / "a.tar", "a", Columns())
    for where in (tmp_path, tmp_path / "a.tar", tmp_path / "*.tar"):
        with pytest.raises((ValueError, FileNotFoundError), match=r"Expected a \.csv|must hold a table"):
            Pairs.open(where)
