"""Converting ViT-L/14 (1.7 GB of float32): wall time beside `cp`, CPU time, and peak memory."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from _checkpoint import vit_b_32
from _compare import row

from clipmb import CLIPConfig

VIT_L_14 = CLIPConfig(
    {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
    {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14, "projection_dim": 768,
    },
    projection_dim=768,
    architectures=["CLIPModel"],
    dtype="float32",
)  # fmt: skip
CONVERT = """
import json, re, resource, sys
from clipmb import convert
convert(sys.argv[1], sys.argv[2], sys.argv[3], dtype=sys.argv[4] or None)
used = resource.getrusage(resource.RUSAGE_SELF)
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
print(json.dumps([used.ru_utime + used.ru_stime, peak]))
"""
CASES = ("safetensors:float16", "safetensors:bfloat16", "safetensors:", "tf-h5:", "flax-msgpack:")
GOAL = 0.5  # of the file, in memory at the peak


def timed(command: list[str]) -> tuple[float, str]:
    """Runs a command; returns the seconds and what it printed."""
    start = time.perf_counter()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return time.perf_counter() - start, output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/vit-l-14"))
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="FORMAT:DTYPE")
    given = parser.parse_args()
    folder = vit_b_32(given.folder, VIT_L_14)
    file = folder / "model.safetensors"
    size = file.stat().st_size
    result = folder.with_name("convert-result")
    shutil.rmtree(result, ignore_errors=True)
    copy = folder.with_name("convert-copy")
    # cp leaves its copy in the page cache; a conversion syncs its result to disk, so the copy is synced too.
    plain, _ = timed(["sh", "-c", f"cp '{file}' '{copy}' && sync '{copy}'"])
    copy.unlink()
    row(f"cp and sync of {size / 1e9:.2f} GB", seconds=f"{plain:.1f}")
    for case in given.cases:
        to, dtype = case.split(":")
        seconds, output = timed([sys.executable, "-c", CONVERT, str(folder), str(result), to, dtype])
        shutil.rmtree(result)
        cpu, peak = json.loads(output)
        verdict = "met" if peak <= GOAL * size else "not met"
        row(
            f"convert to {to}, {dtype or 'as it is'}, with comparison", seconds=f"{seconds:.1f}",
            ratio=f"{seconds / plain:.1f} x cp", cpu=f"{cpu:.1f} s",
            memory=f"{peak / size:.2f} x the file", goal=f"memory at most {GOAL} ({verdict})",
        )  # fmt: skip


if __name__ == "__main__":
    main()
