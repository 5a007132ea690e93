"""Contrastive training in Flax: one step over any number of devices and chunks, equal to that of the full batch.

A step has three parts. The towers encode the pairs of all devices, each its own; the features are gathered, and on
these small matrices the loss and its gradient with respect to every feature are computed; the gradient of the features
goes back through the towers, and the parameters' gradients are added up over the devices. With ``chunk_size`` the
towers do the first and the last part chunk by chunk, and the first without keeping anything.

All of it is one compiled function, over a mesh of all devices of all processes. Batches are filled up to one size, with
rows that count nowhere, so that only another length of text compiles it again.

Source: gradient caching, arXiv 2101.06983. The result does not depend on how the pairs are spread.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clipmb.common import checks
from clipmb.common.errors import MissingBackendError, bad_input
from clipmb.common.hub import Source
from clipmb.common.parameters import KINDS, Spec, specs
from clipmb.common.training.recipe import INITIAL_LOGIT_BIAS, LOGIT_BIAS, MAX_LOGIT_SCALE, Processes, Recipe, decays
from clipmb.common.training.state import FIRST, SECOND, TrainingState
from clipmb.flax.engine import Engine
from clipmb.flax.layers import statistics_dtype
from clipmb.flax.losses import clip_loss, normalize, siglip_loss
from clipmb.flax.modeling import FlaxCLIPModel

try:
    import optax
except ImportError as error:
    raise MissingBackendError("flax", "optax", cause=str(error)) from error

AXIS = "data"  # of the mesh: rows of the batch, and with "fsdp" also one axis of each parameter, lie along it
ROWS, WHOLE = PartitionSpec(AXIS), PartitionSpec()
_JOINED = "joined"  # the name of what is not kept for the backward pass
_LENGTHS = 16  # texts are filled up to a multiple of it, since another length compiles the step again


def start_processes(recipe: Recipe) -> Processes:
    """Joins the other processes of a run; a run of one process, of however many devices, needs none.

    There are others when ``JAX_COORDINATOR_ADDRESS`` (host:port of the first), ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID`` say so, or when Slurm, Open MPI or a Cloud TPU pod started several, which JAX knows how to join;
    or after a ``jax.distributed.initialize`` of your own.

    Raises:
        ValueError: Some of the variables are missing, or JAX has been used before.
    """
    if recipe.distributed == "none":
        return Processes()
    if not jax.distributed.is_initialized():
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        given = {name: os.environ[name] for name in names if os.environ.get(name)}
        if len(given) == len(names):
            try:
                count, rank = (int(given[name]) for name in names[1:])
            except ValueError:
                raise bad_input(f"{names[1]} and {names[2]} must be whole numbers", given, "Correct them") from None
            _initialize(coordinator_address=given[names[0]], num_processes=count, process_id=rank)
        elif _started_by_cluster():
            _initialize()
        elif given:
            raise bad_input(f"Several processes need all of {', '.join(names)}", given, "Set all of them, or none")
    return Processes(jax.process_index(), jax.process_count())


def _initialize(**options: Any) -> None:
    if hasattr(jax.config, "jax_enable_preemption_service"):  # which keeps SIGTERM from ending the process
        jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**options)
    except RuntimeError as error:
        if "before" not in str(error):  # something else went wrong
            raise
        raise bad_input(
            "start_processes() must be called before any other use of JAX",
            "a process with devices in use",
            "Call start_processes or clipmb.train first",
            shown=True,
        ) from error


def _started_by_cluster() -> bool:
    counts = [os.environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or any(count not in ("", "1") for count in counts)


class Trainer:
    """A model and its optimizer, as `clipmb.backends.Trainer` describes it.

    The optimizer is optax's AdamW. It subtracts lr * decay * p together with lr times Adam's direction, where PyTorch
    multiplies p by 1 - lr * decay before: the same, but for rounding. Epsilon is added to the root of the corrected
    second moment in both. Clipping is PyTorch's: optax leaves a norm below the limit alone and adds no 1e-6.

    Args:
        model: A `FlaxCLIPModel`; its parameters become float32, or float64 with that precision, whatever
            ``jax_enable_x64`` says. They are copied: arrays that you hold stay as they are. ``model.params`` are the
            trainer's own from then on, current after every step, and each step reuses the memory of those before.
        recipe: How to train.
        state: The state to continue from, with the weights of the same moment in ``model``; None to begin.

    Attributes:
        steps: Optimizer steps done.
    """

    backend: ClassVar[str] = "flax"

    def __init__(self, model: FlaxCLIPModel, recipe: Recipe, state: TrainingState | None = None) -> None:
        self.model, self.recipe = model, recipe
        self.dtype = np.dtype(recipe.parameter_dtype)
        self.table = [spec for spec in specs(model.config, "CLIPModel") if recipe.trains(spec)]
        if recipe.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.processes = start_processes(recipe)
        self.mesh = self._distributed()
        self._chunks, self._rows = self._sizes()
        with self._exact():
            model.dtype = jnp.dtype(self.dtype)
            model.module = model.module.clone(dtype=model.dtype)
            self._towers = model.module
            if recipe.precision == "bfloat16":
                self._towers = model.module.clone(dtype=jnp.dtype("bfloat16"))
            arrays = model.to_arrays()
            placed = {spec.name: self._like(arrays[spec.name], spec) for spec in self._all_specs()}
            self._parameters = {spec.name: placed.pop(spec.name) for spec in self.table}
            self._frozen = placed
            if recipe.loss == "siglip":
                value = INITIAL_LOGIT_BIAS if state is None else state.logit_bias
                self._parameters[LOGIT_BIAS.name] = self._like(np.array(value), LOGIT_BIAS)
                self.table.append(LOGIT_BIAS)
            self._lie = {name: self._spec(array.shape) for name, array in {**self._parameters, **self._frozen}.items()}
            self.optimizer = self._optimizer()
            self._moments: Any = self._beginning()
        self.steps = 0
        if state is not None:
            self.steps = state.step
            self._restore(state)
        self._take_step = jax.jit(
            self._stepped,
            donate_argnums=(0, 1),
            out_shardings=(
                self._shardings(self._parameters),
                self._shardings(self._moments),
                NamedSharding(self.mesh, WHOLE),
            ),
        )
        self._differentiate = jax.jit(self._backward)
        self._show()

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
            device: As `Engine.load` takes it; JAX's default when None. Several devices are spread over from there.
            **options: The other options of ``from_pretrained``.

        Raises:
            ValueError: Processes cannot be joined, or JAX was used before they were.
            CheckpointError: The checkpoint cannot be read, or the state does not fit model and recipe.
        """
        start_processes(recipe)
        engine = Engine.load(name_or_path, dtype=recipe.parameter_dtype, device=device, **options)
        return cls(engine.model, recipe, state)

    def _distributed(self) -> Mesh:
        """Returns the devices of all processes, those of each side by side; the model's own for "none"."""
        if self.recipe.distributed == "none":
            placed = self.model.params["logit_scale"]
            devices = list(placed.devices()) if isinstance(placed, Array) else jax.local_devices()
            return Mesh(np.array(devices[:1]), (AXIS,))
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        return Mesh(np.array(devices), (AXIS,))

    def _optimizer(self) -> optax.GradientTransformation:
        # Without the learning rate, which every step passes to `_stepped`.
        recipe = self.recipe
        return optax.chain(
            optax.scale_by_adam(*recipe.betas, eps=recipe.eps),
            optax.add_decayed_weights(recipe.weight_decay, {spec.name: decays(spec) for spec in self.table}),
        )

    def _beginning(self) -> Any:
        """Returns the optimizer's state before the first step, sharded as the parameters are."""
        shapes = jax.eval_shape(self.optimizer.init, self._parameters)
        return jax.jit(self.optimizer.init, out_shardings=self._shardings(shapes))(self._parameters)

    def _restore(self, state: TrainingState) -> None:
        first, second = state.moments(self.table)
        with self._exact():
            adam = optax.ScaleByAdamState(
                self._placed(np.array(state.step, np.int32), WHOLE),
                {spec.name: self._like(first[spec.name], spec) for spec in self.table},
                {spec.name: self._like(second[spec.name], spec) for spec in self.table},
            )
        self._moments = (adam, *self._moments[1:])

    def step(self, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Takes one optimizer step.

        Args:
            batch: The pairs of this process: ``input_ids`` (n, seq) integers, padded on the right, and
                ``pixel_values`` (n, channels, height, width).

        Returns:
            ``loss`` over the whole batch, ``grad_norm`` before clipping, ``logit_scale`` (the factor, after the step),
            ``learning_rate`` and, for the sigmoid loss, ``logit_bias``.

        Raises:
            ValueError: Shapes or ids do not fit the model, or there are more pairs than ``batch_size``.
        """
        rate = self.recipe.rate(self.steps)
        with self._exact():
            self._parameters, self._moments, (loss, norm) = self._take_step(
                self._parameters, self._moments, self._frozen, self._key(), np.array(rate, self.dtype),
                self._inputs(batch),
            )  # fmt: skip
        self.steps += 1
        self._show()
        scale = float(np.exp(_whole(self._parameters["logit_scale"])))
        metrics = {"loss": float(loss), "grad_norm": float(norm), "logit_scale": scale, "learning_rate": rate}
        if self.logit_bias is not None:
            metrics["logit_bias"] = self.logit_bias
        return metrics

    def gradients(self, batch: Mapping[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
        """Returns the loss of a batch and its gradient, by canonical name in canonical layout; takes no step."""
        with self._exact():
            loss, found = self._differentiate(self._parameters, self._frozen, self._key(), self._inputs(batch))
        return float(loss), self._canonical(found, self.table)

    def weights(self) -> dict[str, np.ndarray]:
        """Returns every parameter by canonical name; the arrays are copies. Every process must call it."""
        return self._canonical({**self._parameters, **self._frozen}, self._all_specs())

    def moments(self) -> dict[str, np.ndarray]:
        """Returns AdamW's moments under the names of `TrainingState.tensors`; zeros before the first step."""
        found = {}
        for part, values in ((FIRST, self._moments[0].mu), (SECOND, self._moments[0].nu)):
            found.update({part + name: array for name, array in self._canonical(values, self.table).items()})
        return found

    @property
    def logit_bias(self) -> float | None:
        """The bias of the sigmoid loss; None for the other."""
        bias = self._parameters.get(LOGIT_BIAS.name)
        return None if bias is None else float(bias)

    def largest(self, number: int) -> int:
        """Returns the largest of the small numbers that the processes of the run call this with."""
        if self.processes.count == 1:
            return number
        return int(np.max(multihost_utils.process_allgather(np.array(number, np.int32))))

    def engine(self) -> Engine:
        """Returns an engine with the weights of this moment; it is valid until the next step."""
        model = self.model
        if self.mesh.size > 1:  # evaluation runs on one device of each process
            with self._exact():
                model = FlaxCLIPModel.from_pretrained(
                    None, config=model.config, state_dict=self.weights(), dtype=self.dtype.name
                )
        return Engine(model)

    def _all_specs(self) -> list[Spec]:
        return specs(self.model.config, "CLIPModel")

    def _stepped(
        self, parameters: dict[str, Array], moments: Any, frozen: dict[str, Array], key: Array, rate: Array, batch: Any
    ) -> tuple[dict[str, Array], Any, tuple[Array, Array]]:
        """Returns parameters and moments after a step, and the loss and the norm of the gradient before it."""
        loss, gradients = self._backward(parameters, frozen, key, batch)
        norm, gradients = self._clip(gradients)
        updates: Any
        updates, moments = self.optimizer.update(gradients, moments, parameters)
        parameters = {name: parameter - rate * updates[name] for name, parameter in parameters.items()}
        parameters["logit_scale"] = jnp.minimum(parameters["logit_scale"], MAX_LOGIT_SCALE)
        return parameters, moments, (loss, norm)

    def _backward(
        self, parameters: dict[str, Array], frozen: dict[str, Array], key: Array, batch: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the loss over the whole batch and its gradient.

        Args:
            parameters: Those that are trained, by canonical name, in linen's layouts.
            frozen: The others.
            key: (2,) of this step, for dropout.
            batch: As `_inputs` returns it.
        """
        lie = {name: self._lie[name] for name in parameters}
        return jax.shard_map(
            self._own_backward,
            mesh=self.mesh,
            in_specs=(lie, {name: self._lie[name] for name in frozen}, WHOLE, ROWS),
            out_specs=(WHOLE, lie),
            check_vma=False,
        )(parameters, frozen, key, batch)

    def _own_backward(
        self, parameters: dict[str, Array], frozen: dict[str, Array], key: Array, batch: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """Does the part of one device in `_backward`: its rows and its shards are what the arguments hold."""
        valid = batch.pop("valid")
        parts = {name: rows.reshape(self._chunks, -1, *rows.shape[1:]) for name, rows in batch.items()}
        inputs = (jnp.arange(self._chunks), parts["input_ids"], parts["pixel_values"])

        def encode(trained: dict[str, Array], part: Any) -> tuple[Array, Array]:
            return self._encode({**trained, **frozen}, key, *part)

        if self._chunks == 1:
            (text, image), pull = jax.vjp(encode, parameters, tuple(part[0] for part in inputs))

            def back(split: tuple[Array, Array]) -> dict[str, Array]:
                return pull(split)[0]

        else:
            features = jax.lax.map(lambda part: encode(parameters, part), inputs)
            text, image = (part.reshape(len(valid), -1) for part in features)

            def add(total: dict[str, Array], part: Any) -> tuple[dict[str, Array], None]:
                _, pull = jax.vjp(lambda trained: encode(trained, part[0]), parameters)
                return jax.tree.map(jnp.add, total, *pull(part[1])), None

            def back(split: tuple[Array, Array]) -> dict[str, Array]:
                chunks = tuple(part.reshape(self._chunks, -1, part.shape[-1]) for part in split)
                return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, parameters), (inputs, chunks))[0]

        scalars = {name: parameters[name] for name in ("logit_scale", LOGIT_BIAS.name) if name in parameters}
        loss, split, of_scalars = self._loss(text, image, valid, scalars)
        gradients = back(split)
        summed = {  # that of a shard is summed already, where it was gathered
            name: gradient if self._lie[name] != WHOLE else jax.lax.psum(gradient, AXIS)
            for name, gradient in gradients.items()
            if name not in of_scalars
        }
        return loss, {**summed, **of_scalars}

    def _encode(
        self, parameters: dict[str, Array], key: Array, chunk: Array, input_ids: Array, pixel_values: Array
    ) -> tuple[Array, Array]:
        """Returns the features of a chunk; the same ones, with the same dropout, each time in a step."""
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), jax.lax.axis_index(AXIS))
        options: dict[str, Any] = {
            "deterministic": not self.model.dropout,
            "rngs": {"dropout": jax.random.fold_in(key, chunk)},
        }

        def features(parameters: dict[str, Array]) -> tuple[Array, Array]:
            variables = {"params": self._tree({name: self._joined(name, part) for name, part in parameters.items()})}
            text: Any = self._towers.apply(variables, input_ids, method="get_text_features", **options)
            pixels = pixel_values.transpose(0, 2, 3, 1)  # channels last
            image: Any = self._towers.apply(variables, pixels, method="get_image_features", **options)
            wide = statistics_dtype(text.dtype)
            return text.astype(wide), image.astype(wide)

        if self.recipe.distributed == "fsdp":  # gathered once more in the backward pass, instead of kept
            policy = jax.checkpoint_policies.save_anything_except_these_names(_JOINED)
            features = jax.checkpoint(features, policy=policy)
        return features(parameters)

    def _joined(self, name: str, parameter: Array) -> Array:
        """Returns a whole parameter, of whose gradient each device will get its shard of the sum."""
        if self._lie[name] == WHOLE:
            return parameter
        whole = jax.lax.all_gather(parameter, AXIS, axis=self._lie[name].index(AXIS), tiled=True)
        return checkpoint_name(whole, _JOINED)

    def _key(self) -> np.ndarray:
        """Returns the key of this step, from which that of each device and chunk is made."""
        return np.random.SeedSequence((self.recipe.seed, self.steps)).generate_state(2, np.uint32)

    def _loss(
        self, text: Array, image: Array, valid: Array, scalars: dict[str, Array]
    ) -> tuple[Array, tuple[Array, Array], dict[str, Array]]:
        """Returns the loss over the rows of all devices and its gradient.

        Args:
            text: (rows, proj), the features of this device.
            image: (rows, proj).
            valid: (rows,).
            scalars: logit_scale and, for the sigmoid loss, logit_bias.

        Returns:
            The loss, its gradient with respect to the features of this device, and that with respect to the scalars.
        """
        loss_of = siglip_loss if self.recipe.loss == "siglip" else clip_loss
        own = jax.lax.axis_index(AXIS) * len(valid) + jnp.arange(len(valid))
        whole = [jax.lax.all_gather(part, AXIS, tiled=True) for part in (text, image)]
        valid = jax.lax.all_gather(valid, AXIS, tiled=True)  # (n,)

        def loss(features: list[Array], scalars: dict[str, Array]) -> Array:
            # A row of padding may be anything: it must not become NaN, and has no gradient.
            embeds = [normalize(jnp.where(valid[:, None], part, 1)) for part in features]
            return loss_of(*embeds, **scalars, valid=valid, rows=own if self.recipe.local_loss else None)

        value, (split, of_scalars) = jax.value_and_grad(loss, argnums=(0, 1))(whole, scalars)
        if self.recipe.local_loss:
            value, of_scalars = jax.lax.psum((value, of_scalars), AXIS)
            text, image = (jax.lax.psum_scatter(part, AXIS, tiled=True) for part in split)
        else:
            text, image = (part[own] for part in split)
        return value, (text, image), of_scalars

    def _sizes(self) -> tuple[int, int]:
        """Returns the number of chunks of each device's rows, and the rows of a process, padding included."""
        share = -(-self.recipe.batch_size // self.processes.count)
        chunks = 1 if self.recipe.chunk_size is None else -(-share // self.recipe.chunk_size)
        devices = len(self.mesh.local_devices)
        return chunks, -(-share // (chunks * devices)) * chunks * devices

    def _inputs(self, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Puts the rows of all processes on their devices.

        Returns:
            ``input_ids`` (n, seq), ``pixel_values`` (n, channels, height, width) and ``valid`` (n,), False for rows of
            padding; sharded along the rows.

        Raises:
            ValueError: There are more pairs than the recipe says, or ids outside the vocabulary.
        """
        ids, pixels = np.asarray(batch["input_ids"]), np.asarray(batch["pixel_values"])
        count, room = len(ids), self._rows
        if len(pixels) != count or count > room:
            raise bad_input(
                f"A process has at most {room} texts and as many images in a step of batch_size "
                f"{self.recipe.batch_size}",
                f"{count} texts and {len(pixels)} images",
                "Pass smaller batches or a larger batch_size",
                shown=True,
            )
        text, vision = self.model.config.text_config, self.model.config.vision_config
        checks.check_text(ids, None, None, text)
        checks.check_pixels(pixels, vision, False)
        checks.check_ids(ids, text.vocab_size, "input_ids")
        length = text.max_position_embeddings  # the one that several processes agree upon
        if self.processes.count == 1:
            length = min(length, -(-ids.shape[1] // _LENGTHS) * _LENGTHS)
        filled = np.zeros((room, length), np.int32)
        if count:
            filled[:count, : ids.shape[1]] = ids
            filled[:count, ids.shape[1] :] = ids[:, -1:]  # never a first end token
        pictures = np.zeros((room, *pixels.shape[1:]), self.dtype)
        pictures[:count] = pixels
        arrays = {"input_ids": filled, "pixel_values": pictures, "valid": np.arange(room) < count}
        sharding = NamedSharding(self.mesh, ROWS)
        return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in arrays.items()}

    def _clip(self, gradients: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Clips the gradient as ``torch.nn.utils.clip_grad_norm_`` does, and returns its norm before."""
        norm = jnp.sqrt(sum(jnp.square(gradient).sum() for gradient in gradients.values()))
        if self.recipe.clip_norm is not None:
            factor = jnp.minimum(self.recipe.clip_norm / (norm + 1e-6), 1.0)
            gradients = {name: gradient * factor for name, gradient in gradients.items()}
        return norm, gradients

    def _exact(self) -> contextlib.AbstractContextManager:
        """Lets float64 be float64 and nothing else become it, whatever ``jax_enable_x64`` says outside."""
        return jax.enable_x64(self.dtype == np.float64)

    def _spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        """Returns how a parameter and its moments lie: along the largest axis that divides evenly, with "fsdp"."""
        axes = [axis for axis, size in enumerate(shape) if size and size % self.mesh.size == 0]
        if self.recipe.distributed != "fsdp" or not axes:
            return WHOLE
        return PartitionSpec(*[None] * max(axes, key=lambda axis: shape[axis]), AXIS)

    def _shardings(self, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: NamedSharding(self.mesh, self._spec(leaf.shape)), tree)

    def _like(self, array: np.ndarray, spec: Spec) -> Array:
        """Puts a copy of a canonical array where a parameter or its moments are, in linen's layout."""
        array = KINDS[spec.kind].to_framework(np.asarray(array))
        return self._placed(array.astype(self.dtype, copy=False), self._spec(array.shape))

    def _placed(self, array: np.ndarray, spec: PartitionSpec) -> Array:
        # A copy for each device, since JAX may take an array's memory for its own, and a step writes there.
        sharding = NamedSharding(self.mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: np.array(array[index]))

    def _canonical(self, arrays: Mapping[str, Array], table: list[Spec]) -> dict[str, np.ndarray]:
        return {spec.name: KINDS[spec.kind].to_canonical(_whole(arrays[spec.name])) for spec in table}

    def _show(self) -> None:
        """Gives the model the parameters of this moment."""
        self.model.params = self._tree({**self._parameters, **self._frozen})

    def _tree(self, parameters: Mapping[str, Array]) -> dict[str, Any]:
        """Arranges parameters of canonical names as the model does."""
        return unflatten_dict({spec.path("flax"): parameters[spec.name] for spec in self._all_specs()})


def _whole(array: Array) -> np.ndarray:
    """Returns a copy of an array, gathered from the devices of all processes."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.array(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
