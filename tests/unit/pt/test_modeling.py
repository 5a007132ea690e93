"""The PyTorch models' own behaviour; their numbers are compared with the reference in tests/reference."""

from __future__ import annotations

import copy
import io
import pickle
import sys

import numpy as np
import pytest
import torch
from cases import ALL_HEADS, CONFIGS, TEXT_HEADS, config_of, inputs_of, random_arrays, relative, write_checkpoint
from safetensors.torch import load_file

import clipmb
from clipmb import CheckpointError, CLIPConfig, CLIPTextConfig, pt
from clipmb.common.parameters import specs
from clipmb.pt.layers import ACTIVATIONS, interpolate_positions
from clipmb.pt.modeling import attention_bias

CONFIG = CONFIGS["plain"]


def load(tmp_path, head="CLIPModel", config=CONFIG, **options):
    return getattr(pt, head).from_pretrained(write_checkpoint(tmp_path / head, config, head), **options)


def tensors(head="CLIPModel", config=CONFIG, batch=4):
    return {name: torch.from_numpy(value) for name, value in inputs_of(head, config, batch).items()}


@pytest.mark.parametrize("head", ALL_HEADS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_save_and_load_bit_for_bit(tmp_path, head, dtype):
    model = load(tmp_path, head, dtype=dtype)
    assert str(model.dtype) == f"torch.{dtype}"
    assert not model.training
    model.save_pretrained(tmp_path / "again")
    again = getattr(clipmb, head).from_pretrained(tmp_path / "again", dtype="auto")
    assert again.dtype == model.dtype
    assert again.state_dict().keys() == model.state_dict().keys() == {spec.name for spec in specs(model.config, head)}
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert again.config.architectures == [head]


def test_loading_maps_the_file_and_training_leaves_it(tmp_path):
    folder = write_checkpoint(tmp_path, CONFIG)
    before = (folder / "model.safetensors").read_bytes()
    model = pt.CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (folder / "model.safetensors").read_bytes() == before
    model.save_pretrained(folder)  # over the very file that is mapped
    again = pt.CLIPModel.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_what_was_added_and_swapped_is_saved_too(tmp_path):
    model = load(tmp_path)
    model.head = torch.nn.Linear(24, 5)
    model.register_buffer("steps", torch.tensor([3, 2**40]))
    model.visual_projection = torch.nn.Linear(48, 7, bias=True)
    model.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"(?s)visual_projection\.bias.*head\.weight|head\.weight.*visual_proj"):
        pt.CLIPModel.from_pretrained(tmp_path / "again")


def test_a_given_state_dict_is_what_is_saved(tmp_path):
    model = load(tmp_path)
    model.save_pretrained(tmp_path / "half", state_dict={name: value / 2 for name, value in model.state_dict().items()})
    half = pt.CLIPModel.from_pretrained(tmp_path / "half")
    assert all(torch.equal(a / 2, b) for a, b in zip(model.parameters(), half.parameters(), strict=True))


