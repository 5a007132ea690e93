"""Runs an ONNX file over the batches of an npz file, as a script: where no framework can be imported."""

from __future__ import annotations

import sys


def main(model: str, given: str, found: str) -> None:
    """Writes each output of each batch.

    Args:
        model: The ONNX file.
        given: An npz file of inputs, called ``NAME.BATCH``.
        found: The npz file to write, of outputs called likewise.
    """
    import numpy as np
    import onnxruntime as ort

    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    outputs = [entry.name for entry in session.get_outputs()]
    results = {}
    with np.load(given) as arrays:
        for batch in [key.rpartition(".")[2] for key in arrays if key.rpartition(".")[0] == names[0]]:
            values = session.run(outputs, {name: arrays[f"{name}.{batch}"] for name in names})
            results |= {f"{name}.{batch}": value for name, value in zip(outputs, values, strict=True)}
    np.savez(found, **results)


if __name__ == "__main__":
    for _name in ("torch", "tensorflow", "keras", "jax", "flax", "clipmb"):
        sys.modules[_name] = None  # pyright: ignore[reportArgumentType] - which makes importing it an error
    main(*sys.argv[1:])
