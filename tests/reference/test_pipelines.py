"""The pipelines of transformers 4 around our models give what they give around its own."""

from __future__ import annotations

import numpy as np
import pytest
import transformers
from cases import CONFIGS, write_checkpoint
from PIL import Image

import clipmb

pytestmark = pytest.mark.backend("pt")

SIZES = {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}}
TASKS = {
    "image-feature-extraction": ("CLIPVisionModel", "image"),
    "image-classification": ("CLIPForImageClassification", "image"),
    "feature-extraction": ("CLIPTextModel", "text"),
    "zero-shot-image-classification": ("CLIPModel", "both"),
}


@pytest.mark.parametrize("task", TASKS)
def test_pipelines(task, tmp_path):
    clipmb.register("transformers")
    head, takes = TASKS[task]
    plain = CONFIGS["plain"]
    config = type(plain).from_dict({**plain.to_dict(), "projection_dim": 24, "num_labels": 7})
    config.text_config.vocab_size, config.text_config.max_position_embeddings = 49408, 77
    write_checkpoint(tmp_path, config, head)
    clipmb.CLIPTokenizerFast().save_pretrained(tmp_path)
    clipmb.CLIPImageProcessor(**SIZES).save_pretrained(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))
    found = []
    for library in (clipmb, transformers):
        options = {"model": getattr(library, head).from_pretrained(tmp_path, attn_implementation="eager")}
        if takes != "text":
            options["image_processor"] = library.CLIPImageProcessor.from_pretrained(tmp_path)
        if takes != "image":
            options["tokenizer"] = library.CLIPTokenizerFast.from_pretrained(tmp_path)
        pipe = transformers.pipeline(task, device="cpu", **options)
        inputs = ("a cat",) if takes == "text" else (picture,)
        made = pipe(*inputs, **({"candidate_labels": ["a cat", "a dog"]} if takes == "both" else {}))
        if task.endswith("classification"):
            made = [each["score"] for each in sorted(made, key=lambda each: each["label"])]
        found.append(np.array(made))
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)
