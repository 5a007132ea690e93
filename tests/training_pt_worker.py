"""One of the processes of a PyTorch run of several: takes its share of every batch and saves what came out.

Run by torchrun; arguments: the mode ("data" or "fsdp") and the folder for the results.
"""

from __future__ import annotations

import sys
from dataclasses import astuple
from pathlib import Path

import numpy as np
from cases import random_arrays
from training_cases import CONFIG, VARIANTS, batch, batches, recipe, share

from clipmb import CLIPModel
from clipmb.pt.training import Trainer, start_processes


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    rank, count = astuple(start_processes(recipe(distributed=mode)))
    found: dict[str, np.ndarray] = {}
    for variant, changed in VARIANTS.items():
        arrays = random_arrays(CONFIG, "CLIPModel")
        model = CLIPModel.from_pretrained(None, config=CONFIG, state_dict=arrays, dtype="float64")
        trainer = Trainer(model, recipe(distributed=mode, **changed))
        for size in (12, 7, 1):  # 1: one of the processes has nothing
            loss, gradients = trainer.gradients(share(batch(size), rank, count))
            found[f"{variant}/{size}/loss"] = np.asarray(loss)
            found.update({f"{variant}/{size}/gradient/{name}": value for name, value in gradients.items()})
        for whole in batches(6):
            trainer.step(share(whole, rank, count))
        engine = trainer.engine()
        found[f"{variant}/features"] = engine.text_features(batch(3)["input_ids"])
        found.update({f"{variant}/weights/{name}": value.copy() for name, value in trainer.weights().items()})
        found.update({f"{variant}/moments/{name}": value.copy() for name, value in trainer.moments().items()})
    found["largest"] = np.array(trainer.largest(3 + rank))
    np.savez(folder / f"{rank}.npz", **found)


if __name__ == "__main__":
    main()
