"""Training in TensorFlow: losses, gradients over chunks and devices, the optimizer, the state."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from cases import random_arrays
from conftest import TESTS
from processes import HANG
from training_cases import assert_steps_of_adamw, batch, batches, expected_losses, largest_difference, recipe, unit
from training_tf_worker import CONFIG, DEVICES, PROCESSES, SIZES, STEPS, new_model, trainer_of

from clipmb import CheckpointError, CLIPConfig, TFCLIPModel
from clipmb.common.parameters import KINDS
from clipmb.common.training.recipe import MAX_LOGIT_SCALE, Processes, decays
from clipmb.common.training.state import TrainingState
from clipmb.tf.losses import clip_loss, siglip_loss
from clipmb.tf.training import Trainer, scope, start_processes


@pytest.fixture(scope="module")
def plain() -> Trainer:
    """A trainer that takes no step."""
    return trainer_of("plain")


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("parts", [1, 3])
def test_losses(padding, parts):
    text, image, scale, bias = unit(7, 0), unit(7, 1), 1.3, -0.7
    clip, siglip = expected_losses(text[: 7 - padding], image[: 7 - padding], scale, bias)
    valid = tf.range(7) < 7 - padding if padding else None
    rows = [slice(None)] if parts == 1 else [slice(0, 3), slice(3, 4), slice(4, 7)]
    tensors = [tf.constant(value, tf.float64) for value in (text, image, scale, bias)]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        found = sum(clip_loss(*tensors[:3], valid=valid, rows=part) for part in rows)
        found_sigmoid = sum(siglip_loss(*tensors, valid=valid, rows=part) for part in rows)
        both = found + found_sigmoid
    assert float(found) == pytest.approx(clip, rel=1e-13)
    assert float(found_sigmoid) == pytest.approx(siglip, rel=1e-13)
    gradients = [gradient.numpy() for gradient in tape.gradient(both, tensors)]
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    if padding:
        assert not gradients[0][-padding:].any()
        assert not gradients[1][-padding:].any()


@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_those_of_the_model_s_own_loss(plain, size):
    pairs, model = batch(size), new_model()
    variables = [model.parameter(spec).value for spec in plain.table]
    with tf.GradientTape() as tape:
        mask = (pairs["input_ids"] != CONFIG.text_config.pad_token_id).astype(np.int64)
        output = model(pairs["input_ids"], pairs["pixel_values"], mask, return_loss=True)
    expected = {
        spec.name: KINDS[spec.kind].to_canonical(tf.convert_to_tensor(gradient).numpy())
        for spec, gradient in zip(plain.table, tape.gradient(output.loss, variables), strict=True)
    }
    loss, found = plain.gradients(pairs)
    assert loss == pytest.approx(float(output.loss), rel=1e-13, abs=1e-15)
    if size == 1:  # the loss of one pair is zero, and so is its gradient
        assert max(np.abs(value).max() for value in found.values()) < 1e-12
    else:
        assert largest_difference(found, expected) < 1e-12


@pytest.mark.parametrize("variant", ["chunks", "frozen text", "checkpointing"])
def test_chunks_change_nothing(plain, variant):
    trainer = trainer_of(variant)
    names = {spec.name for spec in trainer.table}
    for size in (12, 7):
        loss, expected = plain.gradients(batch(size))
        found_loss, found = trainer.gradients(batch(size))
        assert found_loss == pytest.approx(loss, rel=1e-13)
        assert largest_difference(found, {name: value for name, value in expected.items() if name in names}) < 1e-12
    assert (len(names) < len(plain.table)) == ("frozen" in variant)


def run_worker(folder: Path, variants: tuple[str, ...], workers: int) -> list[dict[str, np.ndarray]]:
    """What the processes of a run found: one with two devices, or several with one."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONWARNINGS": "ignore",
    }
    sockets = [socket.socket() for _ in range(workers)]
    for opened in sockets:
        opened.bind(("127.0.0.1", 0))
    cluster = {"worker": [f"127.0.0.1:{opened.getsockname()[1]}" for opened in sockets]}
    for opened in sockets:
        opened.close()
    running = []
    for index in range(workers):
        place = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        several = {"TF_CONFIG": json.dumps(place)} if workers > 1 else {}
        command = [sys.executable, str(TESTS / "training_tf_worker.py"), str(folder), *variants]
        running.append(
            subprocess.Popen(command, env=environment | several, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        )
    errors = [process.communicate(timeout=HANG)[1].decode() for process in running]
    for process, error in zip(running, errors, strict=True):
        assert process.returncode == 0, error[-4000:]
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(workers)]


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory):
    return run_worker(tmp_path_factory.mktemp("devices"), DEVICES, 1)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return run_worker(tmp_path_factory.mktemp("processes"), PROCESSES, 2)


