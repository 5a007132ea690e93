"""sentence-transformers, torchmetrics and torchao."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchmetrics.multimodal.clip_score import CLIPScore

from clipmb import CLIPModel, CLIPPipeline, CLIPProcessor
from clipmb.common.small_model import held_out_pictures


def test_sentence_transformers_reads_our_folder(trained):
    encoder = SentenceTransformer(str(trained), device="cpu")
    ours = CLIPPipeline.from_pretrained(trained, backend="pt")
    texts = ["a cat", "a rocket in the sky"]
    found = encoder.encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(found, ours.encode_text(texts), atol=1e-5)


def test_clip_score(trained):
    picture = held_out_pictures()[0][0]
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    score = CLIPScore(lambda: (CLIPModel.from_pretrained(trained), CLIPProcessor.from_pretrained(trained)))
    ours = CLIPPipeline.from_pretrained(trained, backend="pt")
    expected = float((ours.encode_image(picture) @ ours.encode_text("a cat").T).item() * 100)
    assert float(score(pixels, "a cat")) == pytest.approx(expected, abs=0.05)


def test_int8_weights_of_torchao(trained):
    model = CLIPModel.from_pretrained(trained)
    ours = CLIPPipeline.from_pretrained(trained, backend="pt")
    ids = torch.tensor([[4512, 320, 4513]])
    with torch.no_grad():
        expected = model.get_text_features(ids)
        quantize_(model, Int8WeightOnlyConfig())
        found = model.get_text_features(ids)
    assert not torch.equal(found, expected)
    assert float(torch.cosine_similarity(found, expected)) > 0.99
    assert ours.backend == "pt"
