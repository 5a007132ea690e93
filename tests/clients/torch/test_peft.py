"""peft: LoRA and DoRA on linear and embedding modules, saved, loaded and merged; and its mixin on our models."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file

from clipmb import CLIPModel, CLIPTextModel

TARGETS = {
    "linear": ["q_proj", "v_proj", "fc1", "out_proj"],
    "token embedding": ["token_embedding"],
    "positions of texts": r"text_model\.embeddings\.position_embedding",
    "positions of pictures": r"vision_model\.embeddings\.position_embedding",
    "projections": ["text_projection", "visual_projection"],
    "one tower": r"vision_model.*\.(q_proj|k_proj)",
}


def lora(target, **options) -> LoraConfig:
    torch.manual_seed(0)
    return LoraConfig(target_modules=TARGETS.get(target, target), init_lora_weights=False, **options)


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits_per_image


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_lora_has_effect_and_survives_saving_and_merging(model, folder, inputs, expected, tmp_path, target, positions):
    if positions:
        inputs = {**inputs, "position_ids": torch.arange(11)[None]}
    adapted = get_peft_model(model, lora(target))
    found = logits(adapted, inputs)
    assert float((found - expected).abs().max()) > 1e-2
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(CLIPModel.from_pretrained(folder), tmp_path)
    assert torch.equal(logits(again, inputs), found)
    torch.testing.assert_close(logits(again.merge_and_unload(), inputs), found, rtol=1e-4, atol=1e-4)


def test_dora(model, inputs, expected):
    assert float((logits(get_peft_model(model, lora("linear", use_dora=True)), inputs) - expected).abs().max()) > 1e-2


def test_modules_to_save(model, folder, inputs, tmp_path):
    adapted = get_peft_model(model, lora("linear", modules_to_save=["visual_projection"]))
    with torch.no_grad():
        adapted.base_model.model.visual_projection.modules_to_save["default"].weight.mul_(2)
    found = logits(adapted, inputs)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(CLIPModel.from_pretrained(folder), tmp_path), inputs), found)


@pytest.mark.parametrize("writer", ["clipmb", "transformers"])
def test_adapters_go_both_ways_between_us_and_transformers(folder, inputs, tmp_path, writer):
    theirs = transformers.CLIPModel.from_pretrained(folder, attn_implementation="eager")
    ours = CLIPModel.from_pretrained(folder, attn_implementation="eager")
    first, second = (ours, theirs) if writer == "clipmb" else (theirs, ours)
    adapted = get_peft_model(first, lora("linear"))
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(second, tmp_path)
    torch.testing.assert_close(logits(again, inputs), logits(adapted, inputs), rtol=1e-4, atol=1e-4)


def test_a_model_with_injected_adapters_saves_them(model, tmp_path):
    inject_adapter_in_model(lora("linear"), model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert any("lora_A" in name for name in saved)
    for name, value in model.state_dict().items():
        assert torch.equal(saved[name], value), name


# -- the methods of transformers' PeftAdapterMixin --------------------------------------------------------------------


def test_adapters_are_added_chosen_and_switched_off(model, inputs, expected):
    model.add_adapter(lora("linear"), adapter_name="first")
    first = logits(model, inputs)
    torch.manual_seed(1)
    model.add_adapter(lora("projections"), adapter_name="second")
    model.set_adapter("second")
    assert model.active_adapters() == ["second"]
    second = logits(model, inputs)
    assert not torch.allclose(first, second, atol=1e-2)
    model.set_adapter("first")
    assert torch.equal(logits(model, inputs), first)
    model.disable_adapters()
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-5, atol=1e-5)
    model.enable_adapters()
    assert torch.equal(logits(model, inputs), first)
    assert model.get_adapter_state_dict("first").keys()
    model.delete_adapter("second")
    with pytest.raises(ValueError, match="second"):
        model.set_adapter("second")
    model.delete_adapter("first")
    assert torch.equal(logits(model, inputs), expected)
    with pytest.raises(ValueError, match="an adapter"):
        model.active_adapters()


def test_with_its_last_adapter_a_model_is_a_plain_one_again(model, tmp_path):
    names = list(model.state_dict())
    model.add_adapter(lora("linear", modules_to_save=["visual_projection"]), adapter_name="first")
    model.add_adapter(lora("one tower"), adapter_name="second")
    model.delete_adapter(["first", "second"])
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    CLIPModel.from_pretrained(tmp_path)


def test_a_saved_adapter_is_loaded(model, folder, inputs, tmp_path):
    adapted = get_peft_model(CLIPModel.from_pretrained(folder), lora("linear"))
    found = logits(adapted, inputs)
    adapted.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, device_map="auto", revision=None)
    assert torch.equal(logits(model, inputs), found)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora" in name)
    model.load_adapter(tmp_path, "other", is_trainable=True)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if ".other." in name)


def test_an_adapter_that_does_not_fit_is_refused_and_leaves_nothing(model, tmp_path, caplog):
    get_peft_model(model, lora("linear")).save_pretrained(tmp_path)
    text = CLIPTextModel.from_pretrained(None, config=model.config.text_config, state_dict=text_weights(model))
    names = list(text.state_dict())
    with pytest.raises(ValueError, match=r"belong to a module.*vision_model"):
        text.load_adapter(tmp_path)
    assert list(text.state_dict()) == names
    with pytest.raises(TypeError, match="colour"):
        text.load_adapter(tmp_path, colour="red")
    with pytest.raises(TypeError, match="device_map"):
        text.load_adapter(tmp_path, device_map={"": "cpu"})
    weights = load_file(tmp_path / "adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if "text_model" in name and "layers.0" in name}
    text.load_adapter(peft_config=lora("linear"), adapter_state_dict=kept)
    assert "text_model.encoder.layers.1" in caplog.text


def text_weights(model) -> dict[str, torch.Tensor]:
    text = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    return {name: value for name, value in text.items() if name.startswith("text_model") and "lora" not in name}


def test_adapters_are_made_from_peft_configs_and_have_names_of_their_own(model):
    with pytest.raises(TypeError, match="LoraConfig"):
        model.add_adapter({"r": 8})
    with pytest.raises(ValueError, match="comes from a folder"):
        model.load_adapter()
    model.add_adapter(lora("linear"))
    with pytest.raises(ValueError, match="name of its own"):
        model.add_adapter(lora("linear"))
    model.add_adapter(lora("linear"), "other")
    model.set_adapter(["default", "other"])
    assert model.active_adapters() == ["default", "other"]
    with pytest.raises(ValueError, match="One adapter"):
        model.save_adapter("nowhere")


def test_an_adapted_model_saves_its_adapter_as_transformers_does(folder, tmp_path):
    model = CLIPTextModel.from_pretrained(folder)
    model.add_adapter(lora("linear"))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    theirs = transformers.CLIPTextModel.from_pretrained(folder, attn_implementation="eager")
    theirs.load_adapter(str(tmp_path))
    ours = CLIPTextModel.from_pretrained(folder, attn_implementation="eager")
    ours.load_adapter(tmp_path)
    ids = torch.tensor([[97, 5, 6, 98]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).last_hidden_state, theirs(ids).last_hidden_state, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "plain", save_peft_format=False)
    assert all(name.startswith("text_model.") for name in load_file(tmp_path / "plain" / "adapter_model.safetensors"))


@pytest.mark.parametrize("options", [{"target": "token_embedding"}, {"modules_to_save": ["token_embedding"]}])
def test_a_token_embedding_with_an_adapter_keeps_its_size(model, options):
    inject_adapter_in_model(LoraConfig(r=2, target_modules=[options.pop("target", "q_proj")], **options), model)
    kept = model.state_dict()
    with pytest.raises(ValueError, match="has an adapter or is offloaded keeps its size"):
        model.resize_token_embeddings(model.config.text_config.vocab_size + 8)
    assert model.state_dict().keys() == kept.keys()
