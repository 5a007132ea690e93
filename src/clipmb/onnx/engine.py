"""The ONNX graph with numpy inputs and outputs, run by onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any, ClassVar, Self

import numpy as np
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as Missing

from clipmb.common import checks
from clipmb.common.checkpoint.tensors import Deferred, lazy
from clipmb.common.config import CLIPConfig
from clipmb.common.errors import bad_input, one_of
from clipmb.common.hub import Source
from clipmb.common.parameters import Spec, initial_weights
from clipmb.common.pretrained import PretrainedMixin
from clipmb.onnx.graph import Graph, clip

DTYPES = ("float32", "float16", "float64")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class ONNXModel(PretrainedMixin):
    """A config and weights, from which graphs are built and run.

    Args:
        config: The model's config.
        arrays: Canonical name to array, in canonical layout; they are kept.
        dtype: "float32", "float16" or "float64".
        device: "cpu" or "cuda"; "cpu" when None.
        quantised: Multiply by the weights of the blocks in 8-bit integers; the rest is done in ``dtype``.
        optimise: Let onnxruntime fuse and reorder operations.
        keep: Canonical names of weights that are not quantised.

    Raises:
        ValueError: The dtype or the device does not exist.
    """

    head = "CLIPModel"
    framework = "onnx"
    config_class = CLIPConfig
    load_options: ClassVar[tuple[str, ...]] = ("device", "quantised", "optimise")

    def __init__(
        self,
        config: CLIPConfig,
        arrays: dict[str, np.ndarray],
        dtype: str = "float32",
        device: str | None = None,
        quantised: bool = False,
        optimise: bool = True,
        keep: Collection[str] = (),
    ) -> None:
        if dtype not in DTYPES:
            raise one_of("dtype of onnxruntime", dtype, (*DTYPES, "int8"))
        if device not in (None, *PROVIDERS):
            raise one_of("device of onnxruntime", device, tuple(PROVIDERS))
        if quantised and dtype != "float32":
            raise bad_input("What is not quantised is computed in float32", dtype, 'Pass dtype="float32"')
        self.provider = PROVIDERS[device or "cpu"]
        if self.provider not in ort.get_available_providers():
            raise bad_input(
                f"onnxruntime must have {self.provider} for this device",
                ", ".join(ort.get_available_providers()),
                'Install onnxruntime-gpu, or pass device="cpu"',
                shown=True,
            )
        self.config, self.arrays, self.dtype = config, arrays, dtype
        self.quantised, self.optimise, self.keep = quantised, optimise, frozenset(keep)
        self._sessions: dict[tuple[str, bool], ort.InferenceSession] = {}

    @classmethod
    def from_arrays(
        cls,
        config: CLIPConfig,
        arrays: dict[str, np.ndarray],
        initialised: list[Spec],
        dtype: str | None = None,
        **options: Any,
    ) -> Self:
        """Builds the model, as `PretrainedMixin.from_arrays` describes it; the options are the constructor's."""
        return cls(config, dict(arrays) | initial_weights(initialised), dtype or "float32", **options)

    def to_arrays(self) -> Deferred:
        """Returns every parameter by its canonical name, in canonical layout."""
        return Deferred(lazy(self.arrays))

    def run(self, tower: str, inputs: dict[str, np.ndarray], hidden_states: bool = False) -> dict[str, np.ndarray]:
        """Computes the outputs of a graph of `clipmb.onnx.graph.clip`.

        Args:
            tower: "image", "text" or "both".
            inputs: Name to array, of the shapes and dtypes of the graph.
            hidden_states: Also return what is made on the way.

        Returns:
            Name to array, in the order of the graph.
        """
        session = self.session(tower, hidden_states)
        names = [output.name for output in session.get_outputs()]
        arrays: Any = session.run(names, inputs)
        return dict(zip(names, arrays, strict=True))

    def session(self, tower: str, hidden_states: bool = False) -> ort.InferenceSession:
        """Returns the session that runs a graph; it is created once."""
        if (tower, hidden_states) not in self._sessions:
            graph = clip(
                self.config,
                self.arrays,
                tower,
                dtype=self.dtype,
                quantised=self.quantised,
                keep=self.keep,
                hidden_states=hidden_states,
            )
            self._sessions[tower, hidden_states] = self._started(graph)
        return self._sessions[tower, hidden_states]

    def _started(self, graph: Graph) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if self.optimise else level.ORT_DISABLE_ALL
        large = {name: array for name, array in graph.tensors.items() if graph.is_large(array)}
        options.add_external_initializers(list(large), [ort.OrtValue.ortvalue_from_numpy(a) for a in large.values()])
        model = graph.model(embedded=False).SerializeToString()
        try:
            return ort.InferenceSession(model, options, providers=[self.provider])
        except Missing as error:
            raise bad_input(
                f"onnxruntime must have every operator of the graph in {self.dtype}",
                str(error).rpartition(" : ")[2],
                'Pass dtype="float32"',
                shown=True,
            ) from error


