"""The training loop: files, resuming, refusals; that frameworks compute the same is in tests/equivalence."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cases import equal, random_arrays
from conftest import BACKENDS
from PIL import Image
from processes import HANG, excerpt, invoke, python, run, start
from training_cases import small_model, small_pairs

import clipmb
from clipmb import CheckpointError, CLIPPipeline
from clipmb.common.checkpoint.safetensors import map_file
from clipmb.common.data.pairs import Pairs
from clipmb.common.training.recipe import Recipe
from clipmb.common.training.state import STATE_NAME, TrainingState
from clipmb.training import train

STEPS = {"steps": 7, "batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A model in ``model``, 18 pairs in ``pairs`` (5 batches an epoch), labelled ones in ``held-out``."""
    folder = tmp_path_factory.mktemp("training")
    small_model(folder / "model")
    small_pairs(folder / "pairs", 18)
    small_pairs(folder / "held-out", 6, seed=1)
    return folder


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Everything that a run goes on from: weights and moments."""
    return {**map_file(folder / "model.safetensors"), **map_file(folder / STATE_NAME)}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_bits(one: Path, other: Path) -> bool:
    return equal(tensors(one), tensors(other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_leaves_a_model_that_every_backend_reads(files, tmp_path, backend):
    out = tmp_path / "out"
    result = train(
        files / "pairs", files / "model", out, backend=backend, epochs=2, batch_size=4, learning_rate=3e-3,
        evaluation_data=files / "held-out", evaluate_every=4, save_every=3,
    )  # fmt: skip
    assert (result["steps"], result["skipped"]) == (10, 0)
    found = lines(out)
    steps = [line for line in found if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 11))
    assert [line["epoch"] for line in steps] == [0] * 5 + [1] * 5
    assert steps[-1]["loss"] == result["loss"]
    assert all(line["pairs_per_second"] > 0 and line["grad_norm"] > 0 for line in steps)
    assert [line["step"] for line in found if "evaluation" in line] == [4, 8, 10]
    assert 0 <= result["evaluation"]["zero_shot"]["top1"] <= 1
    assert result["evaluation"]["retrieval"]["images"] == 6
    assert (out / "curves.png").stat().st_size > 10_000
    state = TrainingState.read(out)
    assert (state.step, state.epoch, state.batch, state.backend) == (10, 2, 0, backend)
    assert state.recipe == Recipe(steps=10, batch_size=4, learning_rate=3e-3)
    pictures = sorted((files / "pairs").glob("*.png"))[:2]
    embeds = [CLIPPipeline.from_pretrained(out, backend=name).encode_image(pictures) for name in BACKENDS]
    before = CLIPPipeline.from_pretrained(files / "model", backend=backend).encode_image(pictures)
    assert np.abs(embeds[0] - before).max() > 1e-3
    for other in embeds[1:]:
        np.testing.assert_allclose(other, embeds[0], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_resuming_gives_the_bits_of_an_uninterrupted_run(files, tmp_path, backend, monkeypatch):
    """Also with the sigmoid loss, augmentation, and a frozen tower: all that a state has to remember."""
    options = {"backend": backend, "save_every": 2, "augment": "crop", "loss": "siglip", "freeze": ("text",), **STEPS}
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(files / "pairs", files / "model", whole, **options)

    module = __import__(f"clipmb.{backend}.training", fromlist=["Trainer"])
    step = module.Trainer.step

    def fails_once(self, batch):
        if self.steps == 5:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(module.Trainer, "step", fails_once)
    with pytest.raises(KeyboardInterrupt):
        train(files / "pairs", files / "model", parted, **options)
    monkeypatch.undo()
    assert TrainingState.read(parted).step == 4
    assert lines(parted)[-1]["step"] == 5
    result = train(files / "pairs", out=parted, backend=backend, resume=True, save_every=2, augment="crop")
    assert result["steps"] == 7
    assert same_bits(whole, parted)
    assert [line["step"] for line in lines(parted)] == list(range(1, 8))
    assert [line["loss"] for line in lines(parted)] == [line["loss"] for line in lines(whole)]


@pytest.mark.parametrize("moved", [(), ("config.json",)])
def test_starting_over_after_a_kill_in_a_save_leaves_nothing_of_the_former_run(files, tmp_path, moved):
    """The former run was killed when its save was committed, and its files were not all in place."""
    options = {"backend": BACKENDS[0], "batch_size": 4, "workers": 0}
    train(files / "pairs", files / "model", tmp_path, steps=1, **options)
    committed = tmp_path / ".clipmb-save"
    committed.mkdir()
    written = ["config.json", "model.safetensors", STATE_NAME]
    for name in set(written) - set(moved):
        (tmp_path / name).rename(committed / name)
    (committed / "clipmb-save.json").write_text(json.dumps({"written": written, "removed": []}))
    with pytest.raises(ValueError, match="out must be a folder without a checkpoint"):
        train(files / "pairs", files / "model", tmp_path, steps=2, **options)

    def stops(image, generator):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # killed again, before the first save
        train(files / "pairs", files / "model", tmp_path, steps=2, overwrite=True, augment=stops, **options)
    assert not committed.exists()
    assert not (tmp_path / STATE_NAME).exists()
    assert not (tmp_path / "metrics.jsonl").read_text()
    train(files / "pairs", files / "model", tmp_path, steps=2, resume=True, **options)  # from the model again
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


KILLED = """
import importlib, os, random, signal, sys, time, warnings
from pathlib import Path
warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # nothing is computed before it
from clipmb.training import train

