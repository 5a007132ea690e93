"""OpenAI's files: the mapping both ways, state dicts and TorchScript archives, which are read and never run."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
from cases import CONFIGS, TEXT, VISION, random_arrays
from conftest import BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmb import CheckpointError, CLIPConfig
from clipmb.common.checkpoint import fit, formats, openai
from clipmb.common.hub import Source
from clipmb.common.parameters import specs
from clipmb.common.saving import Transaction

if "pt" in BACKENDS:
    import torch
    from openai_layout import SMALL, VIT_B_32, Model, as_released, random_model

pytestmark = pytest.mark.backend("pt")

CONFIG = CLIPConfig(
    {**TEXT, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1},
    {**VISION, "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2},
    projection_dim=24,
)


def half(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """float32 arrays whose values float16 has too."""
    return {name: array.astype(np.float16).astype(np.float32) for name, array in arrays.items()}


def write(folder, arrays, config=CONFIG, head="CLIPModel"):
    with Transaction(folder) as save:
        return openai.write(save, arrays, config, head)


def same_values(a, b) -> bool:
    return a.keys() == b.keys() and all(a[n].shape == b[n].shape and np.array_equal(a[n], b[n]) for n in a)


# -- the mapping ------------------------------------------------------------------------------------------------------


def test_the_names_and_shapes_are_those_of_the_independent_model():
    arrays = random_arrays(CONFIG, "CLIPModel")
    tensors = openai.from_canonical(arrays)
    assert {name: array.shape for name, array in tensors.items()} == {
        name: tuple(value.shape) for name, value in Model(SMALL).state_dict().items()
    }


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.integers(0, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 7), st.integers(1, 4))
def test_the_mapping_is_inverted_exactly(text_layers, vision_layers, heads, other_heads, proj, patches):
    config = CLIPConfig(
        {**TEXT, "num_hidden_layers": text_layers, "hidden_size": 4 * heads, "num_attention_heads": heads},
        {
            **VISION, "num_hidden_layers": vision_layers, "hidden_size": 6 * other_heads,
            "num_attention_heads": other_heads, "image_size": 4 * patches,
        },
        projection_dim=proj,
    )  # fmt: skip
    arrays = random_arrays(config, "CLIPModel")
    tensors = dict(openai.from_canonical(arrays))
    back = openai.to_canonical(tensors)
    assert same_values(back, arrays)
    assert all(np.shares_memory(back[name], tensors[openai.openai_name(name)]) for name in back)
    assert openai.names(specs(config, "CLIPModel")).keys() == arrays.keys()
    text, vision, width = openai.sizes_of(tensors, "here")
    assert width == proj
    for part, sizes in ((config.text_config, text), (config.vision_config, vision)):
        layers = part.num_hidden_layers
        assert {**part.to_dict(), **sizes} == part.to_dict() or layers == 0
        assert sizes["num_hidden_layers"] == layers


def test_rows_of_packed_projections_are_q_then_k_then_v():
    arrays = random_arrays(CONFIG, "CLIPModel")
    packed = openai.from_canonical(arrays)["visual.transformer.resblocks.1.attn.in_proj_weight"]
    stem = "vision_model.encoder.layers.1.self_attn"
    for i, part in enumerate("qkv"):
        assert (packed[128 * i : 128 * (i + 1)] == arrays[f"{stem}.{part}_proj.weight"]).all()


def test_missing_and_foreign_arrays_are_all_listed():
    arrays = random_arrays(CONFIG, "CLIPModel")
    del arrays["text_model.encoder.layers.0.self_attn.k_proj.bias"]
    arrays["classifier.weight"] = arrays["logit_scale"]
    with pytest.raises(CheckpointError) as caught:
        openai.from_canonical(arrays)
    assert len(caught.value.problems) == 2


# -- writing ----------------------------------------------------------------------------------------------------------


def test_round_trip_with_the_dtypes_of_the_release(tmp_path):
    arrays = half(random_arrays(CONFIG, "CLIPModel"))
    assert write(tmp_path, arrays) == ["model.pt"]
    loaded = formats.load(Source(str(tmp_path)))
    assert loaded.format == "openai"
    assert same_values(dict(loaded.tensors), arrays)
    stored = torch.load(tmp_path / "model.pt", weights_only=True)
    released = as_released(Model(SMALL), SMALL)
    assert {name: (value.dtype, value.shape) for name, value in stored.items()} == {
        name: (value.dtype, value.shape) for name, value in released.items()
    }
    assert [stored[name].item() for name in openai.METADATA] == [20, 13, 99]


@pytest.mark.parametrize("value", [0.1, 70000.0, 1e-9, np.nan])
def test_no_value_is_ever_rounded(tmp_path, value):
    arrays = half(random_arrays(CONFIG, "CLIPModel"))
    arrays["text_projection.weight"][3, 5] = value
    write(tmp_path, arrays)
    loaded = formats.load(Source(str(tmp_path)))
    assert all(np.array_equal(loaded.tensors[name], arrays[name], equal_nan=True) for name in arrays)
    expected = np.float16 if np.isnan(value) else np.float32
    assert loaded.tensors["visual_projection.weight"].dtype == expected


def test_models_that_openais_code_cannot_express(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        write(tmp_path, random_arrays(CONFIGS["stress"], "CLIPModel"), CONFIGS["stress"])
    assert len(caught.value.problems) == 8
    other = CLIPConfig.from_dict(CONFIG.to_dict(), text_config={"eos_token_id": 7}, vision_config={"num_channels": 4})
    with pytest.raises(CheckpointError, match="eos_token_id"):
        write(tmp_path, {}, other)


# -- reading ----------------------------------------------------------------------------------------------------------


def check(loaded, model) -> None:
    """The config is the model's, and every value arrived."""
    config = loaded.config
    arrays, _ = fit(loaded.tensors, specs(config, "CLIPModel"), "CLIPModel")
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    assert same_values(openai.from_canonical(arrays), state)
    assert config.text_config.hidden_act == config.vision_config.hidden_act == "quick_gelu"
    assert config.text_config.eos_token_id == 2
    assert (config.text_config.num_attention_heads, config.vision_config.num_attention_heads) == (1, 2)
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (20, 4)
    assert {"activation", "num_attention_heads", "pooling", "sizes"} <= loaded.decisions.keys()


