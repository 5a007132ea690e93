"""The backends: what an engine and a trainer are, which backends there are, and which are installed.

A backend is a folder with a module ``engine``, whose ``Engine`` satisfies `Engine`, and, if it trains, a module
``training``, whose ``Trainer`` satisfies `Trainer`. The folder and a row in `BACKENDS` are all that a new one needs:
pipeline, evaluation, training, verification and the commands know backends only by these.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from clipmb.common.errors import MissingBackendError, bad_input, one_of

if TYPE_CHECKING:  # so that listing backends imports nothing heavy
    from typing import Self

    import numpy as np

    from clipmb.common.config import CLIPConfig
    from clipmb.common.hub import Source
    from clipmb.common.training.recipe import Processes, Recipe
    from clipmb.common.training.state import TrainingState


class Engine(Protocol):
    """A loaded CLIP that takes and returns numpy arrays.

    Axes: batch, seq (tokens, at most ``config.text_config.max_position_embeddings``), channels, height, width, proj
    (``config.projection_dim``). Computing in float64 takes and returns float64, every other dtype float32.

    Attributes:
        backend: Key of `BACKENDS`.
        config: The configuration of the model.
        model: The framework's own model, which only the same backend can use.
        few_shapes: Optional, False when it is missing: it computes few shapes, since each is compiled, and fills texts
            and batches up to them; so a batch of 33 may cost as much as one of 64.
    """

    backend: ClassVar[str]
    config: CLIPConfig
    model: Any

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str] | Source | None,
        *,
        dtype: Any = None,
        device: Any = None,
        compile: bool | None = None,
        **options: Any,
    ) -> Self:
        """Loads a checkpoint.

        Args:
            name_or_path: Folder, Hub id or opened source; None to take ``config`` and ``state_dict`` from the options.
            dtype: What to compute in: one of `Backend.dtypes`, "float32" when None, or the framework's own dtype of one
                of these names.
            device: Device, as the framework names it; its default when None.
            compile: Use the framework's compiler: slower first calls, faster later ones. The backend's own choice when
                None.
            **options: The other options of ``from_pretrained``.

        Raises:
            CheckpointError: The files cannot be found or read, or do not fit.
            ValueError: The dtype or the device does not exist.
        """
        ...

    @staticmethod
    def environment() -> dict[str, Any]:
        """Returns what results depend on besides the checkpoint, without loading one.

        Returns:
            ``versions`` (package to version), ``device`` (the default one's name) and ``precision`` (of float32 matrix
            products on it, "highest" where they are exact float32).
        """
        ...

    @property
    def logit_scale(self) -> float:
        """The factor on cosine similarities: the exponential of the model's parameter."""
        ...

    def image_features(self, pixel_values: np.ndarray) -> np.ndarray:
        """Encodes images.

        Args:
            pixel_values: (batch, channels, height, width) of the configured size, preprocessed; real numbers of any
                dtype, byte order and layout in memory.

        Returns:
            (batch, proj), not normalised.

        Raises:
            TypeError: The values are not real numbers.
            ValueError: The shape does not fit the model.
        """
        ...

    def text_features(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Encodes texts.

        Args:
            input_ids: (batch, seq) integers, likewise.
            attention_mask: (batch, seq), 1 for tokens and 0 for padding; all are tokens when None.

        Returns:
            (batch, proj), not normalised.

        Raises:
            TypeError: The ids are not integers, or the mask is not of real numbers.
            ValueError: An id is outside the vocabulary, or a shape does not fit the model.
        """
        ...

    def stages(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None, pixel_values: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Returns the intermediate results, with matrix products in the full precision of the dtype.

        Args:
            input_ids: (texts, seq) integers.
            attention_mask: (texts, seq) or None.
            pixel_values: (images, channels, height, width).

        Returns:
            The names of `clipmb.common.outputs.stages`, in the order of computation, to arrays: ``…embeddings``,
            ``…block.0``, …, ``…last_hidden_state`` (batch, seq or patches + 1, width), ``…pooled`` (batch, width) and
            ``…projected`` (batch, proj) of "text." and "vision.", then ``logits`` (images, texts).
        """
        ...

    def weights(self) -> dict[str, np.ndarray]:
        """Returns every parameter by its canonical name, in canonical layout (`clipmb.common.parameters`)."""
        ...

    def free(self) -> None:
        """Releases the model and its memory; the engine cannot be used afterwards."""
        ...


class Trainer(Protocol):
    """A model, its optimizer and the devices of a run. The same recipe gives the same steps in every backend.

    In a run of several processes every process makes every call, with its own share of each batch.

    Attributes:
        backend: Key of `BACKENDS`.
        recipe: How to train.
        processes: The number of this process, and how many there are.
        steps: Optimizer steps done.
    """

    backend: ClassVar[str]
    recipe: Recipe
    processes: Processes
    steps: int

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str] | Source | None,
        recipe: Recipe,
        state: TrainingState | None = None,
        *,
        device: Any = None,
        **options: Any,
    ) -> Self:
        """Joins the other processes of the run and loads a checkpoint onto the devices that the recipe uses.

        Args:
            name_or_path: As `Engine.load` takes it, and so are the options.
            recipe: How to train; ``recipe.parameter_dtype`` is what the parameters are held in.
            state: What to continue from, saved together with the weights; None to begin.
            device: Device, as the framework names it; its own choice when None.
            **options: The other options of ``from_pretrained``.

        Raises:
            ValueError: The backend cannot do what the recipe asks for, or was used before processes were joined.
            CheckpointError: The checkpoint cannot be read, or the state does not fit model and recipe.
        """
        ...

    def step(self, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Takes one optimizer step.

        Args:
            batch: The pairs of this process: ``input_ids`` (n, seq) integers, padded on the right, and
                ``pixel_values`` (n, channels, height, width).

        Returns:
            ``loss`` over the batch of all processes, ``grad_norm`` before clipping, ``logit_scale`` (the factor, after
            the step), ``learning_rate`` and, for the sigmoid loss, ``logit_bias``.

        Raises:
            ValueError: Shapes or ids do not fit the model.
        """
        ...

    def gradients(self, batch: Mapping[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
        """Returns the loss of a batch and its gradient, by canonical name in canonical layout; takes no step."""
        ...

    def weights(self) -> dict[str, np.ndarray]:
        """Returns every parameter by canonical name; the arrays are valid until the next step."""
        ...

    def moments(self) -> dict[str, np.ndarray]:
        """Returns AdamW's moments under the names of `TrainingState.tensors`; zeros before the first step."""
        ...

    @property
    def logit_bias(self) -> float | None:
        """The bias of the sigmoid loss; None for the other."""
        ...

    def largest(self, number: int) -> int:
        """Returns the largest of the small numbers that the processes of the run call this with."""
        ...

    def engine(self) -> Engine:
        """Returns an engine with the weights of this moment; it is valid until the next step."""
        ...


@dataclass(frozen=True)
class Backend:
    """A row of `BACKENDS`.

    Attributes:
        package: Import path of the folder that has ``engine`` and, if it trains, ``training``.
        needs: Import names of the packages that must be installed.
        trains: Whether there is a ``training``.
        dtypes: What it computes in.
    """

    package: str
    needs: tuple[str, ...]
    trains: bool = True
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16", "float64")


# In the order in which one is chosen when none is named.
BACKENDS = {
    "pt": Backend("clipmb.pt", ("torch",)),
    "tf": Backend("clipmb.tf", ("tensorflow", "keras")),
    "flax": Backend("clipmb.flax", ("jax", "flax")),
    "onnx": Backend(
        "clipmb.onnx", ("onnx", "onnxruntime"), trains=False, dtypes=("float32", "float16", "float64", "int8")
    ),
}


def installed(dtype: str | None = None) -> list[str]:
    """Returns the backends whose packages are installed, without importing them.

    Args:
        dtype: Leave out those that do not compute in it.
    """
    return [
        name
        for name, row in BACKENDS.items()
        if (dtype is None or dtype in row.dtypes) and all(importlib.util.find_spec(need) for need in row.needs)
    ]


def default() -> str:
    """Returns the backend that is used when none is named: the first installed one.

    Raises:
        MissingBackendError: None is installed.
    """
    first, row = next(iter(BACKENDS.items()))
    for name in installed():
        return name
    raise MissingBackendError(first, row.needs[0], cause="no backend is installed")


def engine(backend: str | None) -> type[Engine]:
    """Returns the engine class of a backend, or of the first installed one.

    Raises:
        MissingBackendError: It is not installed.
        ValueError: There is no such backend.
    """
    return importlib.import_module(f"{_row(backend).package}.engine").Engine


def trainer(backend: str | None) -> type[Trainer]:
    """Returns the trainer class of a backend, or of the first installed one.

    Raises:
        MissingBackendError: It is not installed.
        ValueError: There is no such backend, or it does not train.
    """
    row = _row(backend)
    if not row.trains:
        able = ", ".join(repr(name) for name, other in BACKENDS.items() if other.trains)
        raise bad_input("Training needs a backend that trains", backend, f"Pass one of {able}")
    return importlib.import_module(f"{row.package}.training").Trainer


def _row(backend: str | None) -> Backend:
    backend = default() if backend is None else backend
    if backend not in BACKENDS:
        raise one_of("backend", backend, tuple(BACKENDS))
    return BACKENDS[backend]