def test_weights_that_are_not_in_memory_are_not_saved(tmp_path):
    model = load(tmp_path)
    model.text_model.to("meta")
    with pytest.raises(ValueError, match=r"\d+ offloaded.*text_model.*get_state_dict"):
        model.save_pretrained(tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_adapters_need_peft(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = load(tmp_path)
    with pytest.raises(ImportError, match="pip install -U peft"):
        model.add_adapter({})
    with pytest.raises(ValueError, match="must have an adapter"):
        model.disable_adapters()


def test_sharded_files_and_subfolders(tmp_path):
    model = load(tmp_path)
    model.save_pretrained(tmp_path / "whole" / "inner", max_shard_size="50KB")
    again = pt.CLIPModel.from_pretrained(tmp_path / "whole", subfolder="inner")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_missing_weights_are_an_error_or_drawn_anew_on_request(tmp_path):
    folder = write_checkpoint(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match=r"missing: classifier\.weight"):
        pt.CLIPForImageClassification.from_pretrained(folder)
    torch.manual_seed(0)
    model, info = pt.CLIPForImageClassification.from_pretrained(folder, strict=False, output_loading_info=True)
    assert info["missing_keys"] == ["classifier.weight", "classifier.bias"]
    assert 0.5 * 48**-0.5 < model.classifier.weight.std() < 2 * 48**-0.5
    assert not model.classifier.bias.any()
    text = write_checkpoint(tmp_path / "text", CONFIG, "CLIPTextModel")
    with pytest.raises(CheckpointError, match="text_projection"):
        pt.CLIPTextModelWithProjection.from_pretrained(text)


def test_mismatched_weights(tmp_path):
    folder = write_checkpoint(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match="ignore_mismatched_sizes"):
        pt.CLIPModel.from_pretrained(folder, projection_dim=8)
    model, info = pt.CLIPModel.from_pretrained(
        folder, projection_dim=8, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert [name for name, _, _ in info["mismatched_keys"]] == ["visual_projection.weight", "text_projection.weight"]
    assert model(**tensors()).text_embeds.shape == (4, 8)


def test_state_dict_instead_of_files(tmp_path):
    model = load(tmp_path)
    again = pt.CLIPModel.from_pretrained(None, config=CONFIG, state_dict=model.state_dict())
    assert torch.equal(again.logit_scale, model.logit_scale)
    with pytest.raises(ValueError, match="state_dict"):
        pt.CLIPModel.from_pretrained(None, config=CONFIG)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dtype": "int8"}, ValueError, "dtype"),
        ({"dtype": torch.int64}, ValueError, "dtype"),
        ({"colour": "red"}, TypeError, "colour"),
        ({"text_config": {"hidden_size": 33}}, ValueError, "hidden_size"),
        ({"attn_implementation": "flash"}, ValueError, "attn_implementation"),
    ],
)
def test_bad_options(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        load(tmp_path, **options)


def test_former_options_are_accepted(tmp_path):
    options = {"from_tf": True, "from_flax": True, "use_safetensors": True, "low_cpu_mem_usage": True}
    model = load(tmp_path, torch_dtype=torch.float64, device_map="cpu", attn_implementation="eager", **options)
    assert model.dtype == torch.float64
    assert model.config.text_config.attn_implementation == "eager"


def test_a_model_needs_its_own_config():
    with pytest.raises(TypeError, match="CLIPTextConfig"):
        pt.CLIPTextModel(CONFIG)
    with pytest.raises(TypeError, match="CLIPConfig"):
        pt.CLIPModel(CONFIG.text_config)


# -- behaviour --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ALL_HEADS)
def test_tuples_hold_what_dicts_hold(tmp_path, head):
    model = load(tmp_path, head, attn_implementation="eager")
    options = {"output_hidden_states": True, "output_attentions": True}
    output = model(**tensors(head), **options)
    flat = model(**tensors(head), **options, return_dict=False)
    assert isinstance(flat, tuple)
    expected = torch.utils._pytree.tree_leaves(output.to_tuple())
    found = torch.utils._pytree.tree_leaves(flat)
    assert len(expected) == len(found) > 4
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_outputs_by_name_attribute_and_position(tmp_path):
    output = load(tmp_path)(**tensors())
    assert output.loss is None
    assert "loss" not in output
    assert output[0] is output["logits_per_image"] is output.logits_per_image
    assert list(output)[:2] == ["logits_per_image", "logits_per_text"]
    assert output[1:3][1] is output.text_embeds
    again = pickle.loads(pickle.dumps(output))
    assert type(again) is type(output)
    assert torch.equal(again.text_model_output.pooler_output, output.text_model_output.pooler_output)
    assert copy.copy(output).keys() == output.keys()
    with pytest.raises(AttributeError, match="colour"):
        _ = output.colour
    with pytest.raises(KeyError):
        _ = output["loss"]


def test_config_defaults_apply(tmp_path):
    model = load(tmp_path, output_hidden_states=True, return_dict=False)
    model.config.text_config.output_hidden_states = True
    output = model(**tensors())
    assert isinstance(output, tuple)
    assert len(output[4]) == 3


def test_attentions_under_fused_attention_fall_back_with_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr("clipmb.common.errors._said", set())
    model = load(tmp_path)
    with pytest.warns(UserWarning, match="eager"):
        first = model(**tensors(), output_attentions=True)
    model(**tensors(), output_attentions=True)  # a second warning would be an error
    model.set_attn_implementation("eager")
    second = model(**tensors(), output_attentions=True)
    for a, b in zip(first.text_model_output.attentions, second.text_model_output.attentions, strict=True):
        assert a.shape == (4, 4, 11, 11)
        assert torch.equal(a, b)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(tmp_path, implementation, reentrant):
    model = load(tmp_path, dtype="float64", attn_implementation=implementation).train()

    def gradients():
        model.zero_grad()
        inputs = tensors()
        if reentrant:  # needs an input that requires a gradient
            model.text_model.embeddings.token_embedding.weight.requires_grad_()
        model(**inputs, return_loss=True).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    calls = []
    handles = [layer.register_forward_pre_hook(lambda *_: calls.append(1)) for layer in model.text_model.encoder.layers]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    checkpointed = gradients()
    assert len(calls) == 2 * len(handles)  # every block ran again in the backward pass
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    assert all(gradient.abs().max() > 0 for name, gradient in plain.items() if not name.endswith("k_proj.bias"))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_dropout(tmp_path, implementation):
    model = load(tmp_path, text_config={"attention_dropout": 0.5}, attn_implementation=implementation)
    inputs = tensors()
    kept = model.get_text_features(inputs["input_ids"])
    assert torch.equal(kept, model.get_text_features(inputs["input_ids"]))
    model.train()
    torch.manual_seed(0)
    first = model.get_text_features(inputs["input_ids"])
    assert not torch.equal(first, model.get_text_features(inputs["input_ids"]))
    torch.manual_seed(0)
    assert torch.equal(first, model.get_text_features(inputs["input_ids"]))
    assert torch.equal(
        model.get_image_features(inputs["pixel_values"]), model.get_image_features(inputs["pixel_values"])
    )


def test_returned_attentions_are_after_dropout_with_a_mask_per_row_and_head(tmp_path):
    model = load(tmp_path, "CLIPVisionModel", attention_dropout=0.5, attn_implementation="eager").train()
    weights = model(**tensors("CLIPVisionModel"), output_attentions=True).attentions[0]
    dropped = weights == 0
    assert 0.4 < dropped.float().mean() < 0.6
    masks = {tuple(row.flatten().tolist()) for row in dropped.flatten(0, 1)}
    assert len(masks) == dropped.shape[0] * dropped.shape[1]


def test_masks():
    states = torch.zeros(1, 3, 4)
    lowest = torch.finfo(torch.float32).min
    assert attention_bias(None, states)[0, 0].tolist() == [[0, lowest, lowest], [0, 0, lowest], [0, 0, 0]]
    hidden = attention_bias(torch.tensor([[0, 1, 1]]), states)[0, 0].tolist()
    assert hidden == [[lowest, lowest, lowest], [lowest, 0, lowest], [lowest, 0, 0]]
    twice = attention_bias(torch.tensor([[1, 1, 0]]), states)[0, 0].tolist()
    assert twice == [[0, lowest, -np.inf], [0, 0, -np.inf], [0, 0, lowest]]
    half = attention_bias(torch.tensor([[1.0, 0.5, 1.0]]), states)[0, 0, 2].tolist()
    assert half == [0, lowest, 0]
    assert torch.equal(attention_bias(torch.tensor([[True, False, True]]), states)[0, 0, 2], torch.tensor(half))


@pytest.mark.parametrize("head", TEXT_HEADS)
def test_left_padding_does_not_change_the_text_when_positions_are_given(tmp_path, head):
    model = load(tmp_path, head, dtype="float64")
    ids = torch.tensor([[97, 5, 6, 7, 98]])
    padded = torch.tensor([[3, 3, 97, 5, 6, 7, 98]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4]])
    alone = model(ids).last_hidden_state
    among = model(padded, mask, positions).last_hidden_state[:, 2:]
    assert relative(among.detach(), alone.detach()) < 1e-12


def test_pooling_rules(tmp_path):
    ids = torch.tensor([[97, 98, 5, 98, 4], [97, 5, 6, 7, 8], [5, 6, 7, 8, 9]])
    first = load(tmp_path / "a", "CLIPTextModel")(ids)
    assert torch.equal(first.pooler_output, first.last_hidden_state[[0, 1, 2], [1, 0, 0]])
    largest = load(tmp_path / "b", "CLIPTextModel", CONFIGS["legacy eos"])(ids)
    assert torch.equal(largest.pooler_output, largest.last_hidden_state[[0, 1, 2], [1, 0, 4]])


def test_interpolated_positions_keep_the_plain_table_and_the_class_token(tmp_path):
    table = torch.randn(26, 48)
    assert interpolate_positions(table, 5, 5) is table
    wide = interpolate_positions(table, 3, 9)
    assert wide.shape == (28, 48)
    assert torch.equal(wide[0], table[0])
    model = load(tmp_path)
    pixels = torch.randn(2, 3, 13, 38)  # leaves a rest in both directions
    assert model.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state.shape == (2, 28, 48)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": torch.full((4, 11), 99)}, r"\[0, 99\).*99 to 99"),
        ({"input_ids": torch.full((4, 11), -1)}, r"\[0, 99\)"),
        (
            {"input_ids": torch.zeros(4, 14, dtype=torch.long), "attention_mask": None},
            "max_position_embeddings = 13.*14",
        ),
        ({"input_ids": torch.zeros(11, dtype=torch.long)}, r"\(batch, seq\)"),
        ({"input_ids": None}, "needs input_ids"),
        ({"attention_mask": torch.ones(4, 10)}, "attention_mask"),
        ({"attention_mask": torch.ones(4, 1, 11, 11)}, "attention_mask"),
        ({"position_ids": torch.zeros(3, 11, dtype=torch.long)}, "position_ids"),
        ({"position_ids": torch.full((1, 11), 13)}, r"position_ids must lie in \[0, 13\)"),
        ({"pixel_values": torch.zeros(4, 3, 20, 24)}, r"20\*24.*20\*20"),
        ({"pixel_values": torch.zeros(4, 20, 20, 3)}, r"\(batch, 3, height, width\)"),
        ({"pixel_values": torch.zeros(3, 20, 20)}, r"\(batch, 3, height, width\)"),
        ({"pixel_values": None}, "needs pixel_values"),
        ({"pixel_values": torch.zeros(4, 3, 3, 20), "interpolate_pos_encoding": True}, "at least one patch"),
        ({"pixel_values": torch.zeros(3, 3, 20, 20), "return_loss": True}, "4 texts and 3 images"),
    ],
)
def test_bad_input(tmp_path, change, words):
    with pytest.raises(ValueError, match=words) as caught:
        load(tmp_path)(**{**tensors(), **change})
    assert "Received: " in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        (torch.tensor([0, 6, 3, 1]), {}),
        (torch.rand(4, 7), {}),
        (torch.rand(4), {"num_labels": 1, "ignore_mismatched_sizes": True}),
    ],
)
def test_classification_loss_follows_the_labels(tmp_path, labels, options):
    model = load(tmp_path, "CLIPForImageClassification", **options)
    output = model(**tensors("CLIPForImageClassification"), labels=labels)
    logits = output.logits
    if labels.dtype == torch.long:
        expected = -torch.log_softmax(logits, -1)[range(4), labels].mean()
    elif labels.ndim == 2:
        expected = -(labels * torch.sigmoid(logits).log() + (1 - labels) * torch.sigmoid(-logits).log()).mean()
    else:
        expected = ((logits[:, 0] - labels) ** 2).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_contrastive_loss_by_hand(tmp_path):
    output = load(tmp_path)(**tensors(), return_loss=True)
    logits = output.logits_per_text.double()
    rows = -torch.log_softmax(logits, 1).diagonal().mean()
    columns = -torch.log_softmax(logits, 0).diagonal().mean()
    assert output.loss.shape == ()
    assert output.loss.item() == pytest.approx(((rows + columns) / 2).item(), rel=1e-6)


