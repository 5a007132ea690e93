"""A few hundred damaged files for every reader, and that the harness of `make fuzz` would notice what must not be."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import fuzz_readers
import numpy as np
import pytest
from processes import python

from clipmb import CheckpointError
from clipmb.common.checkpoint import formats


@pytest.mark.parametrize("format", formats.FORMATS)
def test_damaged_files_give_weights_or_a_checkpoint_error(format):
    done = python(fuzz_readers.__file__, "--format", format, "--files", 300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "300 files" in done.stdout


@pytest.mark.parametrize("format", formats.FORMATS)
def test_the_damage_is_noticed_often_and_not_always(format, tmp_path, monkeypatch):
    """Otherwise the files would be too well, or so broken that nothing behind the first check is reached."""
    refused, load = [], formats.load

    def counted(source):
        try:
            loaded = load(source)
            refused.append(False)
        except CheckpointError:
            refused.append(True)
            raise
        return loaded

    monkeypatch.setattr(formats, "load", counted)
    monkeypatch.setattr(fuzz_readers, "samples", _samples)
    monkeypatch.setattr(fuzz_readers.resource, "setrlimit", lambda *_: None)
    assert fuzz_readers.work(format, 0, 0, 100, tmp_path / "progress") == []
    assert 20 < sum(refused) < 100


def _wrong(*_):
    raise KeyError("of a reader")


def _slow(*_):
    try:
        time.sleep(8)
    except Exception:
        _wrong()


def _greedy(*_):
    np.ones(300 << 20, np.uint8)  # 300 MB
    raise CheckpointError("damaged")


@pytest.mark.parametrize(("reader", "words"), [(_wrong, "KeyError"), (_slow, "slower"), (_greedy, "MB in")])
def test_the_harness_notices(reader, words, tmp_path, monkeypatch):
    calls = []

    def load(source):
        calls.append(source)
        return reader() if len(calls) > 3 else formats.format_of("safetensors").read(source)

    monkeypatch.setattr(formats, "load", load)
    monkeypatch.setattr(fuzz_readers, "samples", _samples)
    monkeypatch.setattr(fuzz_readers, "SECONDS", 3)
    monkeypatch.setattr(fuzz_readers.resource, "setrlimit", lambda *_: None)
    problems = fuzz_readers.work("safetensors", 0, 5, 1, tmp_path / "progress")
    assert len(problems) == 1, problems
    (problem,) = problems
    assert problem.startswith("safetensors 5: ")
    assert words in problem


_real_samples = fuzz_readers.samples


def _samples(format, base):
    """Writes valid files while `formats.load`, which a conversion reads back with, is replaced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "load", _load)
        return _real_samples(format, base)


_load = formats.load


def test_a_crash_is_reported_with_the_number_of_its_file(monkeypatch):
    script = """
import os, sys
import fuzz_readers
from pathlib import Path
def work(format, seed, first, count, progress):
    for number in range(first, first + count):
        progress.write_text(str(number))
        if number == 7:
            os.abort()
    return []
fuzz_readers.work = work
sys.exit(fuzz_readers.main())
"""
    run = subprocess.run

    def patched(command, **options):
        return run([command[0], "-c", script, *command[2:]], **options)

    monkeypatch.setattr(fuzz_readers.subprocess, "run", patched)
    monkeypatch.setenv("PYTHONPATH", ":".join([str(Path(fuzz_readers.__file__).parent), *sys.path]))
    found = list(fuzz_readers.batches("safetensors", 0, 0, 20))
    assert [size for size, _ in found] == [8, 12]
    assert found[0][1][0].startswith("safetensors 7: ended with -6")
    assert found[1][1] == []
