"""Embeddings on disk: nothing lost, the same rows after every kill, exact search, and no mixing of models."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import sys
import tracemalloc

import numpy as np
import pytest
from cases import VISION, write_checkpoint
from conftest import ENGINES, TESTS
from data_cases import jpeg
from embedding_cases import BROKEN, CONFIG, collection, pipeline
from processes import excerpt, invoke, python

import clipmb
from clipmb import CheckpointError, CLIPConfig, CLIPPipeline, Index, Pairs, embed
from clipmb.common.saving import locked, stamps
from clipmb.embedding import store
from clipmb.embedding.index import nearest
from clipmb.embedding.passport import weights_digest
from clipmb.embedding.store import Rows, write_shard

TEXT = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1, "num_attention_heads": 4}
MODEL = CLIPConfig({**TEXT, "max_position_embeddings": 16}, VISION, projection_dim=24)
parquet = pytest.importorskip("pyarrow.parquet")
SOURCE = 11  # good images of the collection
OPTIONS = {"batch_size": 6, "shard_size": 5, "workers": 2}


def rows_of(folder):
    """All rows of a folder: kind to list, in the order of the shards; and the errors."""
    found = {kind: [] for kind in ("images", "texts")}
    for kind, rows in found.items():
        for path in sorted(folder.glob(f"{kind}-*.parquet")):
            rows += parquet.read_table(path).to_pylist()
    return found, parquet.read_table(folder / "errors.parquet").to_pylist()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return collection(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def embedded(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded") / "out"
    return folder, embed(data, folder, model=pipeline(), **OPTIONS)


def test_every_input_is_a_row_or_an_error(data, embedded):
    folder, done = embedded
    rows, errors = rows_of(folder)
    assert [row["id"] for row in rows["images"]] == [f"{i:03d}.jpg" for i in range(SOURCE)]
    captions = [text for i in range(SOURCE) for text in (f"caption {i}", f"another of {i}")[: i % 3]]
    assert [row["caption"] for row in rows["texts"]][:-2] == captions
    assert {error["id"]: error["kind"] for error in errors} == {
        **dict.fromkeys([*BROKEN, "missing.jpg"], "image"), "captions.jsonl:20": "item",
    }  # fmt: skip
    assert all(error["reason"] for error in errors)
    items = SOURCE + len(BROKEN) + 3
    counts = {"items": items, "images": SOURCE, "texts": len(captions) + 2, "errors": len(BROKEN) + 2}
    assert {name: done[name] for name in counts} == counts
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {name: manifest["sources"][0][name] for name in counts} == counts
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_embeddings_are_those_of_the_pipeline(data, embedded):
    rows, _ = rows_of(embedded[0])
    model = pipeline()
    paths = [str(data.parent / row["id"]) for row in rows["images"]]
    assert [row["path"] for row in rows["images"]] == paths
    np.testing.assert_array_equal([row["embedding"] for row in rows["images"]], model.encode_image(paths))
    texts = model.encode_text([row["caption"] for row in rows["texts"]], long_text="truncate")
    np.testing.assert_allclose([row["embedding"] for row in rows["texts"]], texts, rtol=0, atol=1e-6)


def test_other_columns_are_kept_with_their_types(embedded):
    rows, _ = rows_of(embedded[0])
    assert [row["width"] for row in rows["images"]] == [20 + i for i in range(SOURCE)]
    assert [json.loads(row["tags"]) for row in rows["images"]] == [["a", i] for i in range(SOURCE)]
    schema = parquet.read_schema(embedded[0] / "images-00000.parquet")
    assert str(schema.field("embedding").type) == "fixed_size_list<element: float>[6]"
    assert json.loads(schema.metadata[b"clipmb"]) == Index.open(embedded[0]).passport


@pytest.mark.parametrize("stored", ["float32", "float16"])
@pytest.mark.parametrize("normalize", [True, False])
def test_numbers_in_the_files(data, tmp_path, stored, normalize):
    embed(data, tmp_path / "out", model=pipeline(), stored=stored, normalize=normalize, **OPTIONS)
    rows, _ = rows_of(tmp_path / "out")
    expected = pipeline().encode_image([row["path"] for row in rows["images"]], normalize=normalize).astype(stored)
    found = Index.open(tmp_path / "out", model=pipeline())
    assert found.vectors().dtype == stored
    np.testing.assert_array_equal(found.vectors(), expected)


def test_embeddings_that_cannot_be_used_are_errors(data, tmp_path):
    done = embed(data, tmp_path / "out", model=pipeline(float("inf")), **OPTIONS)
    assert (done["images"], done["texts"], done["errors"]) == (0, 0, SOURCE + 11 + 1 + len(BROKEN) + 2)
    assert "is not finite" in rows_of(tmp_path / "out")[1][-1]["reason"]


KILLED = """
import sys
from pathlib import Path
from kills import at_every_operation
from embedding_cases import pipeline
from clipmb import Pairs, embed
pairs, model = Pairs.open(sys.argv[2], partial=True), pipeline()
options = {"model": model, "batch_size": 6, "shard_size": 5, "workers": 1}
embed(pairs, Path(sys.argv[1]) / "warm", **options)
at_every_operation(Path(sys.argv[1]), lambda path: None, lambda path: embed(pairs, path, resume=True, **options))
"""


def test_a_job_killed_at_any_moment_goes_on(data, embedded, tmp_path):
    done = python("-c", KILLED, tmp_path, data, PYTHONPATH=os.pathsep.join([str(TESTS), *sys.path]))
    assert done.returncode == 0, excerpt(done.stderr)
    last = int(done.stdout)
    assert last > 30
    expected = rows_of(embedded[0])
    pairs, model = Pairs.open(data, partial=True), pipeline()
    embed(pairs, tmp_path / "whole", model=model, **OPTIONS)
    calls = model.engine.calls
    unfinished = remembered = 0
    for k in range(1, last + 1):
        folder = tmp_path / str(k)
        manifest = folder / "manifest.json"
        unfinished += not manifest.is_file() or json.loads(manifest.read_text())["pending"] is not None
        kept = {json.loads(path.read_text())["images"] for path in folder.glob(".clipmb-embed/*.json")}
        model.engine.calls = 0
        embed(pairs, folder, model=model, resume=True, **OPTIONS)
        assert rows_of(folder) == expected, k
        assert model.engine.calls <= calls - len(kept - {0})
        remembered += bool(kept - {0})
        assert [path.name for path in folder.glob("*.parquet.*")] == []
    assert unfinished > 20
    assert remembered > 10


def test_another_source_is_appended(data, embedded, tmp_path):
    (tmp_path / "texts.txt").write_text("one\ntwo\n", "utf-8")
    folder = tmp_path / "out"
    with pytest.raises(ValueError, match="append needs a folder with embeddings"):
        embed(data, folder, model=pipeline(), append=True, **OPTIONS)
    embed(data, folder, model=pipeline(), **OPTIONS)
    done = embed(tmp_path / "texts.txt", folder, model=pipeline(), append=True, **OPTIONS)
    assert (done["items"], done["texts"], done["errors"]) == (2, 2, 0)
    rows, errors = rows_of(folder)
    before, earlier = rows_of(embedded[0])
    assert rows["images"] == before["images"]
    assert rows["texts"][:-2] == before["texts"]
    assert [row["caption"] for row in rows["texts"][-2:]] == ["one", "two"]
    assert errors == earlier
    index = Index.open(folder, model=pipeline())
    assert (index.count("images"), index.count("texts")) == (SOURCE, len(rows["texts"]))
    assert index.search("two", kind="texts", k=1)[0]["caption"] == "two"
    with pytest.raises(ValueError, match="A source may be embedded only once"):
        embed(data, folder, model=pipeline(), append=True, **OPTIONS)
    again = embed(data, folder, model=pipeline(), resume=True, **OPTIONS)
    assert (again["images"], again["bottleneck"]) == (SOURCE, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"out must be a new or empty folder"),
        ({"resume": True, "append": True}, "either resumes or appends"),
        ({"resume": True, "model": pipeline(2.0)}, r"weights: \w{12}… there, \w{12}… here"),
        ({"resume": True, "normalize": False}, "normalized: True there, False here"),
        ({"resume": True, "long_text": "mean"}, "long_text: truncate there, mean here"),
        ({"resume": True, "stored": "float16"}, "stored must stay what it was, float32"),
        ({"resume": True, "shard_size": 6}, "shard_size must stay what it was, 5"),
        ({"resume": True, "batch_size": 5}, "batch_size must stay what it was, 6"),
        ({"batch_size": 0}, "batch_size"),
        ({"workers": 0}, "workers"),
        ({"normalize": "no"}, "normalize must be True or False"),
        ({"resume": "no"}, "resume must be True or False"),
        ({"stored": "int8"}, "stored"),
        ({"long_text": "cut"}, "long_text"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(data, embedded, change, message):
    folder = embedded[0]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=message):
        embed(data, folder, **{"model": pipeline(), **OPTIONS, **change})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_with_other_things_and_a_file_are_refused(data, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="out must be a new or empty folder"):
        embed(data, tmp_path, model=pipeline(), resume=True)
    with pytest.raises(ValueError, match="out must be a folder"):
        embed(data, tmp_path / "mine.txt", model=pipeline())


def test_one_process_at_a_time(data, tmp_path):
    with locked(tmp_path / "out"), pytest.raises(ValueError, match="Only one process at a time"):
        embed(data, tmp_path / "out", model=pipeline())


def _remove(folder):
    (folder / "images-00000.parquet").unlink()


def _cut(folder):
    os.truncate(folder / "texts-00000.parquet", 100)


def _spoil(folder):
    (folder / ".clipmb-embed" / "00000.json").write_text("{")


def _empty(folder):
    (folder / ".clipmb-embed" / "00001.json").write_text("{}")


@pytest.mark.parametrize("harm", [_remove, _cut, _spoil, _empty])
def test_shards_that_were_lost_before_the_job_is_finished_are_made_again(data, embedded, tmp_path, monkeypatch, harm):
    folder = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("clipmb.embedding.store.write_errors", lambda *_: _killed())
        with pytest.raises(InterruptedError):
            embed(data, folder, model=pipeline(), **OPTIONS)
        harm(folder)
    embed(data, folder, model=pipeline(), resume=True, **OPTIONS)
    assert rows_of(folder) == rows_of(embedded[0])


def test_a_shard_that_was_lost_while_the_job_ran_is_an_error(data, tmp_path, monkeypatch):
    finish = store.finish

    def lost(folder, number, about):
        finish(folder, number, about)
        if number == 2:
            (folder / "images-00000.parquet").unlink()

    with monkeypatch.context() as patched:
        patched.setattr("clipmb.embedding.store.finish", lost)
        with pytest.raises(CheckpointError, match="shard 0 was changed or removed meanwhile"):
            embed(data, tmp_path / "out", model=pipeline(), **OPTIONS)
    assert embed(data, tmp_path / "out", model=pipeline(), resume=True, **OPTIONS)["images"] == SOURCE
    assert len(rows_of(tmp_path / "out")[0]["images"]) == SOURCE


def _killed():
    raise InterruptedError


@pytest.mark.parametrize(
    "change",
    [
        {"sources": None}, {"sources": [{}]}, {"sources": 5}, {"options": {}}, {"options": None}, {"passport": None},
        {"pending": {}}, {"pending": 5}, {"store": "int4"}, {"dimension": "6"},
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_named(data, embedded, tmp_path, change):
    manifest = json.loads((embedded[0] / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(CheckpointError, match=r"manifest\.json "):
        embed(data, tmp_path, model=pipeline(), resume=True, **OPTIONS)


def test_an_interrupted_job_is_no_index(data, embedded, tmp_path):
    with pytest.raises(CheckpointError, match=r"Received: no manifest\.json"):
        Index.open(tmp_path)
    manifest = json.loads((embedded[0] / "manifest.json").read_text())
    manifest["pending"], manifest["sources"] = manifest["sources"][0], []
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="only an interrupted job"):
        Index.open(tmp_path)
    (tmp_path / "new.txt").write_text("a text")
    with pytest.raises(ValueError, match="An interrupted job must be finished first"):
        embed(tmp_path / "new.txt", tmp_path, model=pipeline(), resume=True, **OPTIONS)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(CheckpointError, match="must have format 1"):
        Index.open(tmp_path)


@pytest.mark.parametrize("finished", [0, 1])
def test_an_interrupted_job_can_be_dropped(tmp_path, finished):
    """Finished sources stay as they were, and the folder ends as if the dropped job had never begun."""
    lines = {"kept": 5, "dropped": 7, "new": 2}
    for name, count in lines.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i}\n" for i in range(count)))
    given = {**OPTIONS, "model": pipeline(), "shard_size": 2}
    expected, out = tmp_path / "expected", tmp_path / "out"
    for folder, names in ((expected, ["kept"] * finished + ["new"]), (out, ["kept"] * finished + ["dropped"])):
        for place, name in enumerate(names):
            embed(tmp_path / f"{name}.txt", folder, append=place > 0, **given)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["pending"] = manifest["sources"].pop()
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / ".clipmb-embed").mkdir()
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}

    again = {**given, "append": bool(finished)}
    with pytest.raises(ValueError, match=r"resumed or discarded"):
        embed(tmp_path / "new.txt", out, **{**again, "append": False}, resume=True, discard=True)
    with pytest.raises(ValueError, match=r"An interrupted job must be finished first.*discard=True"):
        embed(tmp_path / "new.txt", out, **given, append=True)
    with pytest.raises(ValueError, match="once" if finished else "append needs a folder"):
        embed(tmp_path / "kept.txt", out, **given, append=True, discard=True)
    if finished:
        with pytest.raises(ValueError, match=r"append=True"):
            embed(tmp_path / "new.txt", out, **given, discard=True)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before

    embed(tmp_path / "new.txt", out, **again, discard=True)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in expected.iterdir())
    for path in expected.glob("*.parquet"):
        assert parquet.read_table(path).equals(parquet.read_table(out / path.name)), path.name
    with pytest.raises(ValueError, match="Only an interrupted job can be discarded"):
        embed(tmp_path / "new.txt", out, **again, discard=True)


# -- passports ---------------------------------------------------------------------------------------------------------


def test_the_digest_of_weights_depends_on_values_names_and_shapes_only():
    values = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float16)
    digest = weights_digest({"b": values, "a": values[0]})
    assert weights_digest({"a": values[0].astype(np.float64), "b": np.asfortranarray(values, np.float32)}) == digest
    changed = values.copy()
    changed[3, 5] = np.nextafter(changed[3, 5], np.float16(9))
    others = [
        {"b": changed, "a": values[0]}, {"c": values, "a": values[0]}, {"b": values.reshape(6, 4), "a": values[0]},
        {"b": values.astype(np.float64) + 1e-12, "a": values[0]}, {"b": values},
    ]  # fmt: skip
    assert len({digest, *map(weights_digest, others)}) == 6


@pytest.mark.several(engines=True)
def test_backends_are_equivalent_and_dtypes_are_not(data, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "model", MODEL)
    first, second = (CLIPPipeline.from_pretrained(checkpoint, backend=name) for name in ENGINES[:2])
    embed(data, tmp_path / "out", model=first, **OPTIONS)
    found = [
        Index.open(tmp_path / "out", model=model).search("caption 4", k=3)
        for model in (first, second, None, checkpoint)
    ]
    for hits in found[1:]:
        assert [hit["id"] for hit in hits] == [hit["id"] for hit in found[0]]
        np.testing.assert_allclose([hit["score"] for hit in hits], [hit["score"] for hit in found[0]], atol=1e-5)
    half = CLIPPipeline.from_pretrained(checkpoint, backend=ENGINES[0], dtype="float16")
    with pytest.raises(ValueError, match="dtype: float32 there, float16 here"):
        Index.open(tmp_path / "out", model=half).search("caption 4")
    double = CLIPPipeline.from_pretrained(checkpoint, backend=ENGINES[0], dtype="float64")
    assert Index.open(tmp_path / "out", model=double).search("caption 4", k=1)[0]["id"] == found[0][0]["id"]


def test_weights_that_were_replaced_since_they_were_loaded_have_no_passport(data, tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "model", MODEL)
    model = CLIPPipeline.from_pretrained(checkpoint, backend=ENGINES[0])
    late = CLIPPipeline.from_pretrained(checkpoint, backend=ENGINES[0])
    embed(data, tmp_path / "out", model=model, **OPTIONS)
    (checkpoint / "README.md").write_text("A model.")
    write_checkpoint(tmp_path / "other", CLIPConfig({**TEXT, "max_position_embeddings": 16}, VISION, projection_dim=24))
    name = "model.safetensors"
    assert stamps(checkpoint / name) == {name: model.stamps[name]}
    (tmp_path / "other" / name).replace(checkpoint / name)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has been replaced\. Load the model again\."):
        embed(data, tmp_path / "new", model=late, **OPTIONS)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr("clipmb.embedding.passport.weights_digest", None)  # known from before: hashed once
    assert len(Index.open(tmp_path / "out", model=model).search("caption 4", k=3)) == 3


def test_other_tokenizers_and_processors_are_other_passports():
    model = pipeline()
    images, tokenizer = model.processor.image_processor, model.processor.tokenizer
    known = images.fingerprint, tokenizer.fingerprint
    images.image_mean = [0.5, 0.5, 0.5]
    tokenizer.add_tokens(["<new>"])
    assert images.fingerprint != known[0]
    assert tokenizer.fingerprint != known[1]
    assert clipmb.CLIPImageProcessor(size=16, crop_size=16).fingerprint == known[0]
    assert clipmb.CLIPTokenizer().fingerprint != known[1] or clipmb.CLIPTokenizer().text_cleaning == "nfc"
    assert clipmb.CLIPTokenizerFast().fingerprint == known[1]


# -- search ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_search_is_exact(monkeypatch, dtype, some):
    for name, size in {"_BLOCK": 7, "_QUERIES": 2, "_PAIRS": 3}.items():
        monkeypatch.setattr(f"clipmb.embedding.index.{name}", size)
    random = np.random.default_rng(0)
    vectors = random.standard_normal((100, 5)).astype(dtype)
    vectors[50:] = vectors[:50]  # equal ones, whose order counts
    queries = random.standard_normal((3, 5)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    rows = np.arange(0, 100, 3) if some else None
    kept = np.arange(100) if rows is None else rows
    whole = vectors.astype(np.float64)[kept]
    cosines = np.round(queries @ (whole / np.linalg.norm(whole, axis=1, keepdims=True)).T, 6)
    for k in (1, 4, 20, 200):
        scores, found = nearest(vectors, queries, k, rows=rows)
        expected = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(found, kept[expected])
        np.testing.assert_allclose(scores, np.take_along_axis(cosines, expected, 1), atol=2e-6)


def test_cosines_depend_on_the_row_alone():
    """Not on its place in a product, whose kernels differ in the last bits."""
    random = np.random.default_rng(0)
    vectors = np.repeat(random.standard_normal((1, 33)).astype(np.float32), 1000, axis=0)
    queries = random.standard_normal((5, 33)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    scores, found = nearest(vectors, queries, 1000)
    assert (found == np.arange(1000)).all()
    assert (scores == scores[:, :1]).all()
    wide, row = queries.astype(np.float64), vectors[0].astype(np.float64)
    exact = wide @ row / np.linalg.norm(row) / np.linalg.norm(wide, axis=1)
    np.testing.assert_array_equal(scores[:, 0], exact.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "options",
    [
        None,
        {"use_dictionary": False, "compression": "snappy"},
        {"use_dictionary": False, "compression": "none", "data_page_size": 1 << 10, "write_batch_size": 100},
        {"use_dictionary": True, "compression": "none"},
        {"use_dictionary": False, "compression": "none", "use_byte_stream_split": ["embedding.list.element"]},
    ],
)
def test_rows_are_mapped_where_the_files_allow_it(tmp_path, monkeypatch, dtype, options):
    monkeypatch.setattr("clipmb.embedding.store.GROUP", 60)
    random = np.random.default_rng(0)
    vectors = random.standard_normal((250, 24)).astype(dtype)
    rows = [{"id": str(i), "path": None, "label": None, "fields": {}} for i in range(250)]
    paths = [tmp_path / f"images-{i:05d}.parquet" for i in (0, 1)]
    for path, part in zip(paths, (slice(0, 130), slice(130, 250)), strict=True):
        write_shard(path, rows[part], vectors[part], {}, {})
        if options:
            parquet.write_table(parquet.read_table(path), path, **options)
    found = Rows(paths, 24, dtype)
    assert {group.place is not None for group in found._groups} == {options is None}
    assert [group.rows for group in found._groups] == ([60, 60, 10, 60, 60] if options is None else [130, 120])
    queries = random.standard_normal((3, 24)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    for some in (None, np.array([0, 59, 60, 131, 132, 249]), None):  # at last with the lengths that were kept
        numbers, blocks = zip(*found.blocks(50, some), strict=True)
        np.testing.assert_array_equal(np.concatenate(numbers), np.arange(250) if some is None else some)
        np.testing.assert_array_equal(np.concatenate(blocks), vectors[np.concatenate(numbers)].astype(np.float32))
        for one, two in zip(
            nearest(found, queries, 7, rows=some), nearest(vectors, queries, 7, rows=some), strict=True
        ):
            np.testing.assert_array_equal(one, two)
    assert [row["id"] for row in found.take(np.array([249, 0, 130, 129]))] == ["249", "0", "130", "129"]


def test_search_needs_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("clipmb.embedding.index._BLOCK", 1 << 10)
    count, width = 40_000, 64
    rows = [{"id": None, "path": None, "label": None, "fields": {}}] * (count // 4)
    paths = [tmp_path / f"images-{i:05d}.parquet" for i in range(4)]
    for i, path in enumerate(paths):
        write_shard(
            path, rows, np.random.default_rng(i).standard_normal((count // 4, width)).astype(np.float32), {}, {}
        )
    before = {path.name for path in tmp_path.iterdir()}
    tracemalloc.start()
    try:
        nearest(Rows(paths, width, "float32"), np.eye(1, width, dtype=np.float32), 10)
        assert tracemalloc.get_traced_memory()[1] < count * width * 4 / 5
    finally:
        tracemalloc.stop()
    assert {path.name for path in tmp_path.iterdir()} == before


def test_shards_of_other_embeddings_are_no_rows(tmp_path):
    path = tmp_path / "images-00000.parquet"
    write_shard(path, [{"id": "a", "path": None, "label": None, "fields": {}}], np.ones((1, 5), np.float32), {}, {})
    for wrong in ((6, "float32"), (5, "float16")):
        with pytest.raises(CheckpointError, match="must have a column embedding of"):
            Rows([path], *wrong)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Rows([path], 5, "float32")


def test_many_queries_at_once(embedded):
    index = Index.open(embedded[0], model=pipeline())
    queries = index.vectors()[[3, 5]]
    scores, rows = index.nearest(2 * queries, 4, where="width>22")
    for query, own, found in zip(queries, scores, rows, strict=True):
        hits = index.search(vector=query, k=4, where="width>22")
        assert [hit["row"] for hit in hits] == found.tolist()
        assert [hit["score"] for hit in hits] == own.tolist()
    assert index.nearest(queries[:0], 4)[1].shape == (0, 4)
    with pytest.raises(ValueError, match="vector must have 6 finite numbers"):
        index.nearest(queries[0])


def test_queries_are_sums_and_differences(data, embedded):
    index = Index.open(embedded[0], model=pipeline())
    model = pipeline()
    picture = str(data.parent / "004.jpg")
    one, two, three = model.encode_text(["one", "two", "three"])
    seen = model.encode_image(picture)[0]
    expected = one + two + seen - three
    found = index.query(["one", "two"], picture, minus_text="three")
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-6)
    hit = index.search(image=picture, k=1)[0]
    assert (hit["id"], hit["row"], hit["width"]) == ("004.jpg", 4, 24)
    assert hit["score"] == pytest.approx(1, abs=1e-6)
    assert [hit["row"] for hit in index.search(vector=7 * seen)] == [hit["row"] for hit in index.search(image=picture)]
    for wrong in ({}, {"minus_text": "one"}, {"text": "one", "minus_text": "one"}, {"text": []}):
        with pytest.raises(ValueError, match="A query"):
            index.search(**wrong)
    for vector in (seen[:-1], seen * np.nan, seen * 0):
        with pytest.raises(ValueError, match="vector must have 6 finite numbers"):
            index.search(vector=vector)
    with pytest.raises(ValueError, match="kind"):
        index.search("one", kind="image")


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("width=24", [4]), ("width == 24", [4]), ("width!=24", [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]), ("width<22", [0, 1]),
        ("width<=22", [0, 1, 2]), ("width>29", [10]), ("width>=29", [9, 10]), (["width>22", "width<25"], [3, 4]),
        ("id=003.jpg", [3]), ("id=none", []), ("label=a", []),
    ],
)  # fmt: skip
def test_conditions(embedded, where, kept):
    index = Index.open(embedded[0], model=pipeline())
    assert sorted(hit["row"] for hit in index.search("one", k=100, where=where)) == kept


@pytest.mark.parametrize("where", ["width", "height=3", "=3", "width=x", ""])
def test_wrong_conditions(embedded, where):
    with pytest.raises(ValueError, match=r"[cC]ondition"):
        Index.open(embedded[0], model=pipeline()).search("one", where=where)


def test_near_duplicates(tmp_path, monkeypatch):
    for i, seed in enumerate([1, 2, 1, 3, 2, 1]):
        (tmp_path / f"{i}.png").write_bytes(jpeg(seed, form="PNG"))
    embed(tmp_path, tmp_path / "out", model=pipeline())
    index = Index.open(tmp_path / "out")
    assert index.duplicates(1.0) == [[0, 2, 5], [1, 4]]
    assert index.duplicates(1e-9, kind="texts") == []
    for wrong in (0, 1.5, True, "x"):
        with pytest.raises(ValueError, match="threshold must be a cosine"):
            index.duplicates(wrong)
    found = invoke("duplicates", tmp_path / "out", "--threshold", "0.999", "--json")
    assert json.loads(found.stdout) == [["0.png", "2.png", "5.png"], ["1.png", "4.png"]]
    assert "2 groups of 5 images, of 6" in invoke("duplicates", tmp_path / "out", "--threshold", "0.999").stdout


# -- the commands ------------------------------------------------------------------------------------------------------


def test_the_commands(data, tmp_path):
    model = write_checkpoint(tmp_path / "model", MODEL)
    out = tmp_path / "out"
    arguments = ["embed", data, "--out", out, "--model", model, "--backend", ENGINES[0], "--shard-size", 6]
    done = invoke(*arguments)
    assert done.exit_code == 0, done.stderr
    assert f"{out}: {SOURCE} images" in done.stdout
    assert re.search(r"bottleneck: (decode|resize|tokenize|model|write)", done.stdout)
    assert json.loads(invoke(*arguments, "--resume", "--json").stdout)["images"] == SOURCE
    again = invoke(*arguments)
    assert (again.exit_code, "--resume" in again.stderr) == (1, True)
    assert invoke(*arguments, "--batch-size", "some").exit_code == 2

    page = tmp_path / "found.html"
    found = invoke("search", out, "caption 3", "--image", data.parent / "003.jpg", "-k", 2, "--json", "--html", page)
    hits = json.loads(found.stdout)
    assert len(hits) == 2
    assert hits[0]["score"] >= hits[1]["score"]
    expected = Index.open(out).search("caption 3", str(data.parent / "003.jpg"), k=2)
    assert [hit["id"] for hit in hits] == [hit["id"] for hit in expected]
    shown = page.read_text("utf-8")
    assert shown.count("<li>") == shown.count("data:image/jpeg;base64,") == 2
    assert not re.search(r"""(src|href)=["'](?!data:)""", shown)
    assert base64.b64decode(re.findall(r"base64,([^\"]+)", shown)[0])[:2] == b"\xff\xd8"
    assert hits[0]["id"] in invoke("search", out, "caption 3", "--image", data.parent / "003.jpg").stdout
    folder = invoke("search", out, "caption 3", "--html", tmp_path)
    assert (folder.exit_code, "--html must be a file" in folder.stderr) == (1, True)
    if os.name != "nt":  # a name that is no text, in the title
        odd = tmp_path / os.fsdecode(b"\xff.jpg")
        odd.write_bytes(jpeg(3))
        assert invoke("search", out, "--image", odd, "--html", page).exit_code == 0
        assert r"\udcff.jpg" in page.read_text("utf-8")
    nothing = invoke("search", out)
    assert (nothing.exit_code, "search needs a text or an image" in nothing.stderr) == (1, True)