def test_initialisation_follows_the_factors():
    torch.manual_seed(0)
    text = {"hidden_size": 256, "initializer_factor": 3.0, "num_hidden_layers": 2, "vocab_size": 999}
    model = pt.CLIPModel(CLIPConfig(text, {"hidden_size": 192, "num_hidden_layers": 2, "initializer_range": 0.5}))
    for spec in specs(model.config, "CLIPModel"):
        values = model.get_parameter(spec.name)
        if spec.std and values.numel() > 1000:
            assert values.std().item() == pytest.approx(spec.std, rel=0.1), spec.name
        elif not spec.std:
            assert (values == spec.mean).all(), spec.name
    layer = model.text_model.encoder.layers[0]
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(3 * 256**-0.5 * 4**-0.5, rel=0.05)
    assert layer.self_attn.out_proj.weight.std().item() == pytest.approx(3 * 256**-0.5, rel=0.05)
    assert layer.mlp.fc1.weight.std().item() == pytest.approx(3 * 512**-0.5, rel=0.05)
    assert model.text_model.embeddings.token_embedding.weight.std().item() == pytest.approx(0.06, rel=0.05)
    assert model.text_projection.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert model.vision_model.embeddings.patch_embedding.weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert model.training


def test_token_embeddings_are_resized(tmp_path):
    model = load(tmp_path, "CLIPTextModel")
    old = model.get_input_embeddings().weight.clone()
    assert model.resize_token_embeddings(105, pad_to_multiple_of=8).num_embeddings == 112
    assert model.config.vocab_size == 112
    assert torch.equal(model.get_input_embeddings().weight[:99], old)
    mean = old.mean(dim=0)
    assert torch.allclose(model.get_input_embeddings().weight[99:], mean.expand(13, -1), atol=1e-3)
    model(torch.tensor([[97, 111, 98]]))
    model.save_pretrained(tmp_path / "grown")
    assert pt.CLIPTextModel.from_pretrained(tmp_path / "grown").config.vocab_size == 112
    assert model.resize_token_embeddings(50).num_embeddings == 50
    for size in (0, 2.5):
        with pytest.raises(ValueError, match="whole number of at least 1"):
            model.resize_token_embeddings(size)
    with pytest.raises(ValueError, match="text tower"):
        load(tmp_path, "CLIPVisionModel").resize_token_embeddings(5)


