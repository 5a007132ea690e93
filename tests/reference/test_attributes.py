"""What programs read off configs, tokenizers and processors, beside what transformers 4 has there."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from cases import CONFIGS

import clipmb
from clipmb.common.small_model import small_model

PACKAGES = (transformers, clipmb)
CONFIG = CONFIGS["plain"]
PARTS = ("CLIPTextConfig", "CLIPVisionConfig", "CLIPConfig")


def config(package: Any, name: str, **changes: Any) -> Any:
    part = {"CLIPTextConfig": CONFIG.text_config, "CLIPVisionConfig": CONFIG.vision_config}.get(name, CONFIG)
    return getattr(package, name)(**{**part.to_dict(), **changes})


def towers(config: Any) -> list[Any]:
    return [config, *(getattr(config, name) for name in config.sub_configs)]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(
    "field",
    [
        "is_encoder_decoder", "is_decoder", "add_cross_attention", "output_scores", "tie_word_embeddings",
        "pruned_heads", "chunk_size_feed_forward", "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id",
        "decoder_start_token_id", "tokenizer_class", "prefix", "task_specific_params", "finetuning_task",
        "has_no_defaults_at_init", "transformers_version", "dtype", "torch_dtype", "_attn_implementation",
    ],
)  # fmt: skip
def test_fields_of_a_config(name, field):
    theirs, ours = (getattr(config(package, name), field) for package in PACKAGES)
    assert (ours, type(ours)) == (theirs, type(theirs))


def test_fields_of_other_models_are_written_only_when_they_are_given():
    plain = config(clipmb, "CLIPConfig")
    assert "tie_word_embeddings" not in plain.to_dict()
    assert not hasattr(plain, "tie_word_embedding")
    changed = config(clipmb, "CLIPConfig", tie_word_embeddings=False, bos_token_id=0)
    assert (changed.tie_word_embeddings, changed.bos_token_id) == (False, 0)
    again = clipmb.CLIPConfig.from_dict(json.loads(changed.to_json_string()))
    assert (again.tie_word_embeddings, again.bos_token_id) == (False, 0)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("choice", ["eager", {"": "eager"}, None])
def test_an_assigned_attention_reaches_the_towers(name, choice):
    reached = []
    for package in PACKAGES:
        made = config(package, name)
        made._attn_implementation = "sdpa"
        made._attn_implementation = choice
        reached.append([part._attn_implementation for part in towers(made)])
    assert reached[1] == reached[0]


def test_an_attention_for_one_tower_leaves_the_others():
    reached = []
    for package in PACKAGES:
        made = config(package, "CLIPConfig")
        made._attn_implementation = {"vision_config": "eager"}
        reached.append([part._attn_implementation for part in towers(made)])
    assert reached[1] == reached[0] == [None, None, "eager"]
    with pytest.raises(ValueError, match="A key of attn_implementation"):
        made._attn_implementation = {"text_config": "eager", "audio_config": "eager"}
    assert made.text_config._attn_implementation is None


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("given", [{"dtype": "float16"}, {"torch_dtype": "bfloat16"}, {"dtype": torch.float64}])
def test_dtype_of_a_config(name, given):
    theirs, ours = (config(package, name, **given) for package in PACKAGES)
    assert ours.dtype is theirs.dtype is ours.torch_dtype
    assert json.loads(ours.to_json_string())["dtype"] == json.loads(theirs.to_json_string())["dtype"]
    for each in (theirs, ours):
        each.dtype = torch.float16
    assert ours.to_dict()["dtype"] == theirs.to_dict()["dtype"] == "float16"


@pytest.mark.parametrize("name", ["CLIPTokenizer", "CLIPTokenizerFast"])
def test_attributes_of_a_tokenizer(name):
    theirs, ours = (getattr(package, name).from_pretrained(small_model()) for package in PACKAGES)
    for field in ("SPECIAL_TOKENS_ATTRIBUTES", "chat_template", "verbose", "name_or_path", "init_inputs"):
        assert getattr(ours, field) == getattr(theirs, field)
    expected = {key: value for key, value in theirs.init_kwargs.items() if not key.endswith("_file")}
    assert {key: str(value) for key, value in ours.init_kwargs.items()} == {k: str(v) for k, v in expected.items()}
    kind = theirs.slow_tokenizer_class
    assert getattr(ours.slow_tokenizer_class, "__name__", None) == (kind and kind.__name__)


@pytest.mark.parametrize("name", ["CLIPTokenizer", "CLIPTokenizerFast"])
@pytest.mark.parametrize(
    "tokens",
    [[], ["a</w>", "b"], ["a", "b</w>", "c</w>", ",</w>", "<|endoftext|>", "d"], ["Ã", "©</w>"], ["Ã"]],
)
def test_tokens_as_a_string(name, tokens):
    theirs, ours = (getattr(package, name).from_pretrained(small_model()) for package in PACKAGES)
    assert ours.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)


def test_attributes_of_a_processor():
    theirs, ours = (package.CLIPProcessor.from_pretrained(small_model()) for package in PACKAGES)
    for field in (
        "attributes", "optional_attributes", "optional_call_args", "image_processor_class", "tokenizer_class",
        "feature_extractor_class", "chat_template", "model_input_names",
    ):  # fmt: skip
        with pytest.warns(FutureWarning) if field == "feature_extractor_class" else pytest.MonkeyPatch.context():
            assert getattr(ours, field) == getattr(theirs, field), field


HEADS = {
    "CLIPModel": "CLIPConfig", "CLIPTextModel": "CLIPTextConfig", "CLIPTextModelWithProjection": "CLIPTextConfig",
    "CLIPVisionModel": "CLIPVisionConfig", "CLIPVisionModelWithProjection": "CLIPVisionConfig",
    "CLIPForImageClassification": "CLIPConfig",
}  # fmt: skip


@pytest.mark.backend("pt")
@pytest.mark.parametrize("head", HEADS)
def test_attributes_of_a_model(head):
    theirs, ours = (getattr(package, head)(config(package, HEADS[head])) for package in PACKAGES)
    for field in (
        "projection_dim", "text_embed_dim", "vision_embed_dim", "is_parallelizable", "_supports_sdpa",
        "_tied_weights_keys", "_keys_to_ignore_on_save", "_keys_to_ignore_on_load_missing",
        "_keys_to_ignore_on_load_unexpected", "_keep_in_fp32_modules",
    ):  # fmt: skip
        assert getattr(ours, field, "none") == getattr(theirs, field, "none"), field
    assert ours._can_compile_fullgraph is theirs._can_compile_fullgraph is False
    assert ours._can_set_attn_implementation() is theirs._can_set_attn_implementation() is True
    assert ours.generation_config is theirs.generation_config is None
    assert (
        {part._attn_implementation for part in towers(ours.config)} == {theirs.config._attn_implementation} == {"sdpa"}
    )
    if head.startswith("CLIPText"):  # transformers cannot resize a CLIPModel
        for each in (theirs, ours):
            each.resize_token_embeddings(CONFIG.text_config.vocab_size + 3)
        assert ours.vocab_size == theirs.vocab_size
    assert ours.tie_weights() is theirs.tie_weights() is None
    assert not ours._supports_flash_attn  # transformers says so of text only; here it is refused for all


@pytest.mark.backend("pt")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("own", "options"),
    [
        (None, {}), ("float16", {}), (None, {"torch_dtype": torch.bfloat16}), (None, {"dtype": torch.float64}),
        (None, {"attn_implementation": "eager"}),
    ],
)  # fmt: skip
def test_a_model_from_a_config(head, own, options):
    made = []
    for package in PACKAGES:
        given = config(package, HEADS[head], dtype=own)
        model = getattr(package, head)._from_config(given, **options)
        made.append((model.dtype, [part._attn_implementation for part in towers(model.config)]))
    assert {part._attn_implementation for part in towers(given)} == {None}  # ours, which transformers' is not left as
    assert made[1][0] == made[0][0]
    if "attn_implementation" in options:
        assert made[1][1] == made[0][1]


@pytest.mark.parametrize("name", ["TFCLIPTextModel", "FlaxCLIPTextModel"])
def test_a_model_of_another_framework_from_a_config(name):
    given = config(clipmb, "CLIPTextConfig")
    model = getattr(clipmb, name)._from_config(given, torch_dtype="float16", attn_implementation="eager")
    assert str(model.dtype) == "float16"
    assert (given.attn_implementation, model.config.attn_implementation) == (None, "eager")
