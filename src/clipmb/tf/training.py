"""Contrastive training in TensorFlow: one step over any number of devices and chunks, equal to that of the full batch.

A step has three parts. The towers encode the pairs of this device; the features of all devices are gathered, and on
these small matrices the loss and its gradient with respect to every feature are computed; the gradient of the own
features goes back through the towers, and the parameters' gradients are added up over the devices. With
``chunk_size`` the towers do the first and the last part chunk by chunk, and the first without keeping anything.

A device is what tf.distribute calls a replica. A process has one or several, and its pairs are padded to a multiple of
them, so that all have as many rows; ``valid`` marks the real ones.

Source: gradient caching, arXiv 2101.06983. The result does not depend on how the pairs are spread.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import keras
import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from clipmb.common import checks
from clipmb.common.errors import bad_input
from clipmb.common.hub import Source
from clipmb.common.parameters import KINDS, specs
from clipmb.common.training.recipe import INITIAL_LOGIT_BIAS, LOGIT_BIAS, MAX_LOGIT_SCALE, Processes, Recipe, decays
from clipmb.common.training.state import FIRST, SECOND, TrainingState
from clipmb.tf.engine import Engine
from clipmb.tf.losses import clip_loss, normalize, siglip_loss
from clipmb.tf.modeling import TFCLIPModel
from clipmb.tf.optimizer import AdamW
from clipmb.tf.tensors import fold_in, gradients_of, seeds

POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float64": "float64"}  # of Keras, by precision
_SCALARS = ("logit_scale", LOGIT_BIAS.name)  # the parameters of the loss, which no tower has

_strategy: tf.distribute.Strategy | None = None  # of the run that was started last, if it is for several devices


def start_processes(recipe: Recipe) -> Processes:
    """Chooses the devices of a run, and joins its other processes where ``TF_CONFIG`` names several.

    To be called before anything is computed; the model is then made within `scope`.

    Raises:
        ValueError: The recipe wants what TensorFlow does not have, or TensorFlow has been used before.
    """
    global _strategy
    if recipe.distributed == "fsdp":
        raise bad_input(
            "FSDP is not available in TensorFlow",
            "distributed='fsdp'",
            "Use distributed='data', or the backend pt or flax",
            shown=True,
        )
    cluster = json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster", {})
    _strategy = None if recipe.distributed == "none" else _new_strategy(bool(cluster))
    if _strategy is None or not cluster:
        return Processes()
    chiefs, workers = (len(cluster.get(kind, [])) for kind in ("chief", "worker"))
    resolver = _strategy.cluster_resolver
    return Processes(resolver.task_id + (chiefs if resolver.task_type == "worker" else 0), chiefs + workers)


@functools.cache
def _new_strategy(several_processes: bool) -> tf.distribute.Strategy:
    if not several_processes:
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except RuntimeError as error:
        if "program startup" not in str(error):  # something else went wrong
            raise
        raise bad_input(
            "start_processes() must be called before any other use of TensorFlow",
            "a process with devices in use",
            "Call start_processes or clipmb.train first",
            shown=True,
        ) from error


def scope() -> contextlib.AbstractContextManager:
    """Returns the scope to build the model in, so that it is on every device that `start_processes` chose."""
    return contextlib.nullcontext() if _strategy is None else _strategy.scope()


class Trainer:
    """A model and its optimizer, as `clipmb.backends.Trainer` describes it.

    Args:
        model: A `TFCLIPModel`, made within `scope`; one with another dtype policy than the precision needs, or made
            elsewhere, is copied.
        recipe: How to train.
        state: The state to continue from, with the weights of the same moment in ``model``; None to begin.

    Attributes:
        model: The model that is trained.
        steps: Optimizer steps done.
    """

    backend: ClassVar[str] = "tf"

    def __init__(self, model: TFCLIPModel, recipe: Recipe, state: TrainingState | None = None) -> None:
        self.recipe = recipe
        self.processes = start_processes(recipe)
        self.strategy = tf.distribute.get_strategy() if _strategy is None else _strategy
        self._replicas = self.strategy.num_replicas_in_sync  # of all processes
        self.model = model = self._distributed(model)
        self.table = [spec for spec in specs(model.config, "CLIPModel") if recipe.trains(spec)]
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self._parameters = {spec.name: model.parameter(spec) for spec in self.table}
        if recipe.loss == "siglip":
            value = INITIAL_LOGIT_BIAS if state is None else state.logit_bias
            with self.strategy.scope():
                bias = keras.Variable(np.array(value, np.float64), dtype=model.logit_scale.dtype, name="logit_bias")
            self._parameters[LOGIT_BIAS.name] = bias
            self.table.append(LOGIT_BIAS)
        self.optimizer = self._optimizer()
        self.steps = 0
        if state is not None:
            self.steps = state.step
            self._restore(state)
        vision = model.config.vision_config
        pixels = (None, vision.num_channels, vision.image_size, vision.image_size)
        signature = [  # any number of pairs, and texts of any length
            tf.TensorSpec((None, None), tf.int64),
            tf.TensorSpec(pixels, tf.float32),
            tf.TensorSpec((), tf.int32),
            tf.TensorSpec((2,), tf.int32),
        ]
        schedule = tf.TensorSpec((2,), tf.float64)
        self._traced_step = tf.function(self._step, input_signature=[schedule, *signature], autograph=False)
        self._traced_gradients = tf.function(self._gradients, input_signature=signature, autograph=False)

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
            name_or_path: Folder, Hub id or opened source; None to take ``config`` and ``state_dict`` from the options.
            recipe: How to train.
            state: What to continue from, saved together with the weights; None to begin.
            device: As TensorFlow names it; when None those of `scope`.
            **options: The other options of ``from_pretrained``.

        Raises:
            ValueError: TensorFlow cannot do what the recipe asks for, or was used before processes were joined.
            CheckpointError: The checkpoint cannot be read, or the state does not fit model and recipe.
        """
        start_processes(recipe)
        with scope():
            engine = Engine.load(name_or_path, dtype=recipe.parameter_dtype, device=device, **options)
        return cls(engine.model, recipe, state)

    def _distributed(self, model: TFCLIPModel) -> TFCLIPModel:
        """Returns a model of the precision on the devices of the run: the given one, if it is one."""
        policy = POLICIES[self.recipe.precision]
        own = self.strategy.extended.variable_created_in_scope(model.logit_scale.value)
        if own and model.dtype_policy.name == policy:
            return model
        with self.strategy.scope():
            return TFCLIPModel.from_pretrained(None, config=model.config, state_dict=model.to_arrays(), dtype=policy)

    def _optimizer(self) -> AdamW:
        with self.strategy.scope():
            parameters = {name: variable.value for name, variable in self._parameters.items()}
            return AdamW(self.recipe, parameters, [spec.name for spec in self.table if decays(spec)])

    def _restore(self, state: TrainingState) -> None:
        for values, moments in zip(
            state.moments(self.table), (self.optimizer.first, self.optimizer.second), strict=True
        ):
            for spec in self.table:
                moments[spec.name].assign(KINDS[spec.kind].to_framework(values[spec.name]))

    def step(self, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Takes one optimizer step.

        Args:
            batch: The pairs of this process: ``input_ids`` (n, seq) integers, padded on the right, and
                ``pixel_values`` (n, channels, height, width).

        Returns:
            ``loss`` over the whole batch, ``grad_norm`` before clipping, ``logit_scale`` (the factor, after the step),
            ``learning_rate`` and, for the sigmoid loss, ``logit_bias``.

        Raises:
            ValueError: Shapes or ids do not fit the model.
        """
        rate = self.recipe.rate(self.steps)
        schedule = tf.constant((rate, self.steps + 1), tf.float64)
        loss, norm = self._traced_step(schedule, *self._inputs(batch))
        self.steps += 1
        scale = float(np.exp(self.model.logit_scale.numpy()))
        metrics = {"loss": float(loss), "grad_norm": float(norm), "logit_scale": scale, "learning_rate": rate}
        if self.logit_bias is not None:
            metrics["logit_bias"] = self.logit_bias
        return metrics

    def gradients(self, batch: Mapping[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
        """Returns the loss of a batch and its gradient, by canonical name in canonical layout; takes no step."""
        loss, gradients = self._traced_gradients(*self._inputs(batch))
        return float(loss), {
            spec.name: KINDS[spec.kind].to_canonical(gradients[spec.name].numpy()) for spec in self.table
        }

    def weights(self) -> dict[str, np.ndarray]:
        """Returns every parameter by canonical name; later steps leave the arrays as they are."""
        return dict(self.model.to_arrays())

    def moments(self) -> dict[str, np.ndarray]:
        """Returns AdamW's moments under the names of `TrainingState.tensors`; zeros before the first step."""
        found = {}
        for part, moments in zip((FIRST, SECOND), (self.optimizer.first, self.optimizer.second), strict=True):
            for spec in self.table:
                found[part + spec.name] = KINDS[spec.kind].to_canonical(moments[spec.name].numpy())
        return found

    @property
    def logit_bias(self) -> float | None:
        """The bias of the sigmoid loss; None for the other."""
        bias = self._parameters.get(LOGIT_BIAS.name)
        return None if bias is None else float(bias.numpy())

    def largest(self, number: int) -> int:
        """Returns the largest of the small numbers that the processes of the run call this with."""
        if self.processes.count == 1:
            return number
        found = self.strategy.run(lambda: self._gathered(tf.constant([number])))
        return int(tf.reduce_max(self.strategy.experimental_local_results(found)[0]))

    def engine(self) -> Engine:
        """Returns an engine with the weights of this moment; it is valid until the next step."""
        model = self.model
        if self.recipe.precision == "bfloat16":  # whose layers cannot compute in float32
            model = TFCLIPModel.from_pretrained(None, config=model.config, state_dict=self.weights(), dtype="float32")
        return Engine(model, compile=False)  # it would be traced after every step

    def _inputs(self, batch: Mapping[str, np.ndarray]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns what a step takes: the pairs, padded for the devices, their number, and the seed of dropout.

        Raises:
            ValueError: The texts are not as many as the images, or a shape or an id does not fit the model.
        """
        ids, pixels = np.asarray(batch["input_ids"]), np.asarray(batch["pixel_values"], np.float32)
        text, vision = self.model.config.text_config, self.model.config.vision_config
        if len(ids) != len(pixels):
            raise bad_input(
                "A batch must have as many texts as images", f"{len(ids)} and {len(pixels)}", "Pass pairs", shown=True
            )
        checks.check_text(ids, None, None, text)
        checks.check_pixels(pixels, vision, False)
        checks.check_ids(ids, text.vocab_size, "input_ids")
        devices = self._replicas // self.processes.count
        padding = -len(ids) % devices if len(ids) else devices
        size = tf.constant(len(ids), tf.int32)
        if padding:
            ids, pixels = (np.pad(rows, ((0, padding), *[(0, 0)] * (rows.ndim - 1))) for rows in (ids, pixels))
        key = (self.recipe.seed, self.steps, self.processes.rank)
        seed = np.random.SeedSequence(key).generate_state(2, np.uint32).view(np.int32)
        with tf.device("CPU:0"):  # from where each device takes its part
            return tf.constant(ids.astype(np.int64)), tf.constant(pixels), size, tf.constant(seed)

    def _step(self, schedule: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Takes a step on every device; returns loss and norm.

        Args:
            schedule: (2,), the learning rate and the number of the step, from 1.
            *inputs: As `_backward` takes them.
        """
        found = self.strategy.run(self._update, (schedule, *inputs))
        scale = self.model.logit_scale.value
        scale.assign(tf.minimum(scale, tf.constant(MAX_LOGIT_SCALE, scale.dtype)))
        loss, norm = (self.strategy.experimental_local_results(value)[0] for value in found)
        return loss, norm

    def _update(self, schedule: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The part of a step that one device does."""
        loss, gradients = self._backward(*inputs)
        norm, gradients = self._clip(gradients)
        self.optimizer.apply(gradients, *tf.unstack(schedule))
        return loss, norm

    def _gradients(self, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the gradients on every device, and returns loss and gradients of one of them."""
        loss, gradients = self.strategy.run(self._backward, inputs)
        local = self.strategy.experimental_local_results
        return local(loss)[0], {name: local(gradient)[0] for name, gradient in gradients.items()}

    def _backward(
        self, input_ids: Tensor, pixel_values: Tensor, size: Tensor, seed: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss over the whole batch and its gradient with respect to the parameters.

        Args:
            input_ids: (n, seq) of this process, padded to a multiple of its devices.
            pixel_values: (n, channels, height, width) likewise.
            size: (), how many of them are real.
            seed: (2,), of dropout in this step and process.
        """
        input_ids, pixel_values, valid, seed = self._own(input_ids, pixel_values, size, seed)
        chunk = self.recipe.chunk_size
        variables = [variable.value for name, variable in self._parameters.items() if name not in _SCALARS]

        def rows(place: int | Tensor, tensor: Tensor) -> Tensor:
            return tensor if chunk is None else tensor[place * chunk : (place + 1) * chunk]

        def encode(place: int | Tensor) -> tuple[Tensor, Tensor]:
            return self._encode(place, rows(place, input_ids), rows(place, pixel_values), seed)

        def pulled(tape: tf.GradientTape, place: int | Tensor, outputs: Any, features: Any) -> list[Tensor]:
            weights = [tf.cast(rows(place, g), o.dtype) for o, g in zip(outputs, features, strict=True)]
            return gradients_of(tape, outputs, variables, weights)

        if chunk is None:
            with _watching(variables) as tape:
                features = encode(0)
            loss, split, scalars = self._loss(*features, valid)
            found = pulled(tape, 0, features, split)
        else:
            chunks = -(-tf.shape(input_ids)[0] // chunk)
            shape = (None, self.model.config.projection_dim)
            empty = [tf.TensorArray(self.model.compute_dtype, chunks, element_shape=shape, infer_shape=False)] * 2

            def first(place: Tensor, *kept: tf.TensorArray) -> tuple[Any, ...]:
                return place + 1, *(array.write(place, part) for array, part in zip(kept, encode(place), strict=True))

            def second(place: Tensor, *sums: Tensor) -> tuple[Any, ...]:
                with _watching(variables) as tape:
                    outputs = encode(place)
                return place + 1, *map(tf.add, sums, pulled(tape, place, outputs, split))

            def more(place: Tensor, *_: Any) -> Tensor:
                return place < chunks

            _, *kept = tf.while_loop(more, first, (0, *empty), parallel_iterations=1)
            text, image = (array.concat() for array in kept)
            loss, split, scalars = self._loss(text, image, valid)
            zeros = [tf.zeros_like(variable) for variable in variables]
            _, *found = tf.while_loop(more, second, (0, *zeros), parallel_iterations=1)
        if self._replicas > 1:
            found = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, found)
        names = [name for name in self._parameters if name not in _SCALARS]
        return loss, {**dict(zip(names, found, strict=True)), **scalars}

    def _own(self, input_ids: Tensor, pixel_values: Tensor, size: Tensor, seed: Tensor) -> tuple[Any, ...]:
        """Returns the rows of this device, which of them are real (None for all), and its seed."""
        devices = self._replicas // self.processes.count
        place = tf.distribute.get_replica_context().replica_id_in_sync_group % devices
        rows = tf.shape(input_ids)[0] // devices
        if devices > 1:
            with tf.device("CPU:0"):
                own = slice(place * rows, (place + 1) * rows)
                input_ids, pixel_values = input_ids[own], pixel_values[own]
        valid = None if self._replicas == 1 else place * rows + tf.range(rows) < size
        return input_ids, pixel_values, valid, fold_in(seed, place)

    def _encode(
        self, chunk: int | Tensor, input_ids: Tensor, pixel_values: Tensor, seed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the features of a chunk; the same ones, with the same dropout, each time in a step."""
        key, draws = fold_in(seed, chunk), itertools.count()
        with seeds(lambda: fold_in(key, next(draws))):  # the generators of the towers are variables: devices share none
            text = self.model.get_text_features(input_ids, training=True)
            return text, self.model.get_image_features(pixel_values, training=True)

    def _loss(
        self, text: Tensor, image: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, Tensor]]:
        """Returns the loss over the rows of all devices and its gradient.

        Args:
            text: (rows, proj), the features of this device.
            image: (rows, proj).
            valid: (rows,), False for padding; None when all are real.

        Returns:
            The loss, its gradient with respect to the features of this device, and that with respect to logit_scale
            and, for the sigmoid loss, logit_bias, which are the same on every device.
        """
        wide = self.model.logit_scale.dtype
        own, valid = self._rows(valid)
        scalars = [name for name in _SCALARS if name in self._parameters]
        leaves = [self._gathered(tf.cast(part, wide)) for part in (text, image)]
        leaves += [tf.convert_to_tensor(self._parameters[name].value) for name in scalars]
        loss_of = siglip_loss if self.recipe.loss == "siglip" else clip_loss
        local = self.recipe.local_loss and self._replicas > 1
        with _watching(leaves) as tape:
            embeds = leaves[:2]
            if valid is not None:  # a row of padding may have no direction
                embeds = [tf.where(valid[:, None], leaf, 1) for leaf in embeds]
            embeds = [normalize(leaf) for leaf in embeds]
            loss = loss_of(*embeds, *leaves[2:], valid=valid, rows=own if local else None)
        text, image, *rest = gradients_of(tape, loss, leaves)
        if local:
            context = tf.distribute.get_replica_context()
            loss, text, image, *rest = context.all_reduce(tf.distribute.ReduceOp.SUM, [loss, text, image, *rest])
        return loss, (text[own], image[own]), dict(zip(scalars, rest, strict=True))

    def _rows(self, valid: Tensor | None) -> tuple[slice, Tensor | None]:
        """Returns which rows of those of all devices belong to this one, and which of all are real."""
        if valid is None:
            return slice(None), None
        number = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group + 1, tf.float32)
        marks = self._gathered(tf.where(valid, number, -number))  # each row has its device's number, or minus that
        start = tf.math.count_nonzero(tf.abs(marks) < number, dtype=tf.int32)
        return slice(start, start + tf.size(valid)), marks > 0

    def _gathered(self, rows: Tensor) -> Tensor:
        """Returns the rows of all devices, in order."""
        return rows if self._replicas == 1 else tf.distribute.get_replica_context().all_gather(rows, axis=0)

    def _clip(self, gradients: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Clips the gradient as ``torch.nn.utils.clip_grad_norm_`` does, and returns its norm before."""
        squares = [tf.cast(tf.reduce_sum(tf.square(gradient)), tf.float64) for gradient in gradients.values()]
        norm = tf.sqrt(tf.add_n(squares))
        if self.recipe.clip_norm is not None:
            factor = tf.minimum(self.recipe.clip_norm / (norm + 1e-6), 1)
            gradients = {name: gradient * tf.cast(factor, gradient.dtype) for name, gradient in gradients.items()}
        return norm, gradients


@contextlib.contextmanager
def _watching(tensors: list[Any]) -> Iterator[tf.GradientTape]:
    """Records what depends on these tensors or variables, and nothing else."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(tensors)
        yield tape
