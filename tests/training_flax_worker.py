"""Trains in processes of its own, since the number of devices is settled before JAX starts.

``python training_flax_worker.py JOB RESULT [RANK PORT]`` runs the function JOB of this file and pickles what it
returns; `test_flax_training` starts the jobs and compares.
"""

from __future__ import annotations

import os
import pickle
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
from cases import TEXT, VISION, random_arrays
from training_cases import batch, recipe, share

from clipmb.common.config import CLIPConfig
from clipmb.common.training.state import TrainingState

SIZES = (12, 7, 1)  # of the batches whose gradients are compared; the recipe's batch_size is 12
STEPS = (12, 7, 1, 12)  # of the batches of a run
DEVICES = {"one": 1, "eight": 8, "two": 2}
# Compiling takes nearly all of the time: one block in each tower, and little optimisation.
FLAGS = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count="
SMALL = {"num_hidden_layers": 1}
CONFIG = CLIPConfig(
    {**TEXT, **SMALL, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2},
    {**VISION, **SMALL, "intermediate_size": 40, "patch_size": 10},
    projection_dim=32,
)
DROPOUT = CLIPConfig(
    {**CONFIG.text_config.to_dict(), "attention_dropout": 0.3},
    {**CONFIG.vision_config.to_dict(), "attention_dropout": 0.3},
    projection_dim=32,
)


def chosen(**changed: Any) -> Any:
    return recipe(**{"steps": 9, "warmup_steps": 2, **changed})


def trainer(config: CLIPConfig = CONFIG, state: Any = None, arrays: Any = None, **changed: Any) -> Any:
    from clipmb.flax.engine import Engine
    from clipmb.flax.training import Trainer

    arrays = random_arrays(config, "CLIPModel") if arrays is None else arrays
    recipe = chosen(**changed)
    dtype = "float64" if recipe.precision == "float64" else "float32"
    return Trainer(Engine.load(None, config=config, state_dict=arrays, dtype=dtype).model, recipe, state)


def compiled(made: Any) -> Any:
    with made._exact():
        arguments = made._parameters, made._frozen, made._key(), made._inputs(batch(12))
        made._differentiate = made._differentiate.lower(*arguments).compile()
    return made._differentiate


def differentiated(made: Any) -> dict[Any, Any]:
    """Loss and gradients of each size, and what the devices exchange for it."""
    text = compiled(made).as_text()
    exchanges = {
        name
        for name in ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
        if f" {name}(" in text
    }
    return {"exchanges": exchanges, **{size: made.gradients(batch(size)) for size in SIZES}}


def steps(made: Any, rank: int = 0, count: int = 1) -> list[dict[str, Any]]:
    """Goes on to the end of `STEPS`."""
    taken = []
    while made.steps < len(STEPS):
        metrics = made.step(share(batch(STEPS[made.steps], made.steps), rank, count))
        taken.append({"metrics": metrics, "weights": made.weights(), "moments": made.moments()})
    return taken


def shards(made: Any) -> dict[str, list[tuple[int, int]]]:
    """Of each parameter and its moments: the numbers that the first device has, and all."""
    trees = made._parameters, made._moments[0].mu, made._moments[0].nu
    return {
        name: [(tree[name].addressable_shards[0].data.size, tree[name].size) for tree in trees] for name in trees[0]
    }


