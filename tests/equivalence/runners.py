"""One way to run any head of any backend: numpy in, numpy by field or by canonical parameter name out."""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from cases import CONFIGS, inputs_of

import clipmb
from clipmb.common.outputs import ModelOutput
from clipmb.common.parameters import KINDS, specs

PREFIX = {"pt": "CLIP", "tf": "TFCLIP", "flax": "FlaxCLIP"}


def model_class(backend: str, head: str) -> Any:
    return getattr(clipmb, head.replace("CLIP", PREFIX[backend], 1))


def flatten(output: Any, prefix: str = "") -> dict[str, Any]:
    """Every tensor of an output by its path, such as ``text_model_output.hidden_states.2``."""
    found = {}
    for name, value in output.items():
        if isinstance(value, ModelOutput):
            found.update(flatten(value, f"{prefix}{name}."))
        elif isinstance(value, tuple | list):
            found.update({f"{prefix}{name}.{i}": part for i, part in enumerate(value)})
        else:
            found[prefix + name] = value
    return found


def direction(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A fixed random direction for a field, so that the gradient of a sum over all fields cancels nowhere."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)


def precision(backend: str, dtype: str) -> contextlib.AbstractContextManager:
    """What a backend needs to compute in float64."""
    if backend == "flax" and dtype == "float64":
        import jax

        return jax.enable_x64(True)
    return contextlib.nullcontext()


@contextlib.contextmanager
def loaded(backend: str, head: str, folder: Path, dtype: str, **options: Any) -> Iterator[Any]:
    with precision(backend, dtype):
        model = model_class(backend, head).from_pretrained(folder, dtype=dtype, **options)
        if backend == "flax" and dtype == "float64":  # its parameters keep the file's dtype, and so would gradients
            import jax

            model.params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params)
        yield model


def typed(inputs: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    return {
        name: value.astype(np.float64) if value.dtype == np.float32 and dtype == "float64" else value
        for name, value in inputs.items()
    }


def tensors(backend: str, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    if backend == "pt":
        import torch

        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
    if backend == "tf":
        import tensorflow as tf

        return {name: tf.convert_to_tensor(value) for name, value in inputs.items()}
    import jax.numpy as jnp

    return {name: jnp.asarray(value) for name, value in inputs.items()}


def numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach()
        value = value.float() if value.dtype.itemsize < 4 else value
    return np.asarray(value).astype(np.float64)


def outputs(
    backend: str,
    model: Any,
    inputs: dict[str, np.ndarray],
    compiled: str | None = None,
    training: bool = False,
    **flags: Any,
) -> dict[str, np.ndarray]:
    """Runs a model; ``compiled`` names a compiler of the backend."""
    given = tensors(backend, inputs)
    if backend == "pt":
        model.train(training)
    elif backend == "tf":
        flags["training"] = training
    elif training:
        import jax

        flags |= {"train": True, "dropout_rng": jax.random.key(0)}
    if backend == "pt":
        import torch

        call: Callable[..., Any] = torch.compile(model, backend=compiled, fullgraph=True) if compiled else model
        with torch.no_grad():
            output = call(**given, **flags)
    elif backend == "tf":
        import tensorflow as tf

        call = lambda values: model(**values, **flags)  # noqa: E731
        output = (tf.function(call, jit_compile=compiled == "xla") if compiled else call)(given)
    else:
        import jax

        call = lambda params, values: model(**values, params=params, **flags)  # noqa: E731
        output = (jax.jit(call) if compiled else call)(model.params, given)
    return {name: numpy(value) for name, value in flatten(output).items()}


def gradients(backend: str, model: Any, inputs: dict[str, np.ndarray], **flags: Any) -> dict[str, np.ndarray]:
    """Gradients of a random direction in every output, by canonical name and in canonical layout; 0 where unused."""
    given, table = tensors(backend, inputs), specs(model.config, model.head)
    if backend == "pt":
        import torch

        model.zero_grad()
        fields = flatten(model(**given, **flags))
        sum(
            (v * torch.from_numpy(direction(k, tuple(v.shape))).to(v.dtype)).sum() for k, v in fields.items()
        ).backward()
        found = {spec.name: model.get_parameter(spec.name).grad for spec in table}
    elif backend == "tf":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            fields = flatten(model(**given, **flags))
            total = tf.add_n(
                [tf.reduce_sum(v * tf.cast(direction(k, tuple(v.shape)), v.dtype)) for k, v in fields.items()]
            )
        variables = [model.parameter(spec).value for spec in table]
        found = dict(zip((spec.name for spec in table), tape.gradient(total, variables), strict=True))
        found = {name: None if value is None else tf.convert_to_tensor(value) for name, value in found.items()}
    else:
        import jax

        def total(params: Any) -> Any:
            fields = flatten(model(**given, params=params, **flags))
            return sum((v * direction(k, v.shape).astype(v.dtype)).sum() for k, v in fields.items())

        tree = jax.jit(jax.grad(total))(model.params)
        found = {spec.name: functools.reduce(lambda node, key: node[key], spec.path("flax"), tree) for spec in table}
    canonical = {}
    for spec in table:
        value = np.zeros(()) if found[spec.name] is None else numpy(found[spec.name])
        value = np.zeros(spec.shape) if found[spec.name] is None else value
        canonical[spec.name] = KINDS[spec.kind].to_canonical(value) if backend != "pt" else value
    return canonical


def flags_of(head: str, implementation: str = "eager") -> dict[str, Any]:
    flags: dict[str, Any] = {"output_hidden_states": True, "output_attentions": implementation == "eager"}
    return {**flags, "return_loss": True} if head == "CLIPModel" else flags


def fields_of(head: str, implementation: str) -> list[str]:
    """The path of every field that a head returns, known without running it."""
    towers = {"text": CONFIGS["plain"].text_config, "vision": CONFIGS["plain"].vision_config}

    def states(tower: str, prefix: str = "") -> list[str]:
        layers = towers[tower].num_hidden_layers
        attentions = [f"{prefix}attentions.{i}" for i in range(layers)] if implementation == "eager" else []
        return [*(f"{prefix}hidden_states.{i}" for i in range(layers + 1)), *attentions]

    if head == "CLIPModel":
        nested = [
            name
            for tower in towers
            for prefix in [f"{tower}_model_output."]
            for name in (f"{prefix}last_hidden_state", f"{prefix}pooler_output", *states(tower, prefix))
        ]
        return ["loss", "logits_per_image", "logits_per_text", "text_embeds", "image_embeds", *nested]
    tower = "text" if "Text" in head else "vision"
    if head == "CLIPForImageClassification":
        return ["logits", *states(tower)]
    first = {"text": "text_embeds", "vision": "image_embeds"}[tower]
    head_fields = [first, "last_hidden_state"] if "Projection" in head else ["last_hidden_state", "pooler_output"]
    return [*head_fields, *states(tower)]


def inputs_for(head: str, case: str, dtype: str, batch: int = 5, hidden_rows: bool = True) -> dict[str, np.ndarray]:
    """Inputs of a head; without ``hidden_rows`` every token may look at least at the first."""
    inputs = inputs_of(head, CONFIGS[case], batch)
    if not hidden_rows and "attention_mask" in inputs:
        inputs["attention_mask"][:, 0] = 1
    return typed(inputs, dtype)
