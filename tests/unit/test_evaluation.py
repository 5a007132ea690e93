"""Evaluation: ranks against brute force over embeddings with ties; small checkpoints over real files; the command."""

from __future__ import annotations

import csv
import json
import logging
import tracemalloc

import numpy as np
import pytest
from cases import VISION, write_checkpoint
from conftest import BACKENDS
from PIL import Image
from processes import invoke

import clipmb
from clipmb import CLIPConfig, CLIPPipeline, evaluation
from clipmb.common.processor import CLIPProcessor

# With three labels as many prompts as the table has captions, and as long: one shape, since JAX compiles for each.
TEMPLATES = [
    "a photo of a {}.",
    "{}",
    "the {}",
    "a rather long text about a {} that has more than the context of words",
]
TEXT = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1, "num_attention_heads": 4}
CONFIG = CLIPConfig({**TEXT, "max_position_embeddings": 16}, VISION, projection_dim=24)


class Items:
    """Data in memory, as `clipmb.common.data.pairs.Pairs`: (picture or the error of reading it, captions, label)."""

    def __init__(self, *items):
        self.items = items
        self.opened, self.left_out = [], []

    def __len__(self):
        return len(self.items)

    def id(self, i):
        return f"item-{i}"

    def captions(self, i):
        if isinstance(self.items[i][1], Exception):
            raise self.items[i][1]
        return list(self.items[i][1])

    def label(self, i):
        return self.items[i][2]

    def image(self, i):
        self.opened.append(i)
        if isinstance(self.items[i][0], Exception):
            raise self.items[i][0]
        return self.items[i][0]


class Lookup(CLIPPipeline):
    """A pipeline whose embeddings are given: of pictures by their number, of texts by themselves."""

    def __init__(self, images, texts):
        self.images, self.texts, self.calls = images, texts, []

    def encode_image(self, images, **options):
        images = images if isinstance(images, list) else [images]
        self.calls.append(len(images))
        if bad := [i for i in images if isinstance(i, str)]:
            raise ValueError(f"cannot process {bad[0]}")
        return self.images[images] if images else np.zeros((0, self.images.shape[1]))

    def encode_text(self, texts, **options):
        return np.array([self.texts[text] for text in texts])


def unit_with_ties(rng, count, width=8):
    """Unit vectors with entries of 0, 0.5 and -0.5: many equal ones, and similarities that float64 holds exactly."""
    rows = np.zeros((count, width))
    for row in rows:
        row[rng.choice(width, 4, replace=False)] = rng.choice([-0.5, 0.5], 4)
    return rows.astype(np.float32)


def brute_ranks(similar, right, times):
    """(queries, candidates) similarities; right: the same shape, booleans; times: how often each candidate counts."""
    ranks = []
    for row, mine in zip(similar, right, strict=True):
        best = row[mine].max()
        ranks.append(1 + sum(int(n) for s, r, n in zip(row, mine, times, strict=True) if not r and s >= best))
    return np.array(ranks)


@pytest.mark.parametrize("blocks", [(1024, 4096, 65536), (7, 5, 3), (1, 1, 1)])
def test_ranks_are_those_of_brute_force_whatever_the_blocks(monkeypatch, blocks):
    for name, size in zip(("_QUERIES", "_CANDIDATES", "_PAIRS"), blocks, strict=True):
        monkeypatch.setattr(evaluation, name, size)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        queries, candidates = unit_with_ties(rng, 23), unit_with_ties(rng, 31)
        right = rng.random((23, 31)) < 0.1
        right[np.arange(23), rng.integers(0, 31, 23)] = True
        times = rng.integers(1, 4, 31)
        similar = queries.astype(np.float64) @ candidates.astype(np.float64).T
        found = evaluation._ranks(queries, candidates, np.argwhere(right), times)
        expected = brute_ranks(similar, right, times)
        assert found.tolist() == expected.tolist()
        tied = sum(((row == row[mine].max()) & ~mine).any() for row, mine in zip(similar, right, strict=True))
        assert tied > 5  # so the rule for ties was tested


