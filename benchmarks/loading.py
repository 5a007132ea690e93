"""Loading a checkpoint of 600 MB: time beside transformers 4.57.6, and peak memory in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from _checkpoint import for_each_backend
from _compare import compare, row

PEAK = """
import re, sys
def high():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
{setup}
before = high()
model = {name}.from_pretrained({folder!r})
{touch}
print(high() - before)
"""
# The framework warmed up by a little work, and reading every weight once.
TOUCH = {
    "pt": "total = sum(float(p.detach().sum()) for p in model.parameters())",
    "tf": "total = sum(float(tf.reduce_sum(v)) for v in model.weights)",
    "flax": "total = sum(float(leaf.sum()) for leaf in jax.tree.leaves(model.params))",
}
SETUP = {
    "pt": "import torch; torch.ones(8).sum(); from clipmb import CLIPModel",
    "tf": "import tensorflow as tf; tf.reduce_sum(tf.ones(8)); from clipmb import TFCLIPModel",
    "flax": "import jax; jax.numpy.ones(8).sum(); from clipmb import FlaxCLIPModel",
}
NAMES = {"pt": "CLIPModel", "tf": "TFCLIPModel", "flax": "FlaxCLIPModel"}
GOALS = {"pt": (1.0, 1.15), "tf": (4.0, 1.3), "flax": (4.0, 1.3)}  # how much faster; memory over the file's size


def peak(backend: str, folder: Path) -> int:
    """Returns the bytes that loading and reading every weight adds to a process that has the framework imported."""
    script = PEAK.format(setup=SETUP[backend], name=NAMES[backend], folder=str(folder), touch=TOUCH[backend])
    return int(subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(backend: str, folder: Path) -> None:
    size = (folder / "model.safetensors").stat().st_size
    speed, memory = GOALS[backend]
    import transformers

    import clipmb

    transformers.logging.set_verbosity_error()
    ours = getattr(clipmb, NAMES[backend])
    theirs = getattr(transformers, NAMES[backend])
    options = {"from_pt": True} if backend == "tf" else {}
    compare(
        f"load {size / 1e6:.0f} MB ({backend})",
        lambda: ours.from_pretrained(folder),
        lambda: theirs.from_pretrained(folder, **options),
        count=1,
        unit="loads",
        rounds=7 if backend == "pt" else 3,
        goal=speed,
    )
    ratio = peak(backend, folder) / size
    verdict = "met" if ratio <= memory else "not met"
    row(f"peak memory of loading ({backend})", clipmb=f"{ratio:.3f} x the file", goal=f"at most {memory} ({verdict})")


if __name__ == "__main__":
    for_each_backend(measure, __doc__)
