"""Training in Flax: its losses, its step, and the same step over eight devices and over two processes."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_arrays, relative
from conftest import TESTS
from processes import HANG
from training_cases import batch, largest_difference, recipe
from training_flax_worker import CONFIG, EIGHT, SIZES, STEPS, chosen, trainer

from clipmb import CheckpointError
from clipmb.common.parameters import specs
from clipmb.common.training.recipe import MAX_LOGIT_SCALE, Processes, decays
from clipmb.common.training.state import FIRST, SECOND, TrainingState
from clipmb.flax.losses import clip_loss, siglip_loss
from clipmb.flax.training import start_processes

LARGE = "vision_model.encoder.layers.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Runs all jobs of the worker side by side."""
    folder = tmp_path_factory.mktemp("jobs")
    worker = str(TESTS / "training_flax_worker.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = {"one": [], "eight": [], "two 0": ["0", port], "two 1": ["1", port]}
    environment = {name: value for name, value in os.environ.items() if name != "JAX_ENABLE_X64"}
    started = {
        name: subprocess.Popen(
            [sys.executable, worker, name.split()[0], str(folder / name), *more],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, more in arguments.items()
    }
    try:
        for name, process in started.items():
            _, errors = process.communicate(timeout=HANG)
            assert process.returncode == 0, f"{name}: {errors[-3000:]}"
    finally:
        for process in started.values():
            process.kill()
            process.communicate()
    return {name: pickle.loads((folder / name).read_bytes()) for name in arguments}


@pytest.fixture(scope="module")
def one(jobs):
    return jobs["one"]


@pytest.fixture(scope="module")
def eight(jobs):
    return jobs["eight"]


# -- losses -----------------------------------------------------------------------------------------------------------


def embeds(n):
    rng = np.random.default_rng(n)
    text, image = rng.standard_normal((2, n, 6))
    return text / np.linalg.norm(text, axis=1, keepdims=True), image / np.linalg.norm(image, axis=1, keepdims=True)


def numpy_clip(text, image, scale):
    logits = np.exp(scale) * text @ image.T
    both = (np.log(np.exp(table).sum(axis=1)) - np.diag(table) for table in (logits, logits.T))
    return sum(losses.mean() for losses in both) / 2


def numpy_siglip(text, image, scale, bias):
    logits = np.exp(scale) * text @ image.T + bias
    signs = 2 * np.eye(len(text)) - 1
    return np.log1p(np.exp(-signs * logits)).sum() / len(text)


LOSSES = {"clip": (clip_loss, numpy_clip, (1.5,)), "siglip": (siglip_loss, numpy_siglip, (1.5, -2.0))}
VALID = np.array([True, True, False, True, True, False, True, False])


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_the_papers(name):
    loss, formula, scalars = LOSSES[name]
    text, image = embeds(8)
    with jax.enable_x64(True):
        assert float(loss(text, image, *scalars)) == pytest.approx(formula(text, image, *scalars), rel=1e-13)
        some = formula(text[VALID], image[VALID], *scalars)
        assert float(loss(text, image, *scalars, valid=VALID)) == pytest.approx(some, rel=1e-13)
        for valid, whole in ((None, formula(text, image, *scalars)), (VALID, some)):
            parts = [
                loss(text, image, *scalars, valid=valid, rows=rows)
                for rows in (slice(0, 3), slice(3, 4), jnp.arange(4, 8))
            ]
            assert float(sum(parts)) == pytest.approx(whole, rel=1e-13)
            assert len({float(part) for part in parts}) == 3


@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_padding_have_no_gradient(name):
    loss, _, scalars = LOSSES[name]
    with jax.enable_x64(True):
        text, image = embeds(8)
        gradient = np.asarray(jax.grad(lambda text: loss(text, image, *scalars, valid=VALID))(text))
    assert (gradient[~VALID] == 0).all()
    assert (np.abs(gradient[VALID]).max(axis=1) > 1e-3).all()


# -- the gradient -----------------------------------------------------------------------------------------------------


def assert_same_gradients(found, expected):
    """Losses and all gradients, of all sizes."""
    for size in SIZES:
        assert found[size][0] == pytest.approx(expected[size][0], rel=1e-12, abs=1e-12)
        if size > 1 or expected[size][0] > 0:  # one pair alone is always right: no gradient
            assert largest_difference(found[size][1], expected[size][1]) < 1e-10
        else:
            assert max(np.abs(values).max() for values in found[size][1].values()) == 0


def test_the_gradient_is_that_of_the_models_loss(one):
    """The trainer fills the seven pairs up to twelve, and the texts to a longer one."""
    loss, gradients = one["plain"][7]
    assert loss == pytest.approx(one["model"][0], rel=1e-12)
    assert largest_difference(gradients, one["model"][1]) < 1e-10


def test_chunks_and_checkpointing_change_nothing(one):
    assert_same_gradients(one["recomputed"], one["plain"])


def test_chunks_take_less_memory(one):
    whole, chunks = one["memory"]
    assert chunks < 0.2 * whole  # of 96 pairs in chunks of 8; parameters and their gradient are in it


@pytest.mark.parametrize("name", EIGHT)
def test_eight_devices_do_the_same(one, eight, name):
    assert_same_gradients(eight[name], one["siglip" if "siglip" in name else "plain"])


def test_what_moves_between_devices(eight):
    for name in EIGHT:
        assert not {"all-to-all", "collective-permute"} & eight[name]["exchanges"], name
    assert {"all-gather", "all-reduce"} <= eight["data"]["exchanges"]
    assert "reduce-scatter" not in eight["data"]["exchanges"]
    assert "reduce-scatter" in eight["fsdp, siglip"]["exchanges"]


# -- the step ---------------------------------------------------------------------------------------------------------


def test_the_step_is_adamw_after_clipping(one):
    recipe = chosen()
    table = {spec.name: spec for spec in specs(CONFIG, "CLIPModel")}
    weights = {name: values.astype(np.float64) for name, values in random_arrays(CONFIG, "CLIPModel").items()}
    first, second = ({name: np.zeros(spec.shape) for name, spec in table.items()} for _ in range(2))
    (b1, b2), clipped = recipe.betas, []
    for place, (gradients, taken) in enumerate(zip(one["gradients"], one["steps"], strict=True)):
        norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        factor = min(1, recipe.clip_norm / (norm + 1e-6))
        clipped.append(factor < 1)
        rate, t = recipe.rate(place), place + 1
        for name, spec in table.items():
            gradient = gradients[name] * factor
            first[name] = b1 * first[name] + (1 - b1) * gradient
            second[name] = b2 * second[name] + (1 - b2) * gradient**2
            if decays(spec):
                weights[name] = weights[name] * (1 - rate * recipe.weight_decay)
            divisor = np.sqrt(second[name]) / np.sqrt(1 - b2**t) + recipe.eps
            weights[name] = weights[name] - rate / (1 - b1**t) * first[name] / divisor
        weights["logit_scale"] = np.minimum(weights["logit_scale"], MAX_LOGIT_SCALE)
        assert largest_difference(taken["weights"], weights) < 1e-12
        moments = {FIRST + name: values for name, values in first.items()}
        moments |= {SECOND + name: values for name, values in second.items()}
        assert largest_difference(taken["moments"], moments) < 1e-12
        metrics = taken["metrics"]
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-12)
        assert metrics["learning_rate"] == rate
        assert metrics["logit_scale"] == pytest.approx(np.exp(weights["logit_scale"]), rel=1e-12)
    assert clipped == [True, True, False, True]
    assert "logit_bias" not in metrics


def test_the_model_and_the_engine_are_current(one):
    assert largest_difference(one["current"], one["steps"][-1]["weights"]) == 0
    assert one["engine"].dtype == np.float64


def test_a_run_goes_on_bit_for_bit(one):
    assert len(one["resumed"]) == 2
    for found, expected in zip(one["resumed"], one["steps"][2:], strict=True):
        assert found["metrics"] == expected["metrics"]
        for part in ("weights", "moments"):
            assert found[part].keys() == expected[part].keys()
            assert all(np.array_equal(found[part][name], values) for name, values in expected[part].items())


def same_steps(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-10, abs=1e-12)
        assert largest_difference(ours["weights"], theirs["weights"]) < 1e-10
        assert largest_difference(ours["moments"], theirs["moments"]) < 1e-10


@pytest.mark.parametrize("name", ["data", "fsdp, local, chunks"])
def test_eight_devices_take_the_same_steps(one, eight, name):
    same_steps(eight[name]["steps"], one["steps"])
    assert relative(eight[name]["engine"], one["engine"]) < 1e-12


def test_each_device_has_its_part_of_everything(eight):
    whole = eight["data"]["shards"]
    assert all(kept == size for sizes in whole.values() for kept, size in sizes)
    parts = eight["fsdp, local, chunks"]["shards"]
    assert parts[LARGE] == [(40 * 48 // 8, 40 * 48)] * 3
    kept, size = (sum(pair[i] for sizes in parts.values() for pair in sizes) for i in (0, 1))
    assert kept < size / 7.9
    assert parts["logit_scale"] == [(1, 1)] * 3


def test_two_processes_take_the_same_steps(jobs, one):
    for rank in (0, 1):
        found = jobs[f"two {rank}"]
        assert found["processes"] == (rank, 2)
        assert found["largest"] == 4
        same_steps(found["steps"], one["steps"])
        assert found["shards"][LARGE] == [(40 * 48 // 4, 40 * 48)] * 3
        assert relative(found["engine"], one["engine"]) < 1e-12
    assert STEPS[2] == 1  # where the second process has no pair at all


def test_a_frozen_tower_stays(one):
    start = random_arrays(CONFIG, "CLIPModel")
    last = one["frozen"][-1]
    of_text = {name for name in start if name.startswith(("text_model.", "text_projection."))}
    moved = {name for name, values in start.items() if not np.array_equal(values, last["weights"][name])}
    assert moved == start.keys() - of_text
    assert last["moments"].keys() == {part + name for part in (FIRST, SECOND) for name in moved}
    gradients = {name: values for name, values in one["gradients"][0].items() if name in moved}
    norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
    assert one["frozen"][0]["metrics"]["grad_norm"] == pytest.approx(norm, rel=1e-10)


def test_dropout_repeats_itself_within_a_step(one):
    """The gradient in chunks, whose features are computed twice, is the slope of the loss."""
    found = one["dropout"]
    assert found["again"] == found["loss"]
    assert found["slope"] == pytest.approx(found["difference"], rel=1e-6)
    assert found["next"] != found["loss"]
    assert not np.array_equal(*found["keys"])
    assert abs(found["loss"] - one["plain"][12][0]) > 1e-3


def test_bfloat16_is_near(one):
    """With ``jax_enable_x64`` on, which changes nothing: the parameters are of float32."""
    loss, gradients = one["plain"][12]
    (found, other), dtypes = one["bfloat16"]
    assert dtypes == {"float32"}
    assert found == pytest.approx(loss, rel=0.05)
    distance = np.sqrt(sum(((other[name] - values) ** 2).sum() for name, values in gradients.items()))
    distance /= np.sqrt(sum((values**2).sum() for values in gradients.values()))
    assert 1e-3 < distance < 0.2  # no nearer than bfloat16 can be


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_state_of_another_run():
    spec = specs(CONFIG, "CLIPModel")[0]
    state = TrainingState(3, 0, 0, recipe(), tensors={FIRST + spec.name: np.zeros(())})
    with pytest.raises(CheckpointError, match=r"state of step 3(.|\n)*missing: second_moment\.logit_scale"):
        trainer(state=state)


def test_a_state_without_the_bias_of_the_sigmoid_loss_is_refused():
    state = TrainingState(0, 0, 0, recipe(), tensors=trainer().moments())
    with pytest.raises(CheckpointError, match=r"missing: first_moment\.logit_bias"):
        trainer(state=state, loss="siglip")


def test_bad_batches():
    made = trainer(batch_size=4)
    with pytest.raises(ValueError, match=r"at most 4 texts .*Received: 5 texts and 5 images"):
        made.step(batch(5))
    with pytest.raises(ValueError, match="Received: 4 texts and 3 images"):
        made.step({**batch(4), "pixel_values": batch(3)["pixel_values"]})
    wrong = batch(4)
    wrong["input_ids"][2, 1] = 99
    with pytest.raises(ValueError, match="input_ids"):
        made.step(wrong)
    with pytest.raises(ValueError, match=r"doesn't match model"):
        made.step({**batch(4), "pixel_values": np.zeros((4, 3, 10, 10), np.float32)})
    assert made.steps == 0


def test_processes(monkeypatch):
    assert start_processes(recipe()) == Processes()
    assert start_processes(recipe(distributed="data")) == Processes()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ValueError, match="need all of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"):
        start_processes(recipe(distributed="data"))
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(ValueError, match="must be whole numbers"):
        start_processes(recipe(distributed="data"))
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    jax.devices()
    with pytest.raises(ValueError, match="before any other use of JAX"):
        start_processes(recipe(distributed="data"))
