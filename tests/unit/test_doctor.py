"""`clipmb.doctor` and `clipmb doctor`: a correct installation is found so, and a wrong or missing backend is named."""

from __future__ import annotations

import importlib
import json

import pytest
from conftest import ENGINES
from processes import clipmb

from clipmb import MissingBackendError, backends
from clipmb.doctor import examine


def test_doctor_finds_every_tested_backend_correct():
    found = examine(ENGINES)
    assert found["ok"]
    assert found["tokens"]
    assert found["pixels"]
    assert found["resizing"] in ("kernel", "Pillow")
    assert found["jpeg"] in ("simplejpeg", "Pillow")
    for backend in ENGINES:
        entry = found["backends"][backend]
        assert entry["correct"]
        assert entry["stages"] == 2 * 4 + 3 + 2 + 1
        assert 0 < entry["difference"] <= 1e-5
        assert entry["versions"]
        assert entry["precision"]


@pytest.mark.parametrize("backend", ENGINES)
def test_doctor_finds_a_wrong_backend(backend, monkeypatch):
    place = {"flax": "modules", "onnx": "graph"}.get(backend, "modeling")
    activations = importlib.import_module(f"clipmb.{backend}.{place}").ACTIVATIONS
    monkeypatch.setitem(activations, "gelu", activations["gelu_new"])
    found = examine([backend])
    assert not found["ok"]
    assert not found["backends"][backend]["correct"]
    assert found["backends"][backend]["first"] == "text.block.0"


def test_doctor_reports_what_is_missing(monkeypatch):
    monkeypatch.setattr(backends, "installed", list)
    found = examine()
    assert found["ok"]
    assert {name: entry["installed"] for name, entry in found["backends"].items()} == dict.fromkeys(
        ("pt", "tf", "flax", "onnx"), False
    )

    def missing(name):
        raise MissingBackendError(name, "torch")

    monkeypatch.setattr(backends, "engine", missing)
    found = examine(["pt"])
    assert not found["ok"]
    assert "pip install" in found["backends"]["pt"]["error"]


def test_doctor_on_the_command_line():
    done = clipmb("doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"]
    assert {name for name, entry in found["backends"].items() if entry["installed"]} >= set(ENGINES)
    assert clipmb("doctor", "--backend", "mxnet").returncode == 2
