"""Training in PyTorch: losses, gradients over chunks and processes, the optimizer, the state."""

from __future__ import annotations

import dataclasses
import os
import sys

import numpy as np
import pytest
import torch
from cases import random_arrays
from conftest import TESTS
from processes import excerpt, run
from training_cases import (
    CONFIG,
    VARIANTS,
    assert_steps_of_adamw,
    batch,
    batches,
    expected_losses,
    largest_difference,
    recipe,
    unit,
)

from clipmb import CheckpointError, CLIPConfig, CLIPModel
from clipmb.common.training.recipe import MAX_LOGIT_SCALE, decays
from clipmb.common.training.state import TrainingState
from clipmb.pt.losses import clip_loss, siglip_loss
from clipmb.pt.training import Trainer, start_processes


def new_model(config: CLIPConfig = CONFIG, dtype: str = "float64") -> CLIPModel:
    return CLIPModel.from_pretrained(None, config=config, state_dict=random_arrays(config, "CLIPModel"), dtype=dtype)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("parts", [1, 3])
def test_losses(padding, parts):
    text, image, scale, bias = unit(7, 0), unit(7, 1), 1.3, -0.7
    clip, siglip = expected_losses(text[: 7 - padding], image[: 7 - padding], scale, bias)
    valid = torch.arange(7) < 7 - padding if padding else None
    rows = [slice(None)] if parts == 1 else [slice(0, 3), slice(3, 4), slice(4, 7)]
    tensors = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (text, image, scale, bias)]
    found = sum(clip_loss(*tensors[:3], valid=valid, rows=part) for part in rows)
    assert float(found.detach()) == pytest.approx(clip, rel=1e-13)
    found_sigmoid = sum(siglip_loss(*tensors, valid=valid, rows=part) for part in rows)
    assert float(found_sigmoid.detach()) == pytest.approx(siglip, rel=1e-13)
    (found + found_sigmoid).backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in tensors)
    if padding:
        assert not tensors[0].grad[-padding:].any()
        assert not tensors[1].grad[-padding:].any()


@pytest.mark.parametrize("size", [12, 7, 1])
def test_gradients_are_those_of_the_model_s_own_loss(size):
    pairs, model = batch(size), new_model()
    output = model(
        torch.tensor(pairs["input_ids"]),
        torch.tensor(pairs["pixel_values"]),
        torch.tensor(pairs["input_ids"] != CONFIG.text_config.pad_token_id).long(),
        return_loss=True,
    )
    output.loss.backward()
    expected = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    loss, found = Trainer(new_model(), recipe()).gradients(pairs)
    assert loss == pytest.approx(float(output.loss.detach()), rel=1e-13, abs=1e-15)
    if size == 1:  # the loss of one pair is zero, and so is its gradient
        assert max(np.abs(value).max() for value in found.values()) < 1e-12
    else:
        assert largest_difference(found, expected) < 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_change_nothing(variant):
    changed = VARIANTS[variant]
    plain = Trainer(new_model(), recipe(**{**changed, "chunk_size": None, "gradient_checkpointing": False}))
    other = Trainer(new_model(), recipe(**{"chunk_size": 5, **changed}))
    for size in (12, 7):
        loss, expected = plain.gradients(batch(size))
        found_loss, found = other.gradients(batch(size))
        assert found_loss == pytest.approx(loss, rel=1e-13)
        assert largest_difference(found, expected) < 1e-10


