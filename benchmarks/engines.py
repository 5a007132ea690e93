"""Every engine and mode beside transformers' PyTorch model, in one run: items/s, ratio, and cosine to float32.

The ceiling is what the matrix products alone would take at the rate of the largest of them, measured in PyTorch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch  # before tensorflow
import transformers
from _checkpoint import vit_b_32
from _compare import medians, row

from clipmb import CLIPConfig, backends
from clipmb.backends import Engine

MODES = {
    "pt": [{}, {"compile": True}, {"dtype": "bfloat16"}],
    "tf": [{}],
    "flax": [{}],
    "onnx": [{}, {"dtype": "int8"}],
}
LENGTH = 16
PEER = "transformers, PyTorch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--folder", type=Path, default=Path("build/vit-b-32"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--backends", nargs="*", default=backends.installed(), choices=list(MODES))
    arguments = parser.parse_args()
    folder = vit_b_32(arguments.folder)
    config = CLIPConfig.from_pretrained(folder)
    peer = transformers.CLIPModel.from_pretrained(folder).eval()
    engines = {
        " ".join([name, *map(str, options.values())]).replace("True", "compiled"): backends.engine(name).load(
            folder, **options
        )
        for name in arguments.backends
        for options in MODES[name]
    }
    for tower in ("image", "text"):
        for batch in arguments.batches:
            measure(engines, peer, config, tower, batch, arguments.rounds)


def measure(
    engines: dict[str, Engine], peer: transformers.CLIPModel, config: CLIPConfig, tower: str, batch: int, rounds: int
) -> None:
    """Compares all on one tower and one size of batch."""
    numbers = np.random.default_rng(0)
    side = config.vision_config.image_size
    pixels = numbers.normal(size=(batch, 3, side, side)).astype(np.float32)
    ids = numbers.integers(1, 40_000, (batch, LENGTH))
    ids[:, -1] = config.text_config.eos_token_id
    runs: dict[str, Callable[[], np.ndarray]] = {PEER: lambda: theirs(peer, tower, pixels, ids)}
    for name, engine in engines.items():
        runs[name] = (
            (lambda engine=engine: engine.image_features(pixels))
            if tower == "image"
            else (lambda engine=engine: engine.text_features(ids))
        )
    report(f"{tower}, batch {batch}", batch, runs, rounds, ceiling(config, tower, batch))


def theirs(model: transformers.CLIPModel, tower: str, pixels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        if tower == "image":
            return model.get_image_features(pixel_values=torch.from_numpy(pixels)).numpy()
        return model.get_text_features(input_ids=torch.from_numpy(ids)).numpy()


def report(table: str, batch: int, runs: dict[str, Callable[[], np.ndarray]], rounds: int, least: float) -> None:
    """Times all in alternation; the ratios are to transformers."""
    exact = runs[PEER]()
    cosines = {name: cosine(run(), exact) for name, run in runs.items()}
    taken = medians(runs, rounds)
    for name, middle in taken.items():
        row(
            name, table, **{"items/s": f"{batch / middle:,.1f}"}, ratio=f"{taken[PEER] / middle:.2f}",
            ceiling=f"{100 * least / middle:.0f} %", cosine=f"{cosines[name]:.6f}",
        )  # fmt: skip
    row("matrix products alone, float32", table, **{"items/s": f"{batch / least:,.1f}"}, ceiling="100 %")


def cosine(found: np.ndarray, exact: np.ndarray) -> float:
    """The smallest cosine of a row to its exact value."""
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(exact, axis=1)
    return float(((found * exact).sum(1) / lengths).min())


def ceiling(config: CLIPConfig, tower: str, batch: int) -> float:
    """Seconds for the matrix products of a tower at the measured rate of its largest one."""
    part = config.vision_config if tower == "image" else config.text_config
    tokens = config.vision_config.num_patches + 1 if tower == "image" else LENGTH
    width, inner = part.hidden_size, part.intermediate_size
    a, b = torch.randn(batch * tokens, width), torch.randn(width, inner)
    with torch.inference_mode():
        taken = []
        for _ in range(20):
            start = time.perf_counter()
            a @ b
            taken.append(time.perf_counter() - start)
    weights = part.num_hidden_layers * (4 * width**2 + 2 * width * inner)
    return statistics.median(taken) * weights / (width * inner)


if __name__ == "__main__":
    main()
