"""transformers: its pipelines and Trainer around our objects, and its Auto classes on our folders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments, default_data_collator, pipeline

import clipmb
from clipmb import (
    CLIPForImageClassification,
    CLIPImageProcessor,
    CLIPModel,
    CLIPPipeline,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTokenizerFast,
    CLIPVisionModel,
)
from clipmb.common.small_model import held_out_pictures


@pytest.fixture(scope="session", autouse=True)
def registered() -> None:
    clipmb.register("transformers")
    clipmb.register("transformers")


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


def test_image_feature_extraction(trained):
    model = CLIPVisionModel.from_pretrained(trained)
    processor = CLIPImageProcessor.from_pretrained(trained)
    pictures = held_out_pictures()[0][:2]
    found = pipeline("image-feature-extraction", model=model, image_processor=processor, device="cpu")(pictures)
    with torch.no_grad():
        for each, picture in zip(found, pictures, strict=True):
            expected = model(processor(picture, return_tensors="pt").pixel_values).last_hidden_state
            np.testing.assert_allclose(each, expected, atol=1e-5)


def test_feature_extraction(trained):
    model = CLIPTextModel.from_pretrained(trained)
    tokenizer = CLIPTokenizerFast.from_pretrained(trained)
    texts = ["a cat", "a rocket in the sky"]
    found = pipeline("feature-extraction", model=model, tokenizer=tokenizer, device="cpu")(texts)
    with torch.no_grad():
        for each, text in zip(found, texts, strict=True):
            expected = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
            np.testing.assert_allclose(each, expected, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("head", ["CLIPModel", "CLIPForImageClassification"])
def test_trainer(folder, inputs, tmp_path, head, checkpointing):
    options = {"num_labels": 3, "strict": False} if head == "CLIPForImageClassification" else {}
    torch.manual_seed(0)
    model = getattr(clipmb, head).from_pretrained(folder, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = [{name: value[row] for name, value in inputs.items()} for row in range(4)]
    if head == "CLIPForImageClassification":
        rows = [{"pixel_values": row["pixel_values"], "labels": number % 3} for number, row in enumerate(rows)]
    else:
        rows = [{**row, "return_loss": True} for row in rows]

    def collate(features):
        batch = default_data_collator([{k: v for k, v in row.items() if k != "return_loss"} for row in features])
        return {**batch, "return_loss": True} if head == "CLIPModel" else batch

    arguments = TrainingArguments(
        output_dir=tmp_path / "out", max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, save_steps=1, gradient_checkpointing=checkpointing,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    assert model.is_gradient_checkpointing is checkpointing
    trainer.save_model(tmp_path / "saved")
    after = model.state_dict()
    assert not any(torch.equal(after[name], value) for name, value in before.items() if name.endswith("fc1.weight"))
    assert (tmp_path / "saved" / "config.json").exists()
    for library in (clipmb, transformers):
        for saved in (tmp_path / "saved", tmp_path / "out" / "checkpoint-2"):
            again = getattr(library, head).from_pretrained(saved).state_dict()
            assert again.keys() == after.keys()
            assert all(torch.equal(again[name], value) for name, value in after.items())
    again = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    arguments.max_steps = 3
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert again.state.global_step == 3


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
