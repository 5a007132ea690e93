"""Approximate search: what it finds has exact scores, what it was built of is known, and what it misses is measured."""

from __future__ import annotations

import json
import re
import sys
from datetime import date
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from data_cases import jpeg
from embedding_cases import collection, pipeline
from processes import invoke
from pyarrow import parquet

from clipmb import CheckpointError, Index, embed
from clipmb.embedding.index import columns_of
from clipmb.embedding.store import Manifest, shard_path, write_shard
from clipmb.evaluation import evaluate

WIDTH = 24
METHODS = {"hnsw": {"m": 8, "ef_construction": 40}, "ivf": {"lists": 20}}


def written(folder, images, texts=(), captions=(), source=0):
    """Adds a source of embeddings, as a job does; ids are the numbers of the rows, with the parity as label."""
    manifest = Manifest.read(folder) or Manifest({"model": ""}, WIDTH, "float32", {})
    counts = {"items": len(images), "images": len(images), "texts": len(texts), "errors": 0}
    for kind, vectors in (("images", images), ("texts", texts)):
        rows = [
            {
                "id": str(i),
                "path": None,
                "caption": captions[i] if kind == "texts" else None,
                "label": str(i % 2),
                "fields": {},
            }
            for i in range(len(vectors))
        ]
        if len(vectors):
            write_shard(shard_path(folder, kind, source), rows, np.asarray(vectors), {}, {})
    manifest.sources.append({"name": "", "fingerprint": str(source), **counts, "shards": [source, source + 1]})
    manifest.write(folder)
    return Index.open(folder)


def clusters(count, seed=0):
    random, centres = np.random.default_rng(seed), np.random.default_rng(99).standard_normal((20, WIDTH))
    return (centres[random.integers(0, 20, count)] + 0.5 * random.standard_normal((count, WIDTH))).astype(np.float32)


