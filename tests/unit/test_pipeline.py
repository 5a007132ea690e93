"""The pipeline: batches, order, long text, templates, backends; over a small random checkpoint."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from cases import VISION, relative, write_checkpoint
from conftest import BACKENDS, ENGINES
from PIL import Image
from safetensors.numpy import load_file, save_file

from clipmb import (
    CheckpointError,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPPipeline,
    CLIPTokenizerFast,
    MissingBackendError,
    backends,
)
from clipmb import pipeline as pipelines
from clipmb.common.saving import Transaction
from clipmb.common.zero_shot import TEMPLATES, class_embeddings, prompt_templates, softmax

TEXT = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = CLIPConfig({**TEXT, "max_position_embeddings": 16}, VISION, projection_dim=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("small"), CONFIG)


@pytest.fixture(scope="module", params=ENGINES)
def pipeline(request, folder):
    return CLIPPipeline.from_pretrained(folder, backend=request.param)


def pictures(count=5):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8)) for i in range(count)]


def test_images_keep_their_order_over_batches(pipeline):
    whole = pipeline.encode_image(pictures(), batch_size=32)
    parts = pipeline.encode_image(pictures(), batch_size=2)
    assert whole.shape == (5, 24)
    assert whole.dtype == np.float32
    assert np.abs(whole - parts).max() < 1e-6
    assert np.abs(np.linalg.norm(whole, axis=1) - 1).max() < 1e-6
    single = pipeline.encode_image(pictures()[3])
    assert np.abs(single[0] - whole[3]).max() < 1e-6
    assert np.abs(whole - whole[0]).max() > 1e-3


def test_texts_keep_their_order_over_batches_of_like_length(pipeline):
    texts = ["a cat", "x", "a photo of a very small dog on a mat", "a", "two cats and a dog"]
    whole = pipeline.encode_text(texts)
    assert whole.shape == (5, 24)
    assert np.abs(whole - pipeline.encode_text(texts, batch_size=2)).max() < 1e-6
    for i, text in enumerate(texts):
        assert np.abs(pipeline.encode_text(text)[0] - whole[i]).max() < 1e-6
    assert np.abs(whole[0] - whole[1]).max() > 1e-3
    raw = pipeline.encode_text(texts, normalize=False)
    assert np.abs(raw / np.linalg.norm(raw, axis=1, keepdims=True) - whole).max() < 1e-6
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).max() > 1e-2


def test_trimming_the_padding_changes_nothing(pipeline):
    texts = ["a cat", "a photo of a dog"]
    tokens = CLIPTokenizerFast()(texts, padding="max_length", max_length=16, return_tensors="np")
    padded = pipeline.engine.text_features(tokens["input_ids"], tokens["attention_mask"])
    assert np.abs(padded - pipeline.encode_text(texts, normalize=False)).max() < 1e-5


def test_long_text_is_reported(pipeline):
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    with pytest.raises(ValueError, match="text 1 with 16 tokens"):
        pipeline.encode_text(["a cat", long])
    cut = pipeline.encode_text(["a cat", long], long_text="truncate")
    words = long.split()
    assert np.abs(cut[1] - pipeline.encode_text(" ".join(words[:14]))[0]).max() < 1e-6
    mean = pipeline.encode_text(["a cat", long], long_text="mean")
    assert np.abs(mean[0] - cut[0]).max() < 1e-6
    pieces = pipeline.encode_text([" ".join(words[:14]), " ".join(words[14:])])
    expected = pieces.mean(axis=0) / np.linalg.norm(pieces.mean(axis=0))
    assert np.abs(mean[1] - expected).max() < 1e-6
    with pytest.raises(ValueError, match="long_text"):
        pipeline.encode_text(long, long_text="split")


def test_classify_by_hand(pipeline):
    labels = ["cat", "dog", "cup"]
    found = pipeline.classify(pictures(), labels)
    texts = pipeline.encode_text([f"a photo of a {label}." for label in labels]).astype(np.float64)
    logits = np.exp(2.0) * pipeline.encode_image(pictures()).astype(np.float64) @ texts.T
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert found.shape == (5, 3)
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(softmax(pipeline.similarity(pictures(), [f"a photo of a {x}." for x in labels])) - found).max() < 1e-5


def test_several_templates_are_averaged(pipeline):
    classes = class_embeddings(pipeline.encode_text, ["cat", "dog"], "seven")
    one = pipeline.encode_text([template.format("dog") for template in TEMPLATES["seven"]]).mean(axis=0)
    assert np.abs(classes[1] - one / np.linalg.norm(one)).max() < 1e-6
    several = pipeline.classify(pictures(), ["cat", "dog"], ["a {}", "the {}"])
    assert np.abs(several.sum(axis=1) - 1).max() < 1e-6


def test_empty_lists_are_empty_arrays(pipeline):
    assert pipeline.encode_image([]).shape == (0, 24)
    assert pipeline.encode_text([]).shape == (0, 24)


@pytest.mark.parametrize("labels", [[], "a cat", ["", "a"], [3]])
def test_bad_labels(pipeline, labels):
    with pytest.raises(ValueError, match="labels"):
        pipeline.classify(pictures(), labels)


@pytest.mark.parametrize("templates", [[], "a photo", ["a {}", "b"], [3]])
def test_bad_templates(templates):
    with pytest.raises(ValueError, match="template"):
        prompt_templates(templates)


def test_bad_batches(pipeline):
    for size in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="batch_size"):
            pipeline.encode_text(["a"], batch_size=size)


def test_an_unreadable_picture_is_named_by_its_place_in_the_whole_list(pipeline, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"[Ii]mage 3\b"):
        pipeline.encode_image([*pictures(3), str(path)], batch_size=2)


def test_the_backend_is_chosen_and_told(folder, monkeypatch):
    assert CLIPPipeline.from_pretrained(folder).backend == backends.installed()[0]
    monkeypatch.setattr(backends, "installed", list)
    with pytest.raises(MissingBackendError, match="pip install"):
        CLIPPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="backend"):
        CLIPPipeline.from_pretrained(folder, backend="mxnet")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 3e-2), ("float64", 1e-6)])
def test_dtypes(folder, backend, dtype, bound):
    low = CLIPPipeline.from_pretrained(folder, backend=backend, dtype=dtype).encode_image(pictures())
    high = CLIPPipeline.from_pretrained(folder, backend=backend).encode_image(pictures())
    assert low.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert 0 < np.abs(low - high).max() < bound


@pytest.mark.parametrize("backend", ENGINES)
def test_compiled_engines_agree_for_every_batch_size(folder, backend):
    plain = CLIPPipeline.from_pretrained(folder, backend=backend, compile=False)
    compiled = CLIPPipeline.from_pretrained(folder, backend=backend, compile=True)
    for count in (1, 3):
        assert np.abs(compiled.encode_image(pictures(count)) - plain.encode_image(pictures(count))).max() < 1e-5
    texts = ["a cat", "a photo of a dog on a mat"]
    assert np.abs(compiled.encode_text(texts) - plain.encode_text(texts)).max() < 1e-5


def test_stages_are_complete_and_in_order(pipeline):
    tokens = CLIPTokenizerFast()(["a cat", "two dogs"], padding=True, return_tensors="np")
    pixels = pipeline.processor.image_processor(pictures(3), return_tensors="np")["pixel_values"]
    found = pipeline.engine.stages(tokens["input_ids"], tokens["attention_mask"], pixels)
    blocks = lambda tower: [f"{tower}.embeddings", f"{tower}.block.0", f"{tower}.block.1"]  # noqa: E731
    ends = lambda tower: [f"{tower}.last_hidden_state", f"{tower}.pooled", f"{tower}.projected"]  # noqa: E731
    towers = [name for tower in ("text", "vision") for name in [*blocks(tower), *ends(tower)]]
    assert list(found) == [*towers, "logits"]
    assert found["logits"].shape == (3, 2)
    assert all(isinstance(value, np.ndarray) for value in found.values())
    assert np.abs(found["text.projected"] - pipeline.encode_text(["a cat", "two dogs"], normalize=False)).max() < 1e-5


def test_model_and_processor_are_of_one_save(folder, tmp_path, monkeypatch):
    """Another process saves between the two."""
    one, other = tmp_path / "one", tmp_path / "other"
    shutil.copytree(folder, one)
    larger = CLIPConfig(CONFIG.text_config.to_dict(), {**VISION, "image_size": 60}, projection_dim=24)
    write_checkpoint(other, larger)
    for at, size in ((one, CONFIG.vision_config.image_size), (other, 60)):
        CLIPImageProcessor(size=size, crop_size=size).save_pretrained(at)
    real, calls = pipelines.processor_for, []

    def slow(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            with Transaction(one) as save:
                for path in other.iterdir():
                    save.write(path.name, path.read_bytes())
        return real(*arguments)

    monkeypatch.setattr(pipelines, "processor_for", slow)
    pipeline = CLIPPipeline.from_pretrained(one, backend=ENGINES[0])
    sizes = pipeline.config.vision_config.image_size, pipeline.processor.image_processor.crop_size["height"]
    assert (sizes, len(calls)) == ((60, 60), 2)


def test_a_checkpoint_without_a_tokenizer_needs_clips_vocabulary(tmp_path):
    small = CLIPConfig({**TEXT, "vocab_size": 99, "eos_token_id": 98}, VISION, projection_dim=24)
    with pytest.raises(CheckpointError, match="tokenizer"):
        CLIPPipeline.from_pretrained(write_checkpoint(tmp_path, small))


def test_own_tokenizer_and_processor_are_used(folder, tmp_path):
    pipeline = CLIPPipeline.from_pretrained(folder)
    assert pipeline.processor.image_processor.crop_size == {"height": 20, "width": 20}
    pipeline.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    pipeline.processor.save_pretrained(tmp_path)
    write_checkpoint(tmp_path, CONFIG)
    again = CLIPPipeline.from_pretrained(tmp_path)
    assert again.processor.image_processor.image_mean == [0.1, 0.2, 0.3]
    assert np.abs(again.encode_image(pictures()) - pipeline.encode_image(pictures())).max() < 1e-6


@pytest.mark.parametrize(
    ("images", "place"),
    [
        ([Image.new("RGB", (9, 9)), [Image.new("RGB", (9, 9))]], "list at index 1"),
        ([np.zeros((2, 9, 9, 3), np.uint8)], "ndarray at index 0"),
        ({"a": Image.new("RGB", (9, 9))}, "dict at index 0"),
        ({"a.png"}, "set at index 0"),
        ([*[Image.new("RGB", (9, 9))] * 6, None], r"[Ii]mage 6\b"),
    ],
)
def test_what_is_no_image_is_refused_with_its_place(pipeline, images, place):
    with pytest.raises(TypeError, match=place):
        pipeline.encode_image(images, batch_size=4)


def test_a_batch_in_one_array_has_a_row_for_each_image(pipeline):
    batch = np.stack([np.asarray(picture.resize((30, 30))) for picture in pictures()])
    assert np.array_equal(pipeline.encode_image(batch), pipeline.encode_image(list(batch)))
    assert np.array_equal(pipeline.encode_image(iter(list(batch))), pipeline.encode_image(batch))


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([["a cat", "a dog"]], "list at index 0"),
        (["a cat", None], "NoneType at index 1"),
        (["a cat", b"a dog"], "bytes at index 1"),
        ({"a cat": 1}, "a list of texts"),
        ({"a cat"}, "a list of texts"),
        (b"a cat", "a list of texts"),
        (7, "a list of texts"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(pipeline, texts, words):
    with pytest.raises(TypeError, match=words):
        pipeline.encode_text(texts)


def test_special_tokens_in_a_text_are_text_unless_asked_for(pipeline):
    cut = pipeline.encode_text(["a cat<|endoftext|> and a dog", "a cat"], split_special_tokens=False)
    assert np.abs(cut[0] - cut[1]).max() < 1e-6  # the text ends at the first end token
    text = pipeline.encode_text(["a cat<|endoftext|> and a dog", "a cat"])
    assert np.abs(text[0] - text[1]).max() > 1e-3


def test_a_long_label_can_be_cut(pipeline):
    labels = ["cat", "very " * 20 + "small dog"]
    with pytest.raises(ValueError, match="long_text"):
        pipeline.classify(pictures(), labels)
    assert pipeline.classify(pictures(), labels, long_text="truncate").shape == (5, 2)


def broken_pipeline(folder, backend, name, value, tmp_path):
    """A pipeline whose parameter of this name is filled with a value."""
    weights = load_file(folder / "model.safetensors")
    weights[name] = np.full_like(weights[name], value)
    result = shutil.copytree(folder, tmp_path / "broken")
    save_file(weights, result / "model.safetensors")
    return CLIPPipeline.from_pretrained(result, backend=backend)


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_reported(folder, tmp_path, backend, value, caplog):
    """At loading, and with the first result."""
    name = "vision_model.post_layernorm.bias"
    CLIPPipeline.from_pretrained(folder, backend=backend)
    assert "NaN or infinity" not in caplog.text
    found = broken_pipeline(folder, backend, name, value, tmp_path)
    assert [name in record.message for record in caplog.records if "NaN or infinity in " in record.message] == [True]
    for call in (found.encode_image, lambda images: found.classify(images, ["cat", "dog"])):
        with pytest.raises(CheckpointError, match=name):
            call(pictures())


@pytest.mark.parametrize("backend", ENGINES)
def test_an_embedding_of_zeros_has_no_direction(folder, tmp_path, backend):
    found = broken_pipeline(folder, backend, "text_projection.weight", 0, tmp_path)
    assert not found.encode_text(["a cat"], normalize=False).any()
    with pytest.raises(ValueError, match="text 0 must have a direction"):
        found.encode_text(["a cat"])


@pytest.mark.parametrize("backend", ENGINES)
def test_an_infinite_factor_is_reported(folder, tmp_path, backend):
    found = broken_pipeline(folder, backend, "logit_scale", 800, tmp_path)
    for call in (found.similarity, found.classify):
        with pytest.raises(CheckpointError, match="logit_scale"):
            call(pictures(), ["cat", "dog"])


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_pixels_that_are_no_numbers_are_reported(folder, pipeline):
    with pytest.raises(ValueError, match="Image 3 must hold"):
        pipeline.encode_image([*pictures(3), np.full((30, 30, 3), np.nan, np.float32)], batch_size=2)
    processor = CLIPPipeline.from_pretrained(folder, backend=pipeline.backend).processor
    processor.image_processor.image_std = [1e-39] * 3  # by which pixel values overflow
    with pytest.raises(ValueError, match=r"image 0 must be finite.*pixel values"):
        CLIPPipeline(pipeline.engine, processor).encode_image(pictures())


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "flax"])
def test_flax_compiles_for_few_shapes(folder, backend):
    pipeline = CLIPPipeline.from_pretrained(folder, backend=backend)
    direct = CLIPPipeline.from_pretrained(folder, backend=backend, compile=False)
    ids = np.random.default_rng(0).integers(1, 400, (300, 16))
    ids[:, 5] = ids[:, -1] = CONFIG.text_config.eos_token_id
    expected = {n: direct.engine.model.get_text_features(ids[:, :n], np.ones((300, n), np.int32)) for n in (6, 16)}
    for rows in (1, 2, 3, 5, 7, 9, 12, 300):
        for length in range(6, 17):
            given = ids[:rows, :length]
            found = pipeline.engine.text_features(given, np.ones_like(given))
            assert found.shape == (rows, 24)
            if length in expected:
                assert relative(found, expected[length][:rows]) <= 2e-6
    # 1, 2, 4, 8, 16, 64 and 256 rows (300 are 256 and 44), in 2 lengths
    assert pipeline.engine._text._cache_size() == 14
    pixels = np.random.default_rng(0).standard_normal((300, 3, 20, 20), np.float32)
    whole = direct.engine.model.get_image_features(pixels)
    for rows in (0, 1, 3, 5, 6, 7, 300):
        found = pipeline.engine.image_features(pixels[:rows])
        assert found.shape == (rows, 24)
        assert relative(found, whole[:rows]) <= 2e-6
    assert pipeline.engine._image._cache_size() == 5


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "flax"])
def test_flax_computes_parts_that_fit_the_caches(folder, backend, monkeypatch):
    pipeline = CLIPPipeline.from_pretrained(folder, backend=backend)
    pixels = np.random.default_rng(0).standard_normal((11, 3, 20, 20), np.float32)
    ids = np.random.default_rng(0).integers(1, 400, (11, 16))
    whole = pipeline.engine.image_features(pixels), pipeline.engine.text_features(ids)
    assert pipeline.engine._image._cache_size() == pipeline.engine._text._cache_size() == 1
    vision, text = CONFIG.vision_config, CONFIG.text_config
    monkeypatch.setattr("clipmb.flax.engine._CACHED", 5 * (vision.num_patches + 1) * vision.hidden_size)
    images = pipeline.engine.image_features(pixels)  # 4, 4 and 3
    assert pipeline.engine._image._cache_size() == 2
    monkeypatch.setattr("clipmb.flax.engine._CACHED", 2 * 16 * text.hidden_size)
    texts = pipeline.engine.text_features(ids)  # 5 times 2, and 1
    assert pipeline.engine._text._cache_size() == 3
    for found, expected in zip((images, texts), whole, strict=True):
        assert relative(found, expected) <= 2e-6
