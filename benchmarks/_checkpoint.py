"""A checkpoint of ViT-B/32's size with seeded random weights, and the command line of the benchmarks that use it."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clipmb import CLIPConfig, CLIPImageProcessor, CLIPProcessor, CLIPTokenizerFast, backends
from clipmb.common.checkpoint import write_safetensors
from clipmb.common.parameters import specs
from clipmb.common.saving import Transaction


def vit_b_32(folder: Path, config: CLIPConfig | None = None) -> Path:
    """Writes the checkpoint with tokenizer and image processor, unless it is there already.

    Args:
        folder: Where.
        config: The size; ViT-B/32 when None.

    Returns:
        The folder.
    """
    config = config or CLIPConfig(architectures=["CLIPModel"], dtype="float32")
    done = folder / ".complete"
    mark = hashlib.sha256(config.to_json_string().encode()).hexdigest()
    if done.exists() and done.read_text() == mark:
        return folder
    rng = np.random.default_rng(0)
    arrays = {}
    for spec in specs(config, "CLIPModel"):
        values = rng.standard_normal(spec.shape, np.float32)
        arrays[spec.name] = np.asarray(values * np.float32(spec.std) + np.float32(spec.mean), np.float32)
    with Transaction(folder) as save:
        save.write("config.json", config.to_json_string())
        write_safetensors(save, arrays)
    CLIPProcessor(CLIPImageProcessor(), CLIPTokenizerFast()).save_pretrained(folder)
    done.write_text(mark)
    return folder


def for_each_backend(measure: Callable[..., None], description: str | None, **options: Any) -> None:
    """The command line of a benchmark of ViT-B/32: each installed backend in a process of its own, or the one named.

    Args:
        measure: Called with a backend, the checkpoint's folder, and the options by name.
        description: For ``--help``.
        options: Command-line options, with the arguments of ``argparse`` for each.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--folder", type=Path, default=Path("build/vit-b-32"))
    parser.add_argument("--backend", choices=tuple(backends.BACKENDS), help="one of them, in this process")
    for name, known in options.items():
        parser.add_argument(f"--{name}", **known)
    arguments = vars(parser.parse_args())
    vit_b_32(arguments["folder"])
    backend = arguments.pop("backend")
    if backend is not None:
        measure(backend, **arguments)
        return
    peers = [name for name in backends.installed() if backends.BACKENDS[name].trains]  # in transformers
    for backend in peers:
        subprocess.run([sys.executable, sys.argv[0], "--backend", backend, *sys.argv[1:]], check=True)
