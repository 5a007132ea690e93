"""CLIP in Flax: the classes of transformers 4, each a linen module with its config, its parameters and its files.

Parameters are the nested dicts of the msgpack files of transformers 4. ``dtype`` is what a model computes in; its
parameters are cast where they are used. Those of a 16-bit file are float32 in a model that computes in float32, and
otherwise keep the dtype of the file; ``param_dtype=``, `to_bf16`, `to_fp16` and `to_fp32` change it.
Source of every behaviour not explained here: the Flax models of transformers 4.57.6 for the interface, its PyTorch
models for values.
`clipmb.flax.modules` says what becomes of ids outside the vocabulary under ``jax.jit``, and how to use NNX.
"""

from __future__ import annotations

from typing import Any, Generic

from jax import Array

from clipmb.common.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from clipmb.common.errors import whole_number
from clipmb.common.outputs import (
    BaseModelOutputWithPooling,
    CLIPOutput,
    CLIPTextModelOutput,
    CLIPVisionModelOutput,
    ImageClassifierOutput,
    Output,
)
from clipmb.flax.linen_model import LinenModel, Params
from clipmb.flax.modules import (
    FlaxCLIPForImageClassificationModule,
    FlaxCLIPModule,
    FlaxCLIPTextModelWithProjectionModule,
    FlaxCLIPTextModule,
    FlaxCLIPVisionModelWithProjectionModule,
    FlaxCLIPVisionModule,
)
from clipmb.flax.vocabulary import VocabularyMixin


