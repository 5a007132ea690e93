"""Runs OpenVINO's files over the batches of an npz file, as a script: where no framework can be imported."""

from __future__ import annotations

import sys


def main(model: str, given: str, found: str) -> None:
    """Writes each output of each batch, computed in float32.

    Args:
        model: The file ``….xml``.
        given: An npz file of inputs, called ``NAME.BATCH``.
        found: The npz file to write, of outputs called likewise.
    """
    import numpy as np
    import openvino as ov

    core = ov.Core()
    read = core.read_model(model)
    names, outputs = ([port.any_name for port in ports] for ports in (read.inputs, read.outputs))
    compiled, results = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}), {}
    with np.load(given) as arrays:
        for batch in [key.rpartition(".")[2] for key in arrays if key.rpartition(".")[0] == names[0]]:
            values = compiled({name: arrays[f"{name}.{batch}"] for name in names})
            results |= {f"{name}.{batch}": values[name] for name in outputs}
    np.savez(found, **results)


if __name__ == "__main__":
    for _name in ("torch", "tensorflow", "keras", "jax", "flax", "onnx", "onnxruntime", "clipmb", "openvino_telemetry"):
        sys.modules[_name] = None  # pyright: ignore[reportArgumentType] - which makes importing it an error
    main(*sys.argv[1:])