def test_a_gallery_escapes_what_it_shows(tmp_path):
    from clipmb.embedding.gallery import gallery

    page = gallery("<b>", [{"score": 1.0, "id": "<i>", "path": str(tmp_path / "no.jpg"), "caption": "a & b"}])
    assert "<b>" not in page
    assert "<i>" not in page
    assert "a &amp; b" in page


def test_the_fastest_batch_is_measured_and_kept(data, tmp_path):
    done = embed(data, tmp_path / "out", model=pipeline(), batch_size="auto")
    assert done["batch_size"] in (16, 32, 64, 128, 256)
    assert embed(data, tmp_path / "out", model=pipeline(), batch_size="auto", resume=True)["images"] == SOURCE


def test_a_model_is_described_by_what_it_was_made_of(embedded):
    passport = Index.open(embedded[0]).passport
    assert passport["backend"] == "numpy"
    assert passport["clipmb"] == clipmb.__version__
    assert passport["weights"] == weights_digest(pipeline().engine.weights())
    assert CONFIG.projection_dim == Index.open(embedded[0]).manifest.dimension


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_names_and_values_that_are_no_text(tmp_path):
    """Bytes of a file name that are not UTF-8, half characters, and integers of more than 64 bits."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / os.fsdecode(b"\xff.jpg")).write_bytes(jpeg(0))
    (folder / os.fsdecode(b"\xfe.jpg")).write_bytes(b"broken")
    about = json.dumps({"caption": "text", "size": 2**70, "note": "half \ud800"})
    (folder / os.fsdecode(b"\xff.json")).write_text(about, "utf-8")
    done = embed(folder, tmp_path / "out", model=pipeline(), **OPTIONS)
    assert (done["images"], done["texts"], done["errors"]) == (1, 1, 1)
    rows, errors = rows_of(tmp_path / "out")
    assert (rows["images"][0]["id"], errors[0]["id"]) == (r"\udcff.jpg", r"\udcfe.jpg")
    assert (rows["texts"][0]["note"], rows["texts"][0]["size"]) == (r"half \ud800", str(2**70))
    assert embed(folder, tmp_path / "out", model=pipeline(), resume=True, **OPTIONS)["images"] == 1


def test_every_column_is_kept_whatever_its_name(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    about = {"id_": 1, "id": 2, "path_": 3, "path": 4, "embedding_": 5, "embedding": [6], "image_path": 7, "a.b": 8}
    others = {"": 9, "half \ud800": 10, "half \\ud800": 11, "label_": 12}
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.jpg", "caption": "text", **about, **others}), "utf-8")
    embed(tmp_path / "a.jsonl", tmp_path / "out", model=pipeline(), layout="clip-retrieval", **OPTIONS)
    rows, _ = rows_of(tmp_path / "out")
    for row in [rows["images"][0], rows["texts"][0]]:
        kept = {name: value for name, value in row.items() if name not in ("caption", "embedding")}
        assert kept == {
            "id": "a.jpg", "path": str(tmp_path / "a.jpg"), "label": None, "id_": 1, "id__": 2, "path_": 3, "path__": 4,
            "embedding_": 5, "embedding__": "[6]", "image_path": 7, "a.b": 8, "": 9, r"half \ud800": 10,
            r"half \ud800_": 11, "label_": 12,
        }  # fmt: skip
    (row,) = parquet.read_table(tmp_path / "out/clip-retrieval/metadata/metadata_0.parquet").to_pylist()
    assert (row["image_path"], row["image_path_"], row["id"]) == (str(tmp_path / "a.jpg"), 7, "a.jpg")


def test_an_image_with_a_row_for_each_caption_is_embedded_once(tmp_path):
    """Flickr30k's results.csv, whose comment_number differs."""
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    lines = ["image_name| comment_number| comment", *(f"a.jpg| {i}| caption {i}" for i in range(5))]
    (tmp_path / "results.csv").write_text("\n".join(lines), "utf-8")
    done = embed(tmp_path / "results.csv", tmp_path / "out", model=pipeline(), layout="clip-retrieval", **OPTIONS)
    assert (done["items"], done["images"], done["texts"], done["errors"]) == (1, 1, 5, 0)
    texts = rows_of(tmp_path / "out")[0]["texts"]
    expected = [(f"caption {i}", str(i)) for i in range(5)]
    assert [(row["caption"], row["comment_number"]) for row in texts] == expected
    layout = parquet.read_table(tmp_path / "out/clip-retrieval/metadata/metadata_0.parquet").to_pylist()
    assert [(row["caption"], row["comment_number"]) for row in layout] == expected


