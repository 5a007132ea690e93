"""peft adapters on our models, through the methods that transformers' models have: add, load, choose, disable.

The names and their meaning are those of transformers' ``PeftAdapterMixin``; peft does the work.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from clipmb.common.checkpoint.safetensors import write_file
from clipmb.common.errors import bad_input, logger
from clipmb.common.saving import Transaction
from clipmb.pt.tensors import lazy_numpy

_PREFIX = "base_model.model."  # of the names in peft's own files
_OF_THE_HUB = ("revision", "token", "subfolder", "cache_dir", "force_download", "local_files_only")
_NEUTRAL = {"device_map": "auto", "max_memory": None, "offload_folder": None, "offload_index": None}


class AdapterMixin(nn.Module):
    """Adapters of a PyTorch model.

    Attributes:
        peft_config: The config of each adapter by its name; peft makes it.
    """

    config: Any
    peft_config: dict[str, Any]
    _hf_peft_config_loaded = False  # by which transformers' Trainer and diffusers know a model with adapters

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """Puts a fresh adapter into the model and makes it the active one.

        Args:
            adapter_config: A config of peft, such as ``LoraConfig``.
            adapter_name: Its name; "default" when None.

        Raises:
            ImportError: peft is not installed, or too old.
            ValueError: There is an adapter of this name.
            TypeError: ``adapter_config`` is not a config of peft.
        """
        name = adapter_name or "default"
        if self._hf_peft_config_loaded and name in self.peft_config:
            raise bad_input("Each adapter needs a name of its own", name, "Pass another adapter_name=")
        if not isinstance(adapter_config, _peft().PeftConfig):
            raise bad_input(
                "An adapter needs a peft config",
                type(adapter_config).__name__,
                "Pass one, such as peft.LoraConfig(…)",
                TypeError,
                shown=True,
            )
        adapter_config.base_model_name_or_path = getattr(self.config, "name_or_path", None) or None
        _peft("peft.functional").inject_adapter_in_model(adapter_config, self, name)
        self._hf_peft_config_loaded = True
        self.set_adapter(name)

    def load_adapter(
        self,
        peft_model_id: str | os.PathLike[str] | None = None,
        adapter_name: str | None = None,
        *,
        peft_config: Any = None,
        adapter_state_dict: Mapping[str, Tensor] | None = None,
        is_trainable: bool = False,
        adapter_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Puts a saved adapter into the model and makes it the active one.

        Args:
            peft_model_id: Folder or Hub id of the adapter; None with ``peft_config`` and ``adapter_state_dict``.
            adapter_name: Its name; "default" when None.
            peft_config: Its config, instead of the one in the folder, or fields of it.
            adapter_state_dict: Its weights, instead of those in the folder.
            is_trainable: Let the adapter's parameters have gradients.
            adapter_kwargs: Options of the Hub for the adapter alone.
            **options: ``revision``, ``token``, ``subfolder``, ``cache_dir``, ``force_download`` and
                ``local_files_only``. An adapter lies where the modules lie that it adapts: ``device_map``,
                ``max_memory`` and ``offload_…`` must be None.

        Raises:
            ImportError: peft is not installed, or too old.
            ValueError: There is an adapter of this name, or weights of the adapter fit nothing in this model.
            TypeError: An option is unknown.
        """
        functional = _peft("peft.functional")
        name = adapter_name or "default"
        if peft_model_id is None and (peft_config is None or adapter_state_dict is None):
            raise bad_input(
                "An adapter comes from a folder or the Hub, or as peft_config and adapter_state_dict",
                peft_model_id,
                "Pass peft_model_id=, or both of these",
            )
        from_hub = _hub_options({**options, **(adapter_kwargs or {})})
        if not isinstance(peft_config, _peft().PeftConfig):
            fields = dict(peft_config or {})
            peft_config = _peft().PeftConfig.from_pretrained(str(peft_model_id), **from_hub)
            for field, value in fields.items():
                setattr(peft_config, field, value)
        peft_config.inference_mode = not is_trainable
        state = adapter_state_dict
        if state is None:
            state = _peft().load_peft_weights(str(peft_model_id), device="cpu", **from_hub)
        self.add_adapter(peft_config, name)
        plain = {key.removeprefix(_PREFIX): value for key, value in state.items()}
        wanted = self.get_adapter_state_dict(name).keys()
        result = functional.set_peft_model_state_dict(self, dict(plain), adapter_name=name)
        if result.unexpected_keys:
            self.delete_adapter(name)
            raise bad_input(
                "Every weight of an adapter must belong to a module of the model",
                f"{len(result.unexpected_keys)} that do not: {', '.join(result.unexpected_keys[:5])}",
                "Load the adapter into the kind of model that it was made for",
                shown=True,
            )
        if missing := sorted(wanted - plain.keys()):
            logger.warning("%s has no weights for: %s; they are newly initialised", peft_model_id, ", ".join(missing))
        if not is_trainable:
            functional.set_requires_grad(self, name, requires_grad=False)

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Makes one adapter active, or several; the others have no effect until they are chosen.

        Raises:
            ValueError: There is no adapter of a name.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._require(*names)
        self.enable_adapters()
        _peft("peft.functional").set_adapter(self, adapter_name)

    def active_adapters(self) -> list[str]:
        """Returns the names of the active adapters.

        Raises:
            ValueError: The model has no adapter.
        """
        self._require()
        active = next(self._adapted()).active_adapter
        return [active] if isinstance(active, str) else list(active)

    def disable_adapters(self) -> None:
        """Computes as without adapters, until `enable_adapters`.

        Raises:
            ValueError: The model has no adapter.
        """
        self._require()
        for module in self._adapted():
            module.enable_adapters(False)

    def enable_adapters(self) -> None:
        """Undoes `disable_adapters`.

        Raises:
            ValueError: The model has no adapter.
        """
        self._require()
        for module in self._adapted():
            module.enable_adapters(True)

    def delete_adapter(self, adapter_names: str | list[str]) -> None:
        """Takes adapters out of the model, and with the last one what peft wrapped around modules.

        Raises:
            ValueError: There is no adapter of a name.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._require(*names)
        for name in names:
            prefix = f"{self.peft_config[name].peft_type.value.lower()}_"
            _peft("peft.functional").delete_adapter(self, name, prefix)
            del self.peft_config[name]
        if not self.peft_config:
            self._hf_peft_config_loaded = False
            del self.peft_config
            adapted = {id(module) for module in self._adapted()}
            for name in [name for name, module in self.named_modules() if id(module) in adapted]:
                module: Any = self.get_submodule(name)
                inner = module.get_base_layer() if hasattr(module, "get_base_layer") else module.original_module
                self.set_submodule(name, inner)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Returns the weights of an adapter as peft saves them, without the prefix of peft's own models.

        Args:
            adapter_name: Which one; the active one when None.
            state_dict: Take them from here instead of from the model.

        Raises:
            ValueError: There is no adapter of this name.
        """
        name = adapter_name or self.active_adapters()[0]
        self._require(name)
        return _peft("peft.functional").get_peft_model_state_dict(self, state_dict=state_dict, adapter_name=name)

    def save_adapter(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        save_peft_format: bool = True,
    ) -> None:
        """Writes ``adapter_config.json`` and ``adapter_model.safetensors``, as peft does.

        Args:
            save_directory: The folder; made when it is missing.
            adapter_name: Which adapter; the active one when None.
            state_dict: Take the weights from here instead of from the model.
            save_peft_format: Give the names the prefix that peft itself looks for.

        Raises:
            ValueError: There is no adapter of this name, or several are active and none is named.
        """
        active = self.active_adapters()
        if adapter_name is None and len(active) > 1:
            raise bad_input("One adapter is saved at a time", active, "Choose one with set_adapter")
        name = adapter_name or active[0]
        prefix = _PREFIX if save_peft_format else ""
        weights = self.get_adapter_state_dict(name, state_dict)
        with Transaction(save_directory) as save:
            self.peft_config[name].save_pretrained(save.path(""))
            arrays = {f"{prefix}{key}": lazy_numpy(value) for key, value in weights.items()}
            write_file(save.path("adapter_model.safetensors"), arrays)

    def _adapted(self) -> Iterator[Any]:
        kinds = (_peft("peft.tuners.tuners_utils").BaseTunerLayer, _peft("peft.utils").AuxiliaryTrainingWrapper)
        return (module for module in self.modules() if isinstance(module, kinds))

    def _require(self, *names: str) -> None:
        known = list(self.peft_config) if self._hf_peft_config_loaded else []
        if not known or any(name not in known for name in names):
            wanted = "an adapter" if not names else f"the adapter {', '.join(map(repr, names))}"
            raise bad_input(f"The model must have {wanted}", known, "Add or load it first")


def _hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that say where an adapter is, and refuses others that are not neutral."""
    for name, value in options.items():
        neutral = name in _NEUTRAL and (value is None or value == _NEUTRAL[name])
        if name not in (*_OF_THE_HUB, "low_cpu_mem_usage") and not neutral:
            raise bad_input("load_adapter has no such argument", f"{name}={value!r}", "Leave it out", TypeError)
    return {name: value for name, value in options.items() if name in _OF_THE_HUB and value is not None}


def _peft(module: str = "peft") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError("Adapters need peft 0.18 or later. Install it: pip install -U peft") from error
