"""Configs: construction, checks, dictionaries, files, dialects."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipmb import CheckpointError, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from clipmb.common.config import ACTIVATIONS


def test_defaults_are_those_of_vit_b_32():
    config = CLIPConfig()
    text, vision = config.text_config, config.vision_config
    assert (text.vocab_size, text.hidden_size, text.intermediate_size, text.num_attention_heads) == (
        49408,
        512,
        2048,
        8,
    )
    assert (text.pad_token_id, text.bos_token_id, text.eos_token_id) == (1, 49406, 49407)
    assert (vision.hidden_size, vision.intermediate_size, vision.image_size, vision.patch_size) == (768, 3072, 224, 32)
    assert (config.projection_dim, config.logit_scale_init_value, config.model_type) == (512, 2.6592, "clip")


@pytest.mark.parametrize(
    ("cls", "fields", "named"),
    [
        (CLIPTextConfig, {"hidden_size": 30}, "num_attention_heads"),
        (CLIPTextConfig, {"hidden_size": -8}, "hidden_size"),
        (CLIPTextConfig, {"hidden_size": 8.0}, "hidden_size"),
        (CLIPTextConfig, {"vocab_size": 0}, "vocab_size"),
        (CLIPTextConfig, {"num_hidden_layers": -1}, "num_hidden_layers"),
        (CLIPTextConfig, {"max_position_embeddings": True}, "max_position_embeddings"),
        (CLIPTextConfig, {"hidden_act": "selu"}, "hidden_act"),
        (CLIPTextConfig, {"layer_norm_eps": 0.0}, "layer_norm_eps"),
        (CLIPTextConfig, {"layer_norm_eps": float("nan")}, "layer_norm_eps"),
        (CLIPTextConfig, {"attention_dropout": 1.0}, "attention_dropout"),
        (CLIPTextConfig, {"attention_dropout": -0.1}, "attention_dropout"),
        (CLIPTextConfig, {"eos_token_id": None}, "eos_token_id"),
        (CLIPTextConfig, {"attn_implementation": "flash_attention_2"}, "attn_implementation"),
        (CLIPVisionConfig, {"image_size": 31}, "image_size"),
        (CLIPVisionConfig, {"return_dict": "yes"}, "return_dict"),
        (CLIPVisionConfig, {"architectures": "CLIPModel"}, "architectures"),
        (CLIPTextConfig, {"pad_token_id": 1.5}, "pad_token_id"),
        (CLIPTextConfig, {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        (CLIPConfig, {"num_labels": 10**9}, "num_labels"),
        (CLIPConfig, {"id2label": ["cat"]}, "id2label"),
        (CLIPConfig, {"id2label": {"one": "cat"}}, "id2label"),
        (CLIPConfig, {"label2id": {"cat": None}}, "label2id"),
        (CLIPVisionConfig, {"patch_size": 0}, "patch_size"),
        (CLIPVisionConfig, {"num_channels": -3}, "num_channels"),
        (CLIPConfig, {"projection_dim": 0}, "projection_dim"),
        (CLIPConfig, {"logit_scale_init_value": "2.6"}, "logit_scale_init_value"),
        (CLIPConfig, {"num_labels": -1}, "num_labels"),
        (CLIPConfig, {"problem_type": "guess"}, "problem_type"),
        (CLIPConfig, {"text_config": {"hidden_size": 30}}, "hidden_size"),
    ],
)
def test_impossible_values_are_refused_by_name(cls, fields, named):
    with pytest.raises(ValueError, match=named) as caught:
        cls(**fields)
    assert "Received: " in str(caught.value)


def test_whole_takes_parts_as_dicts_or_configs_and_leaves_them_alone():
    fields = {"hidden_size": 64}
    text = CLIPTextConfig(**fields)
    assert CLIPConfig(text_config=fields).text_config == CLIPConfig(text_config=text).text_config == text
    assert fields == {"hidden_size": 64}
    whole = CLIPConfig.from_text_vision_configs(text, CLIPVisionConfig(num_hidden_layers=3), projection_dim=7)
    assert (whole.text_config.hidden_size, whole.vision_config.num_hidden_layers, whole.projection_dim) == (64, 3, 7)
    with pytest.raises(TypeError, match="text_config"):
        CLIPConfig(text_config=CLIPVisionConfig())


def test_legacy_part_resets_what_it_lacks():
    config = CLIPConfig(text_config={"hidden_size": 64, "num_hidden_layers": 3}, text_config_dict={"hidden_size": 128})
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (128, 12)
    assert "text_config_dict" not in config.to_dict()


def test_unknown_keys_are_kept_and_written_back(tmp_path):
    CLIPTextConfig(dropout=0.1, nested={"a": [1]}).save_pretrained(tmp_path)
    again = CLIPTextConfig.from_pretrained(tmp_path)
    assert (again.dropout, again.nested) == (0.1, {"a": [1]})
    assert json.loads((tmp_path / "config.json").read_text())["dropout"] == 0.1


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_both_names_of_dtype(key):
    config = CLIPConfig.from_dict({"model_type": "clip", key: "torch.bfloat16"})
    assert str(config.dtype).removeprefix("torch.") == "bfloat16"
    assert config.torch_dtype == config.dtype
    assert config.to_dict()["dtype"] == "bfloat16"


def test_a_part_is_taken_out_of_the_whole(tmp_path):
    CLIPConfig({"hidden_size": 64}, {"hidden_size": 48, "num_attention_heads": 4}, dtype="float16").save_pretrained(
        tmp_path
    )
    assert CLIPTextConfig.from_pretrained(tmp_path).hidden_size == 64
    vision = CLIPVisionConfig.from_pretrained(tmp_path, image_size=64)
    assert (vision.hidden_size, vision.image_size, vision.to_dict()["dtype"]) == (48, 64, "float16")


def test_the_wrong_kind_of_config_is_refused(tmp_path):
    CLIPTextConfig().save_pretrained(tmp_path)
    for cls in (CLIPConfig, CLIPVisionConfig):
        with pytest.raises(ValueError, match="clip_text_model"):
            cls.from_pretrained(tmp_path)


def test_changes_reach_into_a_nested_config(tmp_path):
    CLIPConfig({"hidden_size": 64}).save_pretrained(tmp_path)
    config = CLIPConfig.from_pretrained(tmp_path, text_config={"num_hidden_layers": 3}, projection_dim=9)
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers, config.projection_dim) == (64, 3, 9)
    config, unused = CLIPConfig.from_pretrained(tmp_path, return_unused_kwargs=True, projection_dim=9, colour="red")
    assert (config.projection_dim, unused) == (9, {"colour": "red"})


def test_subfolders_and_single_files(tmp_path):
    CLIPTextConfig(hidden_size=64).save_pretrained(tmp_path / "text_encoder")
    assert CLIPTextConfig.from_pretrained(tmp_path, subfolder="text_encoder").hidden_size == 64
    assert CLIPTextConfig.from_pretrained(tmp_path / "text_encoder" / "config.json").hidden_size == 64


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1', "\x00", "[" * 100_000])
def test_damaged_files_are_checkpoint_errors(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        CLIPConfig.from_pretrained(tmp_path)


def test_missing_files_are_checkpoint_errors(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        CLIPConfig.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        CLIPConfig.from_pretrained(tmp_path / "nowhere")


def test_labels():
    assert CLIPConfig().id2label == {0: "LABEL_0", 1: "LABEL_1"}
    config = CLIPConfig.from_dict({"id2label": {"0": "cat", "1": "dog", "2": "cow"}})
    assert (config.num_labels, config.label2id) == (3, {"cat": 0, "dog": 1, "cow": 2})
    assert CLIPConfig.from_dict(config.to_dict(), num_labels=5).num_labels == 5
    with pytest.raises(ValueError, match="id2label"):
        CLIPConfig(id2label={0: "cat"}, num_labels=2)


def test_attention_is_chosen_for_the_whole_or_by_tower():
    config = CLIPConfig(attn_implementation="eager")
    assert config.text_config.attn_implementation == config.vision_config.attn_implementation == "eager"
    config = CLIPConfig(attn_implementation={"text_config": "eager"})
    assert (config.text_config.attn_implementation, config.vision_config.attn_implementation) == ("eager", None)
    with pytest.raises(ValueError, match="attn_implementation"):
        CLIPConfig(attn_implementation={"text": "eager"})


def test_update_checks_too():
    config = CLIPTextConfig()
    config.update({"hidden_size": 64})
    assert config.hidden_size == 64
    with pytest.raises(ValueError, match="hidden_size"):
        config.update({"hidden_size": 65})
    assert config.hidden_size == 64


@given(
    heads=st.integers(1, 8),
    head_dim=st.integers(1, 64),
    layers=st.integers(0, 40),
    grid=st.integers(1, 20),
    patch=st.integers(1, 32),
    act=st.sampled_from(ACTIVATIONS),
    eps=st.floats(1e-12, 1.0),
    extra=st.dictionaries(
        st.from_regex(r"x_[a-z]{1,8}", fullmatch=True), st.integers() | st.text() | st.none(), max_size=3
    ),
)
def test_round_trip(heads, head_dim, layers, grid, patch, act, eps, extra):
    tower = {
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "hidden_act": act,
        "layer_norm_eps": eps,
    }
    config = CLIPConfig({**tower, **extra}, {**tower, "image_size": grid * patch, "patch_size": patch}, **extra)
    again = CLIPConfig.from_dict(json.loads(config.to_json_string()))
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert CLIPConfig.from_dict(json.loads(config.to_json_string(use_diff=True))) == config
    assert again.vision_config.num_patches == grid * grid


def test_the_attention_choice_survives_updates_and_nesting():
    config = CLIPTextConfig(attn_implementation="eager", name_or_path="here")
    config.update({"hidden_size": 64})
    assert (config.attn_implementation, config.name_or_path, config.hidden_size) == ("eager", "here", 64)
    assert CLIPConfig(text_config=config).text_config.attn_implementation == "eager"


def test_saving_by_the_former_name_of_the_argument(tmp_path):
    CLIPTextConfig(hidden_size=64).save_pretrained(save_directory=tmp_path)
    assert CLIPTextConfig.from_pretrained(tmp_path).hidden_size == 64


def test_a_side_that_is_no_multiple_of_the_patch_is_cut_as_in_transformers():
    assert CLIPVisionConfig(image_size=225, patch_size=32).num_patches == 49


@pytest.mark.parametrize(
    "key", ["__class__", "to_dict", "head_dim", "num_patches", "_kept", "_name", "self", "save_pretrained"]
)
def test_no_key_of_a_file_becomes_an_attribute_that_exists(tmp_path, key):
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {key: "x"}, key: "x", "model_type": "clip"}))
    config = CLIPConfig.from_pretrained(tmp_path)
    assert type(config) is CLIPConfig
    assert (config.vision_config.head_dim, config.vision_config.num_patches) == (64, 49)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written[key] == written["vision_config"][key] == "x"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"text_config": [1]}, "text_config must be"),
        ({"vision_config": {"image_size": float("nan")}}, "image_size must be a whole number"),
        ({"id2label": [1]}, "id2label must map"),
        ({"dtype": 3}, "dtype must be"),
        ({"projection_dim": "512"}, "projection_dim must be a whole number"),
        ({"text_config_dict": [1]}, "text_config_dict must be"),
        ({"model_type": "bert"}, "model_type 'clip'"),
    ],
)
def test_wrong_content_names_the_file_and_the_field(tmp_path, fields, told):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **fields}))
    with pytest.raises(CheckpointError, match=told) as caught:
        CLIPConfig.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["1" * 5000, '"\\ud800"', "1e400", "[" * 5000])
def test_what_json_cannot_hold_is_one_clear_error(tmp_path, value):
    (tmp_path / "config.json").write_text(f'{{"model_type": "clip", "projection_dim": {value}}}')
    with pytest.raises(CheckpointError, match=r"config\.json"):
        CLIPConfig.from_pretrained(tmp_path)


def test_a_config_of_transformers_is_taken_for_a_tower():
    class Theirs:
        model_type = "clip_vision_model"

        def to_dict(self):
            return {"model_type": self.model_type, "hidden_size": 24, "transformers_version": "4.57.6"}

    assert CLIPConfig(vision_config=Theirs()).vision_config.hidden_size == 24
    with pytest.raises(TypeError, match="text_config"):
        CLIPConfig(text_config=Theirs())


def test_fields_from_a_string():
    config = CLIPTextConfig()
    config.update_from_string("hidden_size=64,hidden_act=gelu,output_attentions=True")
    assert (config.hidden_size, config.hidden_act, config.output_attentions) == (64, "gelu", True)
    with pytest.raises(ValueError, match="name=value"):
        config.update_from_string("nonsense=1")
