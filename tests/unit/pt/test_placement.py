"""Where parameters go, as far as that needs no accelerate; the rest is in tests/clients/torch/test_accelerate.py."""

from __future__ import annotations

import importlib

import pytest
import torch
from cases import CONFIGS, write_checkpoint

from clipmb import CLIPModel

CONFIG = CONFIGS["plain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "clip", CONFIG)


@pytest.fixture
def without_accelerate(monkeypatch):
    real = importlib.import_module

    def missing(name, *rest):
        if name == "accelerate":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"device": "cpu"},
        {"device": torch.device("cpu")},
        {"device_map": None, "max_memory": None, "offload_folder": None, "offload_buffers": False},
        {"device_map": "cpu", "offload_folder": "unneeded"},
        {"device_map": torch.device("cpu")},
        {"device_map": {"": "cpu"}},
        {"device_map": {"text_model": "cpu", "": torch.device("cpu")}},
    ],
)
def test_one_place_needs_no_accelerate(folder, without_accelerate, options):
    model = CLIPModel.from_pretrained(folder, **options)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_every_parameter_goes_where_the_map_says(folder):
    assert CLIPModel.from_pretrained(folder, device="meta").device.type == "meta"
    assert CLIPModel.from_pretrained(folder, device_map={"": "meta"}).device.type == "meta"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cpu", "device_map": "auto"}, "exclude each other"),
        ({"device": "toaster"}, "toaster"),
        ({"device_map": "fair"}, "balanced_low_0"),
        ({"device_map": {"nonsense": "cuda:7"}}, "'nonsense'.*'text_model'"),
        ({"device_map": {"": "cpu", "text_model": "toaster"}}, "'disk', 'cpu'.*toaster"),
        (
            {"device_map": {"text_model": "cpu", "logit_scale": "cpu"}},
            "41 without one, such as vision_model.embeddings",
        ),
        ({"device_map": {"text_model": "cpu", "": "disk"}}, "offload_folder="),
        ({"max_memory": {"cpu": 10**9}}, "needs a device_map. Received: max_memory"),
        ({"offload_folder": "somewhere", "offload_buffers": True}, "offload_folder, offload_buffers"),
    ],
)
def test_what_cannot_be_done_is_refused(folder, options, words):
    with pytest.raises(ValueError, match=words):
        CLIPModel.from_pretrained(folder, **options)


@pytest.mark.parametrize(
    "options", [{"device_map": {"": "cpu", "text_model": "disk"}}, {"device_map": "auto", "max_memory": {"cpu": 10**9}}]
)
def test_several_places_need_accelerate(folder, tmp_path, without_accelerate, options):
    with pytest.raises(ImportError, match="pip install accelerate"):
        CLIPModel.from_pretrained(folder, offload_folder=tmp_path, **options)
