"""Saves beside readers, other writers and kills: every interleaving at every file operation, and real processes."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from cases import CONFIGS, random_arrays
from processes import excerpt, python

from clipmb import CheckpointError, CLIPTextConfig
from clipmb.common.checkpoint import write_safetensors
from clipmb.common.checkpoint.tensors import Deferred, lazy
from clipmb.common.pretrained import PretrainedMixin
from clipmb.common.saving import Transaction, current, names, prepared_beside, read_whole

OLD = {"config.json": "old", "model.safetensors": "old", "model.safetensors.index.json": "old"}
NEW = {"config.json": "new", "model.safetensors": "new", "tokenizer.json": "new"}
WHOLE = (OLD, NEW)


def save(folder: Path, files: dict[str, str]) -> None:
    with Transaction(folder) as opened:
        opened.remove(*OLD, *NEW)
        for name, content in files.items():
            opened.write(name, content)


def seen(folder: Path) -> dict[str, str]:
    """What a reader sees: it looks names up one by one, as loaders do."""

    def read() -> dict[str, str]:
        paths = {name: current(folder, name) for name in sorted({*OLD, *NEW})}
        return {name: path.read_text() for name, path in paths.items() if path is not None}

    return read_whole(folder, read)


def plain(folder: Path) -> dict[str, str]:
    """What everybody else sees."""
    return {path.name: path.read_text() for path in folder.iterdir()}


# -- every interleaving -----------------------------------------------------------------------------------------------

MUTATING = ("rename", "replace", "unlink", "rmdir", "mkdir")  # what another process can see
OBSERVING = ("stat", "lstat", "listdir", "scandir", "open")


class Killed(BaseException):
    """What ends a writer as a kill does: nothing of it runs on, not even what cleans up."""


class Paused:
    """A function in a thread of its own that stops before each file operation until it is let go on."""

    def __init__(self, work, operations: tuple[str, ...]) -> None:
        self.operations, self.done, self.result, self.dead = operations, False, None, False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()
        self._stopped.acquire()

    def _run(self, work) -> None:
        ROLE.paused = self
        self.stop()
        try:
            self.result = work()
        except Killed:
            pass
        except BaseException as error:
            self.result = error
        self.done = True
        self._stopped.release()

    def stop(self) -> None:
        self._stopped.release()
        self._go.acquire()

    def advance(self, steps: int | None = None) -> int:
        """Lets it do so many operations, or all that are left; returns how many it did."""
        for done in itertools.count() if steps is None else range(steps):
            if self.done:
                return done
            self._go.release()
            self._stopped.acquire()
        return steps or 0

    def kill(self) -> None:
        self.dead = True
        self.advance()


ROLE = threading.local()


@pytest.fixture
def stepped(monkeypatch):
    """Makes the file operations of `Paused` functions stop."""

    def patched(name, real):
        def operation(*arguments, **options):
            paused = getattr(ROLE, "paused", None)
            if paused is not None and name in paused.operations:
                if not paused.dead:
                    paused.stop()
                if paused.dead:
                    raise Killed
            return real(*arguments, **options)

        return operation

    for name in (*MUTATING, *OBSERVING):
        monkeypatch.setattr(os, name, patched(name, getattr(os, name)))
    monkeypatch.setattr(io, "open", patched("open", io.open))


def count(work, operations) -> int:
    return Paused(work, operations).advance()


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_reader_sees_one_save_whole_whatever_a_writer_does_meanwhile(tmp_path, stepped, every):
    """The writer stops anywhere, the reader too, the writer goes on to anywhere; then both end, or it is killed."""
    fresh = (tmp_path / str(number) for number in itertools.count())
    folder = next(fresh)
    save(folder, OLD)
    steps, looks = count(lambda: save(folder, NEW), MUTATING), count(lambda: seen(folder), OBSERVING)
    assert steps > 8
    assert looks > 10
    moments = itertools.product(range(steps + 1), range(looks + 1), range(steps + 1))
    results = []
    for first, look, second in itertools.islice((m for m in moments if m[0] < m[2]), 0, None, every):
        folder = next(fresh)
        save(folder, OLD)
        writer = Paused(lambda folder=folder: save(folder, NEW), MUTATING)
        writer.advance(first)
        reader = Paused(lambda folder=folder: seen(folder), OBSERVING)
        reader.advance(look)
        writer.advance(second - first)
        reader.advance()
        assert reader.result in WHOLE, (first, look, second, reader.result)
        results.append(reader.result)
        if (first + look + second) % 2:
            writer.kill()
        else:
            writer.advance()
            assert plain(folder) == NEW
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        assert seen(folder) in WHOLE
        assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}  # reading changes nothing
    assert OLD in results
    assert NEW in results


def test_the_next_writer_repairs_what_a_writer_killed_at_any_operation_left(tmp_path, stepped):
    fresh = (tmp_path / str(number) for number in itertools.count())
    first = next(fresh)
    save(first, OLD)
    results = []
    for step in range(count(lambda: save(first, NEW), MUTATING) + 1):
        folder = next(fresh)
        save(folder, OLD)
        writer = Paused(lambda folder=folder: save(folder, NEW), MUTATING)
        writer.advance(step)
        writer.kill()
        whole = seen(folder)
        results.append(whole)
        with Transaction(folder) as opened:
            opened.write("other.json", "more")
        assert plain(folder) == {**whole, "other.json": "more"}
    assert results.index(NEW) > 1  # each moment before the commit leaves the old files, each after it the new ones
    assert results == [OLD] * results.index(NEW) + [NEW] * (len(results) - results.index(NEW))


# -- writers ----------------------------------------------------------------------------------------------------------


def test_writers_wait_for_each_other(tmp_path):
    order = []

    def slow() -> None:
        with Transaction(tmp_path / "new") as opened:
            order.append("first in")
            entered.set()
            time.sleep(0.3)
            opened.write("config.json", "first")
            order.append("first out")

    entered = threading.Event()
    thread = threading.Thread(target=slow)
    thread.start()
    entered.wait()
    with Transaction(tmp_path / "new") as opened:
        order.append("second in")
        opened.write("config.json", "second")
    thread.join()
    assert order == ["first in", "first out", "second in"]
    assert plain(tmp_path / "new") == {"config.json": "second"}


def test_a_failed_save_leaves_the_old_files_and_frees_the_lock(tmp_path):
    save(tmp_path, OLD)
    with pytest.raises(TypeError), Transaction(tmp_path) as opened:
        opened.write("config.json", None)
    assert plain(tmp_path) == OLD
    save(tmp_path, NEW)
    assert plain(tmp_path) == NEW


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_folder_of_a_files_name_is_refused_before_anything_changes(tmp_path, name):
    """The second is a file that the save removes."""
    (tmp_path / name).mkdir()
    (tmp_path / "model.safetensors").write_text("old")
    with pytest.raises(ValueError, match=f"a file called {name}"):
        save(tmp_path, NEW)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "model.safetensors"])
    assert (tmp_path / "model.safetensors").read_text() == "old"


@pytest.mark.parametrize("name", ["../config.json", ".hidden.json", "sub/config.json"])
def test_only_plain_files_of_the_folder_are_saved_or_removed(tmp_path, name):
    with pytest.raises(ValueError, match="plain files of its folder"), Transaction(tmp_path / "to") as opened:
        opened.remove(name)
    assert not (tmp_path / "to").exists()


def test_what_killed_saves_staged_is_cleared_by_the_next_save(tmp_path):
    staged = tmp_path / ".clipmb-staging-of-a-killed-save"
    staged.mkdir()
    (staged / "model.safetensors").write_text("half")
    save(tmp_path, NEW)
    assert plain(tmp_path) == NEW


def test_a_full_disk_names_the_folder_and_the_room_that_is_needed(tmp_path, monkeypatch):
    save(tmp_path, OLD)
    needs = "needs 1,000,000,000,000,000 bytes, and the disk has"
    with pytest.raises(OSError, match=needs) as caught, Transaction(tmp_path) as opened:
        opened.reserve(10**15)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no room for the save: more than 9 bytes are needed") as caught:
        save(tmp_path, NEW)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
    assert plain(tmp_path) == OLD


# -- strangers' folders -----------------------------------------------------------------------------------------------


def hostile_link(folder: Path, foreign: Path) -> None:
    (folder / ".clipmb-save").symlink_to(foreign)
    plan = {"written": [], "removed": ["config.json", "model.safetensors"]}
    (foreign / "clipmb-save.json").write_text(json.dumps(plan))


def hostile_names(folder: Path, foreign: Path) -> None:
    (folder / ".clipmb-save").mkdir()
    plan = {"written": [], "removed": ["../foreign/config.json", str(foreign / "config.json")]}
    (folder / ".clipmb-save" / "clipmb-save.json").write_text(json.dumps(plan))


def hostile_file(folder: Path, foreign: Path) -> None:
    (folder / ".clipmb-save").mkdir()
    (folder / ".clipmb-save" / "config.json").symlink_to(foreign / "config.json")
    plan = {"written": ["config.json"], "removed": []}
    (folder / ".clipmb-save" / "clipmb-save.json").write_text(json.dumps(plan))


def nonsense(folder: Path, foreign: Path) -> None:
    (folder / ".clipmb-save").mkdir()
    (folder / ".clipmb-save" / "clipmb-save.json").write_text("[" * 100_000)


def not_a_folder(folder: Path, foreign: Path) -> None:
    (folder / ".clipmb-save").write_text("hello")


@pytest.mark.parametrize("prepare", [hostile_link, hostile_names, hostile_file, nonsense, not_a_folder])
def test_a_strangers_plan_is_not_obeyed(tmp_path, prepare):
    folder, foreign = tmp_path / "folder", tmp_path / "foreign"
    save(folder, OLD)
    foreign.mkdir()
    (foreign / "config.json").write_text("foreign")
    prepare(folder, foreign)
    assert seen(folder) == OLD
    assert names(folder) == sorted(path.name for path in folder.iterdir() if path.is_file())
    if prepare is hostile_file:  # a link is no file of a save; the rest of this plan is fulfilled
        save(folder, NEW)
        assert plain(folder) == NEW
    else:
        with pytest.raises(CheckpointError, match="was not written by clipmb"):
            save(folder, NEW)
        assert {name: (folder / name).read_text() for name in OLD} == OLD
    assert (foreign / "config.json").read_text() == "foreign"


# -- real processes ---------------------------------------------------------------------------------------------------

SOAK = """
import sys, time, pathlib
from clipmb.common.saving import Transaction, current, read_whole
folder, role, end = pathlib.Path(sys.argv[1]), sys.argv[2], time.time() + float(sys.argv[3])
NAMES = ["config.json", "model.safetensors", "tokenizer.json"]
count, kinds = 0, set()
while time.time() < end:
    if role == "reader":
        found = read_whole(folder, lambda: {name: current(folder, name).read_text() for name in NAMES})
        assert len(found) == 3 and len(set(found.values())) == 1, found
        kinds |= set(found.values())
    else:
        with Transaction(folder) as save:
            for name in NAMES:
                save.write(name, f"{role} {count}")
    count += 1
