"""The families of CLIPs: their published configs, and the numbers of parameters that their authors published."""

from __future__ import annotations

import json
import math

import pytest
from cases import CONFIGS, random_arrays, write_checkpoint
from conftest import BACKENDS
from safetensors.numpy import save_file

from clipmb import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, convert
from clipmb.common import errors
from clipmb.common.parameters import specs

if "pt" in BACKENDS:
    from clipmb import CLIPModel, CLIPTextModel, CLIPVisionModel


def text(width: int, layers: int = 12, positions: int = 77) -> dict[str, int]:
    """Every text tower has heads of 64 and four times the width inside."""
    return {
        "hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64,
        "num_hidden_layers": layers, "max_position_embeddings": positions,
    }  # fmt: skip


def vision(width: int, layers: int, heads: int, patch: int, image: int = 224, inner: int = 0) -> dict[str, int]:
    return {
        "hidden_size": width, "intermediate_size": inner or 4 * width, "num_attention_heads": heads,
        "num_hidden_layers": layers, "patch_size": patch, "image_size": image,
    }  # fmt: skip


B32, B16 = vision(768, 12, 12, 32), vision(768, 12, 12, 16)
L14, L14_336 = vision(1024, 24, 16, 14), vision(1024, 24, 16, 14, 336)
H14, H14_378 = vision(1280, 32, 16, 14), vision(1280, 32, 16, 14, 378)
G14, BIG_G14 = vision(1408, 40, 16, 14, inner=6144), vision(1664, 48, 16, 14, inner=8192)
# Name: text, vision, width of the shared space, activation, parameters in millions as in open_clip's table of models
# (model_profile.csv) and OpenAI's model cards; Long-CLIP adds 171 positions to OpenAI's.
FAMILIES = {
    "OpenAI B/32": (text(512), B32, 512, "quick_gelu", 151.28),
    "OpenAI B/16": (text(512), B16, 512, "quick_gelu", 149.62),
    "OpenAI L/14": (text(768), L14, 768, "quick_gelu", 427.62),
    "OpenAI L/14@336": (text(768), L14_336, 768, "quick_gelu", 427.94),
    "LAION B/32": (text(512), B32, 512, "gelu", 151.28),
    "LAION B/16": (text(512), B16, 512, "gelu", 149.62),
    "LAION L/14": (text(768), L14, 768, "gelu", 427.62),
    "LAION H/14": (text(1024, 24), H14, 1024, "gelu", 986.11),
    "LAION g/14": (text(1024, 24), G14, 1024, "gelu", 1366.68),
    "LAION bigG/14": (text(1280, 32), BIG_G14, 1280, "gelu", 2539.57),
    "DFN B/16": (text(512), B16, 512, "quick_gelu", 149.62),
    "DFN L/14": (text(768), L14, 768, "quick_gelu", 427.62),
    "DFN H/14": (text(1024, 24), H14, 1024, "quick_gelu", 986.11),
    "DFN H/14@378": (text(1024, 24), H14_378, 1024, "quick_gelu", 986.71),
    "MetaCLIP B/32": (text(512), B32, 512, "quick_gelu", 151.28),
    "MetaCLIP B/16": (text(512), B16, 512, "quick_gelu", 149.62),
    "MetaCLIP L/14": (text(768), L14, 768, "quick_gelu", 427.62),
    "MetaCLIP H/14": (text(1024, 24), H14, 1024, "quick_gelu", 986.11),
    "FashionCLIP B/32": (text(512), B32, 512, "quick_gelu", 151.28),
    "Long-CLIP B/16": (text(512, positions=248), B16, 512, "quick_gelu", 149.71),
    "Long-CLIP L/14": (text(768, positions=248), L14, 768, "quick_gelu", 427.75),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_config_of_a_family_makes_its_number_of_parameters(name, tmp_path):
    text_fields, vision_fields, proj, act, millions = FAMILIES[name]
    common = {"hidden_act": act, "projection_dim": proj}
    fields = {
        "model_type": "clip", "projection_dim": proj, "architectures": ["CLIPModel"],
        "text_config": {**text_fields, **common, "model_type": "clip_text_model"},
        "vision_config": {**vision_fields, **common, "model_type": "clip_vision_model"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = CLIPConfig.from_pretrained(tmp_path)
    assert {config.text_config.hidden_act, config.vision_config.hidden_act} == {act}
    assert round(sum(math.prod(spec.shape) for spec in specs(config, "CLIPModel")) / 1e6, 2) == millions


# -- models that only look like one -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CLIPConfig, CLIPTextConfig, CLIPVisionConfig])
def test_metaclip_2_is_refused_by_name(tmp_path, kind):
    """Its config has a text_config too, which a text tower of CLIP would take."""
    write_checkpoint(tmp_path, CONFIGS["plain"])
    fields = {**json.loads((tmp_path / "config.json").read_text()), "model_type": "metaclip_2"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="MetaCLIP 2 is not a CLIP model"):
        kind.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="MetaCLIP 2 is not a CLIP model"):
        convert(tmp_path, tmp_path / "result")


@pytest.mark.backend("pt")
def test_metaclip_2_is_refused_by_every_model(tmp_path):
    write_checkpoint(tmp_path, CONFIGS["plain"])
    fields = {**json.loads((tmp_path / "config.json").read_text()), "model_type": "metaclip_2"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for model in (CLIPModel, CLIPTextModel, CLIPVisionModel):
        with pytest.raises(ValueError, match="MetaCLIP 2 is not a CLIP model"):
            model.from_pretrained(tmp_path)


@pytest.mark.backend("pt")
@pytest.mark.parametrize(
    ("vocabulary", "eos", "said"), [(49408, 2, False), (49409, 2, True), (49409, 49407, False), (60000, 2, True)]
)
def test_pooling_at_the_largest_id_is_remarked_on_where_it_may_be_no_end_token(tmp_path, caplog, vocabulary, eos, said):
    errors._said.clear()
    config = CLIPTextConfig.from_dict(
        {**CONFIGS["plain"].text_config.to_dict(), "vocab_size": vocabulary, "eos_token_id": eos, "hidden_size": 4}
    )
    save_file(random_arrays(config, "CLIPTextModel"), tmp_path / "model.safetensors")
    config.to_json_file(tmp_path / "config.json")
    CLIPTextModel.from_pretrained(tmp_path)
    assert ("pooled at their largest id" in caplog.text) == said
