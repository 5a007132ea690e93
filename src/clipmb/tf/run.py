"""Runs a SavedModel over the batches of an npz file, as a script: where clipmb cannot be imported."""

from __future__ import annotations

import sys


def main(model: str, given: str, found: str) -> None:
    """Writes each output of each batch.

    Args:
        model: The folder.
        given: An npz file of inputs, called ``NAME.BATCH``.
        found: The npz file to write, of outputs called likewise.
    """
    import numpy as np
    import tensorflow as tf

    loaded = tf.saved_model.load(model)
    function = loaded.signatures["serving_default"]
    names, results = list(function.structured_input_signature[1]), {}
    with np.load(given) as arrays:
        for batch in [key.rpartition(".")[2] for key in arrays if key.rpartition(".")[0] == names[0]]:
            outputs = function(**{name: tf.constant(arrays[f"{name}.{batch}"]) for name in names})
            results |= {f"{name}.{batch}": value.numpy() for name, value in outputs.items()}
    np.savez(found, **results)


if __name__ == "__main__":
    for _name in ("torch", "jax", "flax", "clipmb"):
        sys.modules[_name] = None  # pyright: ignore[reportArgumentType] - which makes importing it an error
    main(*sys.argv[1:])
