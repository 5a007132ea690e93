"""Importing, beside transformers 4.57.6: processor time of fresh processes, less that of an empty one."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from _compare import medians, row

from clipmb import backends

FRAMEWORKS = {"pt": "torch", "tf": "tensorflow", "flax": "flax.linen"}
MODELS = {"pt": "CLIPModel", "tf": "TFCLIPModel", "flax": "FlaxCLIPModel"}


def run(line: str) -> None:
    """Runs a line of Python in a process of its own."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "TRANSFORMERS_VERBOSITY": "error"}
    subprocess.run([sys.executable, "-c", line], check=True, env={**os.environ, **quiet}, stderr=subprocess.DEVNULL)


def of_children() -> float:
    """Returns the processor seconds of the processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def measure(rounds: int) -> None:
    found = {"the package": ("import clipmb", "import transformers", None)}
    for name in ("CLIPConfig", "CLIPTokenizerFast", "CLIPImageProcessor", "CLIPProcessor"):
        found[name] = (f"from clipmb import {name}", f"from transformers import {name}", None)
    for backend in backends.installed():
        if (framework := FRAMEWORKS.get(backend)) is not None:
            name = MODELS[backend]
            found[name] = (f"from clipmb import {name}", f"from transformers import {name}", framework)
    for what, (ours, theirs, framework) in found.items():
        lines = {"ours": ours, "theirs": theirs, "nothing": "pass"}
        if framework is not None:
            lines["alone"] = f"import {framework}"
        seconds = medians({name: lambda line=line: run(line) for name, line in lines.items()}, rounds, of_children)
        taken = {name: max(value - seconds["nothing"], 1e-3) for name, value in seconds.items()}
        row(
            what, clipmb=f"{taken['ours'] * 1e3:,.0f} ms", peer=f"{taken['theirs'] * 1e3:,.0f} ms (transformers)",
            ratio=f"{taken['theirs'] / taken['ours']:.2f}",
            alone="" if framework is None else f"{taken['alone'] * 1e3:,.0f} ms ({framework})",
        )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    measure(**vars(parser.parse_args()))
