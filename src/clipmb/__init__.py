"""CLIP on PyTorch, TensorFlow and Flax.

Names are imported on first use, so that ``import clipmb`` is quick and imports no framework. ``from clipmb import *``
gives every public name except the models, which import their framework: name those.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipmb import (
        backends as backends,
    )
    from clipmb import (
        common as common,
    )
    from clipmb import (
        doctor as doctor,
    )
    from clipmb import (
        embedding as embedding,
    )
    from clipmb import (
        evaluation as evaluation,
    )
    from clipmb import (
        exporting as exporting,
    )
    from clipmb import (
        flax as flax,
    )
    from clipmb import (
        layouts as layouts,
    )
    from clipmb import (
        onnx as onnx,
    )
    from clipmb import (
        pipeline as pipeline,
    )
    from clipmb import (
        programs as programs,
    )
    from clipmb import (
        pt as pt,
    )
    from clipmb import (
        serving as serving,
    )
    from clipmb import (
        sorting as sorting,
    )
    from clipmb import (
        testing as testing,
    )
    from clipmb import (
        tf as tf,
    )
    from clipmb import (
        training as training,
    )
    from clipmb import (
        verification as verification,
    )
    from clipmb.common.config import CLIPConfig, CLIPOnnxConfig, CLIPTextConfig, CLIPVisionConfig
    from clipmb.common.convert import Conversion, convert
    from clipmb.common.data.batches import Batch, Batches
    from clipmb.common.data.pairs import Pairs
    from clipmb.common.errors import CheckpointError, ClipmbError, MissingBackendError
    from clipmb.common.features import BatchFeature
    from clipmb.common.image.processor import (
        OPENAI_CLIP_MEAN,
        OPENAI_CLIP_STD,
        CLIPFeatureExtractor,
        CLIPImageProcessor,
        CLIPImageProcessorFast,
    )
    from clipmb.common.outputs import (
        BaseModelOutput,
        BaseModelOutputWithPooling,
        CLIPOutput,
        CLIPTextModelOutput,
        CLIPVisionModelOutput,
        ImageClassifierOutput,
        ModelOutput,
    )
    from clipmb.common.processor import CLIPProcessor
    from clipmb.common.small_model import held_out_pictures, small_labels, small_model
    from clipmb.common.text.tokenizer import BatchEncoding, CLIPTokenizer, CLIPTokenizerFast
    from clipmb.common.training.recipe import Recipe
    from clipmb.common.zero_shot import TEMPLATES, class_embeddings
    from clipmb.embedding.classes import Classes
    from clipmb.embedding.index import Index
    from clipmb.embedding.job import Embedded, embed
    from clipmb.evaluation import Evaluation, evaluate
    from clipmb.exporting import export
    from clipmb.flax import (
        FlaxCLIPForImageClassification as FlaxCLIPForImageClassification,
    )
    from clipmb.flax import (
        FlaxCLIPModel as FlaxCLIPModel,
    )
    from clipmb.flax import (
        FlaxCLIPPreTrainedModel as FlaxCLIPPreTrainedModel,
    )
    from clipmb.flax import (
        FlaxCLIPTextModel as FlaxCLIPTextModel,
    )
    from clipmb.flax import (
        FlaxCLIPTextModelWithProjection as FlaxCLIPTextModelWithProjection,
    )
    from clipmb.flax import (
        FlaxCLIPTextPreTrainedModel as FlaxCLIPTextPreTrainedModel,
    )
    from clipmb.flax import (
        FlaxCLIPVisionModel as FlaxCLIPVisionModel,
    )
    from clipmb.flax import (
        FlaxCLIPVisionModelWithProjection as FlaxCLIPVisionModelWithProjection,
    )
    from clipmb.flax import (
        FlaxCLIPVisionPreTrainedModel as FlaxCLIPVisionPreTrainedModel,
    )
    from clipmb.flax import (
        FlaxPreTrainedModel as FlaxPreTrainedModel,
    )
    from clipmb.pipeline import CLIPPipeline
    from clipmb.programs import register as register
    from clipmb.pt import (
        CLIPForImageClassification as CLIPForImageClassification,
    )
    from clipmb.pt import (
        CLIPModel as CLIPModel,
    )
    from clipmb.pt import (
        CLIPPreTrainedModel as CLIPPreTrainedModel,
    )
    from clipmb.pt import (
        CLIPTextModel as CLIPTextModel,
    )
    from clipmb.pt import (
        CLIPTextModelWithProjection as CLIPTextModelWithProjection,
    )
    from clipmb.pt import (
        CLIPVisionModel as CLIPVisionModel,
    )
    from clipmb.pt import (
        CLIPVisionModelWithProjection as CLIPVisionModelWithProjection,
    )
    from clipmb.serving.server import application, serve
    from clipmb.tf import (
        TFCLIPForImageClassification as TFCLIPForImageClassification,
    )
    from clipmb.tf import (
        TFCLIPModel as TFCLIPModel,
    )
    from clipmb.tf import (
        TFCLIPPreTrainedModel as TFCLIPPreTrainedModel,
    )
    from clipmb.tf import (
        TFCLIPTextModel as TFCLIPTextModel,
    )
    from clipmb.tf import (
        TFCLIPTextModelWithProjection as TFCLIPTextModelWithProjection,
    )
    from clipmb.tf import (
        TFCLIPVisionModel as TFCLIPVisionModel,
    )
    from clipmb.tf import (
        TFCLIPVisionModelWithProjection as TFCLIPVisionModelWithProjection,
    )
    from clipmb.training import TrainingResult, train

__version__ = "0.1.0"

__all__ = [
    "OPENAI_CLIP_MEAN",
    "OPENAI_CLIP_STD",
    "TEMPLATES",
    "BaseModelOutput",
    "BaseModelOutputWithPooling",
    "Batch",
    "BatchEncoding",
    "BatchFeature",
    "Batches",
    "CLIPConfig",
    "CLIPFeatureExtractor",
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPOnnxConfig",
    "CLIPOutput",
    "CLIPPipeline",
    "CLIPProcessor",
    "CLIPTextConfig",
    "CLIPTextModelOutput",
    "CLIPTokenizer",
    "CLIPTokenizerFast",
    "CLIPVisionConfig",
    "CLIPVisionModelOutput",
    "CheckpointError",
    "Classes",
    "ClipmbError",
    "Conversion",
    "Embedded",
    "Evaluation",
    "ImageClassifierOutput",
    "Index",
    "MissingBackendError",
    "ModelOutput",
    "Pairs",
    "Recipe",
    "TrainingResult",
    "__version__",
    "application",
    "class_embeddings",
    "convert",
    "embed",
    "evaluate",
    "export",
    "held_out_pictures",
    "register",
    "serve",
    "small_labels",
    "small_model",
    "train",
]  # fmt: skip

_PUBLIC = {
    "clipmb.common.config": ("CLIPConfig", "CLIPOnnxConfig", "CLIPTextConfig", "CLIPVisionConfig"),
    "clipmb.common.convert": ("Conversion", "convert"),
    "clipmb.common.data.batches": ("Batch", "Batches"),
    "clipmb.common.data.pairs": ("Pairs",),
    "clipmb.common.errors": ("CheckpointError", "ClipmbError", "MissingBackendError"),
    "clipmb.common.features": ("BatchFeature",),
    "clipmb.common.image.processor": (
        "OPENAI_CLIP_MEAN", "OPENAI_CLIP_STD", "CLIPFeatureExtractor", "CLIPImageProcessor",
        "CLIPImageProcessorFast",
    ),
    "clipmb.common.outputs": (
        "BaseModelOutput", "BaseModelOutputWithPooling", "CLIPOutput", "CLIPTextModelOutput", "CLIPVisionModelOutput",
        "ImageClassifierOutput", "ModelOutput",
    ),
    "clipmb.common.processor": ("CLIPProcessor",),
    "clipmb.common.small_model": ("held_out_pictures", "small_labels", "small_model"),
    "clipmb.common.text.tokenizer": ("BatchEncoding", "CLIPTokenizer", "CLIPTokenizerFast"),
    "clipmb.common.training.recipe": ("Recipe",),
    "clipmb.common.zero_shot": ("TEMPLATES", "class_embeddings"),
    "clipmb.embedding.classes": ("Classes",),
    "clipmb.embedding.index": ("Index",),
    "clipmb.embedding.job": ("Embedded", "embed"),
    "clipmb.evaluation": ("Evaluation", "evaluate"),
    "clipmb.exporting": ("export",),
    "clipmb.flax": (
        "FlaxCLIPForImageClassification", "FlaxCLIPModel", "FlaxCLIPPreTrainedModel", "FlaxCLIPTextModel",
        "FlaxCLIPTextModelWithProjection", "FlaxCLIPTextPreTrainedModel", "FlaxCLIPVisionModel",
        "FlaxCLIPVisionModelWithProjection", "FlaxCLIPVisionPreTrainedModel", "FlaxPreTrainedModel",
    ),
    "clipmb.pipeline": ("CLIPPipeline",),
    "clipmb.programs": ("register",),
    "clipmb.pt": (
        "CLIPForImageClassification", "CLIPModel", "CLIPPreTrainedModel", "CLIPTextModel",
        "CLIPTextModelWithProjection", "CLIPVisionModel", "CLIPVisionModelWithProjection",
    ),
    "clipmb.tf": (
        "TFCLIPForImageClassification", "TFCLIPModel", "TFCLIPPreTrainedModel", "TFCLIPTextModel",
        "TFCLIPTextModelWithProjection", "TFCLIPVisionModel", "TFCLIPVisionModelWithProjection",
    ),
    "clipmb.serving.server": ("application", "serve"),
    "clipmb.training": ("TrainingResult", "train"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
_SUBMODULES = (
    "backends", "common", "doctor", "embedding", "evaluation", "exporting", "flax", "layouts", "onnx", "pipeline",
    "programs", "pt", "serving", "sorting", "testing", "tf", "training", "verification",
)  # fmt: skip

if not TYPE_CHECKING:  # a type checker would take any name for one that exists

    def __getattr__(name: str) -> object:
        if name in _SUBMODULES:
            return importlib.import_module(f"clipmb.{name}")
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'clipmb' has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return ["__version__", *_MODULE_OF, *_SUBMODULES]
