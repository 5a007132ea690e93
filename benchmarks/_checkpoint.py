"""A checkpoint of ViT-B/32's size with seeded random weights, for benchmarks and the demo."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from clipmb import CLIPConfig, CLIPImageProcessor, CLIPProcessor, CLIPTokenizerFast
from clipmb.common.checkpoint import write_safetensors
from clipmb.common.parameters import specs
from clipmb.common.saving import Transaction


def vit_b_32(folder: Path, config: CLIPConfig | None = None) -> Path:
    """Writes the checkpoint with tokenizer and image processor, unless it is there already.

    Args:
        folder: Where.
        config: The size; ViT-B/32 when None.

    Returns:
        The folder.
    """
    config = config or CLIPConfig(architectures=["CLIPModel"], dtype="float32")
    done = folder / ".complete"
    mark = hashlib.sha256(config.to_json_string().encode()).hexdigest()
    if done.exists() and done.read_text() == mark:
        return folder
    rng = np.random.default_rng(0)
    arrays = {}
    for spec in specs(config, "CLIPModel"):
        values = rng.standard_normal(spec.shape, np.float32)
        arrays[spec.name] = np.asarray(values * np.float32(spec.std) + np.float32(spec.mean), np.float32)
    with Transaction(folder) as save:
        save.write("config.json", config.to_json_string())
        write_safetensors(save, arrays)
    CLIPProcessor(CLIPImageProcessor(), CLIPTokenizerFast()).save_pretrained(folder)
    done.write_text(mark)
    return folder
