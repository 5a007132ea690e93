"""CLIPOnnxConfig: what exporters of the former library ask for."""

from __future__ import annotations

import pytest

from clipmb import CLIPConfig, CLIPOnnxConfig, CLIPProcessor


def test_dummy_inputs_are_those_that_it_names():
    config = CLIPOnnxConfig.from_model_config(CLIPConfig())
    inputs = config.generate_dummy_inputs(CLIPProcessor(), framework="np")
    assert inputs.keys() == config.inputs.keys()
    assert {name: value.shape for name, value in inputs.items()} == {
        "input_ids": (2, 8), "attention_mask": (2, 8), "pixel_values": (2, 3, 224, 224)
    }  # fmt: skip
    assert all(len(config.inputs[name]) == value.ndim for name, value in inputs.items())
    assert list(config.outputs) == ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]
    assert (config.default_onnx_opset, config.atol_for_validation) == (14, 1e-4)
    assert config.generate_dummy_inputs(CLIPProcessor(), 3, 5, "np")["input_ids"].shape == (3, 5)


def test_tasks_that_clip_does_not_have():
    with pytest.raises(ValueError, match="task must be one of 'default'"):
        CLIPOnnxConfig(CLIPConfig(), task="masked-lm")
    with pytest.raises(ValueError, match="These models need no patching"):
        CLIPOnnxConfig(CLIPConfig(), patching_specs=[1])