def one() -> dict[str, Any]:
    """What needs one device."""
    import jax
    import jax.numpy as jnp

    from clipmb.flax import FlaxCLIPModel

    found: dict[str, Any] = {}
    found["siglip"] = differentiated(trainer(loss="siglip"))
    found["recomputed"] = differentiated(trainer(chunk_size=2, gradient_checkpointing=True))

    found["memory"] = [
        compiled(trainer(batch_size=96, chunk_size=size)).memory_analysis().temp_size_in_bytes for size in (None, 8)
    ]

    made = trainer()
    found["plain"] = differentiated(made)
    found["gradients"], found["steps"] = [], []
    for place, size in enumerate(STEPS):
        found["gradients"].append(made.gradients(batch(size, place))[1])
        if place == 2:
            tensors = {name: np.array(values) for name, values in made.moments().items()}
            state = TrainingState(made.steps, 0, 0, made.recipe, tensors=tensors)
            weights = {name: np.array(values) for name, values in made.weights().items()}
        metrics = made.step(batch(size, place))
        found["steps"].append({"metrics": metrics, "weights": made.weights(), "moments": made.moments()})
    found["current"] = dict(made.model.to_arrays())
    found["engine"] = made.engine().text_features(batch(3)["input_ids"])
    resumed = trainer(state=state, arrays=weights)
    resumed._take_step = made._take_step  # the same function of its arguments: it need not be compiled twice
    found["resumed"] = steps(resumed)

    # The model's own loss, differentiated by JAX.
    with jax.enable_x64(True):
        model = FlaxCLIPModel.from_pretrained(
            None, config=CONFIG, state_dict=random_arrays(CONFIG, "CLIPModel"), dtype="float64"
        )
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.params)
        loss = jax.jit(jax.value_and_grad(lambda params: model(**batch(7), params=params, return_loss=True).loss))
        value, gradient = loss(params)
        found["model"] = float(value), dict(model.to_arrays(gradient))

    frozen = trainer(freeze=("text",), chunk_size=5)
    found["frozen"] = steps(frozen)

    dropping = trainer(DROPOUT, chunk_size=5)
    key, part = dropping._key(), batch(12)
    loss, gradients = dropping.gradients(part)
    found["dropout"] = {"loss": loss, "again": dropping.gradients(part)[0]}
    rng = np.random.default_rng(0)
    direction = {name: rng.standard_normal(values.shape) for name, values in gradients.items()}
    found["dropout"]["slope"] = sum((direction[name] * gradients[name]).sum() for name in gradients)
    start, ends = dropping.weights(), []
    for sign in (1, -1):
        moved = {name: values + sign * 1e-6 * direction[name] for name, values in start.items()}
        other = trainer(DROPOUT, arrays=moved, chunk_size=5)
        other._differentiate = dropping._differentiate
        ends.append(other.gradients(part)[0])
    found["dropout"]["difference"] = (ends[0] - ends[1]) / 2e-6
    dropping.steps += 1
    found["dropout"]["next"], found["dropout"]["keys"] = dropping.gradients(part)[0], (key, dropping._key())

    jax.config.update("jax_enable_x64", True)  # the user's setting, which changes nothing
    made = trainer(precision="bfloat16")
    found["bfloat16"] = made.gradients(batch(12)), {array.dtype.name for array in made._parameters.values()}
    return found


def eight() -> dict[str, Any]:
    """What needs eight devices."""
    found: dict[str, Any] = {}
    for name, changed in EIGHT.items():
        made = trainer(**changed)
        found[name] = differentiated(made)
        if name in ("data", "fsdp, local, chunks"):
            found[name]["steps"] = steps(made)
            found[name]["engine"] = made.engine().text_features(batch(3)["input_ids"])
            found[name]["shards"] = shards(made)
    return found


EIGHT: dict[str, dict[str, Any]] = {
    "data": {"distributed": "data"},
    "data, local, chunks, siglip": {"distributed": "data", "local_loss": True, "chunk_size": 5, "loss": "siglip"},
    "fsdp, siglip": {"distributed": "fsdp", "loss": "siglip"},
    "fsdp, local, chunks": {"distributed": "fsdp", "local_loss": True, "chunk_size": 5},
}


def two(rank: int, port: int) -> dict[str, Any]:
    """One of two processes with two devices each."""
    from clipmb.flax.training import start_processes

    os.environ.update(
        JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(rank)
    )  # fmt: skip
    changed = {"distributed": "fsdp", "local_loss": True, "chunk_size": 2}
    processes = astuple(start_processes(chosen(**changed)))
    made = trainer(**changed)
    found = {"processes": processes, "steps": steps(made, *processes), "shards": shards(made)}
    found["engine"] = made.engine().text_features(batch(3)["input_ids"])
    found["largest"] = made.largest(3 + rank)
    return found


if __name__ == "__main__":
    job, result, *place = sys.argv[1:]
    os.environ["XLA_FLAGS"] = FLAGS + str(DEVICES[job])
    Path(result).write_bytes(pickle.dumps(globals()[job](*map(int, place))))