@pytest.fixture(scope="module")
def one_device():
    """Metrics of every step, and the trainer after the last, by loss: without chunks or other devices."""
    trainers = {variant: trainer_of(variant, chunk_size=None) for variant in ("plain", "sigmoid, chunks")}
    return {
        trainer.recipe.loss: ([list(trainer.step(pairs).values()) for pairs in STEPS], trainer)
        for trainer in trainers.values()
    }


def part_of(found: dict[str, np.ndarray], part: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(part): value for name, value in found.items() if name.startswith(part)}


@pytest.mark.parametrize("size", SIZES)
def test_two_devices_have_the_gradients_of_one(plain, two_devices, size):
    loss, expected = plain.gradients(batch(size))
    found = part_of(two_devices[0], f"plain/{size}/gradient/")
    assert float(two_devices[0][f"plain/{size}/loss"]) == pytest.approx(loss, rel=1e-12, abs=1e-14)
    if size > 1:
        assert largest_difference(found, expected) < 1e-10
    else:
        assert found.keys() == expected.keys()
        assert max(np.abs(value).max() for value in found.values()) < 1e-12


@pytest.mark.parametrize(
    ("where", "variant"), [*(("devices", v) for v in DEVICES), *(("processes", v) for v in PROCESSES)]
)
def test_two_devices_step_as_one_does(one_device, request, where, variant):
    """Metrics, weights and moments after steps of even and uneven batches."""
    metrics, trainer = one_device["siglip" if "sigmoid" in variant else "clip"]
    ranks = request.getfixturevalue(f"two_{where}")
    assert len(ranks) == (2 if where == "processes" else 1)
    for found in ranks:
        assert found["largest"] == 2 + len(ranks)
        np.testing.assert_allclose(found[f"{variant}/metrics"], metrics, rtol=1e-10, atol=1e-12)
        assert largest_difference(part_of(found, f"{variant}/weights/"), trainer.weights()) < 1e-10
        assert largest_difference(part_of(found, f"{variant}/moments/"), trainer.moments()) < 1e-10
        features = trainer.engine().text_features(batch(3)["input_ids"])
        assert np.abs(found[f"{variant}/features"] - features).max() < 1e-10


def test_chunks_need_less_memory(two_devices):
    """What the highest memory of a process grows by: a batch in chunks, then the same one as a whole."""
    chunked, whole = two_devices[0]["memory"]
    assert whole > 100e6
    assert chunked < whole / 4


def test_steps_are_those_of_adamw_with_warm_up_decay_and_clipping():
    assert_steps_of_adamw(Trainer(new_model(), recipe(steps=8, warmup_steps=3)))


def test_what_decays(plain):
    assert plain.optimizer.decaying == {spec.name for spec in plain.table if decays(spec)}
    assert 5 < len(plain.optimizer.decaying) < len(plain.table) - 5


def test_neither_sizes_nor_lengths_nor_the_logit_scale_trace_anew():
    """And the logit scale is clamped."""
    model = new_model()
    model.logit_scale.assign(MAX_LOGIT_SCALE + 0.5)
    trainer = Trainer(model, recipe(learning_rate=1e-9))
    for size, length in ((4, 13), (3, 13), (7, 9), (1, 5)):
        pairs = batch(size)
        metrics = trainer.step({**pairs, "input_ids": pairs["input_ids"][:, :length]})
        assert np.isfinite(list(metrics.values())).all()
        assert metrics["logit_scale"] == pytest.approx(100.0)
        assert float(model.logit_scale) <= MAX_LOGIT_SCALE
    assert trainer._traced_step.experimental_get_tracing_count() == 1
    before = {name: value.copy() for name, value in trainer.weights().items()}
    with pytest.raises(ValueError, match=r"input_ids must lie in \[0, 99\)"):
        trainer.step({**pairs, "input_ids": pairs["input_ids"] + 98})
    with pytest.raises(ValueError, match="as many texts as images"):
        trainer.step({**pairs, "pixel_values": batch(2)["pixel_values"]})
    with pytest.raises(ValueError, match=r"20\*19"):
        trainer.step({**pairs, "pixel_values": pairs["pixel_values"][..., 1:]})
    assert trainer.steps == 4
    assert all(np.array_equal(value, before[name]) for name, value in trainer.weights().items())


