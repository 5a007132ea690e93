"""The state of a training run beside the weights: one file, the same whichever framework wrote it.

``training_state.safetensors`` holds the optimizer's moments under the canonical names and in the canonical layouts of
their parameters, and in its metadata the step, the place in the data and the recipe. Random numbers are drawn from
seed, epoch, step and item, so there is no further random state.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors

from clipmb.common.checkpoint import LoadingInfo
from clipmb.common.checkpoint.safetensors import map_file, write_file
from clipmb.common.checkpoint.tensors import lazy
from clipmb.common.errors import CheckpointError
from clipmb.common.parameters import Spec
from clipmb.common.saving import Transaction, current
from clipmb.common.training.recipe import INITIAL_LOGIT_BIAS, LOGIT_BIAS, Recipe

STATE_NAME = "training_state.safetensors"
FIRST, SECOND = "first_moment.", "second_moment."
_FORMAT, _VERSION = "clipmb-training-state", "1"


@dataclass
class TrainingState:
    """The state of a run between two steps.

    Attributes:
        step: Optimizer steps done.
        epoch: The current pass over the data, from 0.
        batch: Batches of it that are done.
        recipe: The recipe of the run.
        data: Fingerprint of the data set.
        backend: The backend that took the last step.
        tensors: ``first_moment.<name>`` and ``second_moment.<name>`` of every trained parameter, in canonical layouts,
            and ``logit_bias`` () of a run with the sigmoid loss.
    """

    step: int
    epoch: int
    batch: int
    recipe: Recipe
    data: str = ""
    backend: str = ""
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def write(self, save: Transaction) -> None:
        """Adds the file to a save."""
        fields = {name: getattr(self, name) for name in ("step", "epoch", "batch", "data", "backend")}
        metadata = {
            "format": _FORMAT,
            "version": _VERSION,
            "state": json.dumps({**fields, "recipe": self.recipe.to_dict()}),
        }
        write_file(save.path(STATE_NAME), lazy(self.tensors), metadata)

    @classmethod
    def read(cls, folder: Path) -> TrainingState:
        """Reads the file of a folder; the tensors are mapped.

        Raises:
            CheckpointError: It is missing, damaged, or not of this version.
        """
        path = current(folder, STATE_NAME)
        if path is None:
            raise CheckpointError(f"{folder} has no {STATE_NAME}. Resume in the folder of a training run.")
        tensors = dict(map_file(path))
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        try:
            if (metadata["format"], metadata["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"format {metadata['format']} of version {metadata['version']}")
            values = json.loads(metadata["state"])
            recipe = Recipe.from_dict(values.pop("recipe"))
            state = cls(recipe=recipe, tensors=tensors, **values)
            if min(state.step, state.epoch, state.batch) < 0:
                raise ValueError("negative counts")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a training state of version {_VERSION}: {error}") from error
        return state

    @property
    def logit_bias(self) -> float:
        """The bias of the sigmoid loss; its initial value where the run has none yet."""
        return float(self.tensors.get(LOGIT_BIAS.name, INITIAL_LOGIT_BIAS))

    def moments(self, table: list[Spec]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Returns the first and the second moment by canonical name.

        Args:
            table: The parameters that are trained.

        Raises:
            CheckpointError: Moments are missing, unexpected or of another shape; all of them are listed.
        """
        expected = {f"{part}{spec.name}": spec.shape for spec in table for part in (FIRST, SECOND)}
        found = {name: array.shape for name, array in self.tensors.items() if name.startswith((FIRST, SECOND))}
        if problems := LoadingInfo.between(found, expected).problems():
            raise CheckpointError(
                f"The training state of step {self.step} does not fit the model and the recipe. Resume with the "
                "towers, freeze and loss that the run began with. Problems:",
                problems,
            )
        first = {spec.name: self.tensors[FIRST + spec.name] for spec in table}
        second = {spec.name: self.tensors[SECOND + spec.name] for spec in table}
        return first, second
