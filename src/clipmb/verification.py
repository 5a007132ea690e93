"""Whether several backends, or two checkpoints, compute the same: they are compared stage by stage."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from clipmb import backends as known
from clipmb.common.config import CLIPConfig
from clipmb.common.dtypes import numpy_dtype
from clipmb.common.errors import CheckpointError, bad_input, one_of
from clipmb.common.hub import Source
from clipmb.common.pretrained import normal_dtype
from clipmb.common.processor import can_tokenize, image_processor_of, tokenizer_of

# Largest relative difference, max|a - b| / max|b|, by dtype: of projected and pooled vectors, and of everything else.
# float64 shows whether two implementations are the same function; the others allow for rounding in another order.
BOUNDS = {
    "float64": (1e-12, 1e-12),
    "float32": (2e-6, 1e-5),
    "bfloat16": (3e-2, 6e-2),
    "float16": (4e-3, 8e-3),
}
TEXTS = ("a photo of a cat", "two cups of coffee, and a third one on the table behind them", "a rocket, at dawn!", "x")


@dataclass
class Comparison:
    """One stage of one contender.

    Attributes:
        contender: What was compared with the standard.
        stage: "ids", "pixels", "weights", or a name of `clipmb.common.outputs.stages`.
        difference: max|a - b| / max|b|; infinite where shapes differ or something is not finite.
        bound: The largest difference that is still agreement.
        detail: Which tensor or item differs, and how.
    """

    contender: str
    stage: str
    difference: float
    bound: float
    detail: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the difference is within the bound."""
        return self.difference <= self.bound


