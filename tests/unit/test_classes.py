"""Class embeddings that are made once: the same results as from the names, and none with another model."""

from __future__ import annotations

import json
import os

import embedding_cases as cases
import numpy as np
import pytest
from conftest import BACKENDS
from data_cases import jpeg
from PIL import Image
from processes import invoke
from safetensors.numpy import save_file

import clipmb
from clipmb import CheckpointError, Classes

LABELS = {"cat": "small cat", "dog": "dog", "cup": "cup of tea"}


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(jpeg(1))
    return path


def test_the_same_as_from_the_names(tmp_path, picture):
    pipeline = cases.pipeline()
    made = Classes.build(pipeline, LABELS, "seven")
    assert (made.labels, made.names, len(made.templates)) == (tuple(LABELS), tuple(LABELS.values()), 7)
    assert np.abs(np.linalg.norm(made.vectors, axis=1) - 1).max() < 1e-6
    made.save(tmp_path / "classes.safetensors")
    read = Classes.open(tmp_path / "classes.safetensors")
    assert (read.labels, read.names, read.templates) == (made.labels, made.names, made.templates)
    assert read.passport == made.passport
    assert np.array_equal(read.vectors, made.vectors)
    expected = pipeline.classify(picture, list(LABELS.values()), "seven")
    calls = pipeline.engine.calls
    assert np.array_equal(pipeline.classify(picture, read), expected)
    assert pipeline.engine.calls == calls + 1  # the image alone
    assert np.array_equal(pipeline.classify(picture, LABELS, "seven"), expected)


def test_lists_and_files_of_names(tmp_path, picture):
    pipeline = cases.pipeline()
    path = tmp_path / "labels.txt"
    path.write_text("\ufeffcat\tsmall cat\ndog\tdog\ncup\tcup of tea\n", "utf-8")
    assert Classes.build(pipeline, path).names == tuple(LABELS.values())
    assert np.array_equal(pipeline.classify(picture, str(path)), pipeline.classify(picture, LABELS))
    assert Classes.build(pipeline, ["cat", "dog"]).names == ("cat", "dog")
    for wrong in ([], ["a", ""], ["a", "a"], {"a": ""}, 3, tmp_path / "none.txt"):
        with pytest.raises(ValueError, match="labels must be"):
            Classes.build(pipeline, wrong)
    with pytest.raises(ValueError, match="may have at most 14 tokens"):
        Classes.build(pipeline, ["very " * 30])


def test_evaluation_takes_them(tmp_path):
    images, labels = clipmb.held_out_pictures()
    images, labels = images[:12], labels[:12]
    rows = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        image.save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "label": label})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    pipeline, names = cases.pipeline(), sorted(set(labels))
    expected = clipmb.evaluate(pipeline, tmp_path / "data.jsonl", labels=names, templates="seven")
    classes = Classes.build(pipeline, names, "seven", long_text="truncate")
    found = clipmb.evaluate(pipeline, tmp_path / "data.jsonl", labels=classes)
    assert found["zero_shot"]["top1"] == expected["zero_shot"]["top1"]
    assert found["zero_shot"]["top5"] == expected["zero_shot"]["top5"]
    with pytest.raises(ValueError, match="templates"):
        clipmb.evaluate(pipeline, tmp_path / "data.jsonl", labels=classes, templates="seven")
    with pytest.raises(ValueError, match=r"weights: .* there, .* here"):
        clipmb.evaluate(cases.pipeline(2.0), tmp_path / "data.jsonl", labels=classes)


def test_another_model_is_refused(picture):
    classes = Classes.build(cases.pipeline(), LABELS)
    with pytest.raises(ValueError, match=r"one model made them.*Received: weights: .* there, .* here"):
        cases.pipeline(2.0).classify(picture, classes)
    with pytest.raises(ValueError, match="have their templates already"):
        cases.pipeline().classify(picture, classes, "seven")
    other = cases.pipeline()
    other.processor.image_processor.image_mean = [0.1, 0.2, 0.3]  # no text depends on it
    other.classify(picture, classes)


def test_files_that_are_none(tmp_path, picture):
    path = tmp_path / "classes.safetensors"
    Classes.build(cases.pipeline(), LABELS).save(path)
    content = path.read_bytes()
    for wrong in (content[:40], b"", b"\xff" * 100, content.replace(b'"labels', b'"lebals', 1)):
        path.write_bytes(wrong)
        with pytest.raises(CheckpointError, match="cannot be read as classes"):
            Classes.open(path)
    save_file({"classes": np.zeros((3, 6), np.float32)}, path)
    with pytest.raises(CheckpointError, match="must be a file of clipmb classes"):
        Classes.open(path)
    with pytest.raises(CheckpointError, match="cannot be read as classes"):
        Classes.open(tmp_path / "none.safetensors")
    classes = Classes.build(cases.pipeline(), LABELS)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        classes.save(tmp_path / "classes.npz")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ValueError, match="written to a file"):
        classes.save(tmp_path / "folder.safetensors")
    with pytest.raises(ValueError, match="in a folder that exists"):
        classes.save(tmp_path / "none" / "classes.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_pipes_are_refused_at_once(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(CheckpointError, match=r"cannot be read as classes.*no file"):
        Classes.open(pipe)
    with pytest.raises(ValueError, match=r"readable text file.*no file"):
        Classes.build(cases.pipeline(), pipe)


def test_the_templates_of_imagenet():
    assert len(clipmb.TEMPLATES["imagenet80"]) == len(set(clipmb.TEMPLATES["imagenet80"])) == 80
    assert all(template.count("{}") == 1 for template in clipmb.TEMPLATES["imagenet80"])
    assert set(clipmb.TEMPLATES["seven"]) < set(clipmb.TEMPLATES["imagenet80"])


def test_commands(tmp_path):
    images, labels = clipmb.held_out_pictures()
    number = labels.index("rocket")
    path = tmp_path / "rocket.png"
    images[number].convert("RGB").resize((64, 64), Image.Resampling.BICUBIC).save(path)
    out = tmp_path / "classes.safetensors"
    backend = ["--backend", BACKENDS[0]]
    done = invoke("classes", "--labels", "rocket,panda,pizza", "--template", "an emoji of {}", "--out", out, *backend)
    assert done.exit_code == 0, done.output
    assert "3 classes in 1 templates" in done.output
    ready = json.loads(invoke("classify", path, "--classes", out, "--json", *backend).stdout)
    named = invoke("classify", path, "-l", "rocket,panda,pizza", "--template", "an emoji of {}", "--json", *backend)
    assert ready["images"] == json.loads(named.stdout)["images"]
    for wrong, message in (
        (["--labels", "a,b"], "either --labels or --classes"),
        (["--template", "x {}"], "--template was decided when the classes were made"),
        (["--long-text", "mean"], "--long-text was decided when the classes were made"),
    ):
        bad = invoke("classify", path, "--classes", out, *wrong, *backend)
        assert bad.exit_code == 2
        assert message in bad.output
    assert invoke("classify", path, *backend).exit_code == 2
    missing = invoke("classify", path, "--labels", tmp_path / "lables.txt", *backend)
    assert (missing.exit_code, "A file of labels must exist" in missing.output) == (1, True)
    other = invoke("classify", path, "--classes", out, "--dtype", "bfloat16", *backend)
    assert other.exit_code == 1
    assert "dtype: float32 there, bfloat16 here" in other.output
