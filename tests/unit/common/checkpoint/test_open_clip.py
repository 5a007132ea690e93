"""open_clip's files: the config decides what the weights do not say, and what no CLIP has is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cases import TEXT, VISION, equal, random_arrays
from conftest import BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from clipmb import CheckpointError, CLIPConfig
from clipmb.common.checkpoint import fit, formats, open_clip, openai
from clipmb.common.hub import Source
from clipmb.common.parameters import specs
from clipmb.common.saving import Transaction

if "pt" in BACKENDS:
    import torch

CONFIG = CLIPConfig(TEXT, VISION, projection_dim=24)
MODEL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 20, "layers": 2, "width": 48, "head_width": 8, "patch_size": 4, "mlp_ratio": 80 / 48},
    "text_cfg": {"context_length": 13, "vocab_size": 99, "width": 32, "heads": 4, "layers": 3, "mlp_ratio": 1.75},
}
WEIGHTS = openai.from_canonical(random_arrays(CONFIG, "CLIPModel"))


def put(folder, model=MODEL, weights=WEIGHTS, name="open_clip_model.safetensors", config="open_clip_config.json"):
    """Writes a checkpoint as open_clip does."""
    if name.endswith(".safetensors"):
        save_file({key: np.require(value, requirements="C") for key, value in weights.items()}, folder / name)
    else:
        torch.save({key: torch.from_numpy(np.array(value)) for key, value in weights.items()}, folder / name)
    if config:
        wrapped = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3}} if "open_clip" in config else model
        (folder / config).write_text(json.dumps(wrapped))
    return Source(str(folder))


def changed(**parts: dict) -> dict:
    """MODEL with other values: keys of the whole, or dictionaries for the towers."""
    return {
        key: {**MODEL.get(key, {}), **value} if key.endswith("_cfg") else value
        for key, value in {**MODEL, **parts}.items()
    }


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("open_clip_model.safetensors", "open_clip_config.json"),
        ("open_clip_model.safetensors", "ViT-tiny.json"),
        ("model.safetensors", "open_clip_config.json"),
        pytest.param("open_clip_pytorch_model.bin", "open_clip_config.json", marks=pytest.mark.backend("pt")),
        pytest.param("epoch_32.pt", "open_clip_config.json", marks=pytest.mark.backend("pt")),
    ],
)
@pytest.mark.parametrize("quick", [None, False, True])
def test_weights_and_config(tmp_path, name, config, quick):
    (tmp_path / "added_tokens.json").write_text("[]")
    source = put(tmp_path, MODEL if quick is None else {**MODEL, "quick_gelu": quick}, name=name, config=config)
    loaded = formats.load(source)
    assert (loaded.format, loaded.files[0]) == ("open_clip", name)
    assert loaded.files[1].endswith(".json")  # which decides the activation
    act = "quick_gelu" if quick else "gelu"
    assert loaded.config == CLIPConfig(
        {**TEXT, "hidden_act": act, "eos_token_id": 2, "bos_token_id": 0},
        {**VISION, "hidden_act": act},
        projection_dim=24,
    )
    assert ("default is false" in loaded.decisions["activation"]) == (quick is None)
    arrays, _ = fit(loaded.tensors, specs(loaded.config, "CLIPModel"), "CLIPModel")
    assert equal(arrays, random_arrays(CONFIG, "CLIPModel"))


@pytest.mark.parametrize(
    "suffix", ["model.safetensors", pytest.param("pytorch_model.bin", marks=pytest.mark.backend("pt"))]
)
@pytest.mark.parametrize("prefix", ["", "_orig_mod.module."])
def test_shards(tmp_path, suffix, prefix):
    """accelerate splits the weights of any model under the names of transformers' files."""
    weights = {f"{prefix}{key}": value for key, value in WEIGHTS.items()}
    stem, _, kind = suffix.partition(".")
    listed = {key: f"{stem}-{1 + i % 2:05d}-of-00002.{kind}" for i, key in enumerate(weights)}
    for file in set(listed.values()):
        source = put(tmp_path, weights={key: weights[key] for key in weights if listed[key] == file}, name=file)
    (tmp_path / f"{suffix}.index.json").write_text(json.dumps({"weight_map": listed}))
    loaded = formats.load(source)
    assert (loaded.format, loaded.config.vision_config.image_size) == ("open_clip", 20)
    assert loaded.files == [*sorted(set(listed.values())), f"{suffix}.index.json", "open_clip_config.json"]
    assert equal(dict(loaded.tensors), random_arrays(CONFIG, "CLIPModel"))
    assert bool(prefix) == ("prefix" in loaded.decisions)


