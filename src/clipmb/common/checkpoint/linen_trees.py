"""The weights of a linen module that is none of CLIP's: a table made from its tree, and the files that fit it.

In such a file the parameters have their canonical names and layouts, which PyTorch would give them, or linen's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from clipmb.common.checkpoint import flax_msgpack, safetensors
from clipmb.common.checkpoint.fitting import LoadingInfo, chosen
from clipmb.common.checkpoint.names import in_canonical
from clipmb.common.checkpoint.tensors import Deferred, Lazy
from clipmb.common.errors import CheckpointError
from clipmb.common.hub import Source
from clipmb.common.parameters import KINDS, Spec

# Name and number of axes of a leaf to its kind.
_KINDS = {
    ("kernel", 2): "linear", ("kernel", 4): "convolution", ("embedding", 2): "embedding", ("scale", 1): "norm scale",
    ("bias", 1): "bias",
}  # fmt: skip


def tree_specs(shapes: Mapping[tuple[str, ...], tuple[int, ...]]) -> list[Spec]:
    """Lists the parameters of any linen module, as `clipmb.common.parameters.specs` does for CLIP's.

    Args:
        shapes: Path of each leaf to its shape in linen's layout.
    """
    table = [_spec(path, shape, _KINDS.get((path[-1], len(shape)), "raw")) for path, shape in shapes.items()]
    count = Counter(
        spec.name for spec in table
    )  # a module may have a kernel and a scale, which PyTorch both calls weight
    return [
        spec if count[spec.name] == 1 else _spec(path, shapes[path], "raw")
        for path, spec in zip(shapes, table, strict=True)
    ]


def _spec(path: tuple[str, ...], shape: tuple[int, ...], kind: str) -> Spec:
    row = KINDS[kind]
    name = ".".join((*path[:-1], row.pt) if row.pt else path)
    return Spec(name, kind, row.to_canonical(np.broadcast_to(0, shape)).shape)


def read_tree(
    source: Source,
    table: Sequence[Spec],
    owner: str,
    *,
    base: str = "",
    variant: str | None = None,
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
) -> tuple[dict[str, np.ndarray], LoadingInfo]:
    """Reads the parameters of a linen module from ``model.safetensors`` or ``flax_model.msgpack``.

    Args:
        source: Where the files are.
        table: The parameters, as `tree_specs` lists them.
        owner: The model's class, for messages.
        base: The attribute of the base model, which only the file's names or only the module's may begin with.
        variant: Read ``model.<variant>.safetensors``.
        strict: Raise for missing and unexpected names.
        ignore_mismatched_sizes: Leave parameters of another shape out instead of raising.

    Returns:
        Canonical name to array, and what differed.

    Raises:
        CheckpointError: There are no weights, they cannot be read, or they do not fit.
    """
    found = safetensors.find(source, variant) or flax_msgpack.find(source, variant)
    if found is None:
        raise CheckpointError(
            f"{source} has neither safetensors nor msgpack weights, which {owner} reads.{source.listing()}"
        )
    known = {name: spec for spec in table for name in (".".join(spec.path("flax")), spec.name)}
    tensors: dict[str, Lazy] = {}
    twice, unexpected = [], []
    for name, tensor in _rebased(found[0], base, known).items():
        spec = known.get(name)
        if spec is None:
            unexpected.append(name)
        elif spec.name in tensors:
            twice.append(spec.name)
        else:
            tensors[spec.name] = tensor if name == spec.name else in_canonical(tensor, spec.kind)
    if twice:
        raise CheckpointError(f"{source} has two tensors for one parameter:", twice)
    return chosen(
        Deferred(tensors), table, unexpected, owner, source,
        strict=strict, ignore_mismatched_sizes=ignore_mismatched_sizes, integers=True,
    )  # fmt: skip


def _rebased(tensors: Mapping[str, Lazy], base: str, known: Mapping[str, Spec]) -> dict[str, Lazy]:
    """Gives the names in a file dots, and the base model's attribute in front, or takes it away, where it must be."""
    plain = {name.replace("/", "."): tensor for name, tensor in tensors.items()}
    plain = {name: tensor for name, tensor in plain.items() if not name.endswith("embeddings.position_ids")}
    start = f"{base}."
    in_file, in_model = (any(name.startswith(start) for name in names) for names in (plain, known))
    if in_file and not in_model:  # the other weights are those of a head
        return {name.removeprefix(start): tensor for name, tensor in plain.items() if name.startswith(start)}
    return {start + name: tensor for name, tensor in plain.items()} if in_model and not in_file else plain
