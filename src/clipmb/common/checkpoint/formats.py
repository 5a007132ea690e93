"""The checkpoint formats: what each one must provide, and the table that lists them."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Protocol

import numpy as np

from clipmb.common.checkpoint import (
    flax_msgpack,
    keras_weights,
    open_clip,
    openai,
    pytorch,
    safetensors,
    tf_h5,
)
from clipmb.common.checkpoint.fitting import canonical_names, foreign
from clipmb.common.checkpoint.single_towers import infer
from clipmb.common.checkpoint.tensors import Loaded
from clipmb.common.config import CONFIG_NAME, BaseConfig
from clipmb.common.errors import CheckpointError, one_of
from clipmb.common.hub import Source
from clipmb.common.parameters import Spec, is_known
from clipmb.common.saving import Transaction


class Format(Protocol):
    """A file format: a module of this package, or any object with these members."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """Glob patterns of the file names that belong to it, and that `convert` replaces when it overwrites."""
        ...

    @property
    def whole_only(self) -> bool:
        """Whether it holds CLIPModel and no other head."""
        ...

    @property
    def streams(self) -> bool:
        """Whether it is written one tensor at a time, so that memory does not grow with the checkpoint."""
        ...

    @property
    def packages(self) -> tuple[str, ...]:
        """The optional packages without which some or all of its files cannot be read or written."""
        ...

    def read(self, source: Source, variant: str | None = None) -> Loaded | None:
        """Reads the weights of a source.

        Args:
            source: Where they are.
            variant: As in ``model.<variant>.safetensors``. A format without variants finds nothing when one is given.

        Returns:
            The weights; None when the source has none in this format, which the content decides, not the name.

        Raises:
            CheckpointError: The files are of this format, and damaged or hostile.
            MissingBackendError: A package that they need is not installed.
        """
        ...

    def write(
        self,
        save: Transaction,
        arrays: Mapping[str, np.ndarray],
        config: BaseConfig,
        head: str,
        *,
        max_shard_size: int | str = "5GB",
    ) -> list[str]:
        """Writes canonical arrays.

        Args:
            save: The transaction of the folder; files of an earlier save in this format are removed with it.
            arrays: Canonical name to array, in canonical layout. A `Deferred` makes its arrays when they are asked for.
            config: The head's config.
            head: Key of `HEADS`; CLIPModel, if the format is `whole_only`.
            max_shard_size: Larger results are split if the format has shards: bytes, or text like "5GB".

        Returns:
            The names of the files of weights, and of an index or a config that the format has beside them.

        Raises:
            CheckpointError: The format cannot hold this model.
            MissingBackendError: A package that it needs is not installed.
            OSError: The files cannot be written.
        """
        ...

    def names(self, table: list[Spec]) -> dict[str, str]:
        """Maps the canonical names of a head's `specs` to those in the files; several may share one tensor there."""
        ...


OWN = "safetensors"  # what `save_pretrained` writes and every framework maps
# In the order in which a source is searched.
FORMATS: dict[str, Format] = {
    OWN: safetensors,
    "pytorch": pytorch,
    "tf-h5": tf_h5,
    "flax-msgpack": flax_msgpack,
    "openai": openai,
    "open_clip": open_clip,
    "keras-weights": keras_weights,
}


def format_of(name: str) -> Format:
    """Returns a format by its name.

    Raises:
        ValueError: There is no such format.
    """
    if name not in FORMATS:
        raise one_of("format", name, tuple(FORMATS))
    return FORMATS[name]


def owns(file: str) -> bool:
    """Whether a file name belongs to one of the formats."""
    return any(fnmatchcase(file, pattern) for entry in FORMATS.values() for pattern in entry.patterns)


def load(source: Source, variant: str | None = None) -> Loaded:
    """Reads the weights of a source, whichever format they are in.

    Args:
        source: Where they are.
        variant: As in ``model.<variant>.safetensors``.

    Raises:
        CheckpointError: There are none, or they cannot be read.
        MissingBackendError: A package that they need is not installed.
    """
    for entry in FORMATS.values():
        if (loaded := entry.read(source, variant)) is not None:
            return loaded
    wanted = f" of variant {variant!r}" if variant else ""
    raise CheckpointError(
        f"{source} has no weights{wanted} in any of the formats {', '.join(FORMATS)}.{source.listing()}"
    )


def config_of(loaded: Loaded, source: Source) -> tuple[BaseConfig, dict[str, str]]:
    """Returns the config of weights without a ``config.json``: that of their format, or what their shapes imply.

    Args:
        loaded: The weights.
        source: Where they are from.

    Returns:
        The config, and the decisions of the weights with the reasons for what was inferred.

    Raises:
        CheckpointError: There is neither.
    """
    if loaded.config is not None:
        return loaded.config, loaded.decisions
    if loaded.undescribed:
        raise CheckpointError(loaded.undescribed)
    if (inferred := infer(loaded)) is not None:
        config, reasons = inferred
        return config, {**loaded.decisions, **reasons}
    if loaded.tensors and not any(map(is_known, canonical_names(loaded.tensors, "CLIPModel"))):
        raise CheckpointError(foreign(list(loaded.tensors), "CLIPModel", source))
    if source.file is None:
        source.require(CONFIG_NAME)  # raises, with the list of what is there
    raise CheckpointError(
        f"{source} has no config, and its shapes are not those of exactly one published model: activation and number "
        "of heads are unknown. Pass config=, or the folder with its config.json if there is one."
    )
