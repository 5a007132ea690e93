"""What the tests of all checkpoint formats share: writing, reading, comparing, and random small configurations."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
from cases import CONFIGS, config_of, random_arrays
from hypothesis import strategies as st

from clipmb.common.checkpoint import fit, formats
from clipmb.common.config import BaseConfig, CLIPConfig
from clipmb.common.hub import Source
from clipmb.common.parameters import specs
from clipmb.common.saving import Transaction

DTYPES = {"float32": np.float32, "float16": np.float16, "float64": np.float64, "bfloat16": ml_dtypes.bfloat16}

# A model that every format holds: OpenAI's files imply heads of 64, an inner width of four times the width, and pooling
# at the largest id.
EVERYWHERE = CLIPConfig(
    {
        "vocab_size": 99, "hidden_size": 64, "intermediate_size": 256, "projection_dim": 24, "num_hidden_layers": 2,
        "num_attention_heads": 1, "max_position_embeddings": 13, "eos_token_id": 98, "bos_token_id": 97,
    },
    {
        "hidden_size": 128, "intermediate_size": 512, "projection_dim": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 20, "patch_size": 4,
    },
    projection_dim=24,
    num_labels=7,
)  # fmt: skip


def arrays_of(config: BaseConfig, head: str, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random values for every parameter."""
    wide = random_arrays(config, head, seed, "float64")
    return {name: array.astype(DTYPES[dtype]) for name, array in wide.items()}


def write_as(name: str, folder: Path, arrays, config: BaseConfig, head: str, size: int | str = "5GB") -> list[str]:
    """Writes a checkpoint in a format, without its config."""
    with Transaction(folder) as save:
        return formats.format_of(name).write(save, arrays, config, head, max_shard_size=size)


def written(
    name: str, folder: Path, head: str = "CLIPModel", dtype: str = "float32", size: int | str = "5GB"
) -> tuple[BaseConfig, dict[str, np.ndarray]]:
    """Writes a head of the plain case in a format; returns its config and arrays."""
    config = config_of(head, CONFIGS["plain"])
    arrays = arrays_of(config, head, dtype)
    write_as(name, folder, arrays, config, head, size)
    return config, arrays


def read_as(name: str, path: Path, config: BaseConfig, head: str) -> dict[str, np.ndarray]:
    """Reads a checkpoint, which must be found to be in this format, strictly."""
    loaded = formats.load(Source(str(path)))
    assert loaded.format == name
    return fit(loaded.tensors, specs(config, head), head)[0]


@st.composite
def heads_and_configs(draw: st.DrawFn, heads: tuple[str, ...]) -> tuple[str, BaseConfig]:
    """A head with a small random configuration of its own."""
    number = st.integers
    text = {
        "vocab_size": draw(number(1, 40)), "hidden_size": 2 * draw(number(1, 9)),
        "intermediate_size": draw(number(1, 20)), "num_hidden_layers": draw(number(0, 12)), "num_attention_heads": 2,
        "max_position_embeddings": draw(number(1, 9)),
    }  # fmt: skip
    patch = draw(number(1, 4))
    vision = {
        "hidden_size": 3 * draw(number(1, 6)), "intermediate_size": draw(number(1, 20)),
        "num_hidden_layers": draw(number(0, 12)), "num_attention_heads": 3, "num_channels": draw(number(1, 4)),
        "patch_size": patch, "image_size": patch * draw(number(1, 4)),
    }  # fmt: skip
    proj = draw(number(1, 9))
    config = CLIPConfig(
        {**text, "projection_dim": proj},
        {**vision, "projection_dim": proj},
        projection_dim=proj,
        num_labels=draw(number(1, 5)),
    )
    head = draw(st.sampled_from(heads))
    return head, config_of(head, config)