print(count, len(kinds))
"""


def test_readers_and_two_writers_in_processes_of_their_own(tmp_path):
    with Transaction(tmp_path) as opened:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            opened.write(name, "begin")
    threads, results = [], {}
    for role in ("reader", "a", "b"):

        def work(role: str = role) -> None:
            results[role] = python("-c", SOAK, tmp_path, role, 2)

        threads.append(threading.Thread(target=work))
        threads[-1].start()
    for thread in threads:
        thread.join()
    for role, done in results.items():
        assert done.returncode == 0, f"{role}: {excerpt(done.stderr)}"
        assert int(done.stdout.split()[0]) > 3, role
    assert len(set(plain(tmp_path).values())) == 1


# -- models -----------------------------------------------------------------------------------------------------------


class Reader(PretrainedMixin):
    """A text tower that is nothing but its config and its arrays."""

    config_class, head = CLIPTextConfig, "CLIPTextModel"

    @classmethod
    def from_arrays(cls, config, arrays, initialised, dtype):
        return config.vocab_size, arrays["text_model.embeddings.token_embedding.weight"].shape


def save_tower(folder: Path, vocab_size: int, **options: object) -> None:
    """Saves a tower of another vocabulary, so that neither fits the config of the other."""
    config = CLIPTextConfig.from_dict(CONFIGS["plain"].text_config.to_dict(), vocab_size=vocab_size)
    with Transaction(folder) as opened:
        opened.write("config.json", config.to_json_string())
        write_safetensors(opened, random_arrays(config, "CLIPTextModel"), **options)


@pytest.mark.parametrize("steps", [None, 4, 7])
def test_a_model_is_of_one_save_whatever_a_writer_does_meanwhile(tmp_path, stepped, steps):
    """The reader stops at every look, and the writer saves then: all of it, or on to the commit and the first moves."""
    save_tower(tmp_path / "first", 99)
    looks = count(lambda: Reader.from_pretrained(tmp_path / "first"), OBSERVING)
    assert looks > 10
    for look in range(looks):
        folder = tmp_path / str(look)
        save_tower(folder, 99)
        reader = Paused(lambda folder=folder: Reader.from_pretrained(folder), OBSERVING)
        reader.advance(look)
        writer = Paused(lambda folder=folder: save_tower(folder, 120, max_shard_size="20KB"), MUTATING)
        writer.advance(steps)
        if steps is not None:
            writer.kill()
        reader.advance()
        assert reader.result in ((99, (99, 32)), (120, (120, 32))), (look, reader.result)
        if steps is None:
            assert Reader.from_pretrained(folder) == (120, (120, 32))


def test_a_model_is_not_saved_where_there_is_no_room_for_it(tmp_path, monkeypatch):
    model = Reader()
    model.config = CONFIGS["plain"].text_config
    weights = Deferred(lazy(random_arrays(model.config, "CLIPTextModel")))
    free = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(OSError, match=r"The save needs [\d,]{7,} bytes, and the disk has 10,000 left") as caught:
        model.save_arrays(weights, tmp_path / "to")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "to"))
    assert not (tmp_path / "to").exists()


def test_what_a_killed_process_prepared_is_removed_by_the_next_for_the_same_folder(tmp_path):
    killed = """
import os, pathlib, signal, sys
from clipmb.common.saving import prepared_beside
with prepared_beside(pathlib.Path(sys.argv[1])) as staging:
    (staging / "half").write_text("a half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    target, other = tmp_path / "to", tmp_path / "to-another"
    for folder in (target, other):
        assert python("-c", killed, folder).returncode == -9
    (tmp_path / ".clipmb-beside-to-mine").write_text("a file of somebody else")
    left = {path for path in tmp_path.iterdir() if path.is_dir()}
    assert len(left) == 2
    with prepared_beside(target) as living, prepared_beside(target) as second:
        here = {path for path in tmp_path.iterdir() if path.is_dir()}
        assert {living.parent, second.parent} < here
        assert len(here & left) == 1
        Transaction(second).__enter__().__exit__(None, None, None)  # a save into it does not wait for its own process
        (second / "whole").write_text("whole")
        second.rename(target)
    assert left & set(tmp_path.iterdir()) == here & left
    assert sorted(path.name for path in tmp_path.iterdir() if path not in left) == [".clipmb-beside-to-mine", "to"]
    assert (target / "whole").read_text() == "whole"