@pytest.mark.parametrize("name", ["model.pt", "ViT-B-32.pt", "mine.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("form", ["plain", "module.", "trainer"])
def test_state_dicts(tmp_path, name, form):
    model = random_model(SMALL)
    state = {**model.state_dict(), "input_resolution": torch.tensor(20)}
    if form == "module.":
        state = {f"module.{key}": value for key, value in state.items()}
    torch.save({"state_dict": state, "epoch": 1} if form == "trainer" else state, tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        loaded = formats.load(Source(str(source)))
        assert (loaded.format, loaded.files) == ("openai", [name])
        check(loaded, model)


def described(path):
    """The config of weights that are alone."""
    source = Source(str(path))
    return formats.config_of(formats.load(source), source)


def test_a_bare_state_dict_is_ambiguous_and_a_config_json_settles_it(tmp_path):
    model = random_model(SMALL)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for source in (tmp_path, tmp_path / "model.pt"):
        with pytest.raises(CheckpointError, match=r"does not guess(.|\n)*open_clip_config\.json"):
            described(source)
    (tmp_path / "config.json").write_text(CONFIG.to_json_string())
    loaded = formats.load(Source(str(tmp_path)))
    assert loaded.config is None
    assert same_values(fit(loaded.tensors, specs(CONFIG, "CLIPModel"), "CLIPModel")[0], dict(loaded.tensors))


@pytest.mark.parametrize("form", ["plain", "module."])
def test_the_two_tables_of_long_clip_become_one(tmp_path, form):
    config = CLIPConfig(
        {**CONFIG.text_config.to_dict(), "max_position_embeddings": 31},
        CONFIG.vision_config.to_dict(),
        projection_dim=24,
    )
    arrays = random_arrays(config, "CLIPModel")
    state = {name: torch.from_numpy(np.array(array)) for name, array in openai.from_canonical(arrays).items()}
    short, long = state["positional_embedding"].clone(), state["positional_embedding"].clone()
    short[20:], long[:20] = 7.0, 8.0  # which neither table is read for
    state |= {"positional_embedding": short, "positional_embedding_res": long}
    state = {(name if form == "plain" else form + name): value for name, value in state.items()}
    torch.save(state, tmp_path / "longclip.pt")
    config, decisions = formats.config_of(formats.load(source := Source(str(tmp_path / "longclip.pt"))), source)
    assert config.text_config.max_position_embeddings == 31
    assert "from row 20 on" in decisions["positions"]
    loaded, _ = fit(formats.load(source).tensors, specs(config, "CLIPModel"), "CLIPModel")
    assert same_values(loaded, arrays)


def test_residual_networks_are_refused_by_name(tmp_path):
    state = {"visual.layer1.0.conv1.weight": torch.zeros(2), "input_resolution": torch.tensor(224)}
    torch.save(state, tmp_path / "RN50.pt")
    with pytest.raises(CheckpointError, match="ResNet"):
        formats.load(Source(str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("visual.proj"), r"visual\.proj is missing"),
        (lambda s: s.update({"visual.proj": torch.zeros(3)}), "shape"),
        (lambda s: s.update({"visual.positional_embedding": torch.zeros(25, 128)}), "square"),
        (lambda s: s.update({"transformer.resblocks.0.attn.in_proj_bias": torch.zeros(191)}), "three matrices"),
        (lambda s: s.update({"visual.conv1.weight": torch.zeros(100, 3, 4, 4)}), "64 wide"),
    ],
)
def test_shapes_that_tell_nothing(tmp_path, change, match):
    state = as_released(Model(SMALL), SMALL)
    change(state)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=match):
        described(tmp_path)


def test_names_that_are_not_openais_come_through_to_the_strict_check(tmp_path):
    torch.save({**as_released(random_model(SMALL), SMALL), "extra": torch.ones(1)}, tmp_path / "model.pt")
    loaded = formats.load(Source(str(tmp_path)))
    with pytest.raises(CheckpointError, match="unexpected: extra"):
        fit(loaded.tensors, specs(loaded.config, "CLIPModel"), "CLIPModel")


def test_the_tensors_of_the_release(tmp_path):
    """The inventory of ViT-B-32.pt as published: 305 tensors, with these dtypes."""
    state = as_released(Model(VIT_B_32), VIT_B_32)
    assert len(state) == 305
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in state.items()}
    assert dtypes | RELEASED == dtypes
    assert {name: list(state[name].shape) for name in SHAPES} == SHAPES
    empty = openai.sizes_of({name: np.empty(value.shape, bool) for name, value in state.items()}, "here")
    defaults = CLIPConfig()
    assert {**defaults.text_config.to_dict(), **empty[0]} == defaults.text_config.to_dict()
    assert {**defaults.vision_config.to_dict(), **empty[1]} == defaults.vision_config.to_dict()
    assert empty[2] == 512


