"""Names of every dialect to canonical ones, and the strict check against what a head needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipmb.common.checkpoint.tensors import Deferred, lazy
from clipmb.common.checkpoint.wrapping import common_start, stripped
from clipmb.common.errors import CheckpointError, ShapeMismatchError, bad_input
from clipmb.common.parameters import HEADS, Spec, is_known

# transformers 5 saves CLIPTextModel and CLIPVisionModel without the tower's prefix.
_BARE = ("embeddings.", "encoder.layers.", "final_layer_norm.", "pre_layrnorm.", "post_layernorm.")
_TEXT_ONLY = ("embeddings.token_embedding.", "final_layer_norm.")
_VISION_ONLY = ("embeddings.class_embedding", "embeddings.patch_embedding.", "pre_layrnorm.", "post_layernorm.")


@dataclass
class LoadingInfo:
    """How a file differed from the model.

    Attributes:
        missing_keys: Parameters that the file lacks; they were newly initialised.
        unexpected_keys: Names in the file that no parameter of the model has, and no other head of CLIP either.
        mismatched_keys: (name, shape in the file, shape in the model); they were newly initialised.
    """

    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched_keys: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @classmethod
    def between(cls, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> LoadingInfo:
        """Compares the shapes that were found with those that a model needs, both by name."""
        return cls(
            [name for name in expected if name not in found],
            [name for name in found if name not in expected],
            [(n, found[n], shape) for n, shape in expected.items() if n in found and found[n] != shape],
        )

    def problems(self, *, strict: bool = True, ignore_mismatched_sizes: bool = False) -> list[str]:
        """Returns one line for each difference.

        Args:
            strict: Include missing and unexpected names.
            ignore_mismatched_sizes: Leave other shapes out.
        """
        lines = []
        if strict:
            lines += [f"missing: {name}" for name in self.missing_keys]
            lines += [f"unexpected: {name}" for name in self.unexpected_keys]
        if not ignore_mismatched_sizes:
            lines += [f"shape: {name} is {got} and must be {shape}" for name, got, shape in self.mismatched_keys]
        return lines

    def to_dict(self) -> dict[str, list]:
        """Returns the lists as ``output_loading_info=True`` gives them in transformers."""
        return {**self.__dict__, "error_msgs": []}

    @property
    def initialised(self) -> list[str]:
        """The parameters that did not come from the file."""
        return [*self.missing_keys, *(name for name, _, _ in self.mismatched_keys)]


def canonical_names(names: Iterable[str], head: str) -> dict[str, str]:
    """Maps canonical names to those in a file, without prefixes of training and the ``position_ids`` of old files.

    Raises:
        CheckpointError: Two names in the file stand for the same parameter.
    """
    plain = {name: stripped(name).removeprefix("clip.") for name in names}
    tower = _bare_tower(plain.values(), head)
    found: dict[str, str] = {}
    twice = []
    for name, short in plain.items():
        if short.endswith("embeddings.position_ids"):
            continue
        canonical = f"{tower}.{short}" if tower and short.startswith(_BARE) else short
        if canonical in found:
            twice.append(f"{canonical}: {found[canonical]} and {name}")
        found[canonical] = name
    if twice:
        raise CheckpointError("The file has two tensors for one parameter:", twice)
    return found


def mapped(tensors: Mapping[str, np.ndarray], key_mapping: Mapping[str, str]) -> Mapping[str, np.ndarray]:
    """Renames tensors as transformers 4 does: in each name, the first pattern that is found is replaced wherever it is.

    Args:
        tensors: Name to array, each made when it is asked for where it was.
        key_mapping: Regular expression to replacement.

    Raises:
        ValueError: A pattern or a replacement is no regular expression.
        CheckpointError: Two tensors would get one name.
    """
    found: dict[str, str] = {}
    twice = []
    for name in tensors:
        new = name
        for pattern, replacement in key_mapping.items():
            try:
                new, count = re.subn(pattern, replacement, name)
            except (re.error, TypeError) as error:
                rule = f"key_mapping has regular expressions and their replacements ({error})"
                raise bad_input(rule, {pattern: replacement}, "Correct it") from error
            if count:
                break
        if new in found:
            twice.append(f"{new}: {found[new]} and {name}")
        found[new] = name
    if twice:
        raise CheckpointError("key_mapping gives two tensors one name:", twice)
    made = lazy(tensors)
    return Deferred({new: made[name] for new, name in found.items()})


def _bare_tower(names: Iterable[str], head: str) -> str | None:
    bare = [name for name in names if name.startswith(_BARE)]
    if not bare:
        return None
    if any(name.startswith(_TEXT_ONLY) for name in bare):
        return "text_model"
    if any(name.startswith(_VISION_ONLY) for name in bare):
        return "vision_model"
    return "text_model" if HEADS[head][0] else "vision_model"


def fit(
    tensors: Mapping[str, np.ndarray],
    table: Sequence[Spec],
    head: str,
    *,
    origin: Any = "the checkpoint",
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
) -> tuple[dict[str, np.ndarray], LoadingInfo]:
    """Chooses the arrays of a head from the tensors of a file of any dialect.

    Parameters of other heads are ignored; everything else that does not fit is an error, and all of it is reported at
    once.

    Args:
        tensors: Name in the file to array.
        table: `specs` of the head.
        head: Key of `HEADS`.
        origin: The file, for the message.
        strict: Raise for missing and unexpected names.
        ignore_mismatched_sizes: Leave parameters of another shape out instead of raising.

    Returns:
        Canonical name to array, for the parameters that the file has, and what differed.

    Raises:
        CheckpointError: Something is missing, unexpected, or not floating-point; a `ShapeMismatchError` where something
            is of another shape.
    """
    names = canonical_names(tensors, head)
    own = {"text_model": HEADS[head][0], "vision_model": HEADS[head][1]}
    known = {spec.name for spec in table}
    unexpected = [
        name
        for canonical, name in names.items()
        if canonical not in known and (not is_known(canonical) or own.get(canonical.split(".")[0], False))
    ]
    if strict and names and not known & names.keys():
        raise CheckpointError(foreign(list(names.values()), head, origin))
    found = lazy(tensors)
    named = Deferred({canonical: found[name] for canonical, name in names.items()})
    return chosen(
        named, table, unexpected, head, origin, strict=strict, ignore_mismatched_sizes=ignore_mismatched_sizes
    )


def chosen(
    tensors: Mapping[str, np.ndarray],
    table: Sequence[Spec],
    unexpected: list[str],
    owner: str,
    origin: Any,
    *,
    strict: bool,
    ignore_mismatched_sizes: bool,
    integers: bool = False,
) -> tuple[dict[str, np.ndarray], LoadingInfo]:
    """Chooses the arrays of a table from tensors with canonical names, and reports all that does not fit at once.

    Args:
        tensors: Canonical name to array; others are left alone.
        table: The parameters of the model.
        unexpected: The names in the file that nothing knows.
        owner: What the table belongs to, for the message.
        origin: The file, for the message.
        strict: As in `fit`.
        ignore_mismatched_sizes: As in `fit`.
        integers: Allow arrays that are not floating-point.

    Returns:
        As `fit`.

    Raises:
        CheckpointError: As `fit`.
    """
    arrays, shapes, problems = {}, {}, []
    for spec in table:
        if spec.name not in tensors:
            continue
        array = tensors[spec.name]
        array = array.reshape(()) if (array.shape, spec.shape) == ((1,), ()) else array
        shapes[spec.name] = array.shape
        if array.dtype.kind not in "fV" and not integers:  # ml_dtypes' bfloat16 is of kind V
            problems.append(f"not floating-point: {spec.name} is {array.dtype}")
        elif array.shape == spec.shape:
            arrays[spec.name] = array
    info = LoadingInfo.between(shapes, {spec.name: spec.shape for spec in table})
    info.unexpected_keys = unexpected
    problems += info.problems(strict=strict, ignore_mismatched_sizes=ignore_mismatched_sizes)
    if problems:
        mismatched = info.mismatched_keys and not ignore_mismatched_sizes
        raise (ShapeMismatchError if mismatched else CheckpointError)(
            f"{origin} does not fit {owner}. Pass strict=False to initialise missing weights and ignore unexpected "
            "ones, ignore_mismatched_sizes=True to initialise those of another shape. Problems:",
            problems,
        )
    return arrays, info


def foreign(names: list[str], head: str, origin: Any) -> str:
    """Returns the message for a file none of whose names belongs to a head."""
    start = common_start(names)
    where = f", all of which begin with {start[:200]!r}" if start else ""
    few = ", ".join(name[:200] for name in names[:5])
    fix = "Remove what stands before CLIP's own names" if start else "Pass the weights of a CLIP"
    return (
        f"{origin} has no weight of {head}, whose names begin with text_model or vision_model. Received: "
        f"{len(names)} names{where}: {few}{', …' if len(names) > 5 else ''}. {fix}."
    )