@pytest.fixture(scope="module", params=["data", "fsdp"])
def two_processes(request, tmp_path_factory):
    """What two processes that torchrun starts found, and the mode."""
    folder = tmp_path_factory.mktemp(request.param)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    worker = ["--rdzv-endpoint=localhost:0", TESTS / "training_pt_worker.py", request.param, folder]
    done = run([*torchrun, *worker], environment)
    assert done.returncode == 0, excerpt(done.stderr)
    return [np.load(folder / f"{rank}.npz") for rank in range(2)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_do_what_one_does(two_processes, variant):
    """Losses, every gradient, and weights and moments after steps of even and uneven batches."""
    trainer = Trainer(new_model(), recipe(**{**VARIANTS[variant], "chunk_size": None}))

    def found(part: str, rank: int) -> dict[str, np.ndarray]:
        prefix = f"{variant}/{part}/"
        return {name.removeprefix(prefix): two_processes[rank][name] for name in two_processes[rank].files
                if name.startswith(prefix)}  # fmt: skip

    for size in (12, 7, 1):
        loss, expected = trainer.gradients(batch(size))
        for rank in range(2):
            assert float(two_processes[rank][f"{variant}/{size}/loss"]) == pytest.approx(loss, rel=1e-12, abs=1e-14)
            gradients = found(f"{size}/gradient", rank)
            if size > 1 or "sigmoid" in variant:
                assert largest_difference(gradients, expected) < 1e-10
            else:
                assert gradients.keys() == expected.keys()
                assert max(np.abs(value).max() for value in gradients.values()) < 1e-12
    for whole in batches(6):
        trainer.step(whole)
    for rank in range(2):
        assert two_processes[rank]["largest"] == 4
        assert largest_difference(found("weights", rank), trainer.weights()) < 1e-10
        assert largest_difference(found("moments", rank), trainer.moments()) < 1e-10
        features = trainer.engine().text_features(batch(3)["input_ids"])
        assert np.abs(two_processes[rank][f"{variant}/features"] - features).max() < 1e-10


def test_steps_are_those_of_adamw_with_warm_up_decay_and_clipping():
    assert_steps_of_adamw(Trainer(new_model(), recipe(steps=8, warmup_steps=3)))


def test_what_decays():
    names = {spec.name for spec in Trainer(new_model(), recipe()).table if decays(spec)}
    assert "text_model.embeddings.token_embedding.weight" in names
    assert "vision_model.embeddings.patch_embedding.weight" in names
    assert "text_model.encoder.layers.0.mlp.fc1.weight" in names
    assert not {"logit_scale", "vision_model.embeddings.class_embedding", "text_model.final_layer_norm.weight"} & names
    assert not any(name.endswith(".bias") for name in names)


def test_the_logit_scale_is_clamped():
    model = new_model()
    with torch.no_grad():
        model.logit_scale.fill_(MAX_LOGIT_SCALE + 0.5)
    metrics = Trainer(model, recipe(learning_rate=1e-9)).step(batch(4))
    assert metrics["logit_scale"] == pytest.approx(100.0)
    assert float(model.logit_scale.detach()) <= MAX_LOGIT_SCALE


@pytest.mark.parametrize("changed", [{}, {"loss": "siglip", "freeze": ("vision",)}, {"precision": "float32"}])
def test_a_run_continues_from_its_state_to_the_bit(tmp_path, changed):
    from clipmb.common.saving import Transaction

    chosen, pairs = recipe(steps=9, **changed), batches(9)
    whole = Trainer(new_model(), chosen)
    for part in pairs:
        whole.step(part)
    begun = Trainer(new_model(), chosen)
    for part in pairs[:4]:
        begun.step(part)
    tensors = begun.moments()
    if begun.logit_bias is not None:
        tensors["logit_bias"] = np.asarray(begun.logit_bias)
    with Transaction(tmp_path) as save:
        TrainingState(4, 0, 4, chosen, "data", "pt", tensors).write(save)
    model = CLIPModel.from_pretrained(None, config=CONFIG, state_dict=begun.weights(), dtype=begun.model.dtype)
    state = TrainingState.read(tmp_path)
    assert state.recipe == chosen
    assert (state.step, state.epoch, state.batch, state.data, state.backend) == (4, 0, 4, "data", "pt")
    continued = Trainer(model, state.recipe, state)
    for part in pairs[4:]:
        metrics = continued.step(part)
    assert metrics["learning_rate"] == chosen.rate(8)
    for found, expected in ((continued.weights(), whole.weights()), (continued.moments(), whole.moments())):
        assert found.keys() == expected.keys()
        assert all(found[name].tobytes() == value.tobytes() for name, value in expected.items())
    assert continued.logit_bias == whole.logit_bias


def test_training_leaves_the_arrays_that_a_model_was_made_of():
    arrays = random_arrays(CONFIG, "CLIPModel")
    model = CLIPModel.from_pretrained(None, config=CONFIG, state_dict=arrays)
    Trainer(model, recipe(precision="float32")).step(batch(4))
    assert all(np.array_equal(arrays[name], value) for name, value in random_arrays(CONFIG, "CLIPModel").items())
    assert not np.array_equal(model.logit_scale.detach().numpy(), arrays["logit_scale"])


def test_a_run_continues_from_weights_of_any_layout():
    """As those are that another framework had transposed; fused AdamW goes through memory as it lies."""
    chosen, pairs = recipe(steps=6), batches(6)
    whole = Trainer(new_model(), chosen)
    for part in pairs:
        whole.step(part)
    begun = Trainer(new_model(), chosen)
    for part in pairs[:3]:
        begun.step(part)
    weights = {name: np.array(value, order="F") for name, value in begun.weights().items()}
    state = TrainingState(3, 0, 3, chosen, tensors=begun.moments())
    continued = Trainer(
        CLIPModel.from_pretrained(None, config=CONFIG, state_dict=weights, dtype="float64"), chosen, state
    )
    for part in pairs[3:]:
        continued.step(part)
    assert largest_difference(continued.weights(), whole.weights()) < 1e-12
    assert largest_difference(continued.moments(), whole.moments()) < 1e-12


def test_a_state_of_another_run_is_refused_with_everything_that_differs():
    begun = Trainer(new_model(), recipe(freeze=("text",)))
    begun.step(batch(4))
    state = TrainingState(1, 0, 1, recipe(), tensors=begun.moments())
    with pytest.raises(CheckpointError, match=r"missing: first_moment\.text_model\.") as caught:
        Trainer(new_model(), recipe(), state)
    assert len(caught.value.problems) > 50
    assert "missing: first_moment.text_projection.weight" in caught.value.problems
    assert "freeze" in str(caught.value)


def test_frozen_towers_stay_as_they_are():
    model = new_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = Trainer(model, recipe(freeze=("vision",)))
    trainer.step(batch(6))
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("vision_model.", "visual_projection."))
        assert torch.equal(parameter, before[name]) == frozen, name
    assert not any("vision" in name or "visual" in name for name in trainer.moments())


