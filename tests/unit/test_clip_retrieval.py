"""The layout of clip-retrieval: read as clip-retrieval and autofaiss do, complete at any moment."""

from __future__ import annotations

import errno
import json
import os
import sys

import numpy as np
import pyarrow.parquet as parquet
import pytest
from conftest import TESTS
from data_cases import jpeg
from embedding_cases import collection, pipeline
from processes import excerpt, invoke, python

from clipmb import Index, embed

OPTIONS = {"batch_size": 6, "shard_size": 7, "workers": 1}


def read(folder):
    """Embeddings by folder, and the metadata, as clip-retrieval's index and back do: all files, in their order."""
    vectors = {
        name: np.concatenate([np.load(path) for path in sorted((folder / name).glob("*.npy"))])
        for name in ("img_emb", "text_emb") if (folder / name).is_dir()
    }  # fmt: skip
    paths = sorted((folder / "metadata").glob("*.parquet"))
    return vectors, [row for path in paths for row in parquet.read_table(path).to_pylist()]


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_rows_are_images_with_each_of_their_captions(tmp_path, stored, caplog):
    data = collection(tmp_path / "pictures", count=20)
    done = embed(data, tmp_path / "out", model=pipeline(), stored=stored, layout="clip-retrieval", **OPTIONS)
    vectors, rows = read(tmp_path / "out" / "clip-retrieval")
    captions = [(f"{i:03d}.jpg", text) for i in range(20) for text in (f"caption {i}", f"another of {i}")[: i % 3]]
    assert [(row["id"], row["caption"]) for row in rows] == captions
    assert [row["image_path"] for row in rows] == [str(data.parent / row["id"]) for row in rows]
    assert [row["width"] for row in rows] == [20 + int(row["id"][:3]) for row in rows]
    index = Index.open(tmp_path / "out")
    known = {kind: index.table(kind).to_pylist() for kind in ("images", "texts")}
    for name, kind, key in (("img_emb", "images", "id"), ("text_emb", "texts", "caption")):
        place = {row[key]: i for i, row in enumerate(known[kind])}
        assert vectors[name].dtype == stored
        np.testing.assert_array_equal(vectors[name], index.vectors(kind)[[place[row[key]] for row in rows]])
    assert (done["images"], len({row["id"] for row in rows})) == (20, 13)
    assert "7 images and 2 texts are left out" in caplog.text


