"""The small model that comes with the package: how good it is on an artist it never saw, the same in every backend.

The pictures are 360 of Twemoji's, chosen by a seed; the labels are those of all emoji.
"""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
from conftest import ENGINES
from safetensors.numpy import load_file

from clipmb import CLIPConfig, CLIPPipeline, CLIPTokenizerFast
from clipmb.common.small_model import TEMPLATES, held_out_pictures, small_labels, small_model
from clipmb.common.zero_shot import class_embeddings

TOP_1, TOP_5 = 38, 60  # percent that every later version of the model must reach; the model card has what this one does


@pytest.fixture(scope="module")
def embeddings():
    """Unit embeddings of the pictures and of all labels, by backend."""
    pictures, _ = held_out_pictures()
    found = {}
    for backend in ENGINES:
        clip = CLIPPipeline.from_pretrained(small_model(), backend=backend)
        encode = partial(clip.encode_text, batch_size=640)  # few shapes: JAX compiles each
        images = clip.encode_image(pictures, batch_size=90)
        found[backend] = images, class_embeddings(encode, small_labels(), TEMPLATES)
        clip.engine.free()
    return found


def ranks(images, classes):
    """The place of the right label of each picture, from 0; labels of equal similarity come first."""
    _, truth = held_out_pictures()
    index = {label: i for i, label in enumerate(small_labels())}
    similar = images @ classes.T
    right = similar[np.arange(len(truth)), [index[label] for label in truth]]
    return (similar >= right[:, None]).sum(axis=1) - 1


@pytest.mark.parametrize("backend", ENGINES)
def test_an_artist_never_seen_in_training(embeddings, backend):
    found = ranks(*embeddings[backend])
    assert 100 * np.mean(found < 1) >= TOP_1
    assert 100 * np.mean(found < 5) >= TOP_5


@pytest.mark.parametrize("backend", ENGINES)
def test_the_score_is_of_these_pictures_and_labels(embeddings, backend):
    """Pictures against labels that are not theirs score as chance does: the bars above cannot be met by accident."""
    images, classes = embeddings[backend]
    assert 100 * np.mean(ranks(np.roll(images, 180, axis=0), classes) < 5) < 5


@pytest.mark.several
def test_every_backend_predicts_the_same(embeddings):
    first, *others = embeddings.values()
    similar = first[0] @ first[1].T
    for images, classes in others:
        assert np.abs(images - first[0]).max() < 1e-5
        assert np.abs(classes - first[1]).max() < 1e-5
        assert ((images @ classes.T).argmax(axis=1) == similar.argmax(axis=1)).all()


def test_labels():
    labels = small_labels()
    pictures, truth = held_out_pictures()
    assert len(labels) == len(set(labels)) == 1914
    assert len(pictures) == len(set(truth)) == 360
    assert set(truth) <= set(labels)
    assert {(picture.size, picture.mode) for picture in pictures} == {((64, 64), "RGB")}
    assert all(any(low < high for low, high in picture.getextrema()) for picture in pictures)


def test_files():
    folder = small_model()
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000
    assert {str(array.dtype) for array in load_file(folder / "model.safetensors").values()} == {"float16"}
    config, tokenizer = CLIPConfig.from_pretrained(folder).text_config, CLIPTokenizerFast.from_pretrained(folder)
    ids = (config.bos_token_id, config.eos_token_id, config.pad_token_id, config.vocab_size)
    assert ids == (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer))
    longest = max(len(row) for row in tokenizer([f"an emoji of {label}" for label in small_labels()])["input_ids"])
    assert longest <= config.max_position_embeddings


def test_every_set_is_named_with_its_licence():
    """The sets that example trains on, the notices beside the weights, and the card."""
    folder = small_model()
    card, notices = ((folder / name).read_text("utf-8") for name in ("README.md", "LICENSE-training-data.txt"))
    sets = (
        "noto", "noto-v1", "fxemoji", "fluent-emoji", "fluent-emoji-flat", "fluent-emoji-high-contrast", "flag",
        "circle-flags", "flagpack",
    )  # fmt: skip
    for name in sets:
        assert f"{name} 1." in notices
        assert f"| {name} |" in card
    for text in ("Permission is hereby granted", "UNICODE LICENSE V3", "Microsoft", "Lipiridis", "HatScripts"):
        assert text in notices
    assert "CC-BY 4.0" in (folder / "LICENSE-pictures.md").read_text("utf-8")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["CLIPModel"]