def test_an_offloaded_table_keeps_its_size(tmp_path):
    model = load(tmp_path, "CLIPTextModel")
    model.text_model.embeddings.token_embedding.to("meta")
    assert model.resize_token_embeddings().weight.is_meta
    with pytest.raises(ValueError, match="offloaded keeps its size"):
        model.resize_token_embeddings(112)


def test_new_rows_are_drawn_as_the_first_ones_were_when_asked_for(tmp_path):
    model = load(tmp_path, "CLIPTextModel")
    model.resize_token_embeddings(199, mean_resizing=False)
    assert model.get_input_embeddings().weight[99:].std().item() == pytest.approx(0.02, rel=0.2)


def test_a_config_turns_gradient_checkpointing_on(tmp_path, monkeypatch):
    config = type(CONFIG).from_dict({**CONFIG.to_dict(), "gradient_checkpointing": True})
    assert pt.CLIPModel(config).is_gradient_checkpointing is True
    assert pt.CLIPModel(CONFIG).is_gradient_checkpointing is False
    load(tmp_path).save_pretrained(tmp_path / "saved")
    model = pt.CLIPModel.from_pretrained(tmp_path / "saved", config=config)
    assert model.is_gradient_checkpointing is True
    calls = []
    plain = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        "clipmb.pt.modeling.checkpoint",
        lambda layer, *rest, **options: calls.append(layer) or plain(layer, *rest, **options),
    )
    model.train()(**tensors())
    blocks = [*model.text_model.encoder.layers, *model.vision_model.encoder.layers]
    assert sorted(map(id, calls)) == sorted(map(id, blocks))
    calls.clear()
    model.gradient_checkpointing_enable(every_n_layers=2)
    model(**tensors())
    first = [*model.text_model.encoder.layers[::2], *model.vision_model.encoder.layers[::2]]
    assert sorted(map(id, calls)) == sorted(map(id, first))
    with pytest.raises(ValueError, match="every_n_layers"):
        model.gradient_checkpointing_enable(every_n_layers=0)
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    model.activation_checkpointing_enable({"preserve_rng_state": False}, every_n_layers=2, offload=False)
    calls.clear()
    model(**tensors())
    assert sorted(map(id, calls)) == sorted(map(id, first))
    assert model.is_activation_checkpointing
    with pytest.raises(ValueError, match="stay on their device"):
        model.activation_checkpointing_enable(offload=True)