@dataclass
class Report:
    """What a comparison found, in the order of computation.

    Attributes:
        standard: What the contenders were compared with.
        dtype: The dtype that was computed in.
        comparisons: Every stage of every contender.
    """

    standard: str
    dtype: str
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Whether every stage of every contender agrees."""
        return all(comparison.agrees for comparison in self.comparisons)

    @property
    def first_divergence(self) -> Comparison | None:
        """The first stage at which a contender diverges from the standard."""
        return next((comparison for comparison in self.comparisons if not comparison.agrees), None)

    def explain(self) -> str:
        """Summarises the comparison in one sentence."""
        worst = self.first_divergence
        if worst is None:
            contenders = sorted({comparison.contender for comparison in self.comparisons})
            agree = "agree" if len(contenders) > 1 else "agrees"
            return f"{', '.join(contenders)} {agree} with {self.standard} in {self.dtype} at every stage."
        detail = f" ({worst.detail})" if worst.detail else ""
        return (
            f"{worst.contender} diverges from {self.standard} in {self.dtype}, first at stage {worst.stage!r}{detail}: "
            f"relative difference {worst.difference:.2e}, allowed {worst.bound:.0e}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        first = self.first_divergence
        return {
            "standard": self.standard,
            "dtype": self.dtype,
            "agrees": self.agrees,
            "first_divergence": None if first is None else _plain(first),
            "comparisons": [_plain(comparison) for comparison in self.comparisons],
        }


def compare(
    checkpoint: str | os.PathLike[str] | Source,
    backends: Sequence[str] | str | None = None,
    *,
    dtype: Any = "float32",
    against: str | os.PathLike[str] | Source | None = None,
    texts: Sequence[str] = TEXTS,
    images: Sequence[Any] | None = None,
    **options: Any,
) -> Report:
    """Runs the same texts and images through several backends, or two checkpoints, and compares every stage.

    Args:
        checkpoint: Folder or Hub id of a full CLIP model.
        backends: Backends to compare; every installed one that computes in ``dtype`` when None. The first is the
            standard for the others.
        dtype: "float32", "float64", "bfloat16" or "float16".
        against: Another checkpoint, which becomes the standard; its own tokenizer and image processor are compared too.
        texts: Texts to encode.
        images: Images as `CLIPImageProcessor` takes them; three photographs of the package when None.
        **options: ``subfolder``, ``revision``, ``cache_dir``, ``token``, ``local_files_only`` for ``checkpoint``.

    Raises:
        CheckpointError: A checkpoint cannot be read.
        MissingBackendError: A named backend is not installed, or none is.
        ValueError: There is nothing to compare, or an argument is wrong.
    """
    kind = normal_dtype(dtype, "compare")
    if kind not in BOUNDS:
        raise one_of("dtype", dtype, tuple(BOUNDS))
    if backends is None:
        backends = known.installed(kind) or [known.default()]
    chosen = [backends] if isinstance(backends, str) else list(backends)
    if len(chosen) < (2 if against is None else 1):
        raise bad_input(
            "Two backends, or another checkpoint, are needed for a comparison",
            chosen,
            "Name more backends, or pass against=",
        )
    if images is None:
        images = demo_photos()
    source = Source.of(checkpoint, options)
    if options:
        raise bad_input("compare has no such options", sorted(options), "Remove them", TypeError)
    contenders = [(source, backend) for backend in chosen]
    if against is not None:
        contenders.insert(0, (Source.of(against, {}), contenders[0][1]))

    report = Report("", kind)
    standard: dict[str, Any] | None = None
    for origin, backend in contenders:
        name = backend if against is None else f"{origin} on {backend}"
        found = _run(origin, backend, kind, texts, images)
        if standard is None:
            standard, report.standard = found, name
        else:
            report.comparisons += _compared(name, found, standard, kind)
    return report


def verify_conversion(source: Source, result: Source, dtype: str) -> dict[str, Any]:
    """Runs the source of a conversion and its result through every installed backend; for `clipmb.convert`'s ``check``.

    Args:
        source: What was converted, run on the first installed backend.
        result: What was written, run on each.
        dtype: Dtype to compute in: that of the result, so that rounding to it is no difference.

    Returns:
        ``contenders``, ``dtype``, and the largest ``difference`` of a stage, for the record.

    Raises:
        CheckpointError: They disagree; the message names the first stage and tensor that diverges.
        MissingBackendError: No backend is installed.
    """
    report = compare(result, dtype=dtype if dtype in BOUNDS else "float32", against=source)
    if not report.agrees:
        raise CheckpointError(f"The conversion changes what is computed; nothing was written. {report.explain()}")
    return {
        "contenders": known.installed(),
        "dtype": report.dtype,
        "difference": max(comparison.difference for comparison in report.comparisons),
    }


def relative_difference(a: Any, b: Any) -> float:
    """max|a - b| / max|b| in float64; infinite for other shapes and for what is not finite in one only."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    if not b.size:
        return 0.0
    return float(np.abs(a - b).max() / max(np.abs(b).max(), np.finfo(np.float64).tiny))


def demo_photos() -> list[str]:
    """Returns the paths of the photographs that ship with the package."""
    folder = importlib.resources.files("clipmb").joinpath("data/photos")
    return sorted(str(path) for path in folder.iterdir() if path.name.endswith((".jpg", ".png")))


def _run(source: Source, backend: str, dtype: str, texts: Sequence[str], images: Sequence[Any]) -> dict[str, Any]:
    engine = known.engine(backend).load(source, dtype=dtype)
    try:
        ids, mask, pixels = inputs_of(source, engine.config, texts, images)
        # A framework may keep its parameters in the dtype of the file and cast them where it uses them.
        weights = {name: array.astype(numpy_dtype(dtype)) for name, array in engine.weights().items()}
        stages = engine.stages(ids, mask, pixels.astype(np.float64) if dtype == "float64" else pixels)
        return {"ids": ids, "pixels": pixels, "weights": weights, "stages": stages}
    finally:
        engine.free()


