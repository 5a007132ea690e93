"""The command line, run as a user runs it: output, exit codes, errors without tracebacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from cases import CONFIGS, VISION, write_checkpoint
from conftest import BACKENDS
from PIL import Image

from clipmb import CLIPConfig, CLIPPipeline

CONFIG = CLIPConfig(
    {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4},
    VISION,
    projection_dim=24,
)


def clipmb(*arguments, **env):
    return subprocess.run(
        [sys.executable, "-m", "clipmb", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "3", **env},
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("small"), CONFIG)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(2)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (24, 30, 3), np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("backend", BACKENDS)
def test_classify(folder, photos, backend):
    options = ["--labels", "a cat, a dog", "--labels", "a cup", "--model", folder, "--backend", backend]
    done = clipmb("classify", *photos, *options, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["backend"] == backend
    expected = CLIPPipeline.from_pretrained(folder, backend=backend).classify(
        [str(p) for p in photos], ["a cat", "a dog", "a cup"]
    )
    for photo, entry, row in zip(photos, found["images"], expected, strict=True):
        assert entry["image"] == str(photo)
        values = {label["label"]: label["probability"] for label in entry["labels"]}
        assert [values["a cat"], values["a dog"], values["a cup"]] == pytest.approx(row.tolist(), abs=1e-6)
        assert list(values.values()) == sorted(values.values(), reverse=True)
    shown = clipmb("classify", photos[0], *options, "--top", "1", "--template", "{}")
    assert shown.returncode == 0
    assert backend in shown.stdout
    assert "\x1b" not in shown.stdout
    assert sum(label in shown.stdout for label in ("a cat", "a dog", "a cup")) == 1


def test_info(folder):
    done = clipmb("info", folder, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["head"] == "CLIPModel"
    assert found["config"]["text.hidden_size"] == 32
    assert found["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert found["parameters"] == sum(part["parameters"] for part in found["parts"].values())
    assert found["dtypes"] == ["float32"]
    shown = clipmb("info", folder)
    assert shown.returncode == 0
    assert "model.safetensors" in shown.stdout
    assert f"{found['parameters']:,}" in shown.stdout


def test_info_of_a_tower(tmp_path):
    write_checkpoint(tmp_path / "a" / "text", CONFIGS["plain"], "CLIPTextModel")
    found = json.loads(clipmb("info", tmp_path / "a", "--subfolder", "text", "--json").stdout)
    assert found["head"] == "CLIPTextModel"
    assert list(found["parts"]) == ["text_model"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["classify"], 2, "IMAGE"),
        (["classify", "PHOTO"], 2, "--labels"),
        (["classify", "PHOTO", "--labels", "a", "--batch-size", "0"], 2, "batch-size"),
        (["nonsense"], 2, "nonsense"),
        (["info"], 2, "MODEL"),
        (["classify", "nowhere.png", "--labels", "a,b", "--model", "FOLDER"], 1, "nowhere.png"),
        (["classify", "PHOTO", "--labels", " , ", "--model", "FOLDER"], 1, "labels"),
        (["classify", "PHOTO", "--labels", "a", "--model", "FOLDER", "--backend", "onnx"], 1, "backend"),
        (["classify", "PHOTO", "--labels", "a", "--model", "FOLDER", "--template", "x"], 1, "template"),
        (["classify", "PHOTO", "--labels", "a", "--model", "/no/such/folder"], 1, "does not exist"),
        (["info", "/no/such/folder"], 1, "does not exist"),
    ],
)
def test_errors(folder, photos, arguments, code, words):
    names = {"PHOTO": photos[0], "FOLDER": folder}
    done = clipmb(*(names.get(argument, argument) for argument in arguments))
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_debug_shows_the_traceback():
    done = clipmb("--debug", "info", "/no/such/folder")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_model_that_is_not_cached_is_named_without_the_network(tmp_path):
    done = clipmb("info", "someone/some-clip", HF_HOME=str(tmp_path))
    assert done.returncode == 1
    assert "someone/some-clip" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_version():
    assert "classify" in clipmb("--help").stdout
    assert "--labels" in clipmb("classify", "--help").stdout
    assert clipmb("--version").stdout.startswith("clipmb 0.")


def test_tables_show_names_as_they_are(tmp_path):
    folder = write_checkpoint(tmp_path / "my[red]clip :cat:", CONFIG)
    assert "my[red]clip :cat:" in clipmb("info", folder).stdout
