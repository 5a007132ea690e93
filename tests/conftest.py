"""Which backends are tested. A backend that is named and cannot be imported is a failure, never a skip."""

from __future__ import annotations

import importlib
import os
import signal
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ALL_BACKENDS = ("pt", "tf", "flax")  # which have models
ALL_ENGINES = (*ALL_BACKENDS, "onnx")
ENGINES = tuple(name.strip() for name in os.environ.get("CLIPMB_TEST_BACKENDS", ",".join(ALL_ENGINES)).split(","))
BACKENDS = tuple(name for name in ENGINES if name in ALL_BACKENDS)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # inherited from a shell that runs the suite in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

if unknown := set(ENGINES) - set(ALL_ENGINES):
    raise pytest.UsageError(f"CLIPMB_TEST_BACKENDS names {sorted(unknown)}; there are {ALL_ENGINES}")

# Files of a backend that is not named are left out; this is a choice of the caller, so it is no skip.
collect_ignore_glob = [
    f"**/{where}" for name in ALL_ENGINES if name not in ENGINES for where in (f"{name}/*", f"test_{name}.py")
]

for _name in ALL_ENGINES:  # torch before tensorflow: the other order can crash
    if _name in ENGINES:
        importlib.import_module(f"clipmb.{_name}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects tests of a backend that is not named, and comparisons of several where one is."""
    left_out = [
        item
        for item in items
        if any(mark.args[0] not in ENGINES for mark in item.iter_markers(name="backend"))
        or _is_alone(item)
        or (len(BACKENDS) < 2 and _is_empty(item))
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _is_alone(item: pytest.Item) -> bool:
    """Whether a test compares several backends, or engines if it says so, and there are not two of them."""
    mark = item.get_closest_marker("several")
    return mark is not None and len(ENGINES if mark.kwargs.get("engines") else BACKENDS) < 2


def _is_empty(item: pytest.Item) -> bool:
    """Whether a test is parametrised over nothing, as one over the backends beside the first may be."""
    return any("empty parameter set" in mark.kwargs.get("reason", "") for mark in item.iter_markers(name="skip"))
