"""The passport of embeddings: what their values depend on, so that only comparable ones are put together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from clipmb import __version__
from clipmb.common.checkpoint.fitting import fit
from clipmb.common.config import CLIPConfig
from clipmb.common.errors import CheckpointError, bad_input
from clipmb.common.parameters import specs
from clipmb.common.pretrained import load_weights
from clipmb.common.saving import stamps
from clipmb.pipeline import CLIPPipeline

# What a model computes, besides its weights. Shapes follow from those.
_SHARED = ("hidden_act", "layer_norm_eps", "num_attention_heads")
_TEXT = (*_SHARED, "bos_token_id", "eos_token_id", "max_position_embeddings")
_VISION = (*_SHARED, "image_size", "patch_size")
# Entries of which a difference makes embeddings incomparable. The backend is none of them: the equivalence suite holds
# all backends to each other within rounding error.
COMPARED = ("weights", "config", "tokenizer", "image_processor", "dtype", "normalized", "long_text")
_DIGESTS: WeakKeyDictionary[CLIPPipeline, str] = WeakKeyDictionary()  # of pipelines that were loaded from files


def passport_of(pipeline: CLIPPipeline, *, normalized: bool, long_text: str) -> dict[str, Any]:
    """Describes what the embeddings of a pipeline depend on.

    Args:
        pipeline: What makes them.
        normalized: Whether they are of unit length.
        long_text: What is done with text longer than the context, as in `CLIPPipeline.encode_text`.

    Returns:
        JSON values: SHA-256 of ``weights``, ``config``, ``tokenizer`` and ``image_processor`` (with the order in which
        images are resized), ``dtype`` of the computation, ``normalized``, ``long_text``; and, for people, ``model``,
        ``backend`` and ``clipmb`` (the version).

    Raises:
        CheckpointError: The files of the weights have been replaced since the model was loaded.
    """
    tokenizer, images = pipeline.processor.tokenizer, pipeline.processor.image_processor
    return {
        "weights": _digest_of(pipeline),
        "config": _config_digest(pipeline.config),
        "tokenizer": tokenizer.fingerprint,
        "image_processor": images.fingerprint,
        "dtype": pipeline.dtype,
        "normalized": normalized,
        "long_text": long_text,
        "model": str(pipeline.config.name_or_path),
        "backend": pipeline.backend,
        "clipmb": __version__,
    }


def require_equivalent(known: Mapping[str, Any], other: Mapping[str, Any], owner: object) -> None:
    """Raises unless embeddings with these passports may be mixed and compared.

    Args:
        known: The passport of embeddings that exist.
        other: That of further ones, or of a query.
        owner: Whose passport ``known`` is, for the message.

    Raises:
        ValueError: They differ; the message names how.
    """
    different = [name for name in COMPARED if _class(name, known.get(name)) != _class(name, other.get(name))]
    if different:
        found = "; ".join(
            f"{name}: {_short(known.get(name))} there, {_short(other.get(name))} here" for name in different
        )
        raise bad_input(
            f"Embeddings can be mixed or compared only if one model made them in one way, that of {owner}",
            found,
            "Use the model and options of its manifest.json, or another folder",
            shown=True,
        )


def passport_digest(passport: Mapping[str, Any]) -> str:
    """SHA-256 of what is compared: equal where embeddings may be mixed and compared."""
    compared = {name: _class(name, passport.get(name)) for name in COMPARED}
    return sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()


def weights_digest(arrays: Mapping[str, Any]) -> str:
    """SHA-256 of weights by canonical name: the same for every file format and dtype that holds the same values."""
    hashed = sha256(b"clipmb-weights-1")
    for name in sorted(arrays):
        value = np.asarray(arrays[name])
        single = np.ascontiguousarray(value, "<f4")
        exact = value.dtype.itemsize < 8 or np.array_equal(single, value, equal_nan=True)
        hashed.update(f"{name} {value.shape}\n".encode())
        hashed.update((single if exact else np.ascontiguousarray(value, "<f8")).data)
    return hashed.hexdigest()


def _digest_of(pipeline: CLIPPipeline) -> str:
    """The digest of the weights as the checkpoint has them, since an engine may have rounded its own."""
    source = pipeline.source
    if source is None:
        return weights_digest(pipeline.engine.weights())
    if pipeline not in _DIGESTS:
        loaded = load_weights(source).of("CLIPModel")
        weights = fit(loaded.tensors, specs(pipeline.config, "CLIPModel"), "CLIPModel", origin=source)[0]
        digest = weights_digest(weights)
        now = stamps(source.file or source.folder)
        if replaced := [name for name in loaded.files if now.get(name) != pipeline.stamps.get(name)]:
            raise CheckpointError(
                "What embeddings were made by can be told only while its files are those it was loaded from. "
                f"Received: {source}, whose {replaced[0]} has been replaced. Load the model again."
            )
        _DIGESTS[pipeline] = digest
    return _DIGESTS[pipeline]


def _config_digest(config: CLIPConfig) -> str:
    entries = [
        {name: getattr(part, name) for name in names}
        for part, names in ((config.text_config, _TEXT), (config.vision_config, _VISION))
    ]
    return sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _class(name: str, value: Any) -> Any:
    """What must be equal: float64 and float32 agree to the rounding error of float32."""
    return "float32" if name == "dtype" and value == "float64" else value


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)
