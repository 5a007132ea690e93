"""One process of a TensorFlow run of several devices: takes its share of every batch and saves what came out.

With ``TF_CONFIG`` it is one of several processes of one device; without, it has two devices of its own. Arguments: the
folder for the results, and the variants to train.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from cases import TEXT, VISION, random_arrays
from training_cases import VARIANTS, batch, batches, recipe, share

from clipmb import CLIPConfig, TFCLIPModel
from clipmb.tf.training import Trainer, scope, start_processes

# One block, because it is traced again for each device.
CONFIG = CLIPConfig({**TEXT, "num_hidden_layers": 1}, {**VISION, "num_hidden_layers": 1}, projection_dim=24)
SIZES = (12, 7, 1)  # 1: one of the devices has nothing
STEPS = [*batches(5), batch(1)]
DEVICES = ("plain", "local loss", "sigmoid, chunks")
PROCESSES = ("local loss",)


def new_model(config: CLIPConfig = CONFIG, dtype: str = "float64") -> TFCLIPModel:
    """The model that every test begins with."""
    return TFCLIPModel.from_pretrained(None, config=config, state_dict=random_arrays(config, "CLIPModel"), dtype=dtype)


def trainer_of(variant: str, **changed: object) -> Trainer:
    """A new trainer, and with it a new model, made where it is trained."""
    chosen = recipe(**{**VARIANTS[variant], **changed})
    start_processes(chosen)
    with scope():
        model = new_model()
    trainer = Trainer(model, chosen)
    if trainer.model is not model:
        raise RuntimeError("the model was copied")
    return trainer


def growth(trainer: Trainer, size: int) -> int:
    """By how many bytes a batch raises the highest memory that this process has had."""
    trainer.gradients(batch(2))  # traces
    before = peak()
    trainer.gradients(batch(size))
    return peak() - before


def peak() -> int:
    """The highest memory of this process in bytes; not ru_maxrss, which starts with that of the parent."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    folder, variants = Path(sys.argv[1]), sys.argv[2:]
    found: dict[str, np.ndarray] = {}
    if "TF_CONFIG" not in os.environ:
        devices = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
        found["memory"] = np.array([growth(trainer_of("plain", chunk_size=chunk), 768) for chunk in (16, None)])
    processes = start_processes(recipe(distributed="data"))
    rank, count = processes.rank, processes.count
    for variant in variants:
        trainer = trainer_of(variant, distributed="data")
        if trainer.strategy.num_replicas_in_sync != 2:
            raise RuntimeError(f"{trainer.strategy.num_replicas_in_sync} devices instead of 2")
        if variant == "plain":
            for size in SIZES:
                loss, gradients = trainer.gradients(share(batch(size), rank, count))
                found[f"{variant}/{size}/loss"] = np.asarray(loss)
                found.update({f"{variant}/{size}/gradient/{name}": value for name, value in gradients.items()})
        metrics = [trainer.step(share(whole, rank, count)) for whole in STEPS]
        found[f"{variant}/metrics"] = np.array([list(values.values()) for values in metrics])
        found[f"{variant}/features"] = trainer.engine().text_features(batch(3)["input_ids"])
        found.update({f"{variant}/weights/{name}": value for name, value in trainer.weights().items()})
        found.update({f"{variant}/moments/{name}": value for name, value in trainer.moments().items()})
        found["largest"] = np.array(trainer.largest(3 + rank))
    np.savez(folder / f"{rank}.npz", **found)


if __name__ == "__main__":
    main()