def inputs_of(
    source: Source, config: CLIPConfig, texts: Sequence[str], images: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ids, mask and pixels; a checkpoint whose tokenizer is missing gets random ids of its vocabulary.

    Args:
        source: The checkpoint.
        config: Its config.
        texts: Texts to tokenize, at most as long as the model takes.
        images: Images as `CLIPImageProcessor` takes them.

    Returns:
        (texts, seq) ids, (texts, seq) mask, and (images, channels, height, width) float32.
    """
    limit = config.text_config.max_position_embeddings
    if can_tokenize(source, config.text_config):
        tokenizer = tokenizer_of(source, config.text_config)
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="np")
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
    else:
        rng = np.random.default_rng(0)
        ids = rng.integers(0, config.text_config.vocab_size, (len(texts), limit))
        mask = (np.arange(limit) < rng.integers(2, limit + 1, (len(texts), 1))).astype(np.int64)
    pixels = image_processor_of(source, config.vision_config)(list(images), return_tensors="np")["pixel_values"]
    return ids, mask, pixels


def bound_of(stage: str, dtype: str) -> float:
    """Returns the largest relative difference that still counts as agreement at a stage.

    Args:
        stage: A name of `clipmb.common.outputs.stages`.
        dtype: Key of `BOUNDS`.
    """
    return BOUNDS[dtype][0 if stage.endswith((".pooled", ".projected")) else 1]


def _compared(name: str, found: dict[str, Any], standard: dict[str, Any], dtype: str) -> Iterator[Comparison]:
    """Compares the inputs exactly, the weights exactly, and the stages within the bounds of the dtype."""
    for stage in ("ids", "pixels"):
        equal = np.array_equal(found[stage], standard[stage])
        difference = 0.0 if equal else max(relative_difference(found[stage], standard[stage]), np.finfo(float).tiny)
        yield Comparison(name, stage, difference, 0.0, "" if equal else _where(found[stage], standard[stage]))
    yield _weights(name, found["weights"], standard["weights"])
    for stage, values in standard["stages"].items():
        bound = bound_of(stage, dtype)
        mine = found["stages"].get(stage)
        difference = float("inf") if mine is None else relative_difference(mine, values)
        detail = "" if difference <= bound else "no such stage" if mine is None else _where(mine, values)
        yield Comparison(name, stage, difference, bound, detail)
    for stage in found["stages"].keys() - standard["stages"].keys():
        yield Comparison(name, stage, float("inf"), 0.0, "not a stage of the standard")


def _weights(name: str, mine: dict[str, np.ndarray], standard: dict[str, np.ndarray]) -> Comparison:
    """Compares all weights, which must be equal to the bit, and names the first that is not."""
    for tensor, values in standard.items():
        if tensor not in mine:
            return Comparison(name, "weights", float("inf"), 0.0, f"{tensor} is missing")
        if mine[tensor].shape != values.shape or mine[tensor].tobytes() != values.tobytes():
            difference = max(relative_difference(mine[tensor], values), np.finfo(float).tiny)
            return Comparison(name, "weights", difference, 0.0, f"{tensor}: {_where(mine[tensor], values)}")
    if extra := mine.keys() - standard.keys():
        return Comparison(name, "weights", float("inf"), 0.0, f"{min(extra)} is not in the standard")
    return Comparison(name, "weights", 0.0, 0.0)


def _where(mine: np.ndarray, standard: np.ndarray) -> str:
    """Says where two arrays differ most."""
    if mine.shape != standard.shape:
        return f"shape {mine.shape}, expected {standard.shape}"
    a, b = np.asarray(mine, np.float64), np.asarray(standard, np.float64)
    gaps = np.where(np.isfinite(a) & np.isfinite(b), np.abs(a - b), np.where(a == b, 0.0, np.inf))
    place = tuple(int(i) for i in np.unravel_index(int(np.argmax(gaps)), gaps.shape))
    return f"largest at {list(place)}: {a[place]:.9g}, expected {b[place]:.9g}"


def _plain(comparison: Comparison) -> dict[str, Any]:
    fields = {**asdict(comparison), "agrees": comparison.agrees}
    return {key: str(value) if value == float("inf") else value for key, value in fields.items()}