pairs, model, out, backend, seed, kills = sys.argv[1:]
importlib.import_module(f"clipmb.{backend}.training")  # once and not in every child
if backend == "pt":
    import torch, torch._dynamo  # which an optimizer imports
    torch.set_num_threads(1)
metrics, dice, reached = Path(out, "metrics.jsonl"), random.Random(int(seed)), []
size = lambda: metrics.stat().st_size if metrics.exists() else 0
for kill in range(int(kills) + 1):
    child = os.fork()
    if not child:
        recipe = {"steps": 120, "batch_size": 4, "learning_rate": 3e-3}
        train(pairs, model, out, backend=backend, resume=True, save_every=2, **recipe)
        os._exit(0)
    wanted = size() + 300 * dice.randrange(1, 6) if kill < int(kills) else float("inf")
    ended, status = 0, 0
    while not ended and size() < wanted:  # some steps, and then in the middle of anything
        time.sleep(0.001)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        time.sleep(dice.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    reached.append(os.waitstatus_to_exitcode(status))
    if reached[-1] > 0:
        sys.exit(f"after {kill} kills a child ended by itself: {reached}")
print(*reached)
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_kills_at_random_moments_change_no_bit(files, tmp_path, backend):
    """kill -9, each time a while into the run, whatever it is doing: stepping, saving, writing metrics."""
    kills = 20 if backend == "pt" else 8  # the others compile their step after each
    options = {"backend": backend, "steps": 120, "batch_size": 4, "learning_rate": 3e-3}
    script = "import torch; torch.set_num_threads(1); " if backend == "pt" else ""
    script += "from clipmb.training import train; import sys; train"
    whole = [files / "pairs", files / "model", tmp_path / "a"]
    done = python("-c", f"{script}(*sys.argv[1:], **{options})", *whole)
    assert done.returncode == 0, excerpt(done.stderr)
    done = python("-c", KILLED, files / "pairs", files / "model", tmp_path / "b", backend, "7", str(kills))
    assert done.returncode == 0, excerpt(done.stderr)
    codes = done.stdout.split()
    assert codes[-1] == "0"
    assert codes.count("-9") >= kills * 3 // 4, codes  # the run may be over before the last of them
    assert same_bits(tmp_path / "a", tmp_path / "b")
    assert [line["loss"] for line in lines(tmp_path / "a")] == [line["loss"] for line in lines(tmp_path / "b")]


@pytest.mark.several
def test_a_run_changes_the_framework_and_the_way_it_computes(files, tmp_path):
    options = {"steps": 6, "batch_size": 6, "learning_rate": 1e-3}
    train(files / "pairs", files / "model", tmp_path / "whole", backend=BACKENDS[0], **options)
    begun = tmp_path / "begun"
    with pytest.raises(IndexError):
        train(files / "pairs", files / "model", begun, backend=BACKENDS[0], save_every=3, augment=_stops_after(20),
              workers=0, **options)  # fmt: skip
    assert TrainingState.read(begun).step == 3
    result = train(files / "pairs", out=begun, backend=BACKENDS[1], resume=True, chunk_size=2, local_loss=True)
    assert TrainingState.read(begun).backend == BACKENDS[1]
    whole = lines(tmp_path / "whole")
    assert result["loss"] == pytest.approx(whole[-1]["loss"], rel=1e-4)


def _stops_after(count: int):
    """An augmentation that changes nothing and ends the run at a picture."""
    left = list(range(count))

    def augment(image: Image.Image, generator: np.random.Generator) -> Image.Image:
        left.pop()
        return image

    return augment


def _signals(number: int, at: int):
    """An augmentation that changes nothing and sends this process a signal at an image."""
    seen = []

    def augment(image: Image.Image, generator: np.random.Generator) -> Image.Image:
        seen.append(image)
        if len(seen) == at:
            os.kill(os.getpid(), number)
        return image

    return augment


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_signal_ends_a_run_with_a_save_from_which_it_continues(files, tmp_path, backend, caplog):
    options = {**STEPS, "backend": backend, "workers": 0}
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(files / "pairs", files / "model", whole, **options)
    with pytest.raises(SystemExit) as caught:
        train(files / "pairs", files / "model", parted, augment=_signals(signal.SIGTERM, 1), **options)
    assert caught.value.code == 143
    step = TrainingState.read(parted).step
    assert 0 < step < options["steps"]
    assert len(lines(parted)) == step
    assert f"SIGTERM after step {step} of {options['steps']}; saved in" in caplog.messages[-1]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(files / "pairs", out=parted, backend=backend, resume=True)
    assert same_bits(whole, parted)


def test_signals_that_the_program_handles_are_its_own(files, tmp_path):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        options = {**STEPS, "backend": BACKENDS[0], "workers": 0, "steps": 2}
        train(files / "pairs", files / "model", tmp_path, augment=_signals(signal.SIGTERM, 1), **options)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
    assert TrainingState.read(tmp_path).step == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_ends_at_a_signal_with_one_line(files, tmp_path, number, code):
    arguments = ["train", files / "pairs", "--model", files / "model", "--out", tmp_path, "--backend", BACKENDS[0]]
    running = start("-m", "clipmb", *arguments, "--steps", 1_000_000, "--batch-size", 4, "--workers", 0)
    metrics = tmp_path / "metrics.jsonl"
    while running.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.05)
    running.send_signal(number)
    _, errors = running.communicate(timeout=HANG)
    assert running.returncode == code, errors
    assert [line for line in errors.splitlines() if number.name in line] == errors.splitlines()[-1:]
    assert TrainingState.read(tmp_path).step == len(lines(tmp_path)) > 0