@pytest.mark.parametrize("config", ["", "open_clip_config.json"])
@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "other.safetensors"])
def test_names_before_which_something_stands_are_said_before_a_config_is_asked_for(tmp_path, name, config):
    put(tmp_path, weights={f"student.{key}": value for key, value in WEIGHTS.items()}, name=name, config=config)
    source = Source(str(tmp_path / name) if name.startswith("other") else str(tmp_path))
    with pytest.raises(CheckpointError, match=r"has no weight of CLIPModel.*all of which begin with 'student\.'"):
        formats.config_of(formats.load(source), source)


@pytest.mark.parametrize("prefix", ["module.", "text."])
def test_prefixes(tmp_path, prefix):
    """Distributed training puts ``module.`` before every name, ``custom_text`` ``text.`` before the text tower's."""
    weights = {
        key if prefix == "text." and key.startswith(("visual.", "logit_scale")) else f"{prefix}{key}": value
        for key, value in WEIGHTS.items()
    }
    loaded = formats.load(put(tmp_path, {**MODEL, "custom_text": True}, {**weights}))
    assert equal(dict(loaded.tensors), random_arrays(CONFIG, "CLIPModel"))


@pytest.mark.backend("pt")
def test_training_checkpoints(tmp_path):
    state = {f"module.{key}": torch.from_numpy(np.array(value)) for key, value in WEIGHTS.items()}
    state["module.attn_mask"] = torch.zeros(13, 13)
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 1e-3}]}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": optimizer}, tmp_path / "epoch_3.pt")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(MODEL))
    loaded = formats.load(Source(str(tmp_path)))
    assert equal(dict(loaded.tensors), random_arrays(CONFIG, "CLIPModel"))


@pytest.mark.parametrize("files", [(), ("a.json", "b.json")])
def test_the_activation_is_never_guessed(tmp_path, files):
    source = put(tmp_path, config="")
    for name in files:
        (tmp_path / name).write_text(json.dumps(MODEL))
    for place in (source, Source(str(tmp_path / "open_clip_model.safetensors"))):
        loaded = formats.load(place)
        assert loaded.config is None
        with pytest.raises(CheckpointError, match=r"QuickGELU(.|\n)*does not guess(.|\n)*open_clip_config\.json"):
            formats.config_of(loaded, place)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vision_cfg": {"timm_model_name": "convnext_base"}}, "timm_model_name"),
        ({"vision_cfg": {"attentional_pool": True}}, "attentional_pool"),
        ({"vision_cfg": {"no_ln_pre": True}}, "no_ln_pre"),
        ({"vision_cfg": {"pool_type": "avg"}}, "pool_type"),
        ({"vision_cfg": {"ls_init_value": 1e-4}}, "ls_init_value"),
        ({"vision_cfg": {"qk_norm": True}}, "qk_norm"),
        ({"vision_cfg": {"brand_new": 1}}, "brand_new"),
        ({"vision_cfg": {"act_kwargs": {"approximate": "fast"}}}, "act_kwargs"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "hf_model_name"),
        ({"text_cfg": {"no_causal_mask": True}}, "no_causal_mask"),
        ({"text_cfg": {"pool_type": "last"}}, "pool_type"),
        ({"text_cfg": {"pool_type": "eos", "eos_id": 2}}, "eos_id"),
        ({"text_cfg": {"embed_cls": True}}, "embed_cls"),
        ({"text_cfg": {"proj_bias": True}}, "proj_bias"),
        ({"text_cfg": {"proj_type": "none"}}, "proj_type"),
        ({"multimodal_cfg": {"width": 32}}, "multimodal_cfg"),
        ({"init_logit_bias": -10}, "init_logit_bias"),
        ({"quick_gelu": "yes"}, "quick_gelu"),
    ],
)
def test_what_no_clip_has_is_refused_by_name(tmp_path, changes, named):
    with pytest.raises(CheckpointError, match=named) as caught:
        formats.load(put(tmp_path, changed(**changes)))
    assert len(caught.value.problems) == 1


def test_the_weights_can_refuse_too(tmp_path):
    with pytest.raises(CheckpointError, match="SigLIP"):
        formats.load(put(tmp_path, weights={**WEIGHTS, "logit_bias": np.zeros(())}))
    with pytest.raises(CheckpointError, match="ResNet"):
        formats.load(put(tmp_path, weights={**WEIGHTS, "visual.layer1.0.bn1.weight": np.zeros(3)}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"embed_dim": 25}, "embed_dim is 25 in the config and 24"),
        ({"vision_cfg": {"layers": 3}}, "layers"),
        ({"vision_cfg": {"image_size": 24}}, "image_size"),
        ({"vision_cfg": {"image_size": [20, 16]}}, "image_size"),
        ({"vision_cfg": {"head_width": 9}}, "heads"),
        ({"vision_cfg": {"head_width": 0}}, "heads"),
        ({"text_cfg": {"heads": 5}}, "heads"),
        ({"text_cfg": {"heads": "4"}}, "heads"),
        ({"text_cfg": {"vocab_size": 49408}}, "vocab_size"),
        ({"text_cfg": {"norm_kwargs": {"elementwise_affine": False}}}, "norm_kwargs"),
    ],
)
def test_a_config_of_another_model(tmp_path, changes, named):
    with pytest.raises(CheckpointError, match=named) as caught:
        formats.load(put(tmp_path, changed(**changes)))
    assert len(caught.value.problems) == 1


