"""Weights as training leaves them: what stands around them goes, is recorded, and nothing is guessed beyond it."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib

import numpy as np
import pytest
from cases import CONFIGS, equal, random_arrays
from conftest import BACKENDS
from safetensors.numpy import save_file

from clipmb import CheckpointError, CLIPConfig, convert
from clipmb.common.checkpoint import fit, flax_msgpack, formats, openai
from clipmb.common.checkpoint.h5 import read_h5, write_h5
from clipmb.common.checkpoint.names import in_framework
from clipmb.common.checkpoint.tensors import lazy
from clipmb.common.checkpoint.wrapping import common_start, stripped, unwrapped
from clipmb.common.hub import Source
from clipmb.common.json_files import read_json
from clipmb.common.parameters import known_specs, specs
from clipmb.common.saving import Transaction

if "pt" in BACKENDS:
    import torch

    from clipmb import CLIPModel, CLIPTextModel

CONFIG = CONFIGS["plain"]
WEIGHTS = random_arrays(CONFIG, "CLIPModel")
TABLE = specs(CONFIG, "CLIPModel")
NAMES = {"transformers": WEIGHTS, "openai": dict(openai.from_canonical(WEIGHTS))}
PREFIXES = ("module.", "_orig_mod.", "model.", "module._orig_mod.model.", "model.net._orig_mod.", "_orig_mod.module.")


def prefixed(weights, prefix):
    return {f"{prefix}{name}": np.require(array, requirements="C") for name, array in weights.items()}


def pickle(path, tree):
    def tensors(value):
        if isinstance(value, dict):
            return {name: tensors(inner) for name, inner in value.items()}
        return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value

    torch.save(tensors(tree), path)
    return path


def loaded_from(path):
    found = formats.load(Source(str(path)))
    return found, fit(found.tensors, specs(CONFIG, "CLIPModel"), "CLIPModel")[0]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_in_safetensors(tmp_path, names, prefix):
    save_file(prefixed(NAMES[names], prefix), tmp_path / "weights.safetensors")
    found, arrays = loaded_from(tmp_path / "weights.safetensors")
    assert equal(arrays, WEIGHTS)
    assert f"{prefix} taken off" in found.decisions["prefix"]


@pytest.mark.backend("pt")
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize(
    "path",
    [
        "",
        "state_dict",
        "model_state_dict",
        "model",
        "module",
        "net",
        "ema",
        "model.module",
        "state_dict.model",
        "ema.module",
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod."])
def test_wrappers_in_pickles(tmp_path, names, path, prefix):
    tree = prefixed(NAMES[names], prefix)
    for key in reversed(path.split(".") if path else []):
        tree = {"epoch": 3, "optimizer": {"state": {0: {"step": 7}}}, key: tree}
    found, arrays = loaded_from(pickle(tmp_path / "last.ckpt", tree))
    assert equal(arrays, WEIGHTS)
    assert found.decisions.get("wrapper", "") == (f"the weights are under {path} in the file" if path else "")
    assert ("prefix" in found.decisions) == bool(prefix)


@pytest.mark.backend("pt")
def test_weights_come_before_their_averages(tmp_path):
    """A file with both holds what was trained under the name that comes first."""
    other = random_arrays(CONFIG, "CLIPModel", seed=1)
    _, arrays = loaded_from(pickle(tmp_path / "a.pt", {"ema": other, "model": WEIGHTS}))
    assert equal(arrays, WEIGHTS)


class Ran:
    """What a hostile file, or a trainer of somebody, has beside the weights."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.backend("pt")
@pytest.mark.parametrize(
    "beside",
    [
        {"args": argparse.Namespace(lr=1e-3)},
        {"callbacks": {argparse.Namespace: {"best": 1.0}}},
        {"config": collections.defaultdict(list, a=[1])},
        {"step": np.float64(3.0)},
        {"output": pathlib.PurePosixPath("/run")},
        {"hostile": "ran"},
    ],
    ids=lambda beside: next(iter(beside)),
)
def test_what_stands_beside_the_weights_is_neither_needed_nor_run(tmp_path, beside):
    beside = {"hostile": Ran(tmp_path / "ran")} if "hostile" in beside else beside
    _, arrays = loaded_from(pickle(tmp_path / "last.ckpt", {"state_dict": prefixed(WEIGHTS, "model."), **beside}))
    assert equal(arrays, WEIGHTS)
    assert not (tmp_path / "ran").exists()


@pytest.mark.backend("pt")
def test_what_stands_among_the_weights_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"a": torch.ones(2), "b": argparse.Namespace()}}, path)
    with pytest.raises(CheckpointError, match=r"would run code(.|\n)*argparse\.Namespace"):
        formats.load(Source(str(path)))


BRANCHES = ("params", "state_dict/params", "ema", "model/_orig_mod/module")


def in_branches(tree, branch):
    """A training state: the weights in one branch, the optimizer's moments of them in another, and a counter."""
    moments = {f"opt_state/0/mu/{name}": array for name, array in tree.items()}
    return lazy({**{f"{branch}/{name}": array for name, array in tree.items()}, **moments, "step": np.ones((1,))})