def test_equal_embeddings_tie_in_every_block():
    """The rounding of a product depends on its shape; whether embeddings are equal does not."""
    rng = np.random.default_rng(0)
    one = rng.normal(size=512)
    candidates = np.repeat((one / np.linalg.norm(one))[None].astype(np.float32), 4099, axis=0)
    queries = rng.normal(size=(1025, 512))
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    right = np.stack([np.arange(1025), rng.integers(0, 4099, 1025)], axis=1)
    assert set(evaluation._ranks(queries, candidates, right).tolist()) == {4099}


def test_memory_is_that_of_a_block():
    rng = np.random.default_rng(0)
    queries, candidates = np.repeat(unit_with_ties(rng, 10, 4), 600, 0), np.repeat(unit_with_ties(rng, 10, 4), 1200, 0)
    right = np.stack([np.arange(6000), np.arange(6000)], axis=1)
    tracemalloc.start()
    try:
        evaluation._ranks(queries, candidates, right)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150e6  # all similarities would take 576e6


def captions_with_duplicates(rng, count):
    """Several captions for each picture, some of other pictures as well, some twice."""
    pool = [f"text {i}" for i in range(count)]
    return [[str(text) for text in rng.choice(pool, rng.integers(1, 6))] for _ in range(count)]


@pytest.mark.parametrize("seed", range(4))
def test_retrieval_is_that_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    images = unit_with_ties(rng, 40)
    texts = dict(zip((f"text {i}" for i in range(40)), unit_with_ties(rng, 40), strict=True))
    captions = captions_with_duplicates(rng, 40)
    data = Items(*((i, texts_, None) for i, texts_ in enumerate(captions)))
    found = clipmb.evaluate(Lookup(images, texts), data, batch_size=7)
    assert "zero_shot" not in found
    assert found["skipped"] == []

    every = [text for several in captions for text in several]  # one by one, nothing shared
    assert len(set(every)) < len(every)
    similar = images.astype(np.float64) @ np.array([texts[text] for text in every], np.float64).T
    right = np.array([[text in several for text in every] for several in captions])
    for way, ranks in (
        ("image_to_text", brute_ranks(similar, right, [1] * len(every))),
        ("text_to_image", brute_ranks(similar.T, right.T, [1] * 40)),
    ):
        expected = {f"recall@{k}": np.mean(ranks <= k) for k in (1, 5, 10)}
        assert found["retrieval"][way] == pytest.approx({**expected, "median_rank": np.median(ranks)}, abs=1e-15)
        assert expected["recall@1"] < expected["recall@10"] < 1
    assert found["retrieval"]["images"] == 40
    assert found["retrieval"]["captions"] == len(every)


def test_a_model_that_embeds_everything_alike_is_never_right():
    images = np.full((20, 4), 0.5, np.float32)
    texts = {f"text {i}": images[0] for i in range(20)} | {f"a photo of a {i}.": images[0] for i in range(20)}
    found = clipmb.evaluate(Lookup(images, texts), Items(*((i, [f"text {i}"], str(i)) for i in range(20))))
    assert found["zero_shot"]["top5"] == 0
    for way in ("image_to_text", "text_to_image"):
        assert found["retrieval"][way] == {"recall@1": 0, "recall@5": 0, "recall@10": 0, "median_rank": 20}


@pytest.mark.parametrize("seed", range(3))
def test_classification_is_that_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    names = [f"class {i}" for i in range(12)]
    images, classes = unit_with_ties(rng, 60), unit_with_ties(rng, 12)
    texts = {f"a photo of a {name}.": embeds for name, embeds in zip(names, classes, strict=True)}
    mine = rng.integers(0, 12, 60)
    data = Items(*((i, [], names[c]) for i, c in enumerate(mine)))
    found = clipmb.evaluate(Lookup(images, texts), data, labels=names)
    similar = images.astype(np.float64) @ classes.astype(np.float64).T
    ranks = brute_ranks(similar, np.eye(12, dtype=bool)[mine], [1] * 12)
    expected = {"top1": np.mean(ranks <= 1), "top5": np.mean(ranks <= 5), "classes": 12, "images": 60}
    assert found == {"zero_shot": pytest.approx(expected, abs=1e-15), "skipped": []}
    assert 0 < expected["top1"] < expected["top5"] < 1