def test_embeddings_and_counts(tmp_path):
    model = load(tmp_path)
    assert model.get_input_embeddings() is model.text_model.embeddings.token_embedding
    vision = load(tmp_path, "CLIPVisionModel")
    assert vision.get_input_embeddings() is vision.vision_model.embeddings.patch_embedding
    replaced = torch.nn.Embedding(99, 32)
    model.set_input_embeddings(replaced)
    assert model.get_input_embeddings() is replaced
    total = sum(array.size for array in random_arrays(CONFIG, "CLIPModel").values())
    assert model.num_parameters() == total
    assert model.num_parameters(exclude_embeddings=True) == total - 99 * 32 - 13 * 32 - 26 * 48
    model.vision_model.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) < total
    assert model.device == torch.device("cpu")
    model.set_input_embeddings(torch.nn.Embedding(107, 32))
    model.save_pretrained(tmp_path / "larger")
    assert pt.CLIPModel.from_pretrained(tmp_path / "larger").get_input_embeddings().weight.shape == (107, 32)


@pytest.mark.parametrize("positions", [False, True])
def test_every_parameter_is_reached_through_the_call_of_its_module(tmp_path, positions):
    model, seen = load(tmp_path), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    model(**tensors(), position_ids=torch.arange(11)[None] if positions else None)
    own = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert own - seen == set()