class FlaxCLIPPreTrainedModel(VocabularyMixin, LinenModel):
    """What the six heads share: construction, files, parameters, checkpointing.

    Args:
        config: The config of the head.
        input_shape: Accepted and unneeded: parameters follow from the config alone.
        seed: Random seed of the initialisation.
        dtype: What the model computes in: float32, float16, bfloat16, or float64 (which needs ``jax_enable_x64``).
        _do_init: Initialise the parameters. Otherwise the model has none and every call needs ``params=``.
        gradient_checkpointing: As `enable_gradient_checkpointing`; so does that field of the config.

    Raises:
        TypeError: The config is not of the class that the head needs.
        ValueError: The dtype is not one that the model can compute in.
    """

    config_class = CLIPConfig

    def enable_gradient_checkpointing(self, every_n_layers: int = 1) -> None:
        """Recomputes blocks in the backward pass of training instead of keeping their intermediate results.

        Args:
            every_n_layers: Recompute the first block of every so many.

        Raises:
            ValueError: ``every_n_layers`` is not a positive number.
        """
        every_n_layers = whole_number("every_n_layers", every_n_layers)
        self.module = self.module.clone(gradient_checkpointing=every_n_layers)

    def disable_gradient_checkpointing(self) -> None:
        """Undoes `enable_gradient_checkpointing`."""
        self.module = self.module.clone(gradient_checkpointing=False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether gradient checkpointing is on."""
        return bool(self.module.gradient_checkpointing)


class FlaxCLIPModel(FlaxCLIPPreTrainedModel):
    """Both towers, their projections, and the similarity of every text with every image."""

    head = "CLIPModel"
    config: CLIPConfig
    module_class = FlaxCLIPModule

    def get_text_features(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        params: Params | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Array:
        """Returns the projected texts, not normalised.

        Args:
            input_ids: (batch, seq) integers.
            attention_mask: (batch, seq), 1 for tokens that may be looked at; all when None.
            position_ids: (batch or 1, seq); 0, 1, … when None.
            params: As in `FlaxCLIPModel.__call__`.
            dropout_rng: As in `FlaxCLIPModel.__call__`.
            train: As in `FlaxCLIPModel.__call__`.
            output_attentions: Changes nothing here; part of the signature of every call.
            output_hidden_states: Like ``output_attentions``.
            return_dict: Like ``output_attentions``.

        Returns:
            (batch, proj).

        Raises:
            ValueError: A shape or a value does not fit.
        """
        inputs = (input_ids, attention_mask, position_ids)
        options = (output_attentions, output_hidden_states)
        return self._apply(inputs, options, params, dropout_rng, train, method="get_text_features")

    def get_image_features(
        self,
        pixel_values: Array | None = None,
        params: Params | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
    ) -> Array:
        """Returns the projected images, not normalised.

        Args:
            pixel_values: (batch, channels, height, width).
            params: As in `FlaxCLIPModel.__call__`.
            dropout_rng: As in `FlaxCLIPModel.__call__`.
            train: As in `FlaxCLIPModel.__call__`.
            output_attentions: Changes nothing here; part of the signature of every call.
            output_hidden_states: Like ``output_attentions``.
            interpolate_pos_encoding: Accept images of any size.
            return_dict: Like ``output_attentions``.

        Returns:
            (batch, proj).

        Raises:
            ValueError: A shape or a value does not fit.
        """
        pixels = self._pixels(pixel_values, interpolate_pos_encoding)
        inputs = (pixels,)
        options = (output_attentions, output_hidden_states, interpolate_pos_encoding)
        return self._apply(inputs, options, params, dropout_rng, train, method="get_image_features")

    def __call__(
        self,
        input_ids: Array | None = None,
        pixel_values: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        params: Params | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> CLIPOutput[Array] | Any:
        """Compares every text with every image.

        Args:
            input_ids: (texts, seq) integers.
            pixel_values: (images, channels, height, width).
            attention_mask: (texts, seq), 1 for tokens that may be looked at; all when None.
            position_ids: (texts or 1, seq); 0, 1, … when None.
            params: The parameters, instead of the model's own.
            dropout_rng: A key for dropout; needed with ``train=True`` when ``attention_dropout`` is not 0.
            train: Drop attention weights.
            output_attentions: Also return every block's attention weights.
            output_hidden_states: Also return every block's input and output.
            return_dict: Return a `CLIPOutput`; otherwise a tuple of what is not None.
            return_loss: Also return the contrastive loss, for as many texts as images, pair by pair.
            interpolate_pos_encoding: Accept images of any size.

        Raises:
            ValueError: A shape or a value does not fit.
        """
        pixels = self._pixels(pixel_values, interpolate_pos_encoding)
        inputs = (input_ids, pixels, attention_mask, position_ids)
        options = (output_attentions, output_hidden_states, return_dict, return_loss, interpolate_pos_encoding)
        return self._apply(inputs, options, params, dropout_rng, train)


class FlaxCLIPTextPreTrainedModel(FlaxCLIPPreTrainedModel, Generic[Output]):
    """What the two text heads share."""

    config_class = CLIPTextConfig
    config: CLIPTextConfig

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        params: Params | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Output | Any:
        """Encodes texts; arguments and errors as in `FlaxCLIPModel.__call__`."""
        inputs = (input_ids, attention_mask, position_ids)
        options = (output_attentions, output_hidden_states, return_dict)
        return self._apply(inputs, options, params, dropout_rng, train)


class FlaxCLIPTextModel(FlaxCLIPTextPreTrainedModel[BaseModelOutputWithPooling[Array]]):
    """The text tower alone."""

    head = "CLIPTextModel"
    module_class = FlaxCLIPTextModule


class FlaxCLIPTextModelWithProjection(FlaxCLIPTextPreTrainedModel[CLIPTextModelOutput[Array]]):
    """The text tower with its projection."""

    head = "CLIPTextModelWithProjection"
    module_class = FlaxCLIPTextModelWithProjectionModule


class FlaxCLIPVisionPreTrainedModel(FlaxCLIPPreTrainedModel, Generic[Output]):
    """What the two vision heads share."""

    config_class = CLIPVisionConfig
    config: CLIPVisionConfig
    main_input_name = "pixel_values"

    def __call__(
        self,
        pixel_values: Array | None = None,
        params: Params | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Output | Any:
        """Encodes images; arguments and errors as in `FlaxCLIPModel.__call__`."""
        pixels = self._pixels(pixel_values, interpolate_pos_encoding)
        inputs = (pixels,)
        options = (output_attentions, output_hidden_states, return_dict, interpolate_pos_encoding)
        return self._apply(inputs, options, params, dropout_rng, train)


class FlaxCLIPVisionModel(FlaxCLIPVisionPreTrainedModel[BaseModelOutputWithPooling[Array]]):
    """The vision tower alone."""

    head = "CLIPVisionModel"
    module_class = FlaxCLIPVisionModule


class FlaxCLIPVisionModelWithProjection(FlaxCLIPVisionPreTrainedModel[CLIPVisionModelOutput[Array]]):
    """The vision tower with its projection."""

    head = "CLIPVisionModelWithProjection"
    module_class = FlaxCLIPVisionModelWithProjectionModule


class FlaxCLIPForImageClassification(FlaxCLIPPreTrainedModel):
    """The vision tower with a linear classifier over the mean of the patch states."""

    head = "CLIPForImageClassification"
    config: CLIPConfig
    main_input_name = "pixel_values"
    module_class = FlaxCLIPForImageClassificationModule

    def __call__(
        self,
        pixel_values: Array | None = None,
        labels: Array | None = None,
        params: Params | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> ImageClassifierOutput[Array] | Any:
        """Classifies images.

        Args:
            pixel_values: (batch, channels, height, width).
            labels: (batch,) class indices, or (batch,) numbers for one label, or (batch, num_labels) numbers in [0, 1].
            params: As in `FlaxCLIPModel.__call__`.
            dropout_rng: As in `FlaxCLIPModel.__call__`.
            train: As in `FlaxCLIPModel.__call__`.
            output_attentions: As in `FlaxCLIPModel.__call__`.
            output_hidden_states: As in `FlaxCLIPModel.__call__`.
            return_dict: As in `FlaxCLIPModel.__call__`.
            interpolate_pos_encoding: As in `FlaxCLIPModel.__call__`.

        Raises:
            TypeError: Class indices are not integers.
            ValueError: A shape or a value does not fit.
        """
        pixels = self._pixels(pixel_values, interpolate_pos_encoding)
        inputs = (pixels, labels)
        options = (output_attentions, output_hidden_states, return_dict, interpolate_pos_encoding)
        return self._apply(inputs, options, params, dropout_rng, train)
