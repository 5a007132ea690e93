"""The weight table: one list of parameters, whose form in every framework follows from seven kinds."""

from __future__ import annotations

import numpy as np
import pytest
from cases import ALL_HEADS, CONFIGS, config_of, equal

from clipmb.common.parameters import HEADS, KINDS, find, initial_weights, is_known, specs

CONFIG = CONFIGS["plain"]
MODEL = specs(CONFIG, "CLIPModel")


def test_every_kind_is_its_own_inverse_pair():
    shapes = {"linear": (2, 3), "convolution": (2, 3, 5, 7)}
    for name, kind in KINDS.items():
        array = np.random.default_rng(0).normal(size=shapes.get(name, (2, 3)))
        assert np.array_equal(kind.to_canonical(kind.to_framework(array)), array)
    assert KINDS["linear"].to_framework(np.empty((2, 3))).shape == (3, 2)
    assert KINDS["convolution"].to_framework(np.empty((2, 3, 5, 7))).shape == (5, 7, 3, 2)


@pytest.mark.parametrize("head", ALL_HEADS)
def test_names_are_distinct_in_every_framework_and_found_again(head):
    table = specs(config_of(head, CONFIG), head)
    for framework in ("pt", "tf", "flax"):
        paths = [spec.path(framework) for spec in table]
        assert len(set(paths)) == len(table)
        assert [find(path, framework) for path in paths] == [(spec.name, spec.kind) for spec in table]
    assert all(is_known(spec.name) for spec in table)


def test_a_full_model_is_its_towers_and_what_lies_between():
    towers = {s.name for head in ("CLIPTextModel", "CLIPVisionModel") for s in specs(config_of(head, CONFIG), head)}
    assert {spec.name for spec in MODEL} == towers | set(HEADS["CLIPModel"][2])


@pytest.mark.parametrize("name", ["", "x", "text_model.encoder.layers.0", "text_model.encoder.layers.01.mlp.fc1.bias"])
def test_other_names_are_unknown(name):
    assert not is_known(name)
    assert find(name.split("."), "pt") is None


def test_a_config_of_another_class():
    with pytest.raises(TypeError, match=r"CLIPTextModel needs a config of its own kind\..*CLIPVisionConfig"):
        specs(CONFIG.vision_config, "CLIPTextModel")


def test_initial_weights_depend_on_name_and_seed_alone():
    drawn = initial_weights(MODEL, 3)
    assert equal(initial_weights(reversed(MODEL), 3), {name: drawn[name] for name in drawn})
    other = initial_weights(MODEL, 4)
    for spec in MODEL:
        assert drawn[spec.name].shape == spec.shape
        assert drawn[spec.name].dtype == np.float32
        assert np.array_equal(drawn[spec.name], other[spec.name]) == (spec.std == 0)
    spec = max(MODEL, key=lambda spec: np.prod(spec.shape))
    assert drawn[spec.name].std() == pytest.approx(spec.std, rel=0.05)