RELEASED = {
    "positional_embedding": "float32", "text_projection": "float16", "logit_scale": "float32",
    "input_resolution": "int64", "context_length": "int64", "vocab_size": "int64",
    "visual.class_embedding": "float32", "visual.positional_embedding": "float32", "visual.proj": "float16",
    "visual.conv1.weight": "float16", "visual.ln_pre.weight": "float32", "visual.ln_post.bias": "float32",
    "visual.transformer.resblocks.0.attn.in_proj_weight": "float16",
    "visual.transformer.resblocks.0.attn.in_proj_bias": "float16",
    "visual.transformer.resblocks.11.attn.out_proj.weight": "float16",
    "visual.transformer.resblocks.11.attn.out_proj.bias": "float16",
    "visual.transformer.resblocks.11.ln_1.weight": "float32", "visual.transformer.resblocks.11.ln_2.bias": "float32",
    "transformer.resblocks.0.mlp.c_fc.weight": "float16", "transformer.resblocks.0.mlp.c_proj.bias": "float16",
    "token_embedding.weight": "float32", "ln_final.weight": "float32", "ln_final.bias": "float32",
}  # fmt: skip
SHAPES = {
    "positional_embedding": [77, 512], "text_projection": [512, 512], "logit_scale": [], "input_resolution": [],
    "visual.positional_embedding": [50, 768], "visual.proj": [768, 512], "visual.conv1.weight": [768, 3, 32, 32],
    "visual.transformer.resblocks.0.attn.in_proj_weight": [2304, 768], "token_embedding.weight": [49408, 512],
    "transformer.resblocks.11.mlp.c_fc.weight": [2048, 512], "transformer.resblocks.11.attn.in_proj_bias": [1536],
}  # fmt: skip


