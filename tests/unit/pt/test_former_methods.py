"""Methods that only PyTorch's models of the former library have."""

from __future__ import annotations

import copy

import cases
import torch

from clipmb import CLIPModel

CONFIG = cases.CONFIGS["plain"]


def test_gradients_flow_from_frozen_embeddings():
    model = CLIPModel(CONFIG).train().requires_grad_(False)
    inputs = model.dummy_inputs
    assert not model(**inputs).logits_per_text.requires_grad
    for _ in range(2):  # once is enough, and does no harm twice
        model.enable_input_require_grads()
    output = copy.deepcopy(model)(**inputs)
    assert output.text_embeds.requires_grad
    assert output.image_embeds.requires_grad
    model.disable_input_require_grads()
    assert not model(**inputs).logits_per_text.requires_grad


def test_checkpointed_blocks_of_a_frozen_model_train_what_is_in_them():
    model = CLIPModel(CONFIG).train().requires_grad_(False)
    trained = [tower.encoder.layers[0].mlp.fc1.bias for tower in (model.text_model, model.vision_model)]
    for parameter in trained:
        parameter.requires_grad_(True)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    model(**model.dummy_inputs, return_loss=True).loss.backward()
    assert all(parameter.grad is not None for parameter in trained)


def test_the_memory_footprint_counts_bytes():
    model = CLIPModel(CONFIG)
    assert model.base_model is model
    bytes_of_weights = 4 * model.num_parameters()
    assert model.get_memory_footprint() == bytes_of_weights
    assert model.half().get_memory_footprint() == bytes_of_weights // 2
    model.register_buffer("more", torch.zeros(10))
    assert model.get_memory_footprint() == bytes_of_weights // 2 + 40
    assert model.get_memory_footprint(return_buffers=False) == bytes_of_weights // 2