def test_numbers_are_kept_exactly(tmp_path):
    """An integer of more than 53 bits has no float64; JSON has no infinity."""
    values = [{"n": 2**53 + 1, "m": 2**63 - 1, "x": [float("inf")]}, {"n": 0.5, "m": 1, "x": None}]
    lines = [json.dumps({"caption": f"text {i}", **value}) for i, value in enumerate(values)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8")
    embed(tmp_path / "a.jsonl", tmp_path / "out", model=pipeline(), **OPTIONS)
    texts = rows_of(tmp_path / "out")[0]["texts"]
    found = [(row["n"], row["m"], row["x"]) for row in texts]
    assert found == [(str(2**53 + 1), 2**63 - 1, "[null]"), ("0.5", 1, None)]


def test_the_bar_counts_errors_as_they_come(data, tmp_path, monkeypatch):
    said = []

    @contextlib.contextmanager
    def bar(shown, description, total, done=0):
        yield lambda count=1, description=None: said.append((count, description))

    monkeypatch.setattr("clipmb.embedding.job.progress_bar", bar)
    embed(data, tmp_path / "out", model=pipeline(), **{**OPTIONS, "shard_size": 100})
    assert sum(count for count, _ in said) == SOURCE + len(BROKEN) + 2
    assert [text for _, text in said if text][:2] == ["items, 1 error", "items, 2 errors"]


def test_what_was_decided_before_cannot_be_asked_for(data, embedded, tmp_path):
    with pytest.raises(ValueError, match="are fixed when the pipeline is created"):
        embed(data, tmp_path / "out", model=pipeline(), backend="pt")
    with pytest.raises(ValueError, match="Columns are chosen when the data are opened"):
        embed(Pairs.open(data, partial=True), tmp_path / "out", model=pipeline(), image_column="image")
    with pytest.raises(ValueError, match="are fixed when the pipeline is created"):
        Index.open(embedded[0], model=pipeline(), backend="pt").search("one")
    with pytest.raises(TypeError, match="model must be a CLIPPipeline"):
        embed(data, tmp_path / "out", model=7)


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_pipeline_knows_its_dtype_however_it_was_made(tmp_path, backend, dtype):
    if dtype not in clipmb.backends.BACKENDS[backend].dtypes:
        with pytest.raises(ValueError, match="dtype"):
            clipmb.backends.engine(backend).load(write_checkpoint(tmp_path, MODEL), dtype=dtype)
        return
    checkpoint = write_checkpoint(tmp_path, MODEL)
    engine = clipmb.backends.engine(backend).load(checkpoint, dtype=dtype)
    assert CLIPPipeline(engine, pipeline().processor).dtype == dtype
    assert CLIPPipeline.from_pretrained(checkpoint, backend=backend, dtype=dtype).dtype == dtype


def test_missing_shards_are_no_vectors(data, tmp_path):
    embed(data, tmp_path / "out", model=pipeline(), **OPTIONS)
    (tmp_path / "out" / "images-00000.parquet").unlink()
    with pytest.raises(CheckpointError, match=rf"must hold the {SOURCE} images of its manifest\.json"):
        Index.open(tmp_path / "out").vectors()
    with pytest.raises(CheckpointError, match=rf"must hold the {SOURCE} images of its manifest\.json"):
        Index.open(tmp_path / "out").table()


def test_a_refused_job_leaves_no_folder(data, tmp_path):
    with pytest.raises(ValueError, match="append needs a folder"):
        embed(data, tmp_path / "out", model=pipeline(), append=True)
    assert not (tmp_path / "out").exists()


def test_ray_refuses_what_cannot_travel_and_options_that_do_nothing(data, tmp_path, monkeypatch):
    """Before Ray is needed, and without leaving a folder."""
    monkeypatch.setitem(sys.modules, "ray", None)
    cases = [
        ({"model": pipeline()}, TypeError, "model must be a folder or a Hub id, which every machine can load"),
        ({"source": Pairs.open(data, partial=True)}, TypeError, "the source must be paths, which every machine can"),
        ({"source": [data, 3]}, TypeError, r"the source must be paths.* Received: 3\."),
        ({"engine": "local", "replicas": 2}, ValueError, r'are Ray\'s\. .*Pass engine="ray" \(--engine ray\)'),
        ({"engine": "local", "gpus_per_replica": 0.5}, ValueError, "are Ray's"),
        ({"engine": "spark"}, ValueError, "engine must be one of 'local', 'ray'"),
        ({"replicas": 0}, ValueError, "replicas must be a whole number"),
        ({"gpus_per_replica": 2}, ValueError, "gpus_per_replica must be a number from 0 to 1"),
        ({"gpus_per_replica": float("nan")}, ValueError, "gpus_per_replica must be a number from 0 to 1"),
        ({"gpus_per_replica": 0.5}, ValueError, r"needs device.*--device cuda"),
        ({}, ImportError, r'pip install "clipmb\[ray\]"'),
    ]  # fmt: skip
    for given, kind, message in cases:
        arguments = {"source": data, "model": clipmb.small_model(), "engine": "ray", **given}
        with pytest.raises(kind, match=message):
            embed(arguments.pop("source"), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