def test_a_second_signal_ends_a_step_that_does_not_return(files, tmp_path):
    script = f"""
import time, clipmb
def augment(image, generator):
    print("waiting", flush=True)
    while True:
        time.sleep(1)
clipmb.train({str(files / "pairs")!r}, {str(files / "model")!r}, {str(tmp_path)!r}, steps=2, batch_size=4, workers=0,
             augment=augment, backend={BACKENDS[0]!r})
"""
    running = start("-c", script)
    assert running.stdout is not None
    assert running.stdout.readline() == "waiting\n"
    while running.poll() is None:  # signals that come together count as one
        running.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert running.returncode == 143
    assert running.communicate()[1].count("Traceback") == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_from_scratch_every_framework_begins_with_the_same_weights(files, tmp_path, backend):
    train(files / "pairs", files / "model", tmp_path, backend=backend, from_scratch=True, seed=5,
          **{**STEPS, "steps": 1, "learning_rate": 0.0})  # fmt: skip
    from clipmb.common.parameters import initial_weights, specs

    config = clipmb.CLIPConfig.from_pretrained(files / "model")
    expected = initial_weights(specs(config, "CLIPModel"), 5)
    found = map_file(tmp_path / "model.safetensors")
    assert all(np.array_equal(found[name], value) for name, value in expected.items())
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    assert expected[name].std() == pytest.approx((2 * config.text_config.hidden_size) ** -0.5, rel=0.1)
    assert not np.array_equal(expected[name], random_arrays(config, "CLIPModel")[name])


