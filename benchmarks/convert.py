"""Converting ViT-L/14 (1.7 GB of float32), safetensors to safetensors: time beside `cp`, and peak memory."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from _checkpoint import vit_b_32

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
import re, sys
from clipmb import convert
convert(sys.argv[1], sys.argv[2], dtype=sys.argv[3] or None)
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


def timed(command: list[str]) -> tuple[float, str]:
    """Runs a command; returns the seconds and what it printed."""
    start = time.perf_counter()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return time.perf_counter() - start, output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/vit-l-14"))
    folder = vit_b_32(parser.parse_args().folder, VIT_L_14)
    file = folder / "model.safetensors"
    size = file.stat().st_size
    result = folder.with_name("convert-result")
    shutil.rmtree(result, ignore_errors=True)
    copy = folder.with_name("convert-copy")
    # cp leaves its copy in the page cache; a conversion syncs its result to disk, so the copy is synced too.
    plain, _ = timed(["sh", "-c", f"cp '{file}' '{copy}' && sync '{copy}'"])
    copy.unlink()
    print(f"cp and sync of {size / 1e9:.2f} GB: {plain:.1f} s")
    for dtype in ("float16", "bfloat16", ""):
        seconds, output = timed([sys.executable, "-c", CONVERT, str(folder), str(result), dtype])
        shutil.rmtree(result)
        ratio = int(output) / size
        verdict = "met" if ratio <= 0.5 else "NOT MET"
        print(
            f"convert, read back, compare, hash, {dtype or 'as it is'}: {seconds:.1f} s ({seconds / plain:.1f} x cp); "
            f"peak memory {ratio:.2f} x the file (goal at most 0.5: {verdict})"
        )


if __name__ == "__main__":
    main()
