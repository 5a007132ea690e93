"""Training steps of ViT-B/32 in batches of 32, beside a plain loop over transformers' model, in each framework.

The peer is what its documentation shows: the model's own loss (in Flax, which has none, the same loss over its
logits), an attention mask, AdamW of the framework, no clipping. clipmb's step does the same work and clips.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _checkpoint import for_each_backend
from _compare import compare

from clipmb import Recipe, backends

RATE, BETAS, EPS, DECAY = 1e-6, (0.9, 0.98), 1e-6, 0.2


def pt(folder: Path, batch: dict[str, np.ndarray]) -> Callable[[], Any]:
    import torch
    import transformers

    model = transformers.CLIPModel.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY)
    inputs = {name: torch.from_numpy(value) for name, value in batch.items()}

    def step() -> float:
        loss = model(**inputs, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def tf(folder: Path, batch: dict[str, np.ndarray]) -> Callable[[], Any]:
    import tensorflow
    import tf_keras
    import transformers

    model = transformers.TFCLIPModel.from_pretrained(folder, from_pt=True)
    optimizer = tf_keras.optimizers.AdamW(RATE, beta_1=BETAS[0], beta_2=BETAS[1], epsilon=EPS, weight_decay=DECAY)
    inputs = {name: tensorflow.constant(value) for name, value in batch.items()}

    @tensorflow.function
    def traced(inputs: dict[str, Any]) -> Any:
        with tensorflow.GradientTape() as tape:
            loss = tensorflow.reduce_mean(model(**inputs, return_loss=True, training=True).loss)
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    return lambda: float(traced(inputs))


def flax(folder: Path, batch: dict[str, np.ndarray]) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp
    import optax
    import transformers

    model = transformers.FlaxCLIPModel.from_pretrained(folder)
    optimizer = optax.adamw(RATE, *BETAS, eps=EPS, weight_decay=DECAY)
    state = [jax.tree.map(jnp.asarray, model.params)]
    state.append(optimizer.init(state[0]))

    def loss_of(params: Any, inputs: dict[str, Any]) -> Any:
        logits = model(**inputs, params=params, train=True, dropout_rng=jax.random.key(0)).logits_per_text
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(part, jnp.arange(len(part))) for part in (logits, logits.T)
        ]
        return (losses[0].mean() + losses[1].mean()) / 2

    def step(params: Any, moments: Any, inputs: dict[str, Any]) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(params, inputs)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    compiled = jax.jit(step, donate_argnums=(0, 1))

    def run() -> float:
        state[0], state[1], loss = compiled(*state, batch)
        return float(loss)

    return run


def pairs(size: int) -> dict[str, np.ndarray]:
    """Random images, and captions of the context's full length."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 40000, (size, 77), np.int64)
    ids[:, 0], ids[:, -1] = 49406, 49407
    return {"input_ids": ids, "pixel_values": rng.standard_normal((size, 3, 224, 224), np.float32)}


def measure(backend: str, folder: Path, batch: int, rounds: int) -> None:
    inputs = pairs(batch)
    framework = importlib.import_module(f"clipmb.{backend}.training")
    recipe = Recipe(steps=1000, batch_size=batch, learning_rate=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY)
    trainer = framework.Trainer(backends.engine(backend).load(folder).model, recipe)
    theirs = globals()[backend](folder, {**inputs, "attention_mask": np.ones_like(inputs["input_ids"])})
    compare(
        f"{backend}: training step, batch {batch}",
        lambda: trainer.step(inputs),
        theirs,
        count=batch,
        unit="pairs",
        rounds=rounds,
        goal=1.0,
    )


if __name__ == "__main__":
    for_each_backend(measure, __doc__, batch={"type": int, "default": 32}, rounds={"type": int, "default": 5})