@pytest.fixture(scope="module", params=METHODS)
def built(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    index = written(folder, 3 * clusters(3000))
    before = {path.name for path in folder.iterdir()}
    about = index.build(method=request.param, **METHODS[request.param])
    assert {path.name for path in folder.iterdir()} - before == {"images.faiss", "images.faiss.json"}
    assert {name: about[name] for name in METHODS[request.param]} == METHODS[request.param]
    assert (about["method"], about["rows"]) == (request.param, 3000)
    return index


def test_what_is_found_has_exact_scores(built):
    queries = clusters(50, seed=1)
    exact, rows = built.nearest(queries, 10)
    scores, found = Index.open(built.folder).nearest(queries, 10, approximate=True)
    assert (scores >= exact[:, -1:]).mean() > 0.95
    assert (np.diff(scores) <= 0).all()
    where = found == rows
    assert where.mean() > 0.9
    np.testing.assert_array_equal(scores[where], exact[where])
    most = {"hnsw": {"ef": 400}, "ivf": {"probes": 20}}[built._approximate("images").method]
    np.testing.assert_array_equal(built.nearest(queries, 10, approximate=True, **most)[1], rows)
    assert built.nearest(queries[:0], 5, approximate=True)[0].shape == (0, 5)
    hits = built.search(vector=queries[0], k=3, approximate=True, **most)
    assert [(hit["row"], hit["id"]) for hit in hits] == [(row, str(row)) for row in rows[0, :3]]


def test_more_effort_finds_more(built):
    queries = clusters(200, seed=2)
    name, few, many = {"hnsw": ("ef", 1, 200), "ivf": ("probes", 1, 10)}[built._approximate("images").method]
    exact = built.nearest(queries, 1)[0]
    found = [
        (built.nearest(queries, 1, approximate=True, **{name: effort})[0] >= exact).mean() for effort in (few, many)
    ]
    assert found[0] < found[1]
    assert found[1] > 0.95


def test_conditions_hold_and_too_few_proposals_are_completed(built, monkeypatch):
    queries = clusters(20, seed=3)
    for limit in ("_FEW", "_SHARE"):
        monkeypatch.setattr(f"clipmb.embedding.index.{limit}", 0 if limit == "_FEW" else 3000)
    exact = built.nearest(queries, 10, where="label=1")[0]
    scores, found = built.nearest(queries, 10, where="label=1", approximate=True)
    assert (found % 2 == 1).all()
    assert (scores >= exact[:, -1:]).mean() > 0.9
    narrow = ["id>299", "id<3"]  # texts are compared: 2990 to 2999, and 3 digits
    few = built.nearest(queries, 40, where=narrow)
    assert 1 < few[1].shape[1] < 40
    for one, two in zip(few, built.nearest(queries, 40, where=narrow, approximate=True), strict=True):
        np.testing.assert_array_equal(one, two)


def test_few_rows_are_searched_exactly(built, monkeypatch):
    monkeypatch.setattr("clipmb.embedding.approximate.Approximate.candidates", None)
    queries = clusters(5, seed=4)
    for one, two in zip(
        built.nearest(queries, 5, where="label=1"),
        built.nearest(queries, 5, where="label=1", approximate=True),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)


def test_an_index_of_other_rows_is_refused(tmp_path):
    index = written(tmp_path, clusters(100))
    query = np.ones(WIDTH, np.float32)
    with pytest.raises(ValueError, match=r"no images\.faiss\. Make it with clipmb index"):
        index.search(vector=query, approximate=True)
    index.build()
    assert len(index.search(vector=query, approximate=True)) == 10
    index = written(tmp_path, clusters(50, seed=1), source=1)
    with pytest.raises(ValueError, match="from before others were added"):
        index.search(vector=query, approximate=True)
    assert len(index.search(vector=query)) == 10
    index.build(method="ivf")
    assert len(index.search(vector=query, k=150, approximate=True, probes=99)) == 150
    path = tmp_path / "images.faiss"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"images\.faiss cannot be read"):
        Index.open(tmp_path).search(vector=query, approximate=True)


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        ("build", {"method": "flat"}, "method must be one of"),
        ("build", {"lists": 4}, "lists is for ivf"),
        ("build", {"method": "ivf", "m": 4}, "m is for hnsw"),
        ("build", {"method": "ivf", "lists": 101}, "lists must be a whole number from 1 to 100"),
        ("build", {"m": 1}, "m must be a whole number"),
        ("build", {"kind": "texts"}, "An index needs rows"),
        ("nearest", {"ef": 4}, "ef is for approximate search"),
        ("nearest", {"probes": 4, "approximate": True}, "probes is for an index of ivf"),
        ("nearest", {"ef": 0, "approximate": True}, "ef must be a whole number"),
        ("evaluate", {"k": 0}, "k must be a whole number"),
        ("evaluate", {"sample": 0}, "sample must be a whole number"),
    ],
)
def test_wrong_arguments(tmp_path, call, options, message):
    index = written(tmp_path, clusters(100))
    if call == "nearest":
        index.build()
        options = {"vectors": np.ones((1, WIDTH), np.float32), **options}
    with pytest.raises(ValueError, match=message):
        getattr(index, call)(**options)


def test_faiss_is_named_when_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r'pip install "clipmb\[search\]"'):
        written(tmp_path, clusters(10)).build()


def test_what_approximate_search_misses(built):
    name, few = {"hnsw": ("ef", 1), "ivf": ("probes", 1)}[built._approximate("images").method]
    found = [built.evaluate(1, sample=1000, **options)["approximate"] for options in ({name: few}, {})]
    assert found[0]["recall"] < found[1]["recall"] <= 1
    assert found[1]["recall"] > 0.95
    assert (found[1]["k"], found[1]["queries"], found[1]["kind"]) == (1, 1000, "images")
    assert found[1]["milliseconds"].keys() == {"exact", "approximate"}
    assert "retrieval" not in built.evaluate(5, sample=100)