# -- TorchScript ------------------------------------------------------------------------------------------------------

# PyTorch 2.13 calls its own TorchScript deprecated; the files of the release are in it all the same.
scripted = pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning")


def trap(mark: str):
    """A module whose code, when an archive with it is loaded, writes a file."""
    from typing import Tuple  # noqa: UP035 - TorchScript reads annotations, and knows this form in every version

    class Trap(torch.nn.Module):
        __constants__ = ["mark"]  # noqa: RUF012 - as TorchScript wants it

        def __init__(self) -> None:
            super().__init__()
            self.mark = mark
            self.x = torch.ones(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

        @torch.jit.export
        def __getstate__(self) -> Tuple[torch.Tensor, bool]:  # noqa: UP006
            return (self.x, self.training)

        @torch.jit.export
        def __setstate__(self, state: Tuple[torch.Tensor, bool]) -> None:  # noqa: UP006
            torch.save(state[0], self.mark)
            self.x, self.training = state

    return Trap()


@scripted
@pytest.mark.parametrize("form", ["traced", "numbers", "half"])
def test_torchscript_archives(tmp_path, form):
    """Traced as OpenAI's, with the three numbers as buffers or as attributes."""
    model = random_model(SMALL)
    if form != "numbers":
        for name, value in (("input_resolution", 20), ("context_length", 13), ("vocab_size", 99)):
            model.register_buffer(name, torch.tensor(value))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # about sizes, which the archive need not vary
        traced = torch.jit.trace(model, (torch.ones(2, 3, 20, 20), torch.ones(2, 7, dtype=torch.int64)))
    if form == "half":
        model.half()
        traced.half()
    traced.save(tmp_path / "ViT-B-32.pt")
    for name in openai.METADATA:
        if hasattr(model, name):
            delattr(model, name)
    for source in (tmp_path, tmp_path / "ViT-B-32.pt"):
        loaded = formats.load(Source(str(source)))
        assert loaded.format == "openai"
        check(loaded, model)


@scripted
def test_code_in_torchscript_archives_is_not_run(tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    module = torch.nn.Module()
    for name, value in random_model(SMALL).state_dict().items():
        *parents, leaf = name.split(".")
        node = module
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, torch.nn.Module())
            node = getattr(node, parent)
        node.register_buffer(leaf, value)
    module.add_module("trap", trap(str(mark)))
    torch.jit.script(module).save(tmp_path / "ViT-B-32.pt")
    mark.unlink(missing_ok=True)

    monkeypatch.setitem(sys.modules, "torch", None)  # PyTorch does not even see the file
    check(formats.load(Source(str(tmp_path))), random_model(SMALL))
    monkeypatch.undo()
    assert not mark.exists()
    torch.jit.load(tmp_path / "ViT-B-32.pt")
    assert mark.exists()  # the trap works: PyTorch's own loader ran it