@pytest.mark.parametrize("branch", BRANCHES)
def test_wrappers_in_msgpack(tmp_path, branch):
    arrays = in_framework(WEIGHTS, TABLE).values()
    named = {"/".join(spec.path("flax")): np.array(array.make()) for spec, array in zip(TABLE, arrays, strict=True)}
    with open(tmp_path / "state.msgpack", "wb") as file:
        flax_msgpack._write_tree(file, [(name.split("/"), array) for name, array in in_branches(named, branch).items()])
    found, arrays = loaded_from(tmp_path / "state.msgpack")
    assert equal(arrays, WEIGHTS)
    where = None if branch == "params" else f"the weights are under {branch.replace('/', '.')} in the file"
    assert found.decisions.get("wrapper") == where


@pytest.mark.parametrize("branch", BRANCHES)
def test_wrappers_in_h5(tmp_path, branch):
    with Transaction(tmp_path) as save:
        (name,) = formats.FORMATS["tf-h5"].write(save, WEIGHTS, CONFIG, "CLIPModel")
    tree = {name: array.make() for name, array in read_h5(tmp_path / name).items()}
    write_h5(tmp_path / "state.h5", in_branches(tree, branch))
    found, arrays = loaded_from(tmp_path / "state.h5")
    assert equal(arrays, WEIGHTS)
    assert found.decisions["wrapper"] == f"the weights are under {branch.replace('/', '.')} in the file"


def test_wrappers_around_single_modules(tmp_path):
    """``torch.compile`` of one tower, and DDP or FSDP of each block, leave their parts inside the names."""
    inside = {
        name.replace("text_model.", "text_model._orig_mod.").replace(".layers.1.", ".layers.1._fsdp_wrapped_module."): a
        for name, a in WEIGHTS.items()
    }
    save_file(inside, tmp_path / "weights.safetensors")
    found, arrays = loaded_from(tmp_path / "weights.safetensors")
    assert equal(arrays, WEIGHTS)
    assert "inside the name" in found.decisions["prefix"]


def test_the_record_names_what_was_taken_off_and_the_names_of_the_source(tmp_path):
    save_file(prefixed(WEIGHTS, "module.model."), tmp_path / "weights.safetensors")
    done = convert(tmp_path / "weights.safetensors", tmp_path / "result", config=CONFIG)
    record = read_json(tmp_path / "result" / "conversion.json")
    assert record["decisions"]["prefix"] == f"module.model. taken off {len(WEIGHTS)} names"
    assert done.mapping[0].source == f"module.model.{done.mapping[0].canonical}"
    assert equal(dict(formats.load(Source(str(tmp_path / "result"))).tensors), WEIGHTS)


@pytest.mark.parametrize("names", NAMES)
def test_two_tensors_that_differ_in_their_prefix_only_are_refused(tmp_path, names):
    save_file({**prefixed(NAMES[names], ""), **prefixed(NAMES[names], "module.")}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="two tensors for one parameter"):
        loaded_from(tmp_path / "weights.safetensors")


def test_foreign_names_are_reported_by_their_common_start_and_five_of_them(tmp_path):
    save_file(prefixed(WEIGHTS, "backbone.clip."), tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError) as caught:
        loaded_from(tmp_path / "weights.safetensors")
    message = str(caught.value)
    assert f"{len(WEIGHTS)} names, all of which begin with 'backbone.clip.'" in message
    assert message.count("backbone.clip.") == 6
    assert "\n" not in message


def test_no_name_of_a_parameter_loses_anything():
    for spec in known_specs():
        assert stripped(spec.name) == spec.name
        assert stripped(openai.openai_name(spec.name) or "x") == (openai.openai_name(spec.name) or "x")


def test_a_dictionary_that_holds_itself_has_an_end():
    tree = {}
    tree["model"] = tree
    assert unwrapped(tree)[1].startswith("model.model.")


@pytest.mark.parametrize(
    ("names", "start"), [(["a.b.c", "a.b.d"], "a.b."), (["a.b", "a.b"], "a."), (["ab.c", "ac.d"], ""), ([], "")]
)
def test_common_start(names, start):
    assert common_start(names) == start


# -- config= ----------------------------------------------------------------------------------------------------------


@pytest.mark.backend("pt")
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("name", ["epoch_5.pt", "model.safetensors"])
def test_a_config_given_describes_weights_of_any_format(tmp_path, names, name):
    tensors = prefixed(NAMES[names], "module.")
    if name.endswith(".pt"):
        pickle(tmp_path / name, {"epoch": 5, "name": "run", "state_dict": tensors})
    else:
        save_file(tensors, tmp_path / name)
    for place in (
        (tmp_path / name,) if name == "epoch_5.pt" and names == "transformers" else (tmp_path, tmp_path / name)
    ):
        model = CLIPModel.from_pretrained(place, config=CONFIG)
        assert equal(dict(model.to_arrays()), WEIGHTS)
        done = convert(place, tmp_path / f"result of {place.name}", config=CONFIG)
        assert done.decisions["activation"] == "text quick_gelu, vision quick_gelu: the config given"
    CONFIG.to_json_file(tmp_path / "mine.json")
    config = tmp_path / "mine.json"
    assert CLIPModel.from_pretrained(tmp_path / name, config=config).config.text_config == CONFIG.text_config
    assert CLIPTextModel.from_pretrained(tmp_path / name, config=CONFIG.text_config)


@pytest.mark.backend("pt")
def test_a_config_that_does_not_fit_the_weights_is_refused(tmp_path):
    pickle(tmp_path / "epoch_5.pt", prefixed(NAMES["openai"], ""))
    with pytest.raises(CheckpointError, match="does not fit CLIPModel"):
        CLIPModel.from_pretrained(tmp_path / "epoch_5.pt", config=CLIPConfig())
