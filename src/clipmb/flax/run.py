"""Runs a program of jax.export over the batches of an npz file, as a script: where Flax cannot be imported."""

from __future__ import annotations

import sys
from typing import Any


def main(model: str, given: str, found: str) -> None:
    """Writes each output of each batch.

    Args:
        model: The file of the program.
        given: An npz file of inputs, called ``NAME.BATCH``.
        found: The npz file to write, of outputs called likewise.
    """
    from pathlib import Path

    import jax
    import numpy as np

    program = jax.export.deserialize(bytearray(Path(model).read_bytes()))
    _, takes = jax.tree.unflatten(program.in_tree, program.in_avals)
    names, results = list(takes), {}
    with np.load(given) as arrays, jax.enable_x64(True):
        for batch in [key.rpartition(".")[2] for key in arrays if key.rpartition(".")[0] == names[0]]:
            outputs: Any = program.call(**{name: arrays[f"{name}.{batch}"] for name in names})
            results |= {f"{name}.{batch}": np.asarray(value) for name, value in outputs.items()}
    np.savez(found, **results)


if __name__ == "__main__":
    for _name in ("torch", "tensorflow", "keras", "flax", "clipmb"):
        sys.modules[_name] = None  # pyright: ignore[reportArgumentType] - which makes importing it an error
    main(*sys.argv[1:])
