"""CLIP in TensorFlow, on Keras 3.

Shapes: batch, seq (tokens, or patches + 1), width, heads, head_dim, patches, proj. Layer and weight names are those of
the checkpoints, with Keras' names for the last part (`clipmb.common.parameters`). The PyTorch models are the standard
of every behaviour; this file differs from theirs where TensorFlow does.

Ids outside the vocabulary raise: eagerly a ValueError, in a ``tf.function`` an InvalidArgumentError. XLA
(``jit_compile=True``) cannot raise; there the states of such ids are NaN. The checked modes are `check_ids` on the
inputs, and ``compile(jit_compile=False)``, since Keras' default for ``fit`` is XLA.

``training`` is handed on by Keras: a layer called inside another one's ``call`` has it from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic

import keras
import tensorflow as tf
from tensorflow import Tensor

from clipmb.common import checks
from clipmb.common.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from clipmb.common.errors import bad_input, warn_once, whole_number
from clipmb.common.outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    CLIPOutput,
    CLIPTextModelOutput,
    CLIPVisionModelOutput,
    ImageClassifierOutput,
    ModelOutput,
    Output,
    default,
    returned,
)
from clipmb.common.pretrained import called_like
from clipmb.tf.export import ExportMixin
from clipmb.tf.keras_model import KerasModel
from clipmb.tf.layers import (
    ACTIVATIONS,
    Convolution,
    LayerNorm,
    Linear,
    Module,
    interpolate_positions,
    look_up,
    recomputed,
    statistics_dtype,
    whole_table,
)
from clipmb.tf.losses import classification_loss, contrastive_loss, normalize
from clipmb.tf.tensors import (
    next_seed,
    plain_errors,
    register_output,
    sizes,
    unpacking,
)
from clipmb.tf.vocabulary import VocabularyMixin

Pick = Callable[[Tensor], Tensor]  # takes one row of each item of a batch: (batch, seq, …) to (batch, 1, …)

for _type in ModelOutput.types:
    register_output(_type)


class TFCLIPAttention(Module):
    """Multi-head self-attention."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.q_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def call(
        self,
        hidden_states: Tensor,
        bias: Tensor | None,
        fused: bool,
        seed: Tensor | None,
        asking: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the context (batch, seq, width) and, unless fused, the weights (batch, heads, seq, seq).

        Of ``asking``, (batch, rows, width), where only its rows of both are wanted.
        TensorFlow has no fused kernel: here it is the form that keeps the scores in at least float32, and no weights.
        ``seed`` is that of dropout, or None for none; fused attention takes none.
        """
        asking = hidden_states if asking is None else asking
        batch, seq, width = sizes(hidden_states)
        rows = sizes(asking)[1]
        split = (batch, seq, self.num_heads, self.head_dim)
        query = tf.reshape(self.q_proj(asking), (batch, rows, *split[2:]))
        query = tf.transpose(query, (0, 2, 1, 3))  # (batch, heads, rows, head_dim)
        key = tf.transpose(tf.reshape(self.k_proj(hidden_states), split), (0, 2, 1, 3))  # (batch, heads, seq, head_dim)
        value = tf.transpose(tf.reshape(self.v_proj(hidden_states), split), (0, 2, 1, 3))
        scores = tf.matmul(query, key, transpose_b=True)  # (batch, heads, rows, seq); faster than einsum
        statistics = statistics_dtype(scores.dtype)
        if fused:
            scores = tf.cast(scores, statistics)
        # Not times the reciprocal: oneDNN would fuse product, factor and bias into a kernel that takes 20 times longer.
        scores = scores / math.sqrt(self.head_dim)
        if bias is not None:
            scores = scores + tf.cast(bias, scores.dtype)
        weights = tf.cast(tf.nn.softmax(tf.cast(scores, statistics), axis=-1), query.dtype)
        if seed is not None:
            weights = tf.nn.experimental.stateless_dropout(weights, self.dropout, seed=seed)
        context = tf.matmul(weights, value)  # (batch, heads, rows, head_dim)
        context = tf.reshape(tf.transpose(context, (0, 2, 1, 3)), (batch, rows, width))
        return self.out_proj(context), None if fused else weights


class TFCLIPMLP(Module):
    """The two-layer perceptron of a block."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def call(self, hidden_states: Tensor) -> Tensor:
        """(batch, seq, width) to the same."""
        return self.fc2(self.activation(self.fc1(hidden_states)))


