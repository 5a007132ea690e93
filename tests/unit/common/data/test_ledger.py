"""Broken items: left out, listed once, and too many of them."""

from __future__ import annotations

import pytest
from data_cases import batches, folder_of, jpeg, ledger_of, pair, tar_of

from clipmb.common.data.pairs import Pairs


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
    assert "must be an image that exists" in errors["007.jpg"]
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
