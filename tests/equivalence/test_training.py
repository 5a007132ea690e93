"""The same training in every framework: gradients, fifty steps, and runs that change the framework half-way."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
import pytest
from cases import random_arrays
from conftest import BACKENDS
from training_cases import CONFIG, STEPS, VARIANTS, batch, batches, largest_difference, recipe

from clipmb.backends import engine
from clipmb.common.saving import Transaction
from clipmb.common.training.recipe import Recipe
from clipmb.common.training.state import TrainingState

FIRST, *OTHERS = BACKENDS
HALF = STEPS // 2
# What differs among frameworks; that devices and chunks change nothing is in the tests of each.
COMPARED = ("chunks", "sigmoid", "frozen text", "frozen vision", "checkpointing")


def trainer(
    backend: str, chosen: Recipe, arrays: dict[str, np.ndarray] | None = None, state: TrainingState | None = None
) -> Any:
    framework = importlib.import_module(f"clipmb.{backend}.training")
    dtype = "float64" if chosen.precision == "float64" else "float32"
    arrays = random_arrays(CONFIG, "CLIPModel") if arrays is None else arrays
    model = engine(backend).load(None, config=CONFIG, state_dict=arrays, dtype=dtype).model
    return framework.Trainer(model, chosen, state)


def copies(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.array(values) for name, values in arrays.items()}


@functools.cache
def gradients(backend: str, variant: str, precision: str) -> list[tuple[float, dict[str, np.ndarray]]]:
    made = trainer(backend, recipe(precision=precision, **VARIANTS[variant]))
    return [made.gradients(batch(size)) for size in (12, 7)]


@functools.cache
def run(backend: str, precision: str, loss: str = "clip") -> tuple[list[float], list[Any], list[Any]]:
    """The losses of an uninterrupted run, its weights and moments after the first half, and those at the end."""
    made = trainer(backend, recipe(precision=precision, loss=loss))
    losses, kept = [], []
    for place, part in enumerate(batches(), start=1):
        losses.append(made.step(part)["loss"])
        if place in (HALF, STEPS):
            kept.append([copies(made.weights()), copies(made.moments())])
    return losses, *kept


@pytest.mark.several
@pytest.mark.parametrize("variant", COMPARED)
@pytest.mark.parametrize("backend", OTHERS)
def test_every_gradient_in_float64(backend, variant):
    for (loss, found), (expected_loss, expected) in zip(
        gradients(backend, variant, "float64"), gradients(FIRST, variant, "float64"), strict=True
    ):
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        assert largest_difference(found, expected) < 1e-10


@pytest.mark.several
@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("backend", OTHERS)
def test_fifty_steps_in_float64_give_the_same_model(backend, loss):
    losses, _, (weights, moments) = run(backend, "float64", loss)
    expected_losses, _, (expected_weights, expected_moments) = run(FIRST, "float64", loss)
    assert len(losses) == STEPS
    assert losses[-6] < 0.7 * losses[0]  # it learns; the last of five is a smaller batch
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-10)
    assert largest_difference(weights, expected_weights) < 1e-9
    assert largest_difference(moments, expected_moments) < 1e-9


@pytest.mark.several
@pytest.mark.parametrize("backend", OTHERS)
def test_fifty_steps_in_float32_give_the_same_curve(backend):
    np.testing.assert_allclose(run(backend, "float32")[0], run(FIRST, "float32")[0], rtol=1e-5)


@pytest.mark.several
@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize(("begins", "goes_on"), [(a, b) for a in BACKENDS for b in BACKENDS if a != b])
def test_a_run_goes_on_in_another_framework(tmp_path, begins, goes_on, precision):
    """25 steps in one, 25 in the other, as an uninterrupted run; the state goes through its file."""
    losses, (weights, moments), _ = run(begins, precision)
    with Transaction(tmp_path) as save:
        TrainingState(HALF, 1, 0, recipe(precision=precision), "data", begins, moments).write(save)
    state = TrainingState.read(tmp_path)
    made = trainer(goes_on, state.recipe, weights, state)
    losses = losses[:HALF] + [made.step(part)["loss"] for part in batches()[HALF:]]
    expected_losses, _, (expected_weights, expected_moments) = run(FIRST, precision)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-10 if precision == "float64" else 1e-5)
    if precision == "float64":
        assert largest_difference(made.weights(), expected_weights) < 1e-9
        assert largest_difference(made.moments(), expected_moments) < 1e-9