def test_what_is_in_memory_is_searched_there(tmp_path, monkeypatch):
    index = written(tmp_path, clusters(300))
    index.build()
    queries = clusters(5, seed=1)
    expected = [index.nearest(queries, 5, **options) for options in ({}, {"where": "label=1"}, {"approximate": True})]
    index.vectors()
    monkeypatch.setattr("clipmb.embedding.store.Rows.blocks", None)
    found = [index.nearest(queries, 5, **options) for options in ({}, {"where": "label=1"}, {"approximate": True})]
    for one, two in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one[0], two[0])
        np.testing.assert_array_equal(one[1], two[1])


def test_a_query_does_not_find_itself(tmp_path):
    """Rows in pairs, of which the other is the only near one: recall of 1 result is known."""
    random = np.random.default_rng(0)
    vectors = np.repeat(random.standard_normal((30, WIDTH)), 2, axis=0).astype(np.float32)
    index = written(tmp_path, vectors)
    index.build()
    assert index.evaluate(1)["approximate"]["recall"] == 1
    real = Index.nearest

    def blind(self, vectors, k=10, **options):  # an index that proposes each row itself, and rows that are far from it
        scores, found = real(self, vectors, k, **{**options, "approximate": False})
        if options.get("approximate"):
            scores, found = scores.copy(), found.copy()
            scores[:, 1], found[:, 1] = -1, (np.arange(60) + 30) % 60
            found[:, 0] = np.arange(60)
        return scores, found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Index, "nearest", blind)
        assert index.evaluate(1)["approximate"]["recall"] == 0


def test_retrieval_is_that_of_evaluate(tmp_path):
    data = collection(tmp_path / "pictures", count=40)
    embed(data, tmp_path / "out", model=pipeline(), batch_size=6, shard_size=7, workers=2)
    expected = evaluate(pipeline(), data, long_text="truncate")["retrieval"]
    found = Index.open(tmp_path / "out").evaluate()
    assert found == {"retrieval": expected}
    assert expected["captions"] > expected["images"] > 20


def test_captions_belong_to_images_of_the_same_source(tmp_path):
    vectors = clusters(6)
    written(tmp_path, vectors[:3], vectors[:3], ["a", "b", "c"])
    index = written(tmp_path, vectors[3:], vectors[3:], ["d", "e", "f"], source=1)
    assert index.pairs().tolist() == [[i, i] for i in range(6)]
    found = index.evaluate()["retrieval"]
    assert (found["images"], found["captions"], found["image_to_text"]["recall@1"]) == (6, 6, 1)


def test_nothing_to_measure(tmp_path):
    index = written(tmp_path, clusters(6))
    with pytest.raises(ValueError, match="There must be an approximate index"):
        index.evaluate()
    with pytest.raises(ValueError, match="ef and probes are for an index of images"):
        index.evaluate(ef=5)


def test_the_commands(tmp_path):
    data = collection(tmp_path / "pictures")
    out = tmp_path / "out"
    embed(data, out, model=pipeline())
    found = invoke("index", out, "--m", 4, "--json")
    assert found.exit_code == 0, found.stderr
    assert {kind: about["m"] for kind, about in json.loads(found.stdout).items()} == {"images": 4, "texts": 4}
    assert (
        "11 images, ivf (lists 2)" in invoke("index", out, "--kind", "images", "--method", "ivf", "--lists", 2).stdout
    )
    shown = invoke("search", out, "--eval", "-k", 3, "--probes", 2)
    assert shown.exit_code == 0, shown.stderr
    assert "ivf of images, 11 queries" in shown.stdout
    assert "recall@3" in shown.stdout
    assert "text to image" in shown.stdout
    measured = json.loads(invoke("search", out, "--eval", "--kind", "texts", "--json").stdout)
    assert measured["approximate"]["method"] == "hnsw"
    assert measured["retrieval"]["images"] > 0
    for arguments in (
        ["index", out, "--lists", 2], ["index", out, "--method", "ivf", "--m", 4], ["search", out, "a", "--eval"],
        ["search", out, "a", "--sample", 4],
    ):  # fmt: skip
        assert invoke(*arguments).exit_code == 2, arguments
    refused = invoke("search", out, "--eval", "--ef", 9)
    assert (refused.exit_code, "ef is for an index of hnsw" in refused.stderr) == (1, True)


