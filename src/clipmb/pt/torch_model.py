"""What PyTorch asks of a model and the other frameworks do not: devices, adapters, a ``state_dict`` of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar, Self, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from clipmb.common import checks
from clipmb.common.checkpoint.tensors import Deferred
from clipmb.common.config import BaseConfig
from clipmb.common.errors import bad_input
from clipmb.common.former import SavingOptions, check_saving
from clipmb.common.parameters import Spec, specs
from clipmb.common.pretrained import PretrainedMixin, dummy_arrays, normal_dtype
from clipmb.common.uploading import uploaded
from clipmb.pt.adapters import AdapterMixin
from clipmb.pt.layers import Uninitialised
from clipmb.pt.placement import place
from clipmb.pt.tensors import from_numpy, lazy_numpy, to_numpy


class TorchModel(PretrainedMixin, AdapterMixin, nn.Module):
    """A PyTorch model that is made on its device, and saves everything that it holds; arguments as in its heads."""

    framework = "pt"
    load_options: ClassVar[tuple[str, ...]] = (
        "device", "device_map", "max_memory", "offload_folder", "offload_buffers"
    )  # fmt: skip
    _no_split_modules: ClassVar[list[str]] = []

    # What programs ask of transformers' models before they treat them in a way of their own.
    is_parallelizable = False
    _supports_sdpa = True
    _supports_flash_attn = _supports_flex_attn = _can_compile_fullgraph = False
    _tied_weights_keys = _keys_to_ignore_on_save = _keep_in_fp32_modules = None
    _keys_to_ignore_on_load_missing = _keys_to_ignore_on_load_unexpected = None

    def __init__(self, config: BaseConfig) -> None:
        super().__init__()
        self.config: Any = checks.config_of(type(self).__name__, self.config_class, config)
        for part in (self.config, *(getattr(self.config, name) for name in self.config.sub_configs)):
            if part.attn_implementation is None:  # the default, which programs read here
                part.attn_implementation = {"": "sdpa"}
        self._require_grads_hooks: list[Any] = []

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:  # what programs ask before `set_attn_implementation`
        return True

    @classmethod
    def _from_config(cls, config: Any, *, dtype: Any = None, torch_dtype: Any = None, **options: Any) -> Self:
        """As in `PretrainedMixin`; the config's own dtype counts too, as in transformers."""
        chosen = next((value for value in (dtype, torch_dtype, config.dtype) if value is not None), None)
        name = normal_dtype(chosen, cls.__name__)
        model = super()._from_config(config, **options)
        return model if name in (None, "auto") else model.to(getattr(torch, name))

    @classmethod
    def from_arrays(
        cls,
        config: Any,
        arrays: dict[str, np.ndarray],
        initialised: list[Spec],
        dtype: str | None,
        device: Any = None,
        device_map: Any = None,
        **offloading: Any,
    ) -> Self:
        """Builds the model around canonical arrays, and draws the parameters that have none.

        Args:
            config: As in `PretrainedMixin.from_arrays`.
            arrays: As in `PretrainedMixin.from_arrays`.
            initialised: As in `PretrainedMixin.from_arrays`.
            dtype: As in `PretrainedMixin.from_arrays`.
            device: The device of the parameters; the CPU when None.
            device_map: As in `clipmb.pt.placement.place`, as an alternative to ``device``.
            **offloading: ``max_memory``, ``offload_folder`` and ``offload_buffers``, likewise.
        """
        with torch.device("meta"), Uninitialised():
            model = cls(config)
        kind = getattr(torch, dtype or "float32")
        for name, array in arrays.items():
            model.set_parameter(name, from_numpy(array).to(kind))
        for spec in initialised:
            model.set_parameter(spec.name, torch.empty(spec.shape, dtype=kind))
        model.init_weights(initialised)
        place(model, device, device_map, no_split=cls._no_split_modules, **offloading)
        return model.eval()

    @classmethod
    def canonical_array(cls, value: Any) -> np.ndarray:
        """Returns one value of a ``state_dict`` as numpy."""
        return np.array(to_numpy(value) if isinstance(value, Tensor) else value)  # a copy, which training may change

    def to_arrays(self) -> Deferred:
        """Returns every parameter by its canonical name, in canonical layout, each made when it is asked for."""
        return Deferred(
            {spec.name: lazy_numpy(self.get_parameter(spec.name)) for spec in specs(self.config, self.head)}
        )

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride] - it takes one argument more
        self,
        save_directory: str | os.PathLike[str],
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
        **options: Unpack[SavingOptions],
    ) -> None:
        """Writes ``config.json`` and ``model.safetensors`` with everything that the model holds, or its adapter.

        What was added to the model or swapped in it is saved under its own names. A model with an adapter of
        `add_adapter` or `load_adapter` saves that alone, as transformers does, for `load_adapter` and peft to read.

        Args:
            save_directory: The folder; made when it is missing.
            state_dict: Name to tensor, instead of the model's own: what ``accelerator.get_state_dict(model)`` returns.
            max_shard_size: Files larger than this are split and given an index.
            variant: Write ``model.<variant>.safetensors``.
            **options: The arguments of transformers 4's `save_pretrained`.

        Raises:
            ValueError: Weights are offloaded or are no plain tensors, ``safe_serialization=False`` was asked for, or
                the folder is a file.
            TypeError: An option is unknown.
        """
        if not check_saving(options):
            return
        if self._hf_peft_config_loaded:
            peft_names = options.get("save_peft_format", True)
            with uploaded(self, save_directory, options):
                self.save_adapter(save_directory, state_dict=state_dict, save_peft_format=peft_names)
            return
        state = self.state_dict() if state_dict is None else state_dict
        plain = (Tensor, nn.Parameter)
        away = [name for name, value in state.items() if type(value) not in plain or value.is_meta]
        if away:
            raise bad_input(
                "Weights that are saved must be plain tensors in memory",
                f"{len(away)} offloaded, quantised or distributed: {', '.join(away[:5])}",
                "Pass state_dict=accelerator.get_state_dict(model), or save before offloading and quantising",
                shown=True,
            )
        arrays = Deferred({name: lazy_numpy(value) for name, value in state.items()})
        with uploaded(self, save_directory, options):
            self.save_arrays(arrays, save_directory, max_shard_size=max_shard_size, variant=variant)

    def set_parameter(self, name: str, tensor: Tensor) -> None:
        """Makes a tensor the parameter of a canonical name."""
        owner, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(owner), leaf, nn.Parameter(tensor))

    def post_init(self) -> None:
        """Initialises every parameter, except on the meta device."""
        if self.device.type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, table: list[Spec] | None = None) -> None:
        """Draws parameters from their initial normal distributions.

        Args:
            table: Those to draw; all when None.
        """
        for spec in specs(self.config, self.head) if table is None else table:
            parameter = self.get_parameter(spec.name)
            if spec.std:
                parameter.normal_(spec.mean, spec.std)
            else:
                parameter.fill_(spec.mean)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype

    def tie_weights(self) -> None:
        """Does nothing: no weights are tied."""

    @property
    def base_model(self) -> Self:
        """The model itself: no head has a smaller model inside."""
        return self

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Inputs that fit the model: ids (3, 5), and images (3, channels, size, size)."""
        return {name: from_numpy(array) for name, array in dummy_arrays(self.config, self.head).items()}

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Returns the bytes of the parameters and, unless ``return_buffers`` is False, the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def enable_input_require_grads(self) -> None:
        """Lets gradients flow from the embeddings on though these are frozen, as adapters under checkpointing need."""
        self.disable_input_require_grads()
        for tower, name in (("text_model", "token_embedding"), ("vision_model", "patch_embedding")):
            if hasattr(self, tower):
                module = getattr(getattr(self, tower).embeddings, name)
                self._require_grads_hooks.append(module.register_forward_hook(_require_grad))

    def disable_input_require_grads(self) -> None:
        """Undoes `enable_input_require_grads`."""
        while self._require_grads_hooks:
            self._require_grads_hooks.pop().remove()


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_()
