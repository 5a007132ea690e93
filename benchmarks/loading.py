"""Loading a checkpoint of 600 MB: time beside the former library, and peak memory in a process of its own."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from _checkpoint import vit_b_32
from _compare import compare

PEAK = """
import re, resource, sys
{setup}
def high():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = high()
model = {load}
{touch}
print(high() - before)
"""

LOADERS = {
    "pt": (
        "import torch; from clipmb.pt import CLIPModel",
        "CLIPModel.from_pretrained({folder!r})",
        "total = sum(float(p.detach().sum()) for p in model.parameters())",
    ),
}


def peak(backend: str, folder: Path) -> int:
    """Returns the bytes that loading and reading every weight adds to a process that has the framework imported."""
    setup, load, touch = LOADERS[backend]
    script = PEAK.format(setup=setup, load=load.format(folder=str(folder)), touch=touch)
    return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/vit-b-32"))
    folder = vit_b_32(parser.parse_args().folder)
    size = (folder / "model.safetensors").stat().st_size
    import transformers

    import clipmb

    transformers.logging.set_verbosity_error()
    compare(
        "load 600 MB (pt)",
        lambda: clipmb.pt.CLIPModel.from_pretrained(folder),
        lambda: transformers.CLIPModel.from_pretrained(folder),
        count=1,
        unit="loads",
        goal=1.0,
    )
    for backend, limit in {"pt": 1.15}.items():
        ratio = peak(backend, folder) / size
        verdict = "met" if ratio <= limit else "NOT MET"
        print(f"peak memory of loading ({backend}): {ratio:.3f} x the file  (goal at most {limit}: {verdict})")


if __name__ == "__main__":
    main()