@pytest.mark.parametrize("changed", [{}, {"loss": "siglip", "freeze": ("vision",), "precision": "float32"}])
def test_a_run_continues_from_its_state_to_the_bit(tmp_path, changed):
    from clipmb.common.saving import Transaction

    chosen, pairs = recipe(steps=9, **changed), batches(9)
    whole = Trainer(new_model(), chosen)
    for part in pairs[:4]:
        whole.step(part)
    tensors = whole.moments()
    if whole.logit_bias is not None:
        tensors["logit_bias"] = np.asarray(whole.logit_bias)
    with Transaction(tmp_path) as save:
        TrainingState(4, 0, 4, chosen, "data", "tf", tensors).write(save)
    weights = whole.weights()  # which the next steps leave as they are
    for part in pairs[4:]:
        whole.step(part)
    state = TrainingState.read(tmp_path)
    model = TFCLIPModel.from_pretrained(None, config=CONFIG, state_dict=weights, dtype=whole.model.dtype_policy.name)
    continued = Trainer(model, state.recipe, state)
    assert continued.model is model
    for part in pairs[4:]:
        metrics = continued.step(part)
    assert metrics["learning_rate"] == chosen.rate(8)
    for found, expected in ((continued.weights(), whole.weights()), (continued.moments(), whole.moments())):
        assert found.keys() == expected.keys()
        assert all(found[name].tobytes() == value.tobytes() for name, value in expected.items())
        assert {value.dtype.name for value in found.values()} == {chosen.precision}
    assert continued.logit_bias == whole.logit_bias
    frozen = random_arrays(CONFIG, "CLIPModel") if chosen.freeze else {}
    for name, value in frozen.items():  # a frozen tower stays as it is, and has no moments
        still = name.startswith(("vision_model.", "visual_projection."))
        assert np.array_equal(whole.weights()[name], value) == still, name
        assert (f"first_moment.{name}" in tensors) != still, name


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_a_state_of_another_run_is_refused_with_everything_that_differs(loss):
    begun = trainer_of("frozen text")
    state = TrainingState(1, 0, 1, recipe(), tensors=begun.moments())
    with pytest.raises(CheckpointError, match=r"missing: first_moment\.text_model\.") as caught:
        Trainer(new_model(), recipe(loss=loss), state)
    assert len(caught.value.problems) > 40
    assert "missing: first_moment.text_projection.weight" in caught.value.problems
    assert any("logit_bias" in problem for problem in caught.value.problems) == (loss == "siglip")
    assert "freeze" in str(caught.value)


def test_dropout_is_repeated_in_chunks_and_after_resuming(plain):
    config = CLIPConfig(
        {**CONFIG.text_config.to_dict(), "attention_dropout": 0.4},
        {**CONFIG.vision_config.to_dict(), "attention_dropout": 0.3},
        projection_dim=24,
    )
    chosen = recipe(chunk_size=3)
    trainer, other = (Trainer(new_model(config), chosen) for _ in range(2))  # whose generators begin elsewhere
    once, again = trainer.gradients(batch(9)), other.gradients(batch(9))
    assert once[0] == again[0]
    assert all(np.array_equal(once[1][name], again[1][name]) for name in once[1])
    assert abs(plain.gradients(batch(9))[0] - once[0]) > 1e-3
    trainer.steps = 1  # another step, other masks
    assert trainer.gradients(batch(9))[0] != once[0]
    trainer.steps, trainer.recipe = 0, dataclasses.replace(chosen, seed=1)
    assert trainer.gradients(batch(9))[0] != once[0]
    # The gradient belongs to the masks of its own loss: a step along it changes the loss as the gradient says.
    size = 1e-5
    for spec in other.table:
        other.model.parameter(spec).assign_sub(size * KINDS[spec.kind].to_framework(once[1][spec.name]))
    square = sum(np.square(value).sum() for value in once[1].values())
    assert (once[0] - other.gradients(batch(9))[0]) / size == pytest.approx(square, rel=1e-2)


def test_bfloat16_keeps_float32_parameters_and_stays_near(plain):
    exact = plain.gradients(batch(12))
    trainer = Trainer(new_model(dtype="float32"), recipe(precision="bfloat16", chunk_size=5))
    loss = trainer.step(batch(12))["loss"]
    assert 1e-6 < abs(loss - exact[0]) < 0.05
    found = trainer.moments()  # the first is a multiple of the gradient
    cosines = [
        (found[f"first_moment.{name}"] * value).sum()
        / np.linalg.norm(found[f"first_moment.{name}"])
        / np.linalg.norm(value)
        for name, value in exact[1].items()
        if "k_proj.bias" not in name
    ]
    assert min(cosines) > 0.97
    assert {value.dtype.name for value in [*trainer.weights().values(), *found.values()]} == {"float32"}
    assert trainer.engine().model.compute_dtype == "float32"


def test_the_model_is_copied_only_where_it_has_to_be(plain):
    model = new_model(dtype="float32")
    trainer = Trainer(model, recipe(precision="float32"))
    assert trainer.model is model
    trainer = Trainer(model, recipe())
    assert trainer.model is not model
    assert trainer.model.dtype_policy.name == "float64"
    assert all(np.array_equal(value, trainer.weights()[name]) for name, value in model.to_arrays().items())


def test_fully_sharded_training_is_refused():
    with pytest.raises(ValueError, match=r"FSDP is not available in TensorFlow.*backend pt or flax"):
        start_processes(recipe(distributed="fsdp"))
    assert start_processes(recipe()) == Processes()
    with scope():
        assert not tf.distribute.has_strategy()


def test_other_processes_are_joined_before_anything_is_computed(monkeypatch):
    tf.ones(1) + 1
    place = {"cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(place))
    with pytest.raises(ValueError, match="must be called before any other use of TensorFlow"):
        start_processes(recipe(distributed="data"))