def test_broken_items_are_left_out_counted_and_named(caplog):
    rng = np.random.default_rng(0)
    images = unit_with_ties(rng, 9)
    texts = {f"text {i}": images[i] for i in range(9)} | {"a photo of a x.": images[0], "a photo of a y.": images[1]}
    sound = [(i, [f"text {i}"], "xy"[i % 2]) for i in range(9)]
    broken = list(sound)
    broken[1] = (ValueError("cannot read item-1"), ["lost"], "x")
    broken[5] = ("five", ["lost too"], "y")  # opens, and cannot be preprocessed
    broken[7] = (7, ValueError("no text"), "z")
    broken[8] = (8, ["half a \ud83d"], "y")
    kept = [item for i, item in enumerate(sound) if i not in (1, 5, 7, 8)]
    expected = clipmb.evaluate(Lookup(images, texts), Items(*kept), batch_size=4)
    data = Items(*broken)
    data.left_out = [("row 3", "no picture")]
    with caplog.at_level(logging.WARNING, "clipmb"):
        found = clipmb.evaluate(Lookup(images, texts), data, batch_size=4)
    skipped = [(entry["id"], entry["reason"]) for entry in found["skipped"]]
    assert skipped[:4] == [
        ("row 3", "no picture"),
        ("item-1", "cannot read item-1"),
        ("item-5", "cannot process five"),
        ("item-7", "no text"),
    ]
    assert skipped[4][0] == "item-8"
    assert "surrogates" in skipped[4][1]
    assert "5 of 10" in caplog.text
    assert "row 3, item-1, item-5, item-7, item-8" in caplog.text
    assert {**found, "skipped": []} == expected


def test_only_broken_items_are_an_error():
    gone = (ValueError("gone"), ["a"], None)
    with pytest.raises(ValueError, match=r"At least one image.*2 that are not.*item-0: gone"):
        clipmb.evaluate(Lookup(np.eye(2), {}), Items(gone, gone))
    with pytest.raises(ValueError, match=r"1 items without; item-0 is broken: no text"):
        clipmb.evaluate(Lookup(np.eye(2), {}), Items((0, ValueError("no text"), None)))


def test_only_the_pictures_of_a_batch_are_open_at_once():
    alive, most = set(), 0

    class Picture(int):
        def __new__(cls, i):
            nonlocal most
            alive.add(i)
            most = max(most, len(alive))
            return int.__new__(cls, i)

        def __del__(self):
            alive.discard(int(self))

    class Lazy(Items):
        def image(self, i):
            return Picture(i)

    images = unit_with_ties(np.random.default_rng(0), 30)
    pipeline = Lookup(images, {f"text {i}": images[i] for i in range(30)})
    clipmb.evaluate(pipeline, Lazy(*((i, [f"text {i}"], None) for i in range(30))), batch_size=4)
    assert most <= 4
    assert pipeline.calls == [4] * 7 + [2]
    unused = Items((0, [], None), (1, ["text 1"], None))
    clipmb.evaluate(pipeline, unused)
    assert unused.opened == [1]


@pytest.mark.parametrize(
    ("items", "options", "words"),
    [
        ([], {}, "at least one item"),
        ([(0, [], None), (1, [], None)], {}, "labels or captions.*2 items without"),
        ([(0, [], "a"), (1, [], "b"), (1, [], "c")], {"labels": ["a", "x"]}, "one of the 2 labels.*2 others: 'b', 'c'"),
        ([(0, ["text"], None)], {"labels": ["a"]}, "labels can only be passed for data with labels"),
        ([(0, [], "a")], {"labels": ["a", "b", "a"]}, r"must be distinct.*\['a'\]"),
        ([(0, [], "a")], {"labels": []}, "at least one non-empty text"),
        ([(0, [], "a")], {"labels": ["a", " "]}, "at least one non-empty text"),
        ([(0, [], "a")], {"labels": 3}, "at least one non-empty text"),
        ([(0, [], "a")], {"labels": "no-such-file.txt"}, "no-such-file.txt"),
        ([(0, [], "a")], {"templates": "a photo"}, "template"),
        ([(0, [], "a")], {"batch_size": 0}, "batch_size"),
        ([(0, [], "a")], {"backend": "pt"}, "backend, dtype and device are fixed when the pipeline is created"),
        ([(0, [], "a")], {"image_column": "path"}, "when the data are opened"),
    ],
)
def test_errors_come_before_any_picture_is_opened(items, options, words):
    data = Items(*items)
    with pytest.raises(ValueError, match=words):
        clipmb.evaluate(Lookup(np.eye(2), {}), data, **options)
    assert data.opened == []


