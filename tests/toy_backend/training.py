"""Training in numpy, as `clipmb.backends.Trainer` describes a trainer, of logit_scale alone and by plain descent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from clipmb.common.parameters import specs
from clipmb.common.training.recipe import Processes, Recipe
from clipmb.common.training.state import FIRST, SECOND, TrainingState
from toy_backend.engine import Engine, unit


class Trainer:
    """A model of which one number is trained."""

    backend: ClassVar[str] = "toy"
    logit_bias = None

    def __init__(self, engine: Engine, recipe: Recipe, state: TrainingState | None) -> None:
        self._engine, self.recipe, self.processes = engine, recipe, Processes()
        self.steps = 0 if state is None else state.step

    @classmethod
    def load(
        cls,
        name_or_path: Any,
        recipe: Recipe,
        state: TrainingState | None = None,
        *,
        device: Any = None,
        **options: Any,
    ) -> Self:
        return cls(Engine.load(name_or_path, dtype=recipe.parameter_dtype, **options), recipe, state)

    def step(self, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        loss, gradients = self.gradients(batch)
        rate, gradient = self.recipe.rate(self.steps), gradients["logit_scale"]
        scale = self._engine.model["logit_scale"]
        self._engine.model["logit_scale"] = np.asarray(scale - rate * gradient, scale.dtype)
        self.steps += 1
        values = {"loss": loss, "grad_norm": float(abs(gradient)), "logit_scale": self._engine.logit_scale}
        return {**values, "learning_rate": rate}

    def gradients(self, batch: Mapping[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
        text = unit(self._engine.text_features(batch["input_ids"]).astype(np.float64))
        image = unit(self._engine.image_features(batch["pixel_values"]).astype(np.float64))
        logits = self._engine.logit_scale * text @ image.T
        own, loss, gradient = np.diag(logits), 0.0, 0.0
        for each in (logits, logits.T):
            weights = np.exp(each - each.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            loss -= np.log(np.diag(weights)).mean() / 2
            gradient += ((weights * each).sum(1) - own).mean() / 2  # of the scale's logarithm
        return float(loss), {"logit_scale": np.asarray(gradient)}

    def weights(self) -> dict[str, np.ndarray]:
        return self._engine.weights()

    def moments(self) -> dict[str, np.ndarray]:
        trained = [spec for spec in specs(self._engine.config, "CLIPModel") if self.recipe.trains(spec)]
        return {part + spec.name: np.zeros(spec.shape, np.float32) for part in (FIRST, SECOND) for spec in trained}

    def largest(self, number: int) -> int:
        return number

    def engine(self) -> Engine:
        return self._engine