def test_a_config_that_is_none(tmp_path):
    with pytest.raises(CheckpointError, match="model_cfg"):
        formats.load(put(tmp_path, {"embed_dim": 3}))


def test_open_clips_defaults_are_held_against_the_weights(tmp_path):
    model = {"embed_dim": 24, "vision_cfg": {}, "text_cfg": {"width": 32}}
    with pytest.raises(CheckpointError) as caught:
        formats.load(put(tmp_path, model))
    named = ("layers", "width", "patch_size", "image_size", "context_length", "vocab_size", "heads")
    assert all(any(name in problem for problem in caught.value.problems) for name in named)


def test_what_the_canonical_config_can_say_is_taken_over(tmp_path):
    model = changed(
        vision_cfg={"norm_kwargs": {"eps": 1e-6}, "image_size": [20, 20], "act_kwargs": {"approximate": "tanh"}},
        text_cfg={"pool_type": "eos", "eos_id": 7, "hf_tokenizer_name": "some/tokenizer"},
    )
    loaded = formats.load(put(tmp_path, model))
    assert loaded.config.vision_config.layer_norm_eps == 1e-6
    assert loaded.config.vision_config.hidden_act == "gelu_pytorch_tanh"
    assert loaded.config.text_config.hidden_act == "gelu"
    assert loaded.config.text_config.eos_token_id == 7
    assert "some/tokenizer" in loaded.decisions["tokenizer"]


# -- writing ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["quick_gelu", "gelu", "gelu_pytorch_tanh"]),
    st.sampled_from([1e-5, 1e-6, 0.1]),
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(0, 2),
    st.sampled_from([2, 7]),
    st.sampled_from(["float32", "float16"]),
)
def test_any_config_round_trips(tmp_path_factory, act, eps, inner, other_inner, layers, eos, dtype):
    common = {"hidden_act": act, "layer_norm_eps": eps}
    config = CLIPConfig(
        {**TEXT, **common, "intermediate_size": inner, "eos_token_id": eos, "bos_token_id": 0},
        {**VISION, **common, "intermediate_size": other_inner, "num_hidden_layers": layers},
        projection_dim=24,
    )
    if not layers:
        config.vision_config.intermediate_size = 4 * config.vision_config.hidden_size  # the weights do not tell
    arrays = random_arrays(config, "CLIPModel", dtype=dtype)
    folder = tmp_path_factory.mktemp("open_clip")
    with Transaction(folder) as save:
        files = open_clip.write(save, arrays, config, "CLIPModel")
    assert sorted(path.name for path in folder.iterdir()) == sorted(files)
    loaded = formats.load(Source(str(folder)))
    assert loaded.config == config
    assert equal(dict(loaded.tensors), arrays)
    told = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    for part, key in (
        (config.text_config, "text_cfg"),
        (config.vision_config, "vision_cfg"),
    ):  # as open_clip computes it
        assert int(part.hidden_size * told[key].get("mlp_ratio", 4.0)) == part.intermediate_size


def test_the_end_token_of_clips_vocabulary_is_the_largest_id(tmp_path):
    with Transaction(tmp_path) as save:
        open_clip.write(save, random_arrays(CONFIG, "CLIPModel"), CONFIG, "CLIPModel")
    assert CONFIG.text_config.eos_token_id == CONFIG.text_config.vocab_size - 1
    assert "pool_type" not in json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]


@pytest.mark.parametrize(
    ("text", "vision", "named"),
    [
        ({"hidden_act": "gelu"}, {}, "hidden_act"),
        ({"hidden_act": "relu"}, {"hidden_act": "gelu"}, "relu"),
        ({}, {"num_channels": 4}, "num_channels"),
    ],
)
def test_models_that_open_clip_has_not(tmp_path, text, vision, named):
    config = CLIPConfig({**TEXT, **text}, {**VISION, **vision})
    with pytest.raises(CheckpointError, match=named), Transaction(tmp_path) as save:
        open_clip.write(save, {}, config, "CLIPModel")


def test_single_towers_have_no_form(tmp_path):
    with pytest.raises(CheckpointError, match="open_clip has CLIPModel only"), Transaction(tmp_path) as save:
        open_clip.write(save, {}, CONFIG.text_config, "CLIPTextModel")
