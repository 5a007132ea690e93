"""Runs every benchmark, each in a process of its own, and writes RESULTS.md; names on the command line choose some."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from _compare import ROWS

BENCHMARKS = (
    "tokenizer", "image_processor", "data", "imports", "loading", "models", "engines", "embedding", "search", "serving",
    "training", "convert",
)  # fmt: skip
RESULTS = Path(__file__).with_name("RESULTS.md")
PACKAGES = (
    "torch", "tensorflow-cpu", "tensorflow", "keras", "jax", "flax", "onnxruntime", "numpy", "pillow", "simplejpeg",
    "transformers", "tokenizers", "open_clip_torch", "torchvision", "sentence-transformers", "fastembed", "keras-hub",
    "starlette", "uvicorn", "faiss-cpu", "usearch", "instant-clip-tokenizer",
)  # fmt: skip
HEAD = """# Results

What `make bench` measured last. The contenders alternate in one process; each figure is the median of its runs. A ratio
is the time of the peer over that of clipmb: above 1, clipmb is faster. Ratios carry over to other machines better than
the figures do. `make bench ARGS="NAME …"` replaces the sections of these names.
"""


def main() -> None:
    chosen = sys.argv[1:] or BENCHMARKS
    if unknown := set(chosen) - set(BENCHMARKS):
        sys.exit(f"error: no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    for name in chosen:
        print(f"\n== {name} ==", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder, "rows.jsonl")
            script = Path(__file__).with_name(f"{name}.py")
            subprocess.run([sys.executable, str(script)], check=True, env={**os.environ, ROWS: str(rows)})
            write(name, [json.loads(line) for line in rows.read_text("utf-8").splitlines()])


def write(name: str, rows: list[dict[str, str]]) -> None:
    """Replaces the section of a benchmark in RESULTS.md."""
    old = RESULTS.read_text("utf-8") if RESULTS.exists() else ""
    sections = {part.split("\n", 1)[0]: part for part in re.split(r"^## ", old, flags=re.MULTILINE)[1:]}
    about = f"{datetime.date.today():%Y-%m-%d}, {machine()}; {versions()}."
    tables = [table(title, rows) for title in dict.fromkeys(row["table"] for row in rows)]
    sections[name] = "\n\n".join([name, about, *tables]) + "\n"
    parts = [HEAD, *("## " + sections[known].rstrip("\n") + "\n" for known in BENCHMARKS if known in sections)]
    RESULTS.write_text("\n".join(parts), "utf-8")


def table(title: str, rows: list[dict[str, str]]) -> str:
    """Formats the rows with this title."""
    rows = [{key: value for key, value in row.items() if key != "table"} for row in rows if row["table"] == title]
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if any(row.get(name) for row in rows)]
    lines = [
        [title or "what", *names[1:]],
        ["---"] * len(names),
        *([row.get(name, "") for name in names] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """Describes the processor."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    units = [unit for unit in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if f" {unit} " in text]
    what = f"{model[1].strip()} ({', '.join(units)})" if model else platform.processor() or platform.machine()
    return f"{cores} cores of {what}, {platform.system()}, Python {platform.python_version()}"


def versions() -> str:
    """Lists what is installed of what takes part."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


if __name__ == "__main__":
    main()
