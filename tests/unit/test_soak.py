"""Processes of their own that read and write one folder for 20 seconds: nothing raises, nothing is a mixture.

`test_saving.py` proves the protocol step by step; here it runs at full speed, in every format and framework.
`make test ARGS="-m slow -rP tests/unit/test_soak.py"` also says how often each process read or wrote.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cases import write_checkpoint
from conftest import BACKENDS
from format_cases import EVERYWHERE
from processes import HANG, excerpt, python, start
from training_cases import small_model, small_pairs

from clipmb import CLIPConfig
from clipmb.common.checkpoint.formats import FORMATS
from clipmb.common.convert import check_record
from clipmb.common.training.state import TrainingState

pytestmark = pytest.mark.slow
SECONDS = 20
CLASSES = {"pt": "CLIPModel", "tf": "TFCLIPModel", "flax": "FlaxCLIPModel"}

# Reads, or writes one of two models in turn, until the time is over; prints how often, and which models were seen.
ROLE = """
import itertools, json, sys, time
import clipmb
from clipmb.common.pretrained import PretrainedMixin

class Arrays(PretrainedMixin):
    config_class, head = clipmb.CLIPConfig, "CLIPModel"

    @classmethod
    def from_arrays(cls, config, arrays, initialised, dtype):
        made = cls()
        made.config, made.arrays = config, arrays
        return made

    def to_arrays(self):
        return self.arrays

role, folder, seconds, *sources = sys.argv[1:]
cls = Arrays if role in clipmb.common.checkpoint.formats.FORMATS or role == "arrays" else getattr(clipmb, role)

def sums(model):
    values = sorted(round(float(abs(array).sum()), 2) for array in model.to_arrays().values())
    return [model.config.text_config.vocab_size, *values]

known = [sums(cls.from_pretrained(source)) for source in sources]
seen, count, end = set(), 0, time.time() + float(seconds)
while time.time() < end:
    if role in clipmb.common.checkpoint.formats.FORMATS:
        clipmb.convert(sources[count % 2], folder, role, overwrite=True)
    else:
        seen.add(known.index(sums(cls.from_pretrained(folder))))  # a ValueError: a mixture
    count += 1
print(json.dumps([count, len(seen)]))
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two models whose vocabularies and values differ."""
    folder = tmp_path_factory.mktemp("soak")
    other = CLIPConfig.from_dict(EVERYWHERE.to_dict())
    other.text_config.vocab_size, other.text_config.eos_token_id = 120, 119
    return [write_checkpoint(folder / "a", EVERYWHERE), write_checkpoint(folder / "b", other, seed=1)]


def together(*roles: tuple[object, ...]) -> list[list[int]]:
    """Runs processes beside each other, which must all succeed; returns what they counted."""
    running = [start("-c", ROLE, *role) for role in roles]
    results = [process.communicate(timeout=HANG) for process in running]
    for process, (_, errors), role in zip(running, results, roles, strict=True):
        assert process.returncode == 0, f"{role}: {errors[-3000:]}"
    return [json.loads(out) for out, _ in results]


@pytest.mark.parametrize("name", FORMATS)
def test_readers_beside_a_writer(tmp_path, sources, name):
    readers = ["arrays", *(CLASSES[backend] for backend in BACKENDS if name == "safetensors")]
    write_checkpoint(tmp_path / "to", EVERYWHERE)
    counts = together(*((role, tmp_path / "to", SECONDS, *sources) for role in (name, *readers)))
    print("counts", counts)
    assert min(count for count, _ in counts) > 3
    assert counts[1][1] == 2  # both models were read


def test_two_writers_and_a_reader(tmp_path, sources):
    write_checkpoint(tmp_path / "to", EVERYWHERE)
    roles = ("safetensors", "flax-msgpack", "arrays")
    counts = together(*((role, tmp_path / "to", SECONDS, *sources) for role in roles))
    print("counts", counts)
    assert min(count for count, _ in counts) > 3


POLL = """
import sys, time
from pathlib import Path
import clipmb
from clipmb.common.checkpoint import formats
from clipmb.common.hub import Source
folder, count, seen = Path(sys.argv[1]), 0, set()
while not (folder / "config.json").exists() and not (folder / "done").exists():
    time.sleep(0.02)
print("polling", flush=True)
while not (folder / "done").exists():
    clip = clipmb.CLIPPipeline.from_pretrained(folder, backend="onnx")
    seen.add(float(clip.encode_text("a red picture").sum()))
    count += 1
    time.sleep(0.02)
print(count, len(seen))
"""


@pytest.mark.backend("onnx")
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_with_a_poller(tmp_path, backend):
    """An evaluation loads each save as soon as it is there, every 20 ms, and disturbs neither side."""
    data, model, out = small_pairs(tmp_path / "pairs", 24), small_model(tmp_path / "model"), tmp_path / "out"
    poller = start("-c", POLL, out)
    options = ("--backend", backend, "--steps", 60, "--save-every", 1, "--batch-size", 8, "--lr", 1e-3, "--workers", 0)
    trained = python("-m", "clipmb", "train", data, "--model", model, "--out", out, *options)
    (out / "done").touch()
    polled, errors = poller.communicate(timeout=HANG)
    assert trained.returncode == 0, excerpt(trained.stderr)
    assert poller.returncode == 0, errors[-3000:]
    count, different = map(int, polled.split()[1:])
    print("counts", count, different)
    assert different > 3
    assert TrainingState.read(out).step == 60


RACE = """
import os, sys
import clipmb
source, folder = sys.argv[1:]
for k in range(25):
    go, ready = os.pipe()
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            os.close(ready)
            os.read(go, 1)  # both begin when the pipe closes
            try:
                clipmb.convert(source, f"{folder}/{k}", "safetensors", max_shard_size="50KB")
            except ValueError as error:
                os._exit(2 if "must be new or empty" in str(error) else 3)
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(4)
            os._exit(0)
        children.append(child)
    os.close(go), os.close(ready)
    print(*sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""


def test_of_two_conversions_into_a_new_folder_one_wins_and_the_other_refuses(tmp_path, sources):
    done = python("-c", RACE, sources[0], tmp_path)
    assert done.stdout.splitlines() == ["0 2"] * 25, excerpt(done.stderr)
    for folder in Path(tmp_path).iterdir():
        assert check_record(folder) == []
