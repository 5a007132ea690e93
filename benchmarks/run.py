"""Runs every benchmark, each in a process of its own; names on the command line choose some."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = ("tokenizer", "image_processor", "data", "loading", "models", "engines", "training", "convert")


def main() -> None:
    chosen = sys.argv[1:] or BENCHMARKS
    if unknown := set(chosen) - set(BENCHMARKS):
        sys.exit(f"error: no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    for name in chosen:
        print(f"\n== {name} ==", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).with_name(f"{name}.py"))], check=True)


if __name__ == "__main__":
    main()
