"""Runs a file of LiteRT over the batches of an npz file, as a script: where no framework can be imported."""

from __future__ import annotations

import sys


def main(model: str, given: str, found: str) -> None:
    """Writes each output of each batch.

    Args:
        model: The file ``….tflite``.
        given: An npz file of inputs, called ``NAME.BATCH``.
        found: The npz file to write, of outputs called likewise.
    """
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(model).get_signature_runner()
    names, results = list(run.get_input_details()), {}
    with np.load(given) as arrays:
        for batch in [key.rpartition(".")[2] for key in arrays if key.rpartition(".")[0] == names[0]]:
            values = run(**{name: arrays[f"{name}.{batch}"] for name in names})
            results |= {f"{name}.{batch}": value for name, value in values.items()}
    np.savez(found, **results)


if __name__ == "__main__":
    for _name in ("torch", "tensorflow", "keras", "jax", "flax", "clipmb"):
        sys.modules[_name] = None  # pyright: ignore[reportArgumentType] - which makes importing it an error
    main(*sys.argv[1:])
