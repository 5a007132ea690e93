"""Towers in one file without a config: found inside diffusion models, described where their sizes are published."""

from __future__ import annotations

import numpy as np
import pytest
from cases import CONFIGS, config_of, equal, random_arrays
from conftest import BACKENDS
from safetensors.numpy import save_file

from clipmb import CheckpointError, CLIPConfig, CLIPTextConfig, CLIPVisionConfig, convert
from clipmb.common.checkpoint import fit, formats, openai, single_towers
from clipmb.common.checkpoint.tensors import Deferred, Lazy, Loaded
from clipmb.common.hub import Source
from clipmb.common.parameters import specs

if "pt" in BACKENDS:
    import torch

    from clipmb import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

L_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_attention_heads": 12}
H_TEXT = {
    "hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 1024, "num_attention_heads": 16,
    "num_hidden_layers": 24, "hidden_act": "gelu",
}  # fmt: skip
G_TEXT = {
    "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280, "num_attention_heads": 20,
    "num_hidden_layers": 32, "hidden_act": "gelu",
}  # fmt: skip
L_VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 768, "num_attention_heads": 16,
    "num_hidden_layers": 24, "patch_size": 14, "image_size": 224,
}  # fmt: skip
H_VISION = {
    "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1024, "num_attention_heads": 16,
    "num_hidden_layers": 32, "patch_size": 14, "image_size": 224, "hidden_act": "gelu",
}  # fmt: skip
G_VISION = {
    "hidden_size": 1664, "intermediate_size": 8192, "projection_dim": 1280, "num_attention_heads": 16,
    "num_hidden_layers": 48, "patch_size": 14, "image_size": 224, "hidden_act": "gelu",
}  # fmt: skip


def stand_ins(config, head):
    """A checkpoint of any size that takes no memory."""
    dtype = np.dtype(np.float16)
    made = {spec.name: Lazy(spec.shape, dtype, lambda: np.zeros(1, dtype)) for spec in specs(config, head)}
    return Loaded("safetensors", Deferred(made), ["clip_l.safetensors"])


# -- the config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "head"),
    [
        (CLIPTextConfig(**L_TEXT), "CLIPTextModel"),
        (CLIPTextConfig(**L_TEXT), "CLIPTextModelWithProjection"),
        (CLIPTextConfig(**L_TEXT, max_position_embeddings=248), "CLIPTextModel"),
        (CLIPTextConfig(**H_TEXT), "CLIPTextModel"),
        (CLIPTextConfig(**G_TEXT), "CLIPTextModelWithProjection"),
        (CLIPVisionConfig(**L_VISION), "CLIPVisionModelWithProjection"),
        (CLIPVisionConfig(**{**L_VISION, "image_size": 336}), "CLIPVisionModelWithProjection"),
        (CLIPVisionConfig(**H_VISION), "CLIPVisionModelWithProjection"),
        (CLIPVisionConfig(**G_VISION), "CLIPVisionModelWithProjection"),
    ],
)
def test_the_towers_that_programs_share_are_described_by_their_sizes(config, head):
    found, reasons = single_towers.infer(stand_ins(config, head))
    assert found == config
    assert "the file does not say" in reasons["activation"]


