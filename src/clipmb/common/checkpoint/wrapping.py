"""What training programs put around weights: dictionaries around the state dict, and prefixes of its names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any, TypeVar

T = TypeVar("T")

# Where a file holds several of them, the first one counts.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "ema")
_MAX_DEPTH = 8
_TOP = ("text_model/", "vision_model/", "logit_scale")  # where these are, there is no wrapper around them
# Attributes of trainers at the beginning of a name, and of wrappers of PyTorch anywhere in it. No name of any dialect
# of CLIP has such a part itself.
_LEADING = re.compile(r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module|model|net)\.)+")
_WRAPPED = re.compile(r"(?<=\.)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrapped(tree: Any) -> tuple[Any, str]:
    """Takes a state dict out of the dictionaries around it.

    Args:
        tree: What a trainer pickled: a state dict, or a dictionary with one under a name of `WRAPPERS`, and so on.

    Returns:
        The state dict, and the names that lead to it, such as "state_dict" or "ema.module"; "" for none.
    """
    path = []
    for _ in range(_MAX_DEPTH):  # a damaged file may hold a dictionary that holds itself
        inner = tree if isinstance(tree, dict) else {}
        name = next((name for name in WRAPPERS if isinstance(inner.get(name), dict)), None)
        if name is None:
            break
        tree = inner[name]
        path.append(name)
    return tree, ".".join(path)


def unwrapped_paths(tensors: Mapping[str, T]) -> tuple[dict[str, T], str]:
    """Does what `unwrapped` does for a tree as Flax and Keras write it: tensors by their attributes, joined by "/".

    A training state of Flax has its weights under "params", beside those of the optimizer.
    """
    path: list[str] = []
    found = dict(tensors)
    while len(path) < _MAX_DEPTH and not any(name.startswith(_TOP) for name in found):
        wrappers = (f"{wrapper}/" for wrapper in (*WRAPPERS, "_orig_mod", "params"))
        prefix = next((start for start in wrappers if any(name.startswith(start) for name in found)), None)
        if prefix is None:
            break
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
        path.append(prefix[:-1])
    return found, ".".join(path)


def stripped(name: str) -> str:
    """Returns a name without ``module.``, ``_orig_mod.``, ``model.`` …, which training leaves before and inside it."""
    if name.startswith(("text_model.", "vision_model.")) and "mod" not in name[10:]:  # nearly all names
        return name
    return _WRAPPED.sub("", _LEADING.sub("", name))


def explain_stripping(names: Iterable[str], wrapper: str = "") -> dict[str, str]:
    """Says for the record of a conversion what was taken away around the weights.

    Args:
        names: The names in the file that were used.
        wrapper: Where in the file the state dict was, as `unwrapped` returns it.
    """
    found = {"wrapper": f"the weights are under {wrapper} in the file"} if wrapper else {}
    removed: dict[str, int] = {}
    for name in names:
        kept = stripped(name)
        if kept != name:
            prefix = name.removesuffix(kept) if name.endswith(kept) else "parts of wrappers inside the name"
            removed[prefix] = removed.get(prefix, 0) + 1
    if removed:
        found["prefix"] = "; ".join(f"{prefix} taken off {count} names" for prefix, count in removed.items())
    return found


def common_start(names: Iterable[str]) -> str:
    """Returns the parts with which all of the names begin, with the dot after them; "" for none."""
    parts = takewhile(lambda part: len(set(part)) == 1, zip(*(name.split(".")[:-1] for name in names), strict=False))
    return "".join(f"{part[0]}." for part in parts)
