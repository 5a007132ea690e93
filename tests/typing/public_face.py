# pyright: reportUnnecessaryTypeIgnoreComment=true
"""User code as a type checker sees it: pyright fails here when a public type is lost. Nothing runs this file."""

from pathlib import Path
from typing import Any, assert_type

import jax
import numpy as np
import torch

import clipmb
from clipmb import (
    BatchEncoding,
    BatchFeature,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPOutput,
    CLIPPipeline,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPTokenizerFast,
    CLIPVisionModelWithProjection,
    Conversion,
    Evaluation,
    FlaxCLIPModel,
    FlaxCLIPTextModel,
    FlaxCLIPTextModelWithProjection,
    NoSuchName,  # noqa: F401  # pyright: ignore[reportAttributeAccessIssue]
    Pairs,
    Recipe,
    TFCLIPModel,
    TFCLIPVisionModel,
    TFCLIPVisionModelWithProjection,
    TrainingResult,
    convert,
    evaluate,
    small_model,
    train,
)

clipmb.NoSuchName  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]

# Loading returns the class, and a pair where it was asked for.
assert_type(small_model(), Path)
assert_type(CLIPConfig.from_pretrained("folder"), CLIPConfig)
assert_type(CLIPConfig.from_pretrained("folder", return_unused_kwargs=True), tuple[CLIPConfig, dict[str, Any]])
assert_type(CLIPConfig.from_dict({}), CLIPConfig)
assert_type(CLIPConfig.from_json_file("config.json"), CLIPConfig)
assert_type(CLIPImageProcessor.from_pretrained("folder"), CLIPImageProcessor)
assert_type(CLIPProcessor.from_pretrained("folder"), CLIPProcessor)
assert_type(CLIPPipeline.from_pretrained("folder", backend="pt"), CLIPPipeline)

# The tokenizers.
assert_type(CLIPTokenizer.from_pretrained("folder"), CLIPTokenizer)
tokenizer = CLIPTokenizerFast()
assert_type(tokenizer("a cat"), BatchEncoding)
assert_type(tokenizer.pad({"input_ids": [[1]]}), BatchEncoding)
assert_type(tokenizer.encode("a cat"), list[int])
assert_type(tokenizer.tokenize("a cat"), list[str])
assert_type(tokenizer.decode([1]), str)
assert_type(tokenizer.batch_decode([[1]]), list[str])
assert_type(tokenizer.convert_ids_to_tokens(1), str | None)
assert_type(tokenizer.convert_ids_to_tokens([1]), list[str | None])
assert_type(tokenizer.get_vocab(), dict[str, int])
assert_type(tokenizer.eos_token, str | None)
assert_type(tokenizer.eos_token_id, int | None)
assert_type(tokenizer.save_pretrained("folder"), tuple[str, ...])

# The processors' parts and results.
assert_type(CLIPImageProcessor()(["a.png"], return_tensors="np"), BatchFeature)
assert_type(CLIPProcessor()(["a cat"], return_tensors="np"), BatchFeature)
CLIPProcessor(CLIPImageProcessor(), CLIPTokenizerFast())

# A model loads as its class, and its call gives typed fields; Any stands for the tuple of return_dict=False.
model = CLIPModel.from_pretrained("folder")
assert_type(model, CLIPModel)
assert_type(CLIPModel.from_pretrained("folder", output_loading_info=True)[0], CLIPModel)
assert_type(model.config, CLIPConfig)
assert_type(model().logits_per_image, torch.Tensor | Any)
assert_type(model.forward().logits_per_image, torch.Tensor | Any)
assert_type(model.get_text_features(), torch.Tensor)
model(return_dict="yes")  # pyright: ignore[reportArgumentType]
model.forward().logits_per_imag  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
assert_type(CLIPVisionModelWithProjection.from_pretrained("folder").forward().image_embeds, torch.Tensor | Any)
assert_type(FlaxCLIPModel.from_pretrained("folder")().text_embeds, jax.Array | Any)
assert_type(FlaxCLIPModel.from_pretrained("folder").config, CLIPConfig)
assert_type(FlaxCLIPTextModelWithProjection.from_pretrained("folder")().text_embeds, jax.Array | Any)
FlaxCLIPTextModel.from_pretrained("folder")().text_embeds  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
tf_model = TFCLIPModel.from_pretrained("folder")  # TensorFlow ships no types: its tensors are unknown
assert_type(tf_model, TFCLIPModel)
assert_type(tf_model.config, CLIPConfig)
TFCLIPVisionModelWithProjection.from_pretrained("folder")().image_embeds  # noqa: B018
TFCLIPVisionModel.from_pretrained("folder")().image_embeds  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
tf_model().logits_per_imag  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
tf_model(return_dict="yes")  # pyright: ignore[reportArgumentType]

output: CLIPOutput[torch.Tensor] = CLIPOutput()
assert_type(output.loss, torch.Tensor | None)
assert_type(output.vision_model_output.hidden_states, tuple[torch.Tensor, ...] | None)

# The pipeline speaks numpy.
clip = CLIPPipeline.from_pretrained(small_model())
assert_type(clip.encode_image(["a.png"]), np.ndarray)
assert_type(clip.encode_text(["a cat"]), np.ndarray)
assert_type(clip.similarity(["a.png"], ["a cat"]), np.ndarray)
assert_type(clip.classify(["a.png"], ["cat", "dog"]), np.ndarray)
assert_type(clip.config, CLIPConfig)

# Conversion, evaluation, training.
assert_type(convert("folder", "other", to="safetensors"), Conversion)
assert_type(evaluate("folder", "captions.csv"), Evaluation)
assert_type(Recipe(steps=100), Recipe)
assert_type(train(Pairs.open("captions.csv"), "folder", "out", steps=100), TrainingResult)