def test_dropout_is_repeated_in_chunks_and_after_resuming():
    config = CLIPConfig(
        {**CONFIG.text_config.to_dict(), "attention_dropout": 0.4},
        {**CONFIG.vision_config.to_dict(), "attention_dropout": 0.3},
        projection_dim=24,
    )
    chosen = recipe(chunk_size=3)
    once, again = (Trainer(new_model(config), chosen).gradients(batch(9)) for _ in range(2))
    assert once[0] == again[0]
    assert all(np.array_equal(once[1][name], again[1][name]) for name in once[1])
    without = Trainer(new_model(), chosen).gradients(batch(9))
    assert abs(without[0] - once[0]) > 1e-3
    trainer = Trainer(new_model(config), dataclasses.replace(chosen, learning_rate=0.0))
    trainer.step(batch(9))
    assert trainer.gradients(batch(9))[0] != once[0]  # another step, other masks
    # The gradient belongs to the masks of its own loss: a step along it changes the loss as the gradient says.
    model = new_model(config)
    size = 1e-5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.from_numpy(once[1][name]), alpha=-size)
    moved, _ = Trainer(model, chosen).gradients(batch(9))
    square = sum(np.square(value).sum() for value in once[1].values())
    assert (once[0] - moved) / size == pytest.approx(square, rel=1e-2)


def test_bfloat16_keeps_float32_parameters_and_stays_near():
    exact = Trainer(new_model(), recipe()).gradients(batch(12))
    trainer = Trainer(new_model(dtype="float32"), recipe(precision="bfloat16", chunk_size=5))
    loss, found = trainer.gradients(batch(12))
    assert 1e-6 < abs(loss - exact[0]) < 0.05
    cosines = [
        (found[name] * value).sum() / np.linalg.norm(found[name]) / np.linalg.norm(value)
        for name, value in exact[1].items()
        if "k_proj.bias" not in name
    ]
    assert min(cosines) > 0.97
    trainer.step(batch(12))
    assert {value.dtype.name for value in trainer.weights().values()} == {"float32"}


def test_a_distributed_run_without_torchrun_is_refused(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"torchrun --nproc-per-node 2 -m clipmb train"):
        start_processes(recipe(distributed="data"))


def test_a_state_without_the_bias_of_the_sigmoid_loss_is_refused():
    state = TrainingState(0, 0, 0, recipe(), tensors=Trainer(new_model(), recipe()).moments())
    with pytest.raises(CheckpointError, match=r"missing: first_moment\.logit_bias"):
        Trainer(new_model(), recipe(loss="siglip"), state)
