"""Pickled files against their own writers and readers: transformers, and OpenAI's model written independently."""

from __future__ import annotations

import json

import numpy as np
import pytest
import transformers
from cases import ALL_HEADS, CONFIGS, config_of, image_inputs, random_arrays, relative, text_inputs
from conftest import BACKENDS

from clipmb.common.checkpoint import fit, formats, open_clip, openai, pytorch
from clipmb.common.config import CLIPConfig
from clipmb.common.hub import Source
from clipmb.common.parameters import specs
from clipmb.common.saving import Transaction

if "pt" in BACKENDS:
    import torch
    from openai_layout import SMALL, VIT_B_32, Model, as_released, model_config, random_model

    import clipmb.pt as pt

pytestmark = pytest.mark.backend("pt")

CONFIG = CONFIGS["plain"]


def theirs(head: str) -> type:
    return getattr(transformers, head)


# -- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ALL_HEADS)
@pytest.mark.parametrize("size", ["5GB", "30KB"])
def test_files_of_transformers(tmp_path, head, size):
    cls, part = theirs(head), config_of(head, CONFIG)
    model = cls(cls.config_class.from_dict(part.to_dict()))
    model.save_pretrained(tmp_path, safe_serialization=False, max_shard_size=size)
    loaded = formats.load(Source(str(tmp_path)))
    assert loaded.format == "pytorch"
    assert (len(loaded.files) > 1) == (size == "30KB")
    arrays, _ = fit(loaded.tensors, specs(part, head), head)
    state = model.state_dict()
    assert arrays.keys() == state.keys()
    assert all(np.array_equal(arrays[name], state[name].numpy()) for name in state)


@pytest.mark.parametrize("head", ALL_HEADS)
@pytest.mark.parametrize("size", ["5GB", "30KB"])
def test_files_for_transformers(tmp_path, head, size):
    cls, part = theirs(head), config_of(head, CONFIG)
    arrays = random_arrays(part, head)
    with Transaction(tmp_path) as save:
        save.write("config.json", part.to_json_string())
        files = pytorch.write(save, arrays, part, head, max_shard_size=size)
    assert (len(files) > 1) == (size == "30KB")
    model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    state = model.state_dict()
    assert all(np.array_equal(arrays[name], state[name].numpy()) for name in arrays)
    assert state.keys() == arrays.keys()


# -- OpenAI's layout --------------------------------------------------------------------------------------------------


def ours(folder) -> tuple[object, CLIPConfig]:
    """Our model of a folder in OpenAI's or open_clip's layout, built from what the format alone tells."""
    loaded = formats.load(Source(str(folder)))
    arrays, _ = fit(loaded.tensors, specs(loaded.config, "CLIPModel"), "CLIPModel")
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    model = pt.CLIPModel.from_pretrained(None, config=loaded.config, state_dict=arrays)
    return model.eval(), loaded.config


def agree(model: Model, folder, tolerance: float, eos: int | None = None) -> None:
    ours_model, config = ours(folder)
    pixels = torch.from_numpy(image_inputs(config)["pixel_values"])
    ids = torch.from_numpy(text_inputs(CONFIG)["input_ids"])
    with torch.no_grad():
        assert relative(ours_model.get_image_features(pixel_values=pixels), model.visual(pixels)) < tolerance
        assert relative(ours_model.get_text_features(input_ids=ids), model.text(ids, eos)) < tolerance


def test_openais_file_gives_the_outputs_of_openais_model(tmp_path):
    model = random_model(SMALL)
    state = as_released(model, SMALL)
    model.load_state_dict({name: value for name, value in state.items() if name not in openai.METADATA})
    torch.save(state, tmp_path / "ViT-B-32.pt")
    agree(model, tmp_path, 2e-6)


def test_the_released_inventory_gives_the_outputs_of_openais_model(tmp_path):
    """305 tensors with the names, shapes and dtypes of ViT-B-32.pt."""
    model = random_model(VIT_B_32)
    state = as_released(model, VIT_B_32)
    assert len(state) == 305
    model.load_state_dict({name: value for name, value in state.items() if name not in openai.METADATA})
    torch.save(state, tmp_path / "ViT-B-32.pt")
    loaded = formats.load(Source(str(tmp_path)))
    assert len(fit(loaded.tensors, specs(CLIPConfig(), "CLIPModel"), "CLIPModel")[0]) == 398
    agree(model, tmp_path, 2e-6)


def test_our_file_gives_openais_model_our_outputs(tmp_path):
    config = CLIPConfig(
        {**CONFIG.text_config.to_dict(), "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1},
        {**CONFIG.vision_config.to_dict(), "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2},
        projection_dim=24,
    )
    arrays = random_arrays(config, "CLIPModel")
    with Transaction(tmp_path) as save:
        openai.write(save, arrays, config, "CLIPModel")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    model = Model(SMALL)
    numbers = {name: state.pop(name).item() for name in openai.METADATA}
    assert numbers == {"input_resolution": 20, "context_length": 13, "vocab_size": 99}
    model.load_state_dict(state)  # strict: no name is missing or unexpected
    agree(model, tmp_path, 2e-6)


@pytest.mark.parametrize(
    ("act", "changes"),
    [
        ("quick", {"quick_gelu": True}),
        ("exact", {}),
        ("exact", {"quick_gelu": False, "eos": 98}),
        ("tanh", {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}}),
    ],
)
def test_open_clips_file_gives_the_outputs_of_its_model(tmp_path, act, changes):
    acts = {"quick": None, "exact": torch.nn.GELU(), "tanh": torch.nn.GELU(approximate="tanh")}
    shape = {**SMALL, "vision_heads": 4, "text_heads": 8}
    eps = changes.get("norm_kwargs", {}).get("eps", 1e-5)
    model = random_model(shape, act=acts[act], eps=eps, ratio=3.7)
    config = model_config(shape, **({"quick_gelu": changes["quick_gelu"]} if "quick_gelu" in changes else {}))
    for tower in (config["vision_cfg"], config["text_cfg"]):
        tower |= {key: changes[key] for key in ("act_kwargs", "norm_kwargs") if key in changes} | {"mlp_ratio": 3.7}
    if "eos" in changes:
        config["text_cfg"] |= {"pool_type": "eos", "eos_id": changes["eos"]}
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    agree(model, tmp_path, 2e-6, changes.get("eos"))


def test_our_file_gives_open_clips_model_our_outputs(tmp_path):
    from safetensors.torch import load_file

    arrays = random_arrays(CONFIG, "CLIPModel")
    with Transaction(tmp_path) as save:
        open_clip.write(save, arrays, CONFIG, "CLIPModel")
    shape = {**SMALL, "vision_width": 48, "vision_heads": 6, "text_width": 32, "text_heads": 4}
    model = Model(shape)
    model.visual.transformer = type(model.transformer)(2, 48, 6, torch.nn.Identity(), 1e-5, 80)
    model.transformer = type(model.transformer)(3, 32, 4, torch.nn.Identity(), 1e-5, 56)
    for block in (*model.visual.transformer.resblocks, *model.transformer.resblocks):
        block.mlp.gelu = Model(SMALL).transformer.resblocks[0].mlp.gelu
    model.eval().load_state_dict(load_file(tmp_path / "open_clip_model.safetensors"))
    agree(model, tmp_path, 2e-6)