class TFCLIPEncoderLayer(Module):
    """One block: attention and perceptron, each behind a layer norm and beside a residual."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig) -> None:
        super().__init__()
        self.self_attn = TFCLIPAttention(config)
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TFCLIPMLP(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def call(
        self, hidden_states: Tensor, bias: Tensor | None, fused: bool, seed: Tensor | None, pick: Pick | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, seq, width) to the same, or to the rows that are picked, and the attention weights unless fused."""
        normed = asking = self.layer_norm1(hidden_states)
        if pick is not None:
            hidden_states, asking = pick(hidden_states), pick(normed)
            bias = None if bias is None else pick(_for_each(bias, normed))[:, None]
        context, weights = self.self_attn(normed, bias, fused, seed, asking)
        hidden_states = hidden_states + context
        hidden_states = hidden_states + self.mlp(self.layer_norm2(hidden_states))
        return hidden_states, weights


class TFCLIPEncoder(Module):
    """The blocks of a tower."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = [TFCLIPEncoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.checkpointing = 0  # the first of every so many blocks is recomputed in the backward pass; none at 0
        self.seed_generator = keras.random.SeedGenerator()

    def call(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        causal: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        training: bool = False,
        pick: Pick | None = None,
    ) -> BaseModelOutput[Tensor]:
        """Runs the blocks over (batch, seq, width); the last one over what ``pick`` takes, where it is given."""
        output_attentions = default(output_attentions, self.config.output_attentions)
        output_hidden_states = default(output_hidden_states, self.config.output_hidden_states)
        fused = self.config.attn_implementation != "eager"
        if fused and output_attentions:
            fused = False
            warn_once(checks.ATTENTIONS_NEED_EAGER)
        dropout = training and self.config.attention_dropout > 0
        fused = fused and not dropout
        bias = attention_bias(attention_mask, hidden_states) if causal else None
        states, attentions = [hidden_states], []
        for i, layer in enumerate(self.layers):
            seed = next_seed(self.seed_generator) if dropout else None  # drawn here: recomputing has to drop the same
            if training and self.checkpointing and i % self.checkpointing == 0:
                hidden_states, weights = recomputed(layer, hidden_states, bias, fused, seed)
            elif pick is not None and i == len(self.layers) - 1:
                hidden_states, weights = layer(hidden_states, bias, fused, seed, pick)
            else:
                hidden_states, weights = layer(hidden_states, bias, fused, seed)
            states.append(hidden_states)
            attentions.append(weights)
        if pick is not None and not self.layers:
            hidden_states = pick(hidden_states)
        return BaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


def attention_bias(attention_mask: Tensor | None, hidden_states: Tensor) -> Tensor:
    """Returns what is added to the scores, (batch or 1, 1, seq, seq): see `clipmb.pt.modeling.attention_bias`."""
    dtype, seq = hidden_states.dtype, sizes(hidden_states)[1]
    lowest = tf.constant(dtype.min, dtype)
    steps = tf.range(seq)
    zero = tf.zeros((), dtype)
    bias = tf.where(steps[:, None] < steps[None, :], lowest, zero)[None, None]  # (1, 1, seq, seq)
    if attention_mask is not None:
        visible = (tf.cast(attention_mask, tf.float32) == 1)[:, None][:, None]  # LiteRT adds one axis at a time
        bias = bias + tf.where(visible, zero, lowest)  # (batch, 1, seq, seq)
    return bias


def _for_each(bias: Tensor, hidden_states: Tensor) -> Tensor:
    """Returns the bias of every row of a batch: (batch or 1, 1, seq, seq) to (batch, seq, seq)."""
    batch, seq, _ = sizes(hidden_states)
    return tf.broadcast_to(bias[:, 0], (batch, seq, seq))


class TFCLIPTextEmbeddings(Module):
    """Token plus position embeddings."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = keras.layers.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = keras.layers.Embedding(config.max_position_embeddings, config.hidden_size)

    def call(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """(batch, seq) to (batch, seq, width)."""
        tokens = look_up(self.token_embedding, input_ids, "input_ids")  # (batch, seq, width)
        if position_ids is None:
            return tokens + whole_table(self.position_embedding)[: sizes(input_ids)[1]]
        return tokens + look_up(self.position_embedding, position_ids, "position_ids")


class TFCLIPVisionEmbeddings(Module):
    """Class token and patch embeddings plus position embeddings."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        width, size = config.hidden_size, config.patch_size
        self.patch_embedding = Convolution(config.num_channels, width, size)
        self.position_embedding = keras.layers.Embedding(config.num_patches + 1, width)

    def build(self, input_shape: Any = None) -> None:
        """Creates class_embedding (width,) and the weights of every part."""
        super().build()
        self.class_embedding = self.add_weight(
            shape=(self.config.hidden_size,), initializer=self.class_embedding_initializer, name="class_embedding"
        )

    def call(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """(batch, channels, height, width) to (batch, patches + 1, width)."""
        size = None if interpolate_pos_encoding else self.config.image_size
        pixel_values = tf.ensure_shape(pixel_values, (None, self.config.num_channels, size, size))
        patches = self.patch_embedding(tf.cast(pixel_values, self.compute_dtype))  # (batch, rows, columns, width)
        batch, rows, columns, width = sizes(patches)
        patches = tf.reshape(patches, (batch, rows * columns, width))  # (batch, patches, width)
        class_token = tf.broadcast_to(self.class_embedding, (batch, 1, width))  # (batch, 1, width)
        positions = whole_table(self.position_embedding)  # (patches + 1, width)
        if interpolate_pos_encoding:
            positions = interpolate_positions(positions, rows, columns)
        return tf.concat([class_token, patches], axis=1) + positions


class TFCLIPTextTransformer(Module):
    """The text tower."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TFCLIPTextEmbeddings(config)
        self.encoder = TFCLIPEncoder(config)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def call(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        training: bool = False,
    ) -> BaseModelOutputWithPooling[Tensor]:
        """Runs the tower over (batch, seq)."""
        with plain_errors():
            input_ids = checks.check_text(input_ids, attention_mask, position_ids, self.config)
        if attention_mask is not None:  # a mask of unknown shape must not be broadcast
            attention_mask = tf.reshape(attention_mask, sizes(input_ids))
        hidden_states = self.embeddings(input_ids, position_ids)
        encoded = self.encoder(hidden_states, attention_mask, True, output_attentions, output_hidden_states)
        last_hidden_state = self.final_layer_norm(encoded.last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=end_tokens(input_ids, self.config.eos_token_id)(last_hidden_state)[:, 0],
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def pooled(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Returns the pooled state (batch, width) of (batch, seq) alone: the last block computes no other row."""
        pick = end_tokens(input_ids, self.config.eos_token_id)
        encoded = self.encoder(self.embeddings(input_ids), attention_mask, True, False, False, pick=pick)
        return self.final_layer_norm(encoded.last_hidden_state)[:, 0]


def end_tokens(input_ids: Tensor, eos_token_id: int) -> Pick:
    """Returns what takes the state at the end token of each row: see `clipmb.pt.modeling.end_tokens`."""
    chosen = input_ids if eos_token_id == 2 else tf.cast(input_ids == eos_token_id, tf.int32)
    # Not tf.argmax, which does not promise the first of equals.
    highest = chosen == tf.reduce_max(chosen, axis=-1, keepdims=True)
    seq = sizes(input_ids)[1]
    positions = tf.reduce_min(tf.where(highest, tf.range(seq), seq), axis=-1)  # (batch,)
    return lambda x: tf.gather(x, positions[:, None], axis=1, batch_dims=1)


class TFCLIPVisionTransformer(Module):
    """The vision tower."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TFCLIPVisionEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = TFCLIPEncoder(config)
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def call(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        training: bool = False,
    ) -> BaseModelOutputWithPooling[Tensor]:
        """Runs the tower over (batch, channels, height, width)."""
        with plain_errors():
            pixel_values = checks.check_pixels(pixel_values, self.config, interpolate_pos_encoding)
        hidden_states = self.pre_layrnorm(self.embeddings(pixel_values, interpolate_pos_encoding))
        encoded = self.encoder(hidden_states, None, False, output_attentions, output_hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=self.post_layernorm(encoded.last_hidden_state[:, 0]),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def pooled(self, pixel_values: Tensor) -> Tensor:
        """Returns the pooled state (batch, width) of images alone: the last block computes no other row."""
        hidden_states = self.pre_layrnorm(self.embeddings(pixel_values))
        encoded = self.encoder(hidden_states, None, False, False, False, pick=lambda x: x[:, :1])
        return self.post_layernorm(encoded.last_hidden_state[:, 0])


class TFCLIPPreTrainedModel(ExportMixin, VocabularyMixin, KerasModel):
    """What the six heads share: construction, files, embeddings, checkpointing.

    Args:
        config: The head's config.
        dtype: A Keras dtype policy or its name ("float32", "float64", "bfloat16", "mixed_bfloat16", …); Keras' global
            policy when None.
        **kwargs: ``name`` and ``trainable``, as in Keras.

    Raises:
        TypeError: The config is not of the class that the head needs.
    """

    config_class = CLIPConfig
    text_model: TFCLIPTextTransformer  # of heads that have it
    vision_model: TFCLIPVisionTransformer  # of heads that have it

    def post_init(self) -> None:
        """Creates every weight, and turns gradient checkpointing on where the config asks for it."""
        super().post_init()
        if getattr(self.config, "gradient_checkpointing", False):
            self.gradient_checkpointing_enable()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1
    ) -> None:
        """Recomputes blocks in the backward pass of training instead of keeping their intermediate results.

        Args:
            gradient_checkpointing_kwargs: PyTorch's keywords; TensorFlow has nothing to choose.
            every_n_layers: Recompute the first block of every so many.

        Raises:
            ValueError: ``every_n_layers`` is not a positive number.
        """
        self._set_checkpointing(whole_number("every_n_layers", every_n_layers))

    def gradient_checkpointing_disable(self) -> None:
        """Undoes `gradient_checkpointing_enable`."""
        self._set_checkpointing(0)

    def _set_checkpointing(self, every_n_layers: int) -> None:
        for layer in self._flatten_layers():
            if isinstance(layer, TFCLIPEncoder):
                layer.checkpointing = every_n_layers

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether gradient checkpointing is on."""
        return any(isinstance(layer, TFCLIPEncoder) and layer.checkpointing for layer in self._flatten_layers())


@keras.saving.register_keras_serializable("clipmb")
class TFCLIPModel(TFCLIPPreTrainedModel):
    """Both towers, their projections, and the similarity of every text with every image."""

    head = "CLIPModel"
    config: CLIPConfig

    def __init__(self, config: CLIPConfig, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(config, dtype, **kwargs)
        config = self.config
        text, vision = config.text_config, config.vision_config
        self.text_model = TFCLIPTextTransformer(text)
        self.vision_model = TFCLIPVisionTransformer(vision)
        self.visual_projection = Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = Linear(text.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    def build(self, input_shape: Any = None) -> None:
        """Creates logit_scale () and the weights of every part."""
        super().build()
        # Not cast by mixed policies: in bfloat16 a scale of 100 would be 99.
        self.logit_scale = self.add_weight(
            shape=(), initializer=self.logit_scale_initializer, autocast=False, name="logit_scale"
        )

    @unpacking
    def get_text_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool = False,
    ) -> Tensor:
        """Returns the projected texts, not normalised.

        Args:
            input_ids: (batch, seq) integers.
            attention_mask: (batch, seq), 1 for tokens that may be looked at; all when None.
            position_ids: (batch or 1, seq); 0, 1, … when None.
            output_attentions: Changes nothing here; part of the signature of every call.
            output_hidden_states: Like ``output_attentions``.
            return_dict: Like ``output_attentions``.
            training: As in `call`.

        Returns:
            (batch, proj).

        Raises:
            ValueError: A shape or a value does not fit.
        """
        output = self.text_model(
            input_ids, attention_mask, position_ids, output_attentions, output_hidden_states, training=training
        )
        return self.text_projection(output.pooler_output)

    @unpacking
    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        training: bool = False,
    ) -> Tensor:
        """Returns the projected images, not normalised.

        Args:
            pixel_values: (batch, channels, height, width).
            output_attentions: Changes nothing here; part of the signature of every call.
            output_hidden_states: Like ``output_attentions``.
            interpolate_pos_encoding: Accept images of any size.
            return_dict: Like ``output_attentions``.
            training: As in `call`.

        Returns:
            (batch, proj).

        Raises:
            ValueError: A shape or a value does not fit.
        """
        output = self.vision_model(
            pixel_values, output_attentions, output_hidden_states, interpolate_pos_encoding, training=training
        )
        return self.visual_projection(output.pooler_output)

    def call(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        training: bool = False,
    ) -> CLIPOutput[Tensor] | Any:
        """Compares every text with every image.

        Args:
            input_ids: (texts, seq) integers.
            pixel_values: (images, channels, height, width).
            attention_mask: (texts, seq), 1 for tokens that may be looked at; all when None.
            position_ids: (texts or 1, seq); 0, 1, … when None.
            return_loss: Also return the contrastive loss, for as many texts as images, pair by pair.
            output_attentions: Also return every block's attention weights.
            output_hidden_states: Also return every block's input and output.
            interpolate_pos_encoding: Accept images of any size.
            return_dict: Return a `CLIPOutput`; otherwise a tuple of what is not None.
            training: Apply dropout, and gradient checkpointing where it is enabled.

        Raises:
            ValueError: A shape or a value does not fit.
        """
        text_output = self.text_model(input_ids, attention_mask, position_ids, output_attentions, output_hidden_states)
        vision_output = self.vision_model(
            pixel_values, output_attentions, output_hidden_states, interpolate_pos_encoding
        )
        text_embeds = normalize(self.text_projection(text_output.pooler_output))  # (texts, proj)
        image_embeds = normalize(self.visual_projection(vision_output.pooler_output))  # (images, proj)
        scale = tf.cast(tf.exp(self.logit_scale), text_embeds.dtype)
        logits_per_text = tf.matmul(text_embeds, image_embeds, transpose_b=True) * scale  # (texts, images)
        output = CLIPOutput(
            loss=contrastive_loss(logits_per_text) if return_loss else None,
            logits_per_image=tf.transpose(logits_per_text),
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_output,
            vision_model_output=vision_output,
        )
        return returned(output, return_dict, self.config.return_dict)

    if TYPE_CHECKING:

        @called_like(call)
        def __call__(self) -> Any:
            """Runs `call` as a Keras layer."""

    def own_loss(self, y: Any, y_pred: CLIPOutput[Tensor] | tuple[Any, ...]) -> Tensor:
        """Returns the contrastive loss of the batch."""
        return contrastive_loss(y_pred[-5])  # logits_per_text, whether or not there is a loss before it


class TFCLIPTextPreTrainedModel(TFCLIPPreTrainedModel, Generic[Output]):
    """What the two text heads share."""

    config_class = CLIPTextConfig
    config: CLIPTextConfig

    def __init__(self, config: CLIPTextConfig, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(config, dtype, **kwargs)
        self.text_model = TFCLIPTextTransformer(self.config)

    def output_of(self, output: BaseModelOutputWithPooling[Tensor]) -> ModelOutput:
        """Makes the output of the head from that of the tower."""
        return output

    def call(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool = False,
    ) -> Output | Any:
        """Encodes texts; arguments and errors as in `TFCLIPModel.call`."""
        output = self.text_model(input_ids, attention_mask, position_ids, output_attentions, output_hidden_states)
        return returned(self.output_of(output), return_dict, self.config.return_dict)

    if TYPE_CHECKING:

        @called_like(call)
        def __call__(self) -> Any:
            """Runs `call` as a Keras layer."""


@keras.saving.register_keras_serializable("clipmb")
class TFCLIPTextModel(TFCLIPTextPreTrainedModel[BaseModelOutputWithPooling[Tensor]]):
    """The text tower alone; arguments as in `TFCLIPPreTrainedModel`."""

    head = "CLIPTextModel"

    def __init__(self, config: CLIPTextConfig, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(config, dtype, **kwargs)
        self.post_init()


@keras.saving.register_keras_serializable("clipmb")
class TFCLIPTextModelWithProjection(TFCLIPTextPreTrainedModel[CLIPTextModelOutput[Tensor]]):
    """The text tower with its projection; arguments as in `TFCLIPPreTrainedModel`."""

    head = "CLIPTextModelWithProjection"

    def __init__(self, config: CLIPTextConfig, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(config, dtype, **kwargs)
        self.text_projection = Linear(self.config.hidden_size, self.config.projection_dim, bias=False)
        self.post_init()

    def output_of(self, output: BaseModelOutputWithPooling[Tensor]) -> CLIPTextModelOutput[Tensor]:
        """Projects the pooled state; see `TFCLIPTextPreTrainedModel.output_of`."""
        return CLIPTextModelOutput(
            text_embeds=self.text_projection(output.pooler_output),
            last_hidden_state=output.last_hidden_state,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class TFCLIPVisionPreTrainedModel(TFCLIPPreTrainedModel, Generic[Output]):
    """What the two vision heads share."""

    config_class = CLIPVisionConfig
    config: CLIPVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CLIPVisionConfig, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(config, dtype, **kwargs)
        self.vision_model = TFCLIPVisionTransformer(self.config)

    def output_of(self, output: BaseModelOutputWithPooling[Tensor]) -> ModelOutput:
        """Makes the output of the head from that of the tower."""
        return output

    def call(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        training: bool = False,
    ) -> Output | Any:
        """Encodes images; arguments and errors as in `TFCLIPModel.call`."""
        output = self.vision_model(pixel_values, output_attentions, output_hidden_states, interpolate_pos_encoding)
        return returned(self.output_of(output), return_dict, self.config.return_dict)

    if TYPE_CHECKING:

        @called_like(call)
        def __call__(self) -> Any:
            """Runs `call` as a Keras layer."""


@keras.saving.register_keras_serializable("clipmb")
class TFCLIPVisionModel(TFCLIPVisionPreTrainedModel[BaseModelOutputWithPooling[Tensor]]):
    """The vision tower alone; arguments as in `TFCLIPPreTrainedModel`."""

    head = "CLIPVisionModel"

    def __init__(self, config: CLIPVisionConfig, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(config, dtype, **kwargs)
        self.post_init()


@keras.saving.register_keras_serializable("clipmb")
class TFCLIPVisionModelWithProjection(TFCLIPVisionPreTrainedModel[CLIPVisionModelOutput[Tensor]]):
    """The vision tower with its projection; arguments as in `TFCLIPPreTrainedModel`."""

    head = "CLIPVisionModelWithProjection"

    def __init__(self, config: CLIPVisionConfig, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(config, dtype, **kwargs)
        self.visual_projection = Linear(self.config.hidden_size, self.config.projection_dim, bias=False)
        self.post_init()

    def output_of(self, output: BaseModelOutputWithPooling[Tensor]) -> CLIPVisionModelOutput[Tensor]:
        """Projects the pooled state; see `TFCLIPVisionPreTrainedModel.output_of`."""
        return CLIPVisionModelOutput(
            image_embeds=self.visual_projection(output.pooler_output),
            last_hidden_state=output.last_hidden_state,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


@keras.saving.register_keras_serializable("clipmb")
class TFCLIPForImageClassification(TFCLIPPreTrainedModel):
    """The vision tower with a linear classifier over the mean of the patch states.

    Raises:
        ValueError: The config has no labels.
    """

    head = "CLIPForImageClassification"
    config: CLIPConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CLIPConfig, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(config, dtype, **kwargs)
        config = self.config
        if config.num_labels < 1:
            raise bad_input("num_labels must be at least 1", config.num_labels, "Pass num_labels= or id2label=")
        self.num_labels = config.num_labels
        self.vision_model = TFCLIPVisionTransformer(config.vision_config)
        self.classifier = Linear(config.vision_config.hidden_size, config.num_labels)
        self.post_init()

    def call(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        training: bool = False,
    ) -> ImageClassifierOutput[Tensor] | Any:
        """Classifies images.

        Args:
            pixel_values: (batch, channels, height, width).
            labels: (batch,) class indices, or (batch,) numbers for one label, or (batch, num_labels) numbers in [0, 1].
            output_attentions: As in `TFCLIPModel.call`.
            output_hidden_states: As in `TFCLIPModel.call`.
            interpolate_pos_encoding: As in `TFCLIPModel.call`.
            return_dict: As in `TFCLIPModel.call`.
            training: As in `TFCLIPModel.call`.

        Raises:
            TypeError: Class indices are not integers.
            ValueError: A shape or a value does not fit.
        """
        output = self.vision_model(pixel_values, output_attentions, output_hidden_states, interpolate_pos_encoding)
        logits = self.classifier(tf.reduce_mean(output.last_hidden_state[:, 1:], axis=1))  # (batch, num_labels)
        classified = ImageClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config),
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return returned(classified, return_dict, self.config.return_dict)

    if TYPE_CHECKING:

        @called_like(call)
        def __call__(self) -> Any:
            """Runs `call` as a Keras layer."""

    def own_loss(self, y: Any, y_pred: ImageClassifierOutput[Tensor] | tuple[Any, ...]) -> Tensor | None:
        """Returns the loss of labels beside the inputs, else that of labels among them, else None."""
        if y is not None:
            return classification_loss(self.scored(y_pred), y, self.config)
        return y_pred[0] if y_pred[0].shape.rank == 0 else None

    def scored(self, y_pred: ImageClassifierOutput[Tensor] | tuple[Any, ...]) -> Tensor:
        """Returns the logits, whether or not there is a loss before them."""
        return y_pred[1] if y_pred[0].shape.rank == 0 else y_pred[0]

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        """The weights that training changes: not ``post_layernorm``, of whose missing gradients Keras would warn."""
        unused = {id(weight) for weight in self.vision_model.post_layernorm.weights}
        return [weight for weight in super().trainable_weights if id(weight) not in unused]

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        """Like `trainable_weights`, which for this model are the same."""
        return self.trainable_weights