def test_images_alone_and_texts_alone(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(9):
        (tmp_path / "pictures" / f"{i}.jpg").write_bytes(jpeg(i))
    (tmp_path / "lines.txt").write_text("one\ntwo\n", "utf-8")
    for source, kind, name in (("pictures", "images", "img_emb"), ("lines.txt", "texts", "text_emb")):
        out = tmp_path / kind
        embed(tmp_path / source, out, model=pipeline(), layout="clip-retrieval", **OPTIONS)
        vectors, rows = read(out / "clip-retrieval")
        assert list(vectors) == [name]
        np.testing.assert_array_equal(vectors[name], Index.open(out).vectors(kind))
        assert [row["id"] for row in rows] == Index.open(out).table(kind).column("id").to_pylist()
        assert ("caption" in rows[0], "image_path" in rows[0]) == (kind == "texts", kind == "images")
    with pytest.raises(ValueError, match="no image has one of the texts as its caption"):
        embed(
            tmp_path / "lines.txt",
            tmp_path / "images",
            model=pipeline(),
            append=True,
            layout="clip-retrieval",
            **OPTIONS,
        )


def test_the_layout_is_written_anew(tmp_path):
    data = collection(tmp_path / "pictures")
    out = tmp_path / "out"
    embed(data, out, model=pipeline(), **OPTIONS)
    embed(data, out, model=pipeline(), resume=True, layout="clip-retrieval", **OPTIONS)
    before = len(read(out / "clip-retrieval")[1])
    more = collection(tmp_path / "more", count=15)
    embed(more, out, model=pipeline(), append=True, layout="clip-retrieval", **OPTIONS)
    vectors, rows = read(out / "clip-retrieval")
    assert len(rows) == before + 15
    assert len(vectors["img_emb"]) == len(vectors["text_emb"]) == len(rows)
    assert sorted(path.name for path in (out / "clip-retrieval").iterdir()) == ["img_emb", "metadata", "text_emb"]
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(ValueError, match="layout must be one of"):
        embed(data, tmp_path / "other", model=pipeline(), layout="webdataset", **OPTIONS)


KILLED = """
import sys
from pathlib import Path
from kills import at_every_operation
from embedding_cases import pipeline
from clipmb import Pairs, embed
pairs, model = Pairs.open(sys.argv[2], partial=True), pipeline()
options = {"model": model, "batch_size": 6, "shard_size": 7, "workers": 1, "resume": True}
prepare = lambda path: embed(pairs, path, layout="clip-retrieval", **options)
prepare(Path(sys.argv[1]) / "warm")
at_every_operation(Path(sys.argv[1]), prepare, lambda path: embed(pairs, path, layout="clip-retrieval", **options))
"""


def test_a_layout_is_whole_or_is_not_there(tmp_path):
    data = collection(tmp_path / "pictures")
    done = python("-c", KILLED, tmp_path, data, PYTHONPATH=os.pathsep.join([str(TESTS), *sys.path]))
    assert done.returncode == 0, excerpt(done.stderr)
    expected = read(tmp_path / "warm" / "clip-retrieval")
    missing = 0
    for k in range(2, int(done.stdout) + 1):
        folder = tmp_path / str(k)
        if (folder / "clip-retrieval").is_dir():
            found = read(folder / "clip-retrieval")
            assert found[1] == expected[1], k
            for name, values in expected[0].items():
                np.testing.assert_array_equal(found[0][name], values)
        else:
            missing += 1
    assert 1 <= missing <= 3
    embed(data, tmp_path / "2", model=pipeline(), resume=True, **OPTIONS)
    assert [path.name for path in (tmp_path / "2").iterdir() if path.name.startswith(".")] == []


FULL = """
import resource, signal, sys
from pathlib import Path
from clipmb.embedding import clip_retrieval
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))  # what is written beyond fails, as on a full disk
try:
    clip_retrieval.write(Path(sys.argv[1]))
except OSError as error:
    print(error.errno == __import__("errno").EFBIG)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk_is_an_error_and_no_crash(tmp_path):
    """A write into mapped memory for which there is no room would end the process."""
    data = collection(tmp_path / "pictures")
    embed(data, tmp_path / "out", model=pipeline(), **OPTIONS)
    done = python("-c", FULL, tmp_path / "out", PYTHONPATH=os.pathsep.join(sys.path))
    assert (done.returncode, done.stdout.strip()) == (0, "True"), excerpt(done.stderr)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith((".", "clip"))] == []


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    data = collection(tmp_path / "pictures")
    monkeypatch.setattr("clipmb.embedding.store.write_atomically", full)
    with pytest.raises(OSError, match=r"room on the disk\. Received: .*out, which is full\. Free some, and go on"):
        embed(data, tmp_path / "out", model=pipeline(), **OPTIONS)


def test_errors_alone_have_no_layout(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    with pytest.raises(ValueError, match="needs an image or a text"):
        embed(tmp_path / "broken.jpg", tmp_path / "out", model=pipeline(), layout="clip-retrieval", **OPTIONS)
    assert parquet.read_table(tmp_path / "out" / "errors.parquet").num_rows == 1


def test_the_option(tmp_path):
    (tmp_path / "lines.txt").write_text("one\ntwo\n", "utf-8")
    arguments = ["embed", tmp_path / "lines.txt", "--out", tmp_path / "out", "--layout", "clip-retrieval", "--json"]
    assert json.loads(invoke(*arguments).stdout)["texts"] == 2
    assert read(tmp_path / "out" / "clip-retrieval")[0]["text_emb"].shape[0] == 2
    assert invoke(*arguments[:-2], "other").exit_code == 2