def test_columns_apply_to_evaluation_data_as_far_as_they_have_them(files, tmp_path):
    """Labelled data need no captions; without the columns, neither table could be read."""
    for name, columns in (("train", "image;foto;wort"), ("held-out", "image;foto;art")):
        rows = [f"no.png;{path};{place % 2}" for place, path in enumerate(sorted((files / "pairs").glob("*.png"))[:4])]
        (tmp_path / f"{name}.csv").write_text("\n".join([columns, *rows]), "utf-8")
    options = {"backend": BACKENDS[0], "steps": 1, "batch_size": 4}
    columns = {"image_column": "foto", "caption_column": "wort", "label_column": "art", "separator": ";"}
    held_out = tmp_path / "held-out.csv"
    result = train(
        tmp_path / "train.csv", files / "model", tmp_path / "out", evaluation_data=held_out, columns=columns, **options
    )
    assert result["evaluation"]["zero_shot"]["images"] == 4
    assert "retrieval" not in result["evaluation"]
    opened = Pairs.open(tmp_path / "train.csv", image_column="foto", caption_column="wort", separator=";")
    for data, evaluation_data, message in (
        (tmp_path / "train.csv", None, "label_column applies to the file of evaluation_data"),
        (opened, held_out, "caption_column must name a column"),
        (tmp_path / "train.csv", tmp_path / "train.csv", "label_column must name a column"),
    ):
        with pytest.raises(ValueError, match=message):
            train(data, files / "model", tmp_path / "no", evaluation_data=evaluation_data, columns=columns, **options)
    with pytest.raises(ValueError, match="Columns are chosen when the data are opened"):
        train(opened, files / "model", tmp_path / "no", columns={"separator": ";"}, **options)
    assert not (tmp_path / "no").exists()


def test_broken_pictures_are_left_out_and_named(files, tmp_path):
    small_pairs(tmp_path / "pairs", 10)
    (tmp_path / "pairs" / "3.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    result = train(tmp_path / "pairs", files / "model", out, backend=BACKENDS[0], epochs=2, batch_size=4)
    assert (result["steps"], result["skipped"]) == (6, 2)
    ledger = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [(entry["epoch"], "3.png" in entry["id"]) for entry in ledger] == [(0, True), (1, True)]


@pytest.fixture(scope="module")
def done(files, tmp_path_factory) -> Path:
    """A run of two steps that is over."""
    out = tmp_path_factory.mktemp("done") / "out"
    train(files / "pairs", files / "model", out, backend=BACKENDS[0], **{**STEPS, "steps": 2})
    return out


class TestRefusals:
    """Bad input is one clear error, and nothing is lost by it."""

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({}, r"out must be a folder without a checkpoint.*resume=True.*overwrite=True"),
            ({"resume": True, "overwrite": True}, r"resume and overwrite cannot both be set"),
            ({"resume": True, "steps": 3}, r"must use its own recipe.*steps=3 instead of 2"),
            ({"resume": True, "steps": 2, "loss": "siglip"}, r"loss='siglip' instead of 'clip'"),
            ({"overwrite": True}, r"needs a length"),
            ({"overwrite": True, "steps": 2, "epochs": 2}, r"either epochs or steps, not both"),
            ({"overwrite": True, "epochs": 0}, r"epochs must be a whole number"),
            ({"overwrite": True, "steps": 2, "learning_rat": 1.0}, r"learning_rat.*Remove or correct"),
            ({"overwrite": True, "steps": 2, "batch_size": 0}, r"batch_size must be a whole number.*Received: 0"),
            ({"overwrite": True, "steps": 2, "loss": "mse"}, r"loss must be one of 'clip', 'siglip'"),
            ({"overwrite": True, "steps": 2, "freeze": ("text", "vision")}, r"At least one tower must be trained"),
            ({"overwrite": True, "steps": 2, "freeze": ("head",)}, r"freeze must be one of"),
            ({"overwrite": True, "steps": 2, "betas": (0.9,)}, r"betas must be two numbers"),
            ({"overwrite": True, "steps": 2, "save_every": 0}, r"save_every must be"),
        ],
    )
    def test_arguments(self, files, done, given, message):
        before = tensors(done)
        with pytest.raises(ValueError, match=message):
            train(files / "pairs", files / "model", done, backend=BACKENDS[0], **given)
        after = tensors(done)
        assert all(after[name].tobytes() == value.tobytes() for name, value in before.items())

    def test_other_data(self, files, done):
        with pytest.raises(ValueError, match=r"resumed run must use the same data"):
            train(files / "held-out", out=done, resume=True, backend=BACKENDS[0])

    def test_no_model(self, files, tmp_path):
        with pytest.raises(ValueError, match=r"needs a model to start from"):
            train(files / "pairs", out=tmp_path / "x", steps=1)

    def test_a_file_as_folder(self, files, tmp_path):
        (tmp_path / "x").write_text("mine")
        with pytest.raises(ValueError, match=r"Pass a folder, not a file"):
            train(files / "pairs", files / "model", tmp_path / "x", steps=1)
        assert (tmp_path / "x").read_text() == "mine"

    def test_a_damaged_state(self, files, done, tmp_path):
        import shutil

        shutil.copytree(done, tmp_path / "x")
        (tmp_path / "x" / STATE_NAME).write_bytes((done / STATE_NAME).read_bytes()[:100])
        with pytest.raises(CheckpointError, match=STATE_NAME):
            train(files / "pairs", out=tmp_path / "x", resume=True, backend=BACKENDS[0])

    def test_a_loss_that_is_not_finite_leaves_the_last_save(self, files, tmp_path):
        with pytest.raises(ValueError, match=r"loss of step \d+ must be finite.*Lower learning_rate"):
            train(files / "pairs", files / "model", tmp_path, backend=BACKENDS[0], save_every=1,
                  **{**STEPS, "steps": 50, "learning_rate": 1e30, "clip_norm": 0})  # fmt: skip
        assert np.isfinite(TrainingState.read(tmp_path).tensors["first_moment.logit_scale"])

    @pytest.mark.backend("tf")
    def test_tensorflow_has_no_fsdp(self, files, tmp_path):
        with pytest.raises(ValueError, match=r"distributed='data'"):
            train(files / "pairs", files / "model", tmp_path / "x", backend="tf", distributed="fsdp", steps=1)


