"""Batches: their order, their parts for processes and workers, their captions, threads and arguments."""

from __future__ import annotations

import itertools
import json
import logging
import threading

import numpy as np
import pytest
from data_cases import BOS, EOS, PROCESSOR, assert_same_batches, batches, folder_of, jpeg
from processes import python

from clipmb import CLIPImageProcessor, CLIPProcessor, CLIPTokenizerFast
from clipmb.common.data.batches import Batches
from clipmb.common.data.pairs import Pairs


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
    decoded = Pairs.decoded
    monkeypatch.setattr(Pairs, "decoded", lambda self, index: asked.append(index) or decoded(self, index))
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

    monkeypatch.setattr(Pairs, "decoded", fail)
    with pytest.raises(MemoryError, match="worker"):
        list(batches(ten, workers=3).epoch(0))
    assert not running()


def test_only_some_batches_are_decoded_ahead(tmp_path, monkeypatch):
    pairs = Pairs.open(folder_of(tmp_path, 40))
    asked = []
    decoded = Pairs.decoded
    monkeypatch.setattr(Pairs, "decoded", lambda self, index: asked.append(index) or decoded(self, index))
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
import itertools, signal, sys, threading, time
from clipmb import CLIPProcessor
from clipmb.common.data.batches import Batches
from clipmb.common.data.pairs import Pairs
pairs = Pairs.open(sys.argv[1])
calls = itertools.count()
def slow(image, generator):
    time.sleep(0.05)
    if next(calls) == 6:  # when both threads are there
        signal.raise_signal(signal.SIGINT)
    return image
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process started in the background lacks
try:
    for batch in Batches(pairs, CLIPProcessor(), batch_size=30, context=77, workers=2, augment=slow).epoch(0):
        pass
except KeyboardInterrupt:
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("clipmb-data")]
    print("interrupted", names)
"""
    done = python("-c", script, tmp_path)
    assert done.stdout.strip() == "interrupted []", done.stderr


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