class Engine:
    """A loaded CLIP that takes and returns numpy arrays, as `clipmb.backends.Engine` describes it.

    Args:
        model: An `ONNXModel`.
    """

    backend: ClassVar[str] = "onnx"

    def __init__(self, model: ONNXModel) -> None:
        self.model = model
        self.config: CLIPConfig = model.config

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
        """Loads a checkpoint, of any format, and makes the graphs of both towers in memory.

        Args:
            name_or_path: Folder, Hub id or opened source; None to take ``config`` and ``state_dict`` from the options.
            dtype: "float32" (the default), "float16", "float64", or "int8": the weights of the blocks are quantised
                while they are loaded.
            device: "cpu" or "cuda"; the CPU when None.
            compile: Let onnxruntime fuse and reorder operations; it does when None.
            **options: The other options of ``from_pretrained``.

        Raises:
            CheckpointError: The files cannot be found or read, or do not fit.
            ValueError: The dtype or the device does not exist.
        """
        quantised = dtype == "int8"
        model = ONNXModel.from_pretrained(
            name_or_path,
            dtype="float32" if quantised else dtype,
            device=device,
            quantised=quantised,
            optimise=compile is not False,
            **options,
        )
        for tower in ("image", "text"):
            model.session(tower)
        return cls(model)

    @staticmethod
    def environment() -> dict[str, Any]:
        """Returns the versions, the default device, and the precision of float32 matrix products on it."""
        return {"versions": {"onnxruntime": ort.__version__}, "device": "cpu", "precision": "highest"}

    @property
    def logit_scale(self) -> float:
        """The factor on cosine similarities."""
        with np.errstate(over="ignore"):  # the pipeline reports infinity
            return float(np.exp(np.asarray(self.model.arrays["logit_scale"], np.float64)))

    def image_features(self, pixel_values: np.ndarray) -> np.ndarray:
        """Encodes images.

        Args:
            pixel_values: (batch, channels, height, width), preprocessed.

        Returns:
            (batch, proj), not normalised; float32, or float64 for such a model.

        Raises:
            TypeError: The values are not real numbers.
            ValueError: The shape does not fit the model.
        """
        return self.model.run("image", self._pixels(pixel_values))["image_embeds"]

    def text_features(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Encodes texts.

        Args:
            input_ids: (batch, seq) integers.
            attention_mask: (batch, seq), 1 for tokens and 0 for padding; all are tokens when None.

        Returns:
            (batch, proj), not normalised; float32, or float64 for such a model.

        Raises:
            TypeError: The ids are not integers, or the mask is not of real numbers.
            ValueError: An id is outside the vocabulary, or a shape does not fit the model.
        """
        return self.model.run("text", self._texts(input_ids, attention_mask))["text_embeds"]

    def stages(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None, pixel_values: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Returns the intermediate results.

        Args:
            input_ids: (texts, seq) integers.
            attention_mask: (texts, seq) or None.
            pixel_values: (images, channels, height, width).

        Returns:
            Stage to array, named and ordered as by `clipmb.common.outputs.stages`.
        """
        inputs = self._texts(input_ids, attention_mask) | self._pixels(pixel_values)
        found = self.model.run("both", inputs, hidden_states=True)
        made = {name: array for name, array in found.items() if "." in name}
        return made | {"logits": found["logits_per_image"]}

    def weights(self) -> dict[str, np.ndarray]:
        """Returns every parameter by its canonical name, in canonical layout."""
        return dict(self.model.to_arrays())

    def free(self) -> None:
        """Releases the model and its memory; the engine cannot be used afterwards."""
        del self.model

    def _pixels(self, pixel_values: np.ndarray) -> dict[str, np.ndarray]:
        wide = self.model.dtype == "float64"
        return {"pixel_values": checks.engine_pixels(pixel_values, self.config.vision_config, wide)}

    def _texts(self, input_ids: np.ndarray, attention_mask: np.ndarray | None) -> dict[str, np.ndarray]:
        ids, mask = checks.engine_texts(input_ids, attention_mask, self.config.text_config)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids) if mask is None else mask}
