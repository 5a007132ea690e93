"""transformers: its pipelines around our objects, and its Auto classes on our folders."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from transformers import pipeline

from clipmb import CLIPForImageClassification, CLIPImageProcessor, CLIPModel, CLIPPipeline, CLIPProcessor
from clipmb.common.small_model import held_out_pictures


def test_zero_shot_image_classification(trained):
    processor = CLIPProcessor.from_pretrained(trained)
    ours = pipeline(
        "zero-shot-image-classification", model=CLIPModel.from_pretrained(trained), tokenizer=processor.tokenizer,
        image_processor=processor.image_processor, processor=processor, device="cpu",
    )  # fmt: skip
    pictures = held_out_pictures()[0][:3]
    labels = ["a cat", "a rocket", "a house"]
    expected = CLIPPipeline.from_pretrained(trained, backend="pt").classify(pictures, labels, templates="{}")
    for row, picture in zip(expected, pictures, strict=True):
        found = {each["label"]: each["score"] for each in ours(picture, labels, hypothesis_template="{}")}
        np.testing.assert_allclose([found[label] for label in labels], row, atol=1e-5)


def test_image_classification(folder, tmp_path):
    model = CLIPForImageClassification.from_pretrained(folder, num_labels=3, strict=False)
    processor = CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20})
    found = pipeline("image-classification", model=model, image_processor=processor, device="cpu")(
        transformers.image_utils.PIL.Image.new("RGB", (30, 40))
    )
    assert {each["label"] for each in found} == {"LABEL_0", "LABEL_1", "LABEL_2"}


def test_auto_classes_read_our_folders(trained, inputs):
    theirs = transformers.AutoModel.from_pretrained(trained)
    ours = CLIPModel.from_pretrained(trained)
    assert isinstance(theirs, transformers.CLIPModel)
    for name, value in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name
    assert transformers.AutoConfig.from_pretrained(trained).model_type == "clip"
    picture = transformers.image_utils.PIL.Image.new("RGB", (30, 40), "red")
    text = ["a cat", "two dogs!"]
    processor = transformers.AutoProcessor.from_pretrained(trained, use_fast=False)
    found = processor(text=text, images=picture, padding=True, return_tensors="np")
    expected = CLIPProcessor.from_pretrained(trained)(text=text, images=picture, padding=True, return_tensors="np")
    np.testing.assert_array_equal(found["input_ids"], expected["input_ids"])