def test_the_command(files, tmp_path):
    arguments = ["train", files / "pairs", "--model", files / "model", "--out", tmp_path / "out", "--steps", 3,
                 "--batch-size", 4, "--lr", 1e-3, "--backend", BACKENDS[0], "--eval", files / "held-out",
                 "--freeze", "text", "--beta2", 0.95, "--clip-norm", 0]  # fmt: skip
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    assert "loss of the last step" in done.stdout
    assert "zero_shot top1" in done.stdout
    recipe = TrainingState.read(tmp_path / "out").recipe
    assert (recipe.betas, recipe.clip_norm, recipe.freeze) == ((0.9, 0.95), None, ("text",))
    refused = invoke(*arguments)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: out must be a folder without a checkpoint")
    arguments = ["train", files / "pairs", "--out", tmp_path / "out", "--resume", "--json", "--backend", BACKENDS[0]]
    resumed = invoke(*arguments)
    assert json.loads(resumed.stdout)["steps"] == 3


@pytest.mark.backend("pt")
def test_two_processes_write_one_checkpoint(files, tmp_path):
    """The whole command under torchrun, as the README says it, against one process."""
    options = ["--steps", "4", "--batch-size", "5", "--lr", "1e-3", "--model", str(files / "model"), "--backend", "pt"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
                "--rdzv-endpoint=localhost:0", "-m"]  # fmt: skip
    for name, launcher, more in (("one", [sys.executable, "-m"], []), ("two", torchrun, ["--distributed", "data"])):
        command = [*launcher, "clipmb", "train", str(files / "pairs"), "--out", str(tmp_path / name), *options, *more]
        done = run(command, {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, excerpt(done.stderr)
    one, two = (lines(tmp_path / name) for name in ("one", "two"))
    np.testing.assert_allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=1e-5)


@pytest.mark.backend("pt")
def test_a_signal_to_one_process_ends_all_after_the_same_step(files, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    arguments = ["train", files / "pairs", "--model", files / "model", "--out", tmp_path, "--backend", "pt"]
    options = ["--steps", 1_000_000, "--batch-size", 4, "--distributed", "data"]
    running = [
        start("-m", "clipmb", *arguments, *options, **place, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)
    ]
    metrics = tmp_path / "metrics.jsonl"
    while running[0].poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=HANG)[1] for process in running]
    assert [process.returncode for process in running] == [143, 143], errors
    step = TrainingState.read(tmp_path).step
    assert step == len(lines(tmp_path)) > 0
    assert f"SIGTERM after step {step} of" in errors[0]
    assert "SIGTERM" not in errors[1]
