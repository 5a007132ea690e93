"""Every engine and mode beside transformers' PyTorch model: items/s of both, ratio, and cosine to float32.

Each engine has a process of its own, with the peer: the waiting threads of other runtimes would disturb calls of a few
milliseconds. The ceiling is what the matrix products alone would take at the rate of the largest of them, in PyTorch or
in onnxruntime, whichever is faster: on AMD's processors PyTorch's MKL reaches half of what others do.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch  # before tensorflow
import transformers
from _checkpoint import vit_b_32
from _compare import medians, row

from clipmb import CLIPConfig, backends

MODES = {
    "pt": {"backend": "pt"},
    "pt compiled": {"backend": "pt", "compile": True},
    "pt bfloat16": {"backend": "pt", "dtype": "bfloat16"},
    "tf": {"backend": "tf"},
    "flax": {"backend": "flax"},
    "onnx": {"backend": "onnx"},
    "onnx int8": {"backend": "onnx", "dtype": "int8"},
}
LENGTH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--folder", type=Path, default=Path("build/vit-b-32"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--engine", choices=list(MODES), help="one of them, in this process")
    arguments = parser.parse_args()
    folder = vit_b_32(arguments.folder)
    config = CLIPConfig.from_pretrained(folder)
    cases = [(tower, batch) for tower in ("image", "text") for batch in arguments.batches]
    if arguments.engine is not None:
        measure(arguments.engine, folder, config, cases, arguments.rounds)
        return
    for name, mode in MODES.items():
        if mode["backend"] in backends.installed():
            subprocess.run([sys.executable, sys.argv[0], *sys.argv[1:], "--engine", name], check=True)
    for tower, batch in cases:
        rate = f"{batch / ceiling(config, tower, batch):,.1f}"
        row("matrix products alone, float32", title(tower, batch), **{"items/s": rate}, ceiling="100 %")


def title(tower: str, batch: int) -> str:
    return f"{tower}, batch {batch}"


def measure(name: str, folder: Path, config: CLIPConfig, cases: list[tuple[str, int]], rounds: int) -> None:
    """Compares an engine with the peer on each tower and size of batch."""
    peer = transformers.CLIPModel.from_pretrained(folder).eval()
    options = dict(MODES[name])
    engine = backends.engine(options.pop("backend")).load(folder, **options)
    side = config.vision_config.image_size
    for tower, batch in cases:
        numbers = np.random.default_rng(0)
        pixels = numbers.normal(size=(batch, 3, side, side)).astype(np.float32)
        ids = numbers.integers(1, 40_000, (batch, LENGTH))
        ids[:, -1] = config.text_config.eos_token_id
        ours = partial(engine.image_features, pixels) if tower == "image" else partial(engine.text_features, ids)
        other = partial(theirs, peer, tower, pixels, ids)
        near, least = cosine(ours(), other()), ceiling(config, tower, batch)
        taken = medians({"ours": ours, "theirs": other}, rounds)
        row(
            name, title(tower, batch),
            **{"items/s": f"{batch / taken['ours']:,.1f}", "transformers": f"{batch / taken['theirs']:,.1f}"},
            ratio=f"{taken['theirs'] / taken['ours']:.2f}", ceiling=f"{100 * least / taken['ours']:.0f} %",
            cosine=f"{near:.6f}",
        )  # fmt: skip


def theirs(model: transformers.CLIPModel, tower: str, pixels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        if tower == "image":
            return model.get_image_features(pixel_values=torch.from_numpy(pixels)).numpy()
        return model.get_text_features(input_ids=torch.from_numpy(ids)).numpy()


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
    taken = [statistics.median(seconds(partial(torch.matmul, a, b)))]
    if "onnx" in backends.installed():
        taken.append(statistics.median(seconds(in_onnxruntime(a.numpy(), b.numpy()))))
    weights = part.num_hidden_layers * (4 * width**2 + 2 * width * inner)
    return min(taken) * weights / (width * inner)


def seconds(run: Callable[[], object], rounds: int = 20) -> list[float]:
    """Times a product."""
    run()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return taken


def in_onnxruntime(a: np.ndarray, b: np.ndarray) -> Callable[[], object]:
    """Returns what multiplies two matrices, of which the second is constant."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    shapes = {"a": list(a.shape), "c": [len(a), b.shape[1]]}
    given, found = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in shapes.items())
    nodes = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    graph = helper.make_graph(nodes, "product", [given], [found], [numpy_helper.from_array(b, "b")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString())
    return lambda: session.run(None, {"a": a})


if __name__ == "__main__":
    main()
