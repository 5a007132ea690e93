"""accelerate: preparing, its documented save, offloading to CPU and disk, device maps."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model, infer_auto_device_map

from clipmb import CLIPModel


@torch.no_grad()
def difference(model, inputs, expected) -> float:
    return float((model(**inputs).logits_per_image - expected).abs().max())


def test_prepare_train_and_the_documented_save(model, inputs, folder, tmp_path):
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    accelerator.backward(prepared(**inputs, return_loss=True).loss)
    optimizer.step()
    state = accelerator.get_state_dict(prepared)
    accelerator.unwrap_model(prepared).save_pretrained(
        tmp_path / "out", is_main_process=accelerator.is_main_process, save_function=accelerator.save, state_dict=state
    )
    with torch.no_grad():
        after = prepared(**inputs).logits_per_image
    assert difference(CLIPModel.from_pretrained(tmp_path / "out"), inputs, after) == 0
    assert difference(CLIPModel.from_pretrained(folder), inputs, after) > 1e-3


def test_other_processes_than_the_main_one_save_nothing(model, tmp_path):
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_given_state_is_what_is_saved(model, inputs, tmp_path):
    state = {name: value * 0.5 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    again = CLIPModel.from_pretrained(tmp_path)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_cpu_offload(model, inputs, expected):
    cpu_offload(model, torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert difference(model, inputs, expected) == 0


def test_disk_offload(model, inputs, expected, tmp_path):
    disk_offload(model, tmp_path, torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert difference(model, inputs, expected) == 0


def test_offloaded_models_with_positions_given(model, inputs):
    """Every parameter is reached through the call of its module, whichever way leads to it."""
    positions = torch.arange(11)[None]
    with torch.no_grad():
        expected = model(**inputs, position_ids=positions).logits_per_image
    cpu_offload(model, torch.device("cpu"))
    assert difference(model, {**inputs, "position_ids": positions}, expected) == 0


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential", {"": "cpu"}])
def test_device_maps(folder, inputs, expected, device_map):
    model = CLIPModel.from_pretrained(folder, device_map=device_map)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert difference(model, inputs, expected) == 0


def test_a_device_map_that_leaves_a_tower_on_disk(folder, inputs, expected, tmp_path):
    device_map = {"text_model": "cpu", "vision_model": "disk", "": "cpu"}
    model = CLIPModel.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    assert {p.device.type for p in model.vision_model.parameters()} == {"meta"}
    assert {p.device.type for p in model.text_model.parameters()} == {"cpu"}
    assert difference(model, inputs, expected) == 0


@pytest.mark.parametrize("device_map", [{"nonsense": "cpu"}, {"text_model": "cpu"}])
def test_a_device_map_must_place_every_parameter_and_nothing_else(folder, device_map):
    with pytest.raises(ValueError, match="device_map"):
        CLIPModel.from_pretrained(folder, device_map=device_map)


def test_blocks_are_not_split(model, inputs, expected, tmp_path):
    size = sum(parameter.nbytes for parameter in model.vision_model.parameters())
    places = infer_auto_device_map(model, max_memory={"cpu": size}, no_split_module_classes=model._no_split_modules)
    assert set(places.values()) == {"cpu", "disk"}
    assert not [name for name in places if ".layers." in name and not name.split(".layers.")[1].isdecimal()]
    dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    assert difference(model, inputs, expected) == 0
