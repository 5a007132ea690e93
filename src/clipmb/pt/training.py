"""Contrastive training in PyTorch: one step over any number of devices and chunks, equal to that of the full batch.

A step has three parts. The towers encode the pairs of this process; the features of all processes are gathered, and on
these small matrices the loss and its gradient with respect to every feature are computed; the gradient of the own
features goes back through the towers, and the parameters' gradients are added up over the processes. With
``chunk_size`` the towers do the first and the last part chunk by chunk, and the first without keeping anything.

Source: gradient caching, arXiv 2101.06983. The result does not depend on how the pairs are spread.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from clipmb.common.errors import bad_input
from clipmb.common.hub import Source
from clipmb.common.parameters import Spec, specs
from clipmb.common.training.recipe import INITIAL_LOGIT_BIAS, LOGIT_BIAS, MAX_LOGIT_SCALE, Processes, Recipe, decays
from clipmb.common.training.state import FIRST, SECOND, TrainingState
from clipmb.pt.engine import Engine
from clipmb.pt.losses import clip_loss, normalize, siglip_loss
from clipmb.pt.modeling import CLIPModel
from clipmb.pt.tensors import from_numpy, to_numpy


def start_processes(recipe: Recipe) -> Processes:
    """Joins the other processes of a run that ``torchrun`` started; a run of one process needs none.

    Raises:
        ValueError: The recipe is for several devices and this process was not started by ``torchrun``.
    """
    if recipe.distributed == "none":
        return Processes()
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise bad_input(
                f"distributed={recipe.distributed!r} in PyTorch needs the processes that torchrun starts",
                "a process without RANK in its environment",
                "Launch it as: torchrun --nproc-per-node 2 -m clipmb train …",
                shown=True,
            )
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return Processes(dist.get_rank(), dist.get_world_size())


class Towers(nn.Module):
    """Both towers behind one forward pass, for DDP and FSDP, which work where a module is called."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.text_model, self.text_projection = model.text_model, model.text_projection
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the features of the texts and of the images, (n, proj) each, not normalised."""
        text = self.text_projection(self.text_model(input_ids).pooler_output)
        return text, self.visual_projection(self.vision_model(pixel_values).pooler_output)


class Trainer:
    """A model and its optimizer, as `clipmb.backends.Trainer` describes it.

    Args:
        model: A `CLIPModel`; its parameters become float32, or float64 with that precision.
        recipe: How to train.
        state: The state to continue from, with the weights of the same moment in ``model``; None to begin.

    Attributes:
        steps: Optimizer steps done.
    """

    backend: ClassVar[str] = "pt"

    def __init__(self, model: CLIPModel, recipe: Recipe, state: TrainingState | None = None) -> None:
        self.model, self.recipe = model, recipe
        model.to(getattr(torch, recipe.parameter_dtype))
        self.table = [spec for spec in specs(model.config, "CLIPModel") if recipe.trains(spec)]
        trained = {spec.name for spec in self.table}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.processes = start_processes(recipe)
        self._towers = self._distributed(Towers(model))
        self._parameters = {spec.name: model.get_parameter(spec.name) for spec in self.table}
        if recipe.loss == "siglip":
            value = INITIAL_LOGIT_BIAS if state is None else state.logit_bias
            bias = torch.tensor(value, dtype=model.logit_scale.dtype, device=model.logit_scale.device)
            self._parameters[LOGIT_BIAS.name] = nn.Parameter(bias)
            self.table.append(LOGIT_BIAS)
        self.optimizer = self._optimizer()
        self.steps = 0
        if state is not None:
            self.steps = state.step
            self._restore(state)

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
            device: As PyTorch names it; when None the GPU of this process, or the CPU.
            **options: The other options of ``from_pretrained``.

        Raises:
            ValueError: The recipe needs processes that were not started.
            CheckpointError: The checkpoint cannot be read, or the state does not fit model and recipe.
        """
        start_processes(recipe)
        if device is None and torch.cuda.is_available():
            device = f"cuda:{torch.cuda.current_device()}"
        engine = Engine.load(name_or_path, dtype=recipe.parameter_dtype, device=device, **options)
        return cls(engine.model, recipe, state)

    def _distributed(self, towers: Towers) -> nn.Module:
        """Lets the towers of all processes add up their gradients."""
        if self.recipe.distributed == "data":
            return DistributedDataParallel(towers)
        if self.recipe.distributed == "fsdp":
            for encoder in (towers.text_model.encoder, towers.vision_model.encoder):
                for layer in encoder.layers:
                    fully_shard(layer)
            fully_shard(towers)
        return towers

    def _optimizer(self) -> torch.optim.AdamW:
        # Tensors and the shards of tensors, and what decays and what does not, are groups of their own.
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for spec in self.table:
            parameter = self._parameters[spec.name]
            groups.setdefault((decays(spec), isinstance(parameter, DTensor)), []).append(parameter)
        recipe = self.recipe
        return torch.optim.AdamW(
            [{"params": found, "weight_decay": recipe.weight_decay * key[0]} for key, found in groups.items()],
            lr=recipe.learning_rate,
            betas=recipe.betas,
            eps=recipe.eps,
            fused=True,
        )

    def _restore(self, state: TrainingState) -> None:
        first, second = state.moments(self.table)
        for name, parameter in self._parameters.items():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": _like(first[name], parameter),
                "exp_avg_sq": _like(second[name], parameter),
            }

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
        loss = self._backward(batch)
        norm = self._clip()
        rate = self.recipe.rate(self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        scale = float(self.model.logit_scale.detach().exp())
        metrics = {"loss": loss, "grad_norm": norm, "logit_scale": scale, "learning_rate": rate}
        if self.logit_bias is not None:
            metrics["logit_bias"] = self.logit_bias
        return metrics

    def gradients(self, batch: Mapping[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
        """Returns the loss of a batch and its gradient, by canonical name in canonical layout; takes no step."""
        loss = self._backward(batch)
        found = {name: to_numpy(_whole(_gradient(parameter))).copy() for name, parameter in self._parameters.items()}
        self.optimizer.zero_grad()
        return loss, found

    def weights(self) -> dict[str, np.ndarray]:
        """Returns every parameter by canonical name; arrays may share memory with the model until the next step."""
        return {spec.name: to_numpy(_whole(self.model.get_parameter(spec.name))) for spec in self._all_specs()}

    def moments(self) -> dict[str, np.ndarray]:
        """Returns AdamW's moments under the names of `TrainingState.tensors`; zeros before the first step."""
        found = {}
        for name, parameter in self._parameters.items():
            state = self.optimizer.state.get(parameter, {})
            for part, key in ((FIRST, "exp_avg"), (SECOND, "exp_avg_sq")):
                found[part + name] = to_numpy(_whole(state.get(key, torch.zeros_like(parameter))))
        return found

    @property
    def logit_bias(self) -> float | None:
        """The bias of the sigmoid loss; None for the other."""
        bias = self._parameters.get(LOGIT_BIAS.name)
        return None if bias is None else float(bias.detach())

    def largest(self, number: int) -> int:
        """Returns the largest of the small numbers that the processes of the run call this with."""
        if self.processes.count == 1:
            return number
        found = torch.tensor(number, device=self.model.logit_scale.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def engine(self) -> Engine:
        """Returns an engine with the weights of this moment; it is valid until the next step."""
        model = self.model
        if self.recipe.distributed == "fsdp":  # whose modules work only as a whole
            model = CLIPModel.from_pretrained(
                None, config=model.config, state_dict=self.weights(), dtype=self.recipe.precision, device=model.device
            )
        return Engine(model)

    def _all_specs(self) -> list[Spec]:
        return specs(self.model.config, "CLIPModel")

    def _inputs(self, batch: Mapping[str, np.ndarray]) -> tuple[Tensor, Tensor]:
        """Puts the pairs of this process on its device."""
        input_ids, pixel_values = (from_numpy(np.ascontiguousarray(batch[k])) for k in ("input_ids", "pixel_values"))
        scale = self.model.logit_scale
        return input_ids.to(scale.device), pixel_values.to(scale.device, scale.dtype)

    def _backward(self, batch: Mapping[str, np.ndarray]) -> float:
        """Leaves the gradient of the loss over the whole batch in the parameters, and returns the loss."""
        self.model.train()
        input_ids, pixel_values = self._inputs(batch)
        sizes = self._sizes(len(input_ids))
        chunks = 1 if self.recipe.chunk_size is None else max(1, -(-max(sizes) // self.recipe.chunk_size))
        parts = list(zip(torch.tensor_split(input_ids, chunks), torch.tensor_split(pixel_values, chunks), strict=True))
        if chunks == 1:
            features = [self._encode(0, *parts[0])]
        else:
            with torch.no_grad():
                features = [self._encode(place, *part) for place, part in enumerate(parts)]
        text, image = (torch.cat(found).detach() for found in zip(*features, strict=True))
        loss, gradients = self._loss(text, image, sizes)
        split = list(zip(*(torch.tensor_split(gradient, chunks) for gradient in gradients), strict=True))
        for place, part in enumerate(parts):
            with self._unsynchronised(place < chunks - 1):
                outputs = features[0] if chunks == 1 else self._encode(place, *part)
                kept = [i for i, output in enumerate(outputs) if output.requires_grad]  # not those of a frozen tower
                # DDP and FSDP average over the processes; the gradient is the sum.
                weights = [split[place][i].to(outputs[i].dtype) * len(sizes) for i in kept]
                torch.autograd.backward([outputs[i] for i in kept], weights)
        return loss

    def _encode(self, chunk: int, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the features of a chunk; the same ones, with the same dropout, each time in a step."""
        bfloat16 = torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")
        with self._dropout(chunk), bfloat16:
            return self._towers(input_ids, pixel_values)

    @contextlib.contextmanager
    def _dropout(self, chunk: int) -> Iterator[None]:
        """Draws from a generator of this step, process and chunk within, when there is dropout."""
        config = self.model.config
        if not (config.text_config.attention_dropout or config.vision_config.attention_dropout):
            yield
            return
        key = (self.recipe.seed, self.steps, self.processes.rank, chunk)
        with torch.random.fork_rng():
            torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
            yield

    def _unsynchronised(self, wanted: bool) -> contextlib.AbstractContextManager:
        """Lets DDP wait for the last chunk before it adds up over the processes."""
        if wanted and isinstance(self._towers, DistributedDataParallel):
            return self._towers.no_sync()
        return contextlib.nullcontext()

    def _loss(self, text: Tensor, image: Tensor, sizes: list[int]) -> tuple[float, tuple[Tensor, Tensor]]:
        """Returns the loss over the rows of all processes and its gradient with respect to those of this one.

        The gradients of logit_scale and logit_bias, which every process has, are left in them.
        """
        wide = torch.promote_types(self.model.logit_scale.dtype, torch.float32)
        start = sum(sizes[: self.processes.rank])
        own = slice(start, start + sizes[self.processes.rank])
        leaves = [self._gathered(part.to(wide), sizes).requires_grad_() for part in (text, image)]
        scalars = [self.model.logit_scale]
        if LOGIT_BIAS.name in self._parameters:
            scalars.append(self._parameters[LOGIT_BIAS.name])
        leaves += [scalar.detach().clone().requires_grad_() for scalar in scalars]
        loss_of = siglip_loss if self.recipe.loss == "siglip" else clip_loss
        embeds = [normalize(leaf) for leaf in leaves[:2]]
        loss = loss_of(*embeds, *leaves[2:], rows=own if self.recipe.local_loss else None)
        gradients = list(torch.autograd.grad(loss, leaves))
        loss = loss.detach()
        if self.recipe.local_loss and len(sizes) > 1:
            for part in (loss, *gradients):
                dist.all_reduce(part)
        for scalar, gradient in zip(scalars, gradients[2:], strict=True):
            scalar.grad = gradient
        return float(loss), (gradients[0][own], gradients[1][own])

    def _sizes(self, size: int) -> list[int]:
        """Returns how many pairs each process has."""
        if self.processes.count == 1:
            return [size]
        device = self.model.logit_scale.device
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.processes.count)]
        dist.all_gather(sizes, torch.tensor([size], device=device))
        return [int(found) for found in sizes]

    def _gathered(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """Returns the rows of all processes, in order."""
        if self.processes.count == 1:
            return rows
        padded = F.pad(rows, (0, 0, 0, max(sizes) - len(rows)))
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def _clip(self) -> float:
        """Clips the gradient as ``torch.nn.utils.clip_grad_norm_`` does, and returns its norm before."""
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        groups = (
            [g for g in gradients if isinstance(g, DTensor)],
            [g for g in gradients if not isinstance(g, DTensor)],
        )
        norms = [_whole(nn.utils.get_total_norm(group)).double() for group in groups if group]
        norm = torch.stack(norms).norm()
        if self.recipe.clip_norm is not None:
            factor = (self.recipe.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factor.to(gradient.dtype))
        return float(norm)


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Returns the gradient of a parameter, which is zero where the loss does not depend on it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _whole(tensor: Tensor) -> Tensor:
    """Gathers a sharded tensor."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(array: np.ndarray, parameter: nn.Parameter) -> Tensor:
    """Returns a copy of an array as a tensor of a parameter's dtype, on its device, laid out and sharded as it is.

    The fused AdamW goes through memory without a look at strides, which those of loaded weights may be any.
    """
    tensor = torch.tensor(array, dtype=parameter.dtype, device=parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return torch.empty_like(parameter, requires_grad=False).copy_(tensor)
