"""Optimum's models and a pipeline of transformers, over a folder that `clipmb.export` wrote, as it is."""

from __future__ import annotations

import numpy as np
import pytest
from optimum.onnxruntime import ORTModelForCustomTasks, ORTModelForZeroShotImageClassification
from transformers import AutoProcessor, pipeline

import clipmb
from clipmb import CLIPPipeline

LABELS = ["a cat", "a photo of two dogs", "a pizza"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "out"
    clipmb.export(clipmb.small_model(), out)
    return out


@pytest.fixture(scope="module")
def ours():
    return CLIPPipeline.from_pretrained(clipmb.small_model(), backend="onnx")


@pytest.fixture(scope="module")
def pictures():
    return clipmb.held_out_pictures()[0][:6]


def test_zero_shot_classification(folder, ours, pictures):
    model = ORTModelForZeroShotImageClassification.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder, use_fast=False)
    inputs = processor(text=LABELS, images=pictures, return_tensors="pt", padding=True)
    found = model(**inputs)
    np.testing.assert_allclose(found.logits_per_image, ours.similarity(pictures, LABELS), atol=1e-4)
    classify = pipeline(
        "zero-shot-image-classification", model=model, tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )  # fmt: skip
    expected = ours.classify(pictures, LABELS, templates="{}")
    for row, wanted in zip(
        classify(pictures, candidate_labels=LABELS, hypothesis_template="{}"), expected, strict=True
    ):
        scores = {result["label"]: result["score"] for result in row}
        np.testing.assert_allclose([scores[label] for label in LABELS], wanted, atol=1e-4)


def test_single_towers(folder, ours, pictures):
    processor = AutoProcessor.from_pretrained(folder, use_fast=False)
    text = ORTModelForCustomTasks.from_pretrained(folder, file_name="text_model.onnx")
    found = text(**processor(text=LABELS, return_tensors="pt", padding=True))["text_embeds"]
    np.testing.assert_allclose(found, ours.encode_text(LABELS, normalize=False), atol=1e-5)
    image = ORTModelForCustomTasks.from_pretrained(folder, file_name="vision_model.onnx")
    found = image(**processor(images=pictures, return_tensors="pt"))["image_embeds"]
    np.testing.assert_allclose(found, ours.encode_image(pictures, normalize=False), atol=1e-5)
