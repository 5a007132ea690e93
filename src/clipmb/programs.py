"""Other programs that look models up in their own tables: adds clipmb's classes to these tables."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import clipmb
from clipmb.common.errors import one_of

_COMPONENT = "PipelineComponent"  # the name in `clipmb` by which diffusers finds what it can load and save


def register(program: Literal["diffusers", "transformers"]) -> None:
    """Makes clipmb's classes known to a program that otherwise takes transformers' only.

    For transformers, its ``Trainer`` saves clipmb's PyTorch models with their config, in folders that load again, and
    the feature extraction of ``pipeline`` finds the fields of their outputs by position. The rest of it needs no call.

    For diffusers, clipmb's PyTorch models, tokenizers, image processors and processors become components of pipelines:
    ``from_pretrained(folder, text_encoder=…, tokenizer=…)`` accepts them in place of those that ``model_index.json``
    names, ``save_pretrained`` writes them, as ``["clipmb", "CLIPTextModel"]``, and LoRA's functions find the text
    encoder. A second call changes nothing.

    Args:
        program: Its name.

    Raises:
        ValueError: clipmb has nothing to register with a program of this name.
        ImportError: The program is not installed, or its version is not one that clipmb knows.
    """
    if program not in _PROGRAMS:
        raise one_of("program", program, list(_PROGRAMS))
    _PROGRAMS[program]()


def _transformers() -> None:
    try:
        trainer: Any = importlib.import_module("transformers.trainer")
        pipeline: Any = importlib.import_module("transformers.pipelines.base").Pipeline
        theirs, move = trainer.PreTrainedModel, pipeline._ensure_tensor_on_device
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "This needs transformers 4.57, 5.23 or a similar version, and what its Trainer needs. "
            f"Received: {error}. Install them: pip install -U transformers accelerate"
        ) from error
    if isinstance(theirs, tuple):
        return

    def move_ours(self: Any, inputs: Any, device: Any) -> Any:
        """Moves tensors as transformers does, and leaves an output of ours one."""
        moved = move(self, inputs, device)
        return type(inputs)(moved) if isinstance(inputs, clipmb.ModelOutput) else moved

    trainer.PreTrainedModel = (theirs, clipmb.CLIPPreTrainedModel)  # isinstance() takes a tuple of them
    pipeline._ensure_tensor_on_device = move_ours


def _diffusers() -> None:
    try:
        tables: Any = importlib.import_module("diffusers.pipelines.pipeline_loading_utils")
        pipelines: Any = importlib.import_module("diffusers.pipelines.pipeline_utils")
        lora: Any = importlib.import_module("diffusers.loaders.lora_base")
        theirs = tables.PreTrainedModel
        check, is_valid = tables.maybe_raise_or_warn, pipelines._is_valid_type
        known = tables.LOADABLE_CLASSES
        importable = tables.ALL_IMPORTABLE_CLASSES
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "Pipelines need diffusers 0.42 or a similar version, and transformers. "
            f"Received: {error}. Install them: pip install -U diffusers transformers"
        ) from error
    if "clipmb" in known:
        return
    models = clipmb.CLIPPreTrainedModel
    components = (
        models,
        clipmb.CLIPTokenizer,
        clipmb.CLIPTokenizerFast,
        clipmb.CLIPImageProcessor,
        clipmb.CLIPProcessor,
    )
    setattr(clipmb, _COMPONENT, components)  # where diffusers has a class, issubclass() takes a tuple of them
    known["clipmb"] = {_COMPONENT: ["save_pretrained", "from_pretrained"]}
    importable.update(known["clipmb"])

    def counterpart(component: Any) -> Any:
        return _Counterpart(component) if isinstance(component, components) else component

    def maybe_raise_or_warn(
        library_name: str,
        library: Any,
        class_name: str,
        importable_classes: Mapping[str, list[str]],
        passed_class_obj: Mapping[str, Any],
        name: str,
        is_pipeline_module: bool,
    ) -> None:
        """Checks a component as diffusers does, with ours in place of transformers' of the same name, and reversed."""
        passed = {name: counterpart(tables._unwrap_model(passed_class_obj[name]))}
        library_name = "transformers" if library_name == "clipmb" else library_name
        check(library_name, library, class_name, importable_classes, passed, name, is_pipeline_module)

    pipelines._is_valid_type = lambda component, types: is_valid(counterpart(component), types)
    for module in (tables, pipelines):
        module.maybe_raise_or_warn = maybe_raise_or_warn
    for module in (tables, lora):
        module.PreTrainedModel = (theirs, models)


class _Counterpart:
    """An object of clipmb that says it is of transformers' class of the same name."""

    def __init__(self, component: Any) -> None:
        self._component = component

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] - nobody sets it
        transformers = importlib.import_module("transformers")
        names = [kind.__name__ for kind in type(self._component).__mro__]
        return next(getattr(transformers, name) for name in names if hasattr(transformers, name))

    def __repr__(self) -> str:
        return repr(self._component)


_PROGRAMS: dict[str, Callable[[], None]] = {"diffusers": _diffusers, "transformers": _transformers}