def foreign(folder, *sources):
    """A folder of images as other programs write it: a source for each dict of columns, with a vector a row."""
    manifest = Manifest({"model": ""}, WIDTH, "float32", {})
    folder.mkdir(exist_ok=True)
    vectors = clusters(100)
    for number, columns in enumerate(sources):
        count = len(next(iter(columns.values())))
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors[:count].reshape(-1)), WIDTH)
        ids = [str(i) for i in range(count)]
        parquet.write_table(
            pa.table({"id": ids, **columns, "embedding": embedding}), shard_path(folder, "images", number)
        )
        counts = {"items": count, "images": count, "texts": 0, "errors": 0}
        manifest.sources.append({"name": "", "fingerprint": str(number), **counts, "shards": [number, number + 1]})
    manifest.write(folder)
    return Index.open(folder)


def kept(index, where):
    return sorted(index.nearest(np.ones((1, WIDTH)), 100, where=where)[1][0].tolist())


@pytest.mark.parametrize("read", [False, True])
def test_sources_may_differ_in_columns_and_types(tmp_path, read):
    index = foreign(
        tmp_path,
        {"size": [1, 2], "price": [1, None], "tags": [["a"], None], "kind": pa.array(["x", "y"]).dictionary_encode()},
        {"size": ["2", "c"], "price": [0.5, 2.0], "tags": ["b", '["a"]'], "kind": ["y", None], "nothing": pa.nulls(2)},
        {"other": [None]},
    )
    if read:
        table = index.table()
        assert table.column("size").to_pylist() == ["1", "2", "2", "c", None]
        assert table.column("price").to_pylist() == [1, None, 0.5, 2, None]
        assert table.column("tags").to_pylist() == ['["a"]', None, "b", '["a"]', None]
    assert kept(index, "size=2") == [1, 2]
    assert kept(index, "size!=2") == [0, 3]
    assert kept(index, "price>=1") == [0, 3]
    assert kept(index, "price<0.75") == [2]
    assert kept(index, 'tags=["a"]') == [0, 3]
    assert kept(index, "kind=y") == [1, 2]
    assert kept(index, "nothing!=1") == []
    assert kept(index, ["size=2", "kind=y", "id=0"]) == [2]
    assert kept(index, []) == [0, 1, 2, 3, 4]
    hits = index.search(vector=np.ones(WIDTH), where="id=0")
    assert {hit["row"]: hit["size"] for hit in hits} == {0: 1, 2: "2", 4: None}
    assert index.duplicates(1) == [[0, 2, 4], [1, 3]]


def test_whole_numbers_are_compared_with_others(tmp_path):
    index = foreign(tmp_path, {"size": [5, 58, 2**60 + 1, None], "day": [date(2024, 1, i) for i in (1, 2, 3, 4)]})
    assert kept(index, "size>57.5") == [1, 2]
    assert kept(index, "size=5.0") == [0]
    assert kept(index, f"size={2**60}") == []
    assert kept(index, "size<1e30") == [0, 1, 2]
    assert kept(index, "day>2024-01-02") == [2, 3]


def test_what_has_no_order_is_refused(tmp_path):
    index = foreign(tmp_path, {"tags": [["a"], ["b"]], "half": pa.array(np.ones(2, np.float16))})
    for where in ("tags=a", "half<2", "id"):
        with pytest.raises(ValueError, match=r"[cC]ondition"):
            kept(index, where)


def test_columns_with_the_names_of_results_stay_beside_them(tmp_path):
    index = foreign(tmp_path, {"score": ["high", "low"], "row": [7, 8]})
    hit = index.search(vector=clusters(100)[1], k=1)[0]
    assert hit == {"score": pytest.approx(1), "row": 1, "id": "1", "score_": "low", "row_": 8}
    assert kept(index, "score=high") == [0]


