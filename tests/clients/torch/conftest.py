"""A small random checkpoint and inputs for it, and what our model makes of them by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import CONFIGS, inputs_of, write_checkpoint
from torch import Tensor

from clipmb import CLIPModel, CLIPProcessor
from clipmb.common.small_model import small_model

CONFIG = CONFIGS["plain"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets the programs of others warn, which is their own matter."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of `cases.CONFIGS`."""
    return write_checkpoint(tmp_path_factory.mktemp("model") / "clip", CONFIG)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The model that comes with the package, with tokenizer and image processor, in a folder of its own."""
    folder = tmp_path_factory.mktemp("trained") / "clip"
    CLIPModel.from_pretrained(small_model()).save_pretrained(folder)
    CLIPProcessor.from_pretrained(small_model()).save_pretrained(folder)
    return folder


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """Ids, mask and pixels of four texts and pictures."""
    return {name: torch.from_numpy(value) for name, value in inputs_of("CLIPModel", CONFIG).items()}


@pytest.fixture
def model(folder) -> CLIPModel:
    """The model of that checkpoint."""
    return CLIPModel.from_pretrained(folder)


@pytest.fixture
def expected(model, inputs) -> Tensor:
    """What it computes by itself."""
    with torch.no_grad():
        return model(**inputs).logits_per_image
