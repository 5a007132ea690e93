"""Runs a program of torch.export over the batches of an npz file, as a script: where clipmb cannot be imported."""

from __future__ import annotations

import sys


def main(model: str, given: str, found: str) -> None:
    """Writes each output of each batch.

    Args:
        model: The file of the program.
        given: An npz file of inputs, called ``NAME.BATCH``.
        found: The npz file to write, of outputs called likewise.
    """
    import numpy as np
    import torch

    program = torch.export.load(model)
    names, module = list(map(str, program.graph_signature.user_inputs)), program.module()
    results = {}
    with np.load(given) as arrays, torch.no_grad():
        for batch in [key.rpartition(".")[2] for key in arrays if key.rpartition(".")[0] == names[0]]:
            outputs = module(**{name: torch.from_numpy(arrays[f"{name}.{batch}"]) for name in names})
            results |= {f"{name}.{batch}": value.numpy() for name, value in outputs.items()}
    np.savez(found, **results)


if __name__ == "__main__":
    for _name in ("tensorflow", "keras", "jax", "flax", "clipmb"):
        sys.modules[_name] = None  # pyright: ignore[reportArgumentType] - which makes importing it an error
    main(*sys.argv[1:])