# -- compilers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("head", ALL_HEADS)
def test_compile_without_graph_breaks(tmp_path, head, implementation):
    model = load(tmp_path, head, attn_implementation=implementation)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = tensors(head)
    expected, found = model(**inputs, output_hidden_states=True), compiled(**inputs, output_hidden_states=True)
    assert type(found) is type(expected)
    assert found.keys() == expected.keys()
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (found, expected)), strict=True):
        assert relative(a.detach(), b.detach()) < 1e-5
    torch.compiler.reset()


def test_export_with_a_dynamic_batch_and_length(tmp_path):
    model = load(tmp_path)
    texts, images, seq = (torch.export.Dim(name, min=2, max=limit) for name, limit in (("t", 64), ("i", 64), ("s", 13)))
    shapes = {"input_ids": {0: texts, 1: seq}, "pixel_values": {0: images}, "attention_mask": {0: texts, 1: seq}}
    example = tensors()
    program = torch.export.export(model, (), example, dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    other = {
        "input_ids": example["input_ids"][:3, :9],
        "attention_mask": example["attention_mask"][:3, :9],
        "pixel_values": torch.cat([example["pixel_values"]] * 2),
    }
    expected, found = model(**other), loaded(**other)
    assert relative(found.logits_per_image.detach(), expected.logits_per_image.detach()) < 1e-5
    assert found.text_embeds.shape == (3, 24)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:DeprecationWarning")
def test_traces_follow_the_inputs(tmp_path):
    """With gradients on, as `torch.jit.trace` compares a trace with gradients to one without."""
    model = load(tmp_path, torchscript=True)
    inputs = tensors()
    traced = torch.jit.trace(model, example_kwarg_inputs=inputs)
    others = {
        "input_ids": inputs["input_ids"][:3, :9],
        "attention_mask": inputs["attention_mask"][:3, :9],
        "pixel_values": torch.cat([inputs["pixel_values"]] * 2),
    }
    for each in (inputs, others):
        for found, expected in zip(traced(**each)[:4], model(**each)[:4], strict=True):
            assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:DeprecationWarning")
def test_a_trace_interpolates_positions_although_its_example_needs_none(tmp_path):
    model = load(tmp_path, "CLIPVisionModel", torchscript=True)
    example = {**tensors("CLIPVisionModel"), "interpolate_pos_encoding": torch.tensor(True)}
    traced = torch.jit.trace(model, example_kwarg_inputs=example)
    assert torch.equal(traced(**example)[0], model(**example)[0])
    example["pixel_values"] = torch.randn(2, 3, 24, 28)
    torch.testing.assert_close(traced(**example)[0], model(**example)[0])


def test_autocast(tmp_path):
    model = load(tmp_path, "CLIPTextModelWithProjection", return_dict=False)
    inputs = tensors("CLIPTextModelWithProjection")
    with torch.autocast("cpu", torch.bfloat16):
        low = model(**inputs)[0]
    high = model(**inputs)[0]
    assert low.dtype == torch.bfloat16
    assert 0 < relative(low.float().detach(), high.detach()) < 0.05


# -- activations ------------------------------------------------------------------------------------------------------


def test_activations_by_their_formulas():
    x = torch.linspace(-12, 12, 241, dtype=torch.float64)
    numbers = x.numpy()
    tanh_gelu = 0.5 * numbers * (1 + np.tanh(np.sqrt(2 / np.pi) * (numbers + 0.044715 * numbers**3)))
    sigmoid = 1 / (1 + np.exp(-numbers))
    erf = torch.erf(x / 2**0.5).numpy()
    expected = {
        "gelu": 0.5 * numbers * (1 + erf),
        "gelu_new": tanh_gelu,
        "quick_gelu": numbers / (1 + np.exp(-1.702 * numbers)),
        "gelu_10": np.clip(0.5 * numbers * (1 + erf), -10, 10),
        "relu2": np.maximum(numbers, 0) ** 2,
        "relu6": np.clip(numbers, 0, 6),
        "leaky_relu": np.where(numbers > 0, numbers, 0.01 * numbers),
        "silu": numbers * sigmoid,
        "mish": numbers * np.tanh(np.log1p(np.exp(numbers))),
        "linear": numbers,
    }
    for name, values in expected.items():
        assert relative(ACTIVATIONS[name](x), values) < 1e-12, name
    assert set(ACTIVATIONS) == set(clipmb.common.config.ACTIVATIONS)


def test_text_config_alone():
    assert pt.CLIPTextModel(CLIPTextConfig(**CONFIG.text_config.to_dict())).num_parameters() > 0
    assert config_of("CLIPTextModel", CONFIG) is CONFIG.text_config