@pytest.mark.parametrize(
    ("config", "head"),
    [
        (CLIPTextConfig(), "CLIPTextModel"),  # OpenAI's ViT-B/32 and LAION's have the same sizes and other activations
        (CLIPVisionConfig(), "CLIPVisionModel"),
        (CLIPTextConfig(**L_TEXT, vocab_size=49410), "CLIPTextModel"),
        (CLIPTextConfig(**{**L_TEXT, "num_hidden_layers": 11}), "CLIPTextModel"),
        (CLIPVisionConfig(**{**L_VISION, "patch_size": 16}), "CLIPVisionModel"),
        (CLIPConfig(L_TEXT, L_VISION, projection_dim=768), "CLIPModel"),
    ],
)
def test_other_sizes_are_not_guessed_at(config, head, tmp_path):
    loaded = stand_ins(config, head)
    assert single_towers.infer(loaded) is None
    (tmp_path / "clip.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"has no config(.|\n)*Pass config="):
        formats.config_of(loaded, Source(str(tmp_path / "clip.safetensors")))


# -- files ------------------------------------------------------------------------------------------------------------

FIRST = CLIPTextConfig.from_dict(
    CONFIGS["plain"].text_config.to_dict(), bos_token_id=49406, eos_token_id=49407, projection_dim=32
)
SECOND = CLIPTextConfig.from_dict(
    FIRST.to_dict(), hidden_size=40, num_hidden_layers=2, num_attention_heads=5, hidden_act="gelu", projection_dim=40
)


@pytest.fixture
def small(monkeypatch):
    """Makes small towers published ones."""
    known = {(c.hidden_size, c.num_hidden_layers): c for c in (FIRST, SECOND)}
    rows = {k: single_towers._Published("a test", c.num_attention_heads, c.hidden_act) for k, c in known.items()}
    monkeypatch.setattr(single_towers, "_TEXT", rows)
    monkeypatch.setattr(single_towers, "_VOCABULARY", 99)


def text_part(config, seed):
    """A text tower with its projection, in open_clip's layout."""
    wide = CLIPConfig(config.to_dict(), CONFIGS["plain"].vision_config.to_dict(), projection_dim=config.projection_dim)
    both = random_arrays(wide, "CLIPModel", seed)
    names = {**random_arrays(config, "CLIPTextModelWithProjection"), "logit_scale": None}
    theirs = openai.from_canonical(both)
    inside = {name: np.require(theirs[name], requirements="C") for name in theirs if not name.startswith("visual.")}
    return {name: both[name] for name in names}, inside


def diffusion_file(kind):
    """The names of a diffusion model, and its text encoders under canonical names."""
    first = random_arrays(FIRST, "CLIPTextModel")
    second, theirs = text_part(SECOND, 1)
    unet = {"model.diffusion_model.out.2.weight": np.ones((4, 4), np.float32)}
    positions = {"text_model.embeddings.position_ids": np.arange(13)[None]}
    if kind == "sd1":
        place = "cond_stage_model.transformer."
        return {**unet, **{f"{place}{name}": a for name, a in {**first, **positions}.items()}}, [first]
    places = {"sd2": "cond_stage_model.model.", "refiner": "conditioner.embedders.0.model."}
    if kind in places:
        return {**unet, **{f"{places[kind]}{name}": a for name, a in theirs.items()}}, [second]
    if kind == "sd3":
        both = {"clip_l": first, "clip_g": second, "t5xxl": {"shared.weight": np.ones((4, 4), np.float32)}}
        found = {
            f"text_encoders.{place}.transformer.{name}": a for place, part in both.items() for name, a in part.items()
        }
        return {**unet, **found}, [first, second]
    found = {f"conditioner.embedders.0.transformer.{name}": a for name, a in first.items()}
    found |= {f"conditioner.embedders.1.model.{name}": a for name, a in theirs.items()}
    return {**unet, **found}, [first, second]


@pytest.mark.parametrize("kind", ["sd1", "sd2", "refiner", "sdxl", "sd3"])
def test_text_encoders_inside_diffusion_models(tmp_path, small, kind):
    tensors, encoders = diffusion_file(kind)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    loaded = formats.load(Source(str(path)))
    assert len(loaded.others) == len(encoders) - 1
    for one, expected in zip((loaded, *loaded.others), encoders, strict=True):
        config, decisions = formats.config_of(one, Source(str(path)))
        head = "CLIPTextModelWithProjection" if "text_projection.weight" in expected else "CLIPTextModel"
        arrays, _ = fit(one.tensors, specs(config, head), head)
        assert equal(arrays, {name: expected[name] for name in arrays})
        assert {"encoder", "activation", "sizes"} <= decisions.keys()


@pytest.mark.parametrize(
    ("head", "config"), [(None, FIRST), ("CLIPTextModel", FIRST), ("CLIPTextModelWithProjection", SECOND)]
)
@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_the_second_encoder_is_the_one_with_a_projection(tmp_path, small, head, config, kind):
    tensors, _ = diffusion_file(kind)
    save_file(tensors, tmp_path / "model.safetensors")
    done = convert(tmp_path / "model.safetensors", tmp_path / "result", head=head)
    assert done.head == (head or "CLIPTextModel")
    assert type(config).from_pretrained(tmp_path / "result").to_dict() == {
        **config.to_dict(), "architectures": [done.head], "dtype": "float32",
    }  # fmt: skip


@pytest.mark.backend("pt")
def test_models_from_one_file(tmp_path, small, caplog):
    tensors, (first, second) = diffusion_file("sdxl")
    save_file(tensors, tmp_path / "sdxl.safetensors")
    model = CLIPTextModel.from_pretrained(tmp_path / "sdxl.safetensors")
    assert equal(dict(model.to_arrays()), first)
    assert "quick_gelu and 4 heads, as in a test" in caplog.text
    model = CLIPTextModelWithProjection.from_pretrained(tmp_path / "sdxl.safetensors")
    found = dict(model.to_arrays())
    assert equal(found, {name: second[name] for name in found})
    save_file(first, tmp_path / "clip_l.safetensors")
    assert equal(dict(CLIPTextModel.from_pretrained(tmp_path / "clip_l.safetensors").to_arrays()), first)
    torch.save(
        {"state_dict": {name: torch.from_numpy(np.array(a)) for name, a in diffusion_file("sd1")[0].items()}},
        tmp_path / "v1.ckpt",
    )
    assert equal(dict(CLIPTextModel.from_pretrained(tmp_path / "v1.ckpt").to_arrays()), first)
    with pytest.raises(ValueError, match="model_type"):
        CLIPModel.from_pretrained(tmp_path / "v1.ckpt")


@pytest.mark.backend("pt")
def test_a_vision_tower_of_unpublished_sizes_needs_a_config(tmp_path):
    head = "CLIPVisionModelWithProjection"
    config = config_of(head, CONFIGS["plain"])
    arrays = random_arrays(config, head)
    save_file(arrays, tmp_path / "clip_vision.safetensors")
    with pytest.raises(CheckpointError, match="Pass config="):
        CLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip_vision.safetensors")
    model = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip_vision.safetensors", config=config)
    assert equal(dict(model.to_arrays()), arrays)
