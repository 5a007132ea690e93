"""Where the parameters of a PyTorch model go: one device, or several, the CPU and the disk among them, by a device map.

accelerate moves and offloads modules; what is asked for is checked here first, because a map that misses a module or
names one that does not exist would place nothing there without a word.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from torch import nn

from clipmb.common.errors import bad_input, one_of

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def place(
    model: nn.Module,
    device: Any = None,
    device_map: Any = None,
    *,
    no_split: list[str],
    max_memory: dict[Any, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload_buffers: bool = False,
) -> None:
    """Moves a model to a device, or its modules to those of a device map.

    Args:
        model: The model, on the CPU.
        device: One device for all.
        device_map: A device; one of `STRATEGIES`; or the device of each module or parameter by its name, where "disk"
            offloads it and "" stands for all that no other name covers.
        no_split: Names of the classes whose modules stay on one device.
        max_memory: Bytes for each device, for a strategy.
        offload_folder: Where what goes to "disk" is kept.
        offload_buffers: Offload buffers too.

    Raises:
        ValueError: Both ``device`` and ``device_map`` are given, or neither where something is to be offloaded; there
            is no such strategy; or the map names what the model does not have or leaves a parameter without a place.
        ImportError: Several devices are asked for, and accelerate is not installed.
    """
    if device is not None and device_map is not None:
        raise bad_input("device and device_map exclude each other", device_map, "Pass one of them")
    given = {"max_memory": max_memory, "offload_folder": offload_folder, "offload_buffers": offload_buffers or None}
    if device_map is None and (idle := [name for name, value in given.items() if value is not None]):
        raise bad_input("Offloading needs a device_map", ", ".join(idle), 'Pass device_map="auto" too', shown=True)
    if isinstance(device_map, str) and device_map in STRATEGIES:
        if max_memory is None and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
            return  # the CPU is all there is
        device_map = _planned(model, device_map, max_memory, no_split)
    if not isinstance(device_map, dict):
        target = device if device_map is None else device_map
        if target is not None:
            model.to(_device(target, *STRATEGIES))
        return
    _check(model, device_map)
    if len(places := set(map(str, device_map.values()))) == 1 and "disk" not in places:
        model.to(next(iter(device_map.values())))
        return
    if "disk" in places and offload_folder is None:
        raise bad_input("Offloading to disk needs a folder", device_map, "Pass offload_folder=")
    options: dict[str, Any] = {"offload_dir": offload_folder, "offload_buffers": offload_buffers}
    if not any(isinstance(value, int) or str(value) not in ("cpu", "disk") for value in device_map.values()):
        options["main_device"] = "cpu"
    _accelerate().dispatch_model(model, _flat(model, device_map), **options)


def _planned(model: nn.Module, strategy: str, max_memory: Any, no_split: list[str]) -> dict[str, Any]:
    """Lets accelerate spread the modules over the devices there are."""
    accelerate = _accelerate()
    if strategy != "sequential":
        max_memory = accelerate.utils.get_balanced_memory(
            model,
            max_memory=max_memory,
            no_split_module_classes=no_split,
            low_zero=strategy == "balanced_low_0",
        )
    return accelerate.infer_auto_device_map(model, max_memory=max_memory, no_split_module_classes=no_split)


def _check(model: nn.Module, device_map: dict[str, Any]) -> None:
    known = {"", *(name for name, _ in model.named_modules()), *(name for name, _ in model.named_parameters())}
    if unknown := [name for name in device_map if name not in known]:
        raise bad_input(
            "device_map must name modules or parameters of the model",
            ", ".join(map(repr, unknown)),
            f"Use names such as {', '.join(repr(name) for name, _ in model.named_children())}",
            shown=True,
        )
    for place in device_map.values():
        if place is not None and place != "disk":
            _device(place, "disk")
    homeless = [name for name, _ in model.named_parameters() if _place_of(name, device_map) is None]
    if homeless:
        raise bad_input(
            "device_map must give every parameter a place",
            f"{len(homeless)} without one, such as {homeless[0]}",
            'Add their modules, or "" for all others',
            shown=True,
        )


def _device(value: Any, *others: str) -> torch.device:
    """Returns a device; what else may stand in its place is for the error."""
    try:
        return torch.device(value)
    except (RuntimeError, TypeError):
        raise one_of("device", value, (*others, "cpu", "cuda", "cuda:0", "…")) from None


def _place_of(name: str, device_map: dict[str, Any]) -> Any:
    """Returns the place that the longest name in the map gives a parameter; None where none covers it."""
    parts = name.split(".")
    covering = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
    return next((device_map[each] for each in covering if each in device_map), None)


def _flat(model: nn.Module, device_map: dict[str, Any]) -> dict[str, Any]:
    """Returns the map without "", which accelerate takes for the whole model: what it covers by name instead."""
    if "" not in device_map:
        return device_map
    flat = {name: place for name, place in device_map.items() if name}
    for name, _ in model.named_parameters():
        if _place_of(name, flat) is None:
            top = name.partition(".")[0]
            whole = not any(other.startswith(f"{top}.") for other in flat)
            flat[top if whole else name] = device_map[""]
    return flat


def _accelerate() -> Any:
    try:
        return importlib.import_module("accelerate")
    except ImportError as error:
        raise ImportError("A device_map over several places needs accelerate: pip install accelerate") from error