def test_lengths_of_queries_do_not_matter(tmp_path):
    index = foreign(tmp_path, {"size": list(range(50))})
    query = clusters(1, seed=1).astype(np.float64)
    expected = index.nearest(query, 5)
    for factor in (1e-300, 1e-30, 1e30, 1e300):
        scores, rows = index.nearest(query * factor, 5)
        np.testing.assert_array_equal(rows, expected[1])
        np.testing.assert_allclose(scores, expected[0], atol=1e-6)


def test_conditions_and_pairs_need_little_memory(tmp_path):
    """Less than the columns take: only those that are asked for are read, in blocks."""
    count = 100_000
    index = written(tmp_path, np.ones((count, WIDTH), np.float32))
    notes = [f"a note of the number {i}, that is rather long" for i in range(count)]
    path = shard_path(tmp_path, "images", 0)
    table = parquet.read_table(path).append_column("note", pa.array(notes)).append_column("more", pa.array(notes))
    parquet.write_table(table, path, row_group_size=1 << 14)
    index = Index.open(tmp_path)
    index.rows()
    before = pa.total_allocated_bytes()
    most = []
    for block in index.rows().tables(["note"]):
        most.append(pa.total_allocated_bytes() - before)
        assert block.num_rows <= 1 << 14
    assert max(most) < sum(map(len, notes))
    assert kept(index, "note=a note of the number 77777, that is rather long") == [77777]
    assert not index._tables


def test_one_large_group(monkeypatch, tmp_path):
    """Equal rows in every block, and chains between blocks, against all pairs at once."""
    monkeypatch.setattr("clipmb.embedding.index._BLOCK", 7)
    random = np.random.default_rng(0)
    vectors = np.repeat(random.standard_normal((12, WIDTH)), 5, axis=0)[random.permutation(60)]
    vectors[10:20] = random.standard_normal(WIDTH) + np.outer(np.arange(10), 0.3 * random.standard_normal(WIDTH))
    index = written(tmp_path, vectors.astype(np.float32))
    whole = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for threshold in (0.3, 0.9, 0.99, 1):
        reach = (whole @ whole.T >= threshold - 1e-6).astype(float)
        for _ in range(6):
            reach = (reach @ reach > 0).astype(float)
        groups = {tuple(np.flatnonzero(row).tolist()) for row in reach}
        assert index.duplicates(threshold) == sorted(list(rows) for rows in groups if len(rows) > 1)


def test_duplicates_of_several_sources_are_named_by_their_paths(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(jpeg(1, form="PNG"))
        embed(tmp_path / name, tmp_path / "out", model=pipeline(), append=name == "b")
    found = json.loads(invoke("duplicates", tmp_path / "out", "--json").stdout)
    assert found == [[str(tmp_path / name / "1.png") for name in ("a", "b")]]


def test_values_of_other_programs_are_shown(tmp_path):
    """What pandas writes by itself, of which JSON has none."""
    nanoseconds = pa.array([1_704_067_200_000_001_001], pa.timestamp("ns", "UTC"))
    columns = {
        "day": [date(2024, 1, 1)],
        "price": [Decimal("1.50")],
        "raw": [b"\xff"],
        "in": [{"a": [date(2024, 1, 2)]}],
    }
    hit = foreign(tmp_path, {**columns, "at": nanoseconds}).search(vector=np.ones(WIDTH))[0]
    assert hit["day"] == date(2024, 1, 1)
    assert json.loads(json.dumps(columns_of(hit))) == {
        "id": "0", "day": "2024-01-01", "price": "1.50", "raw": repr(b"\xff"), "in": {"a": ["2024-01-02"]},
        "at": "2024-01-01 00:00:00.000001+00:00",
    }  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [{"sources": [{}]}, {"sources": 3}, {"dimension": "x"}, {"store": "x"}, {"passport": []}, {"passport": {}}],
)
def test_damaged_manifests_are_one_error(tmp_path, wrong):
    written(tmp_path, clusters(3))
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **wrong}), "utf-8")
    found = invoke("search", tmp_path, "a")
    assert found.exit_code == 1
    assert re.fullmatch(r"error: .*manifest\.json .*\n", found.stderr), found.stderr
