"""fastembed, immich's steps and Triton's configuration, over folders that are written for them; without a framework."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from fastembed import ImageEmbedding, TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType
from google.protobuf import text_format
from PIL import Image
from tokenizers import Tokenizer
from tritonclient.grpc import model_config_pb2 as triton

import clipmb
from clipmb import CLIPPipeline

TEXTS = ["a cat", "A photo of two dogs, and a red car!", "火箭 🚀"]
TYPES = {"tensor(int64)": triton.TYPE_INT64, "tensor(int32)": triton.TYPE_INT32, "tensor(float)": triton.TYPE_FP32}


@pytest.fixture(scope="module")
def pipeline():
    return CLIPPipeline.from_pretrained(clipmb.small_model(), backend="onnx")


@pytest.fixture(scope="module")
def pictures():
    """Of several shapes."""
    found = clipmb.held_out_pictures()[0][:4]
    return [picture.resize((90 + 40 * i, 150 - 17 * i), Image.Resampling.BICUBIC) for i, picture in enumerate(found)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Layout to folder."""
    found = {layout: tmp_path_factory.mktemp("exported") / layout for layout in ("fastembed", "immich", "triton")}
    for layout, folder in found.items():
        clipmb.export(clipmb.small_model(), folder, layout=layout)
    return found


def test_fastembed(folders, pipeline, pictures):
    """Its own tokenizer and image processor; both by the names of its CLIP models and by a name of one's own."""
    folder = folders["fastembed"]
    TextEmbedding.add_custom_model(
        "mine/text", PoolingType.DISABLED, False, ModelSource(hf="mine/text"), dim=128, model_file="model.onnx"
    )
    for name in ("mine/text", "Qdrant/clip-ViT-B-32-text"):
        texts = TextEmbedding(name, specific_model_path=str(folder / "text"))
        found = np.stack([*texts.embed(TEXTS)])
        np.testing.assert_allclose(found, pipeline.encode_text(TEXTS), atol=1e-6)
    images = ImageEmbedding("Qdrant/clip-ViT-B-32-vision", specific_model_path=str(folder / "image"))
    found = np.stack([*images.embed(pictures)])
    np.testing.assert_allclose(found, pipeline.encode_image(pictures), atol=1e-5)


def test_immich(folders, pipeline, pictures):
    """What machine-learning/immich_ml/models/clip does with the files: ids without a mask, its own crop."""
    folder = folders["immich"]
    context = clipmb.CLIPConfig.from_pretrained(clipmb.small_model()).text_config.max_position_embeddings
    tokenizer = Tokenizer.from_file(str(folder / "textual/tokenizer.json"))
    pad = clipmb.CLIPTokenizerFast.from_pretrained(folder / "textual").pad_token
    tokenizer.enable_padding(length=context, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=context)
    session = ort.InferenceSession(folder / "textual/model.onnx")
    for text in TEXTS:
        [found] = session.run(None, {"text": np.array([tokenizer.encode(text).ids], np.int32)})
        np.testing.assert_allclose(found, pipeline.encode_text([text]), atol=1e-6)
    session = ort.InferenceSession(folder / "visual/model.onnx")
    for pixels, expected in zip(
        pipeline.processor.image_processor(pictures, return_tensors="np")["pixel_values"],
        pipeline.encode_image(pictures),
        strict=True,
    ):
        [found] = session.run(["embedding"], {"image": pixels[None]})
        np.testing.assert_allclose(found[0], expected, atol=1e-6)


def test_triton(folders):
    """Triton's own schema reads each config.pbtxt, which says what the file beside it takes and returns."""
    for name in ("clip", "clip_text", "clip_image"):
        folder = folders["triton"] / name
        config = text_format.Parse((folder / "config.pbtxt").read_text(), triton.ModelConfig())
        session = ort.InferenceSession(folder / "1/model.onnx")
        batch = [-1] if config.max_batch_size else []
        for said, has in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
            expected = [
                (entry.name, TYPES[entry.type], [size if isinstance(size, int) else -1 for size in entry.shape])
                for entry in has
            ]
            assert [(entry.name, entry.data_type, [*batch, *entry.dims]) for entry in said] == expected