def test_a_model_is_a_pipeline_or_a_name():
    with pytest.raises(TypeError, match="CLIPPipeline"):
        clipmb.evaluate(object(), Items((0, ["text"], None)))


@pytest.mark.parametrize("where", ["image", "text", "class"])
def test_embeddings_that_are_not_finite_are_an_error(where):
    images = np.eye(3)
    texts = {"text": images[0], "a photo of a x.": images[1]}
    broken = {"image": images, "text": texts["text"], "class": texts["a photo of a x."]}
    broken[where] = broken[where].copy()
    broken[where][..., 0] = np.nan
    lookup = Lookup(broken["image"], {"text": broken["text"], "a photo of a x.": broken["class"]})
    with pytest.raises(ValueError, match=f"The {where} embeddings.*finite"):
        clipmb.evaluate(lookup, Items((0, ["text"], "x"), (1, ["text"], "x")))


def test_files_of_labels(tmp_path):
    images = np.eye(4, dtype=np.float32)
    texts = {f"a photo of a {name}.": images[i] for i, name in enumerate(["cat", "dog", "n1", "n2"])}
    data = Items((0, [], "n1"), (1, [], "n2"))
    path = tmp_path / "labels.txt"
    path.write_text("n1\n\n n2 \n", encoding="utf-8")
    assert clipmb.evaluate(Lookup(images, texts), data, labels=path)["zero_shot"]["top1"] == 0
    path.write_text("\ufeffn1\tcat\nn2\t dog\n", encoding="utf-8")
    assert clipmb.evaluate(Lookup(images, texts), data, labels=str(path))["zero_shot"]["top1"] == 1
    names = {"n2": "dog", "n1": "cat"}
    assert clipmb.evaluate(Lookup(images, texts), data, labels=names)["zero_shot"]["top1"] == 1
    for content, words in (("n1\tcat\nn2\n", "a tab"), ("n1\tcat\nn1\tdog", "distinct"), (" \n", "non-empty")):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=words):
            clipmb.evaluate(Lookup(images, texts), data, labels=path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("small"), CONFIG)
    pipeline = CLIPPipeline.from_pretrained(folder, backend=BACKENDS[0])
    processor: CLIPProcessor = pipeline.processor
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of real files: 9 pictures of 3 classes, one or two captions each, one of them broken, one too long."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        write = csv.writer(file)
        write.writerow(["image", "caption", "label"])
        for i in range(9):
            label = ("cat", "dog", "cup")[i % 3]
            Image.fromarray(rng.integers(0, 256, (24 + i, 30, 3), np.uint8)).save(folder / f"{i}.png")
            write.writerow([f"{i}.png", f"a {label} number {i}", label])
            if i % 2:
                write.writerow([f"{i}.png", f"{'very ' * (i * 3)}small {label}", label])
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:200])
    return folder / "pairs.csv"


