"""A further backend is one folder and one row of `BACKENDS`: everything above works with it, and agrees."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import BACKENDS
from PIL import Image
from processes import invoke
from training_cases import small_model, small_pairs

from clipmb import CLIPPipeline, backends, evaluate, train
from clipmb.backends import Backend
from clipmb.common.training.state import TrainingState
from clipmb.doctor import examine
from clipmb.testing import assert_backends_agree


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """Registers the backend; its folder is beside the tests."""
    monkeypatch.setitem(backends.BACKENDS, "toy", Backend("toy_backend", ("numpy",)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model in ``model``, and labelled pictures with captions in ``pairs``."""
    folder = tmp_path_factory.mktemp("files")
    small_model(folder / "model")
    small_pairs(folder / "pairs", 10)
    return folder


def run(*arguments):
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_row_is_all_that_lists_it():
    assert backends.installed()[-1] == "toy"
    assert backends.engine("toy").__module__ == "toy_backend.engine"
    assert backends.trainer("toy").__module__ == "toy_backend.training"
    with pytest.raises(ValueError, match=r"backend must be one of .*'toy'.*Received: 'onyx'"):
        backends.engine("onyx")


def test_a_backend_whose_package_is_missing_is_not_installed(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "toy", Backend("toy_backend", ("numpy", "no_such_package")))
    assert "toy" not in backends.installed()


def test_a_backend_without_a_trainer_is_not_asked_to_train(files, tmp_path, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "toy", Backend("toy_backend", ("numpy",), trains=False))
    with pytest.raises(ValueError, match=r"Training needs a backend that trains. Received: 'toy'. Pass one of 'pt'"):
        train(files / "pairs", files / "model", tmp_path, backend="toy", steps=1)


def test_no_backend_at_all_is_an_error_with_the_pip_command(monkeypatch):
    monkeypatch.setattr(backends, "installed", list)
    with pytest.raises(ImportError, match=r'no backend is installed.*pip install "clipmb\[pt\]"'):
        backends.engine(None)


def test_it_computes_what_the_others_compute(files):
    names = (BACKENDS[0], "toy")
    assert_backends_agree(files / "model", names, dtype="float64")
    assert examine(["toy"])["backends"]["toy"]["correct"]
    pictures = sorted((files / "pairs").glob("*.png"))
    found = [CLIPPipeline.from_pretrained(files / "model", backend=name) for name in names]
    assert [pipeline.backend for pipeline in found] == list(names)
    ours, theirs = (pipeline.classify(pictures, ["red", "a blue one"]) for pipeline in found)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    scores = [evaluate(pipeline, files / "pairs") for pipeline in found]
    assert scores[0] == scores[1]
    assert scores[0].keys() == {"zero_shot", "retrieval", "skipped"}


def test_the_commands_take_it(files, tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    model, pairs = files / "model", files / "pairs"
    found = json.loads(
        run("classify", tmp_path / "red.png", "-l", "red,blue", "-m", model, "--backend", "toy", "--json")
    )
    assert found["backend"] == "toy"
    assert {label["label"] for label in found["images"][0]["labels"]} == {"red", "blue"}
    assert "on toy agrees with" in run("verify", model, "--backend", "toy", "--against", model)
    assert json.loads(run("evaluate", pairs, "-m", model, "--backend", "toy", "--json"))["backend"] == "toy"
    assert json.loads(run("doctor", "--backend", "toy", "--json"))["ok"]


def test_it_trains_and_resumes(files, tmp_path, monkeypatch):
    options = {"backend": "toy", "steps": 6, "learning_rate": 0.5, "batch_size": 5, "save_every": 2}
    whole = train(files / "pairs", files / "model", tmp_path / "whole", **options)
    trainer = backends.trainer("toy")
    step = trainer.step

    def fails_once(self, batch):
        if self.steps == 3:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(trainer, "step", fails_once)
    with pytest.raises(KeyboardInterrupt):
        train(files / "pairs", files / "model", tmp_path / "parted", **options)
    monkeypatch.setattr(trainer, "step", step)
    state = TrainingState.read(tmp_path / "parted")
    assert (state.step, state.backend) == (2, "toy")
    assert train(files / "pairs", out=tmp_path / "parted", resume=True, backend="toy")["loss"] == whole["loss"]
    folders = [tmp_path / "whole", tmp_path / "parted", files / "model"]
    scales = [CLIPPipeline.from_pretrained(folder, backend="toy").engine.logit_scale for folder in folders]
    assert scales[0] == scales[1] != scales[2]