def by_hand(pipeline, table):
    """The same measures, from all similarities at once, for data without ties."""
    rows = list(csv.DictReader(table.read_text("utf-8").splitlines()))
    rows = [row for row in rows if row["image"] != "4.png"]
    names = list(dict.fromkeys(row["image"] for row in rows))
    images = pipeline.encode_image([str(table.parent / name) for name in names], batch_size=4).astype(np.float64)
    texts = pipeline.encode_text([row["caption"] for row in rows], long_text="truncate").astype(np.float64)
    prompts = [template.replace("{}", label) for label in ("cat", "cup", "dog") for template in TEMPLATES]
    classes = pipeline.encode_text(prompts, long_text="truncate").astype(np.float64).reshape(3, 4, -1).mean(axis=1)
    scores = images @ (classes / np.linalg.norm(classes, axis=1, keepdims=True)).T
    right = np.array([[f"{i}" in name for i in range(9)] for name in names]).reshape(8, 3, 3).any(axis=1)[:, [0, 2, 1]]
    own = np.array([[row["image"] == name for row in rows] for name in names])
    ranks = [
        np.array([1 + (row[~mine] > row[mine].max()).sum() for row, mine in zip(similar, owned, strict=True)])
        for similar, owned in ((scores, right), (images @ texts.T, own), (texts @ images.T, own.T))
    ]
    recall = lambda ranks: {  # noqa: E731
        **{f"recall@{k}": np.mean(ranks <= k) for k in (1, 5, 10)}, "median_rank": np.median(ranks)
    }  # fmt: skip
    return {
        "zero_shot": {"top1": np.mean(ranks[0] == 1), "top5": 1.0, "classes": 3, "images": 8},
        "retrieval": {
            "image_to_text": recall(ranks[1]),
            "text_to_image": recall(ranks[2]),
            "images": 8,
            "captions": len(rows),
        },
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_real_files_in_every_backend(folder, table, backend):
    pipeline = CLIPPipeline.from_pretrained(folder, backend=backend)
    found = clipmb.evaluate(pipeline, table, templates=TEMPLATES, batch_size=5)
    (skipped,) = found.pop("skipped")
    assert skipped["id"] == "4.png"
    assert skipped["reason"]
    assert found == by_hand(pipeline, table)
    assert found["retrieval"]["text_to_image"]["recall@1"] < found["retrieval"]["text_to_image"]["recall@5"] < 1


def test_a_model_is_loaded_by_its_name(folder, table):
    named = clipmb.evaluate(str(folder), table, BACKENDS[0], templates=TEMPLATES, batch_size=5, dtype="float64")
    expected = by_hand(CLIPPipeline.from_pretrained(folder, backend=BACKENDS[0], dtype="float64"), table)
    assert {key: named[key] for key in expected} == expected
    json.dumps(named)


def run(*arguments):
    return invoke("evaluate", *arguments)


def test_command(folder, table, tmp_path):
    options = [table, "--model", folder, "--backend", BACKENDS[0], "--batch-size", 5]
    done = run(*options, *(part for template in TEMPLATES for part in ("--template", template)), "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    expected = by_hand(CLIPPipeline.from_pretrained(folder, backend=BACKENDS[0]), table)
    assert {key: found[key] for key in expected} == expected
    assert (found["backend"], found["data"], len(found["skipped"])) == (BACKENDS[0], str(table), 1)

    labels = tmp_path / "labels.txt"
    labels.write_text("cat\ndog\ncup\ncar\nbus\nhat\n", encoding="utf-8")
    shown = run(*options, "--labels", labels)
    assert shown.exit_code == 0, shown.output
    for words in ("8 images, 6 classes", "top1", "top5", "recall@10", "median rank", "text to image", "left out: 1"):
        assert words in shown.stdout
    assert f"{expected['retrieval']['text_to_image']['recall@5']:.2%}" in shown.stdout
    assert "4.png" in shown.stdout
    six = run(*options, "--labels", "cat, dog,cup,car,bus,hat", "--json")
    assert json.loads(six.stdout)["zero_shot"]["classes"] == 6


def test_templates_without_labels_are_reported(folder, table):
    unlabelled = table.with_name("unlabelled.csv")
    unlabelled.write_text(table.read_text("utf-8").replace("caption,label", "caption,other", 1), "utf-8")
    done = run(unlabelled, "--model", folder, "--backend", BACKENDS[0], "--template", "a {}")
    assert done.exit_code == 0, done.output
    assert "--template had no effect: the data has no labels." in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "DATA"),
        (["TABLE", "--batch-size", "0"], 2, "batch-size"),
        (["nowhere.csv"], 1, "nowhere.csv"),
        (["TABLE", "--labels", "cat"], 1, "--labels"),
        (["TABLE", "--labels", "cat,dog"], 1, "1 others: 'cup'"),
        (["TABLE", "--template", "x"], 1, "template"),
        (["TABLE", "--backend", "mxnet"], 2, "pt, tf, flax"),
        (["TABLE", "--caption-column", "nothing"], 1, "nothing"),
    ],
)
def test_errors_of_the_command(folder, table, arguments, code, words):
    done = run(*(table if argument == "TABLE" else argument for argument in arguments), "--model", folder)
    assert done.exit_code == code
    assert words in done.stderr
    assert done.stdout == ""
