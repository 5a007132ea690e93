# ruff: noqa: D102  (setup is what linen calls a constructor)
"""The linen modules of CLIP: what computes. `clipmb.flax.modeling` wraps each in a model.

Shapes: batch, seq (tokens, or patches + 1), width, heads, head_dim, patches, proj. Module and parameter names are those
of the checkpoints. Source of every behaviour not explained here: the PyTorch models of transformers 4.57.6.

Every module computes in its ``dtype``, whatever the dtype of its parameters, which are cast where they are used:
``dtype=jnp.bfloat16`` gives what PyTorch gives for a model in bfloat16. Images are channels last here, as linen's
convolution takes them, as did those of transformers 4; the models of `clipmb.flax.modeling` take channels first.

Ids outside an embedding table raise a ValueError where their values are known. Under ``jax.jit`` and the other
transformations they are not: there such an id makes its whole row NaN, never a plausible number, and JAX's own check of
indices reports it, at some cost and only where it is asked for::

    from jax.experimental import checkify

    features = checkify.checkify(lambda params, ids: model(ids, params=params), errors=checkify.index_checks)
    error, output = jax.jit(features)(model.params, ids)
    error.throw()  # raises for ids outside the vocabulary and positions outside the context

For NNX, ``nnx.bridge.ToNNX(FlaxCLIPTextModule(config), rngs=nnx.Rngs(0)).lazy_init(ids)`` is an NNX module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from clipmb.common import checks
from clipmb.common.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from clipmb.common.errors import bad_input, warn_once
from clipmb.common.outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    CLIPOutput,
    CLIPTextModelOutput,
    CLIPVisionModelOutput,
    ImageClassifierOutput,
    ModelOutput,
    default,
    returned,
)
from clipmb.flax.layers import (
    ACTIVATIONS,
    LayerNorm,
    Module,
    attention_context,
    attention_scores,
    embedding,
    fused_attention,
    initial,
    interpolate_positions,
    linear,
    look_up,
    patch_product,
    statistics_dtype,
)
from clipmb.flax.losses import classification_loss, contrastive_loss, normalize
from clipmb.flax.tensors import register_output

Pick = Callable[[Array], Array]  # takes one row of each item of a batch: (batch, seq, …) to (batch, 1, …)

for _type in ModelOutput.types:
    register_output(_type)


class FlaxCLIPAttention(Module):
    """Multi-head self-attention."""

    config: CLIPTextConfig | CLIPVisionConfig

    def setup(self) -> None:
        config, width = self.config, self.config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.dropout = nn.Dropout(config.attention_dropout)
        self.k_proj = linear(self, "k_proj", width)
        self.v_proj = linear(self, "v_proj", width)
        self.q_proj = linear(self, "q_proj", width)
        self.out_proj = linear(self, "out_proj", width)

    def __call__(
        self,
        hidden_states: Array,
        bias: Array | None,
        fused: bool,
        deterministic: bool,
        asking: Array | None = None,
    ) -> tuple[Array, Array | None]:
        """Returns the context (batch, seq, width) and, unless fused, the weights (batch, heads, seq, seq).

        Of ``asking``, (batch, rows, width), where only its rows of both are wanted.
        """
        asking = hidden_states if asking is None else asking
        batch, seq, width = hidden_states.shape
        rows = asking.shape[1]
        split = (batch, seq, self.num_heads, self.head_dim)
        query = self.q_proj(asking).reshape(batch, rows, *split[2:])  # (batch, rows, heads, head_dim)
        key = self.k_proj(hidden_states).reshape(split)  # (batch, seq, heads, head_dim)
        value = self.v_proj(hidden_states).reshape(split)
        if fused:
            weights = None
            context = fused_attention(query, key, value, bias, scale=self.scale)
        else:
            scores = attention_scores(query, key) * self.scale  # (batch, heads, rows, seq)
            if bias is not None:
                scores = scores + bias
            statistics = statistics_dtype(scores.dtype)
            weights = jax.nn.softmax(scores.astype(statistics), axis=-1).astype(query.dtype)
            weights = self.dropout(weights, deterministic)
            context = attention_context(weights, value)  # (batch, rows, heads, head_dim)
        context = context.reshape(batch, rows, width)
        return self.out_proj(context), weights


class FlaxCLIPMLP(Module):
    """The two-layer perceptron of a block."""

    config: CLIPTextConfig | CLIPVisionConfig

    def setup(self) -> None:
        config = self.config
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = linear(self, "fc1", config.intermediate_size)
        self.fc2 = linear(self, "fc2", config.hidden_size)

    def __call__(self, hidden_states: Array) -> Array:
        """(batch, seq, width) to the same."""
        return self.fc2(self.activation(self.fc1(hidden_states)))


class FlaxCLIPEncoderLayer(Module):
    """One block: attention and perceptron, each behind a layer norm and beside a residual."""

    config: CLIPTextConfig | CLIPVisionConfig

    def setup(self) -> None:
        self.self_attn = FlaxCLIPAttention(self.config, self.dtype)
        self.layer_norm1 = LayerNorm(self.config.layer_norm_eps, self.dtype)
        self.mlp = FlaxCLIPMLP(self.config, self.dtype)
        self.layer_norm2 = LayerNorm(self.config.layer_norm_eps, self.dtype)

    def __call__(
        self,
        hidden_states: Array,
        bias: Array | None,
        fused: bool,
        deterministic: bool,
        pick: Pick | None = None,
    ) -> tuple[Array, Array | None]:
        """(batch, seq, width) to the same, or to the rows that are picked, and the attention weights unless fused."""
        normed = asking = self.layer_norm1(hidden_states)
        if pick is not None:
            batch, seq, _ = normed.shape
            hidden_states, asking = pick(hidden_states), pick(normed)
            bias = None if bias is None else pick(jnp.broadcast_to(bias[:, 0], (batch, seq, seq)))[:, None]
        context, weights = self.self_attn(normed, bias, fused, deterministic, asking)
        hidden_states = hidden_states + context
        hidden_states = hidden_states + self.mlp(self.layer_norm2(hidden_states))
        return hidden_states, weights


class FlaxCLIPLayerCollection(Module):
    """The blocks under the names "0", "1", …, as the checkpoints have them.

    Attributes:
        gradient_checkpointing: The first of every so many blocks is recomputed in the backward pass; none at 0.
    """

    config: CLIPTextConfig | CLIPVisionConfig
    gradient_checkpointing: int = False

    def setup(self) -> None:
        every, recomputed = self.gradient_checkpointing, nn.remat(FlaxCLIPEncoderLayer, static_argnums=(3, 4, 5))
        kinds = [
            recomputed if every and i % every == 0 else FlaxCLIPEncoderLayer
            for i in range(self.config.num_hidden_layers)
        ]
        self.blocks = [kind(self.config, self.dtype, name=str(i)) for i, kind in enumerate(kinds)]

    def __call__(
        self,
        hidden_states: Array,
        bias: Array | None,
        fused: bool,
        deterministic: bool,
        pick: Pick | None = None,
    ) -> tuple[list[Array], list[Array | None]]:
        """Returns the input and the output of each block, and the attention weights of each."""
        states, attentions = [hidden_states], []
        for i, layer in enumerate(self.blocks):
            own = pick if i == len(self.blocks) - 1 else None
            hidden_states, weights = layer(hidden_states, bias, fused, deterministic, own)
            states.append(hidden_states)
            attentions.append(weights)
        return states, attentions


class FlaxCLIPEncoder(Module):
    """The blocks of a tower."""

    config: CLIPTextConfig | CLIPVisionConfig
    gradient_checkpointing: int = False

    def setup(self) -> None:
        self.layers = FlaxCLIPLayerCollection(self.config, self.dtype, self.gradient_checkpointing)

    def __call__(
        self,
        hidden_states: Array,
        attention_mask: Array | None = None,
        causal: bool = False,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        pick: Pick | None = None,
    ) -> BaseModelOutput[Array]:
        """Runs the blocks over (batch, seq, width); the last one over what ``pick`` takes, where it is given."""
        output_attentions = default(output_attentions, self.config.output_attentions)
        output_hidden_states = default(output_hidden_states, self.config.output_hidden_states)
        fused = self.config.attn_implementation != "eager"
        if fused and output_attentions:
            fused = False
            warn_once(checks.ATTENTIONS_NEED_EAGER)
        # JAX's fused attention has no dropout, and its softmax is in float32 even for float64.
        dropout = not deterministic and self.config.attention_dropout > 0
        fused = fused and not dropout and hidden_states.dtype != jnp.float64
        bias = attention_bias(attention_mask, hidden_states) if causal else None
        states, attentions = self.layers(hidden_states, bias, fused, deterministic, pick)
        if pick is not None and not attentions:
            states = [pick(hidden_states)]
        return BaseModelOutput(
            last_hidden_state=states[-1],
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


def attention_bias(attention_mask: Array | None, hidden_states: Array) -> Array:
    """Returns what is added to the scores, (batch or 1, 1, seq, seq): see `clipmb.pt.modeling.attention_bias`."""
    dtype, seq = hidden_states.dtype, hidden_states.shape[1]
    lowest = jnp.array(jnp.finfo(dtype).min, dtype)
    steps = jnp.arange(seq)
    zero = jnp.zeros((), dtype)
    bias = jnp.where(steps[:, None] < steps[None, :], lowest, zero)[None, None]  # (1, 1, seq, seq)
    if attention_mask is not None:
        bias = bias + jnp.where(attention_mask[:, None, None, :] == 1, zero, lowest)  # (batch, 1, seq, seq)
    return bias


class FlaxCLIPTextEmbeddings(Module):
    """Token plus position embeddings."""

    config: CLIPTextConfig

    def setup(self) -> None:
        self.token_embedding = embedding(self, "token_embedding", self.config.vocab_size)
        self.position_embedding = embedding(self, "position_embedding", self.config.max_position_embeddings)

    def __call__(self, input_ids: Array, position_ids: Array | None = None) -> Array:
        """(batch, seq) to (batch, seq, width)."""
        tokens = look_up(self.token_embedding, input_ids, "input_ids")  # (batch, seq, width)
        if position_ids is None:
            return tokens + self.position_embedding.embedding[: input_ids.shape[1]].astype(self.dtype)
        return tokens + look_up(self.position_embedding, position_ids, "position_ids")


class FlaxCLIPVisionEmbeddings(Module):
    """Class token and patch embeddings plus position embeddings."""

    config: CLIPVisionConfig

    def setup(self) -> None:
        config = self.config
        width, size = config.hidden_size, (config.patch_size, config.patch_size)
        self.class_embedding = self.param("class_embedding", initial(config, "class_embedding"), (width,))
        self.patch_embedding = nn.Conv(
            width,
            size,
            strides=size,
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            kernel_init=initial(config, "patch_embedding.weight"),
            conv_general_dilated=patch_product,
        )
        self.position_embedding = embedding(self, "position_embedding", config.num_patches + 1)

    def __call__(self, pixel_values: Array, interpolate_pos_encoding: bool = False) -> Array:
        """(batch, height, width, channels) to (batch, patches + 1, width)."""
        patches = self.patch_embedding(jnp.asarray(pixel_values, self.dtype))  # (batch, rows, columns, width)
        batch, rows, columns, width = patches.shape
        patches = patches.reshape(batch, rows * columns, width)  # (batch, patches, width)
        class_token = jnp.broadcast_to(self.class_embedding.astype(self.dtype), (batch, 1, width))
        positions = self.position_embedding.embedding.astype(self.dtype)  # (patches + 1, width)
        if interpolate_pos_encoding:
            positions = interpolate_positions(positions, rows, columns)
        return jnp.concatenate([class_token, patches], axis=1) + positions


class FlaxCLIPTextTransformer(Module):
    """The text tower."""

    config: CLIPTextConfig
    gradient_checkpointing: int = False

    def setup(self) -> None:
        self.embeddings = FlaxCLIPTextEmbeddings(self.config, self.dtype)
        self.encoder = FlaxCLIPEncoder(self.config, self.dtype, self.gradient_checkpointing)
        self.final_layer_norm = LayerNorm(self.config.layer_norm_eps, self.dtype)

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling[Array]:
        """Runs the tower over (batch, seq)."""
        input_ids = checks.check_text(input_ids, attention_mask, position_ids, self.config)
        hidden_states = self.embeddings(input_ids, position_ids)
        encoded = self.encoder(
            hidden_states, attention_mask, True, deterministic, output_attentions, output_hidden_states
        )
        last_hidden_state = self.final_layer_norm(encoded.last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=end_tokens(input_ids, self.config.eos_token_id)(last_hidden_state)[:, 0],
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def pooled(self, input_ids: Array, attention_mask: Array | None = None) -> Array:
        """Returns the pooled state (batch, width) of (batch, seq) alone: the last block computes no other row."""
        pick = end_tokens(input_ids, self.config.eos_token_id)
        encoded = self.encoder(self.embeddings(input_ids), attention_mask, True, True, False, False, pick)
        return self.final_layer_norm(encoded.last_hidden_state)[:, 0]


def end_tokens(input_ids: Array, eos_token_id: int) -> Pick:
    """Returns what takes the state at the end token of each row: see `clipmb.pt.modeling.end_tokens`."""
    chosen = input_ids if eos_token_id == 2 else input_ids == eos_token_id
    positions = jnp.argmax(chosen, axis=-1)  # (batch,)
    return lambda x: x[jnp.arange(positions.shape[0]), positions][:, None]


class FlaxCLIPVisionTransformer(Module):
    """The vision tower."""

    config: CLIPVisionConfig
    gradient_checkpointing: int = False

    def setup(self) -> None:
        self.embeddings = FlaxCLIPVisionEmbeddings(self.config, self.dtype)
        self.pre_layrnorm = LayerNorm(self.config.layer_norm_eps, self.dtype)
        self.encoder = FlaxCLIPEncoder(self.config, self.dtype, self.gradient_checkpointing)
        self.post_layernorm = LayerNorm(self.config.layer_norm_eps, self.dtype)

    def __call__(
        self,
        pixel_values: Array | None = None,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> BaseModelOutputWithPooling[Array]:
        """Runs the tower over (batch, height, width, channels)."""
        pixel_values = check_channels_last(pixel_values, self.config, interpolate_pos_encoding)
        hidden_states = self.pre_layrnorm(self.embeddings(pixel_values, interpolate_pos_encoding))
        encoded = self.encoder(hidden_states, None, False, deterministic, output_attentions, output_hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=self.post_layernorm(encoded.last_hidden_state[:, 0]),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def pooled(self, pixel_values: Array) -> Array:
        """Returns the pooled state (batch, width) of images alone: the last block computes no other row."""
        hidden_states = self.pre_layrnorm(self.embeddings(pixel_values))
        encoded = self.encoder(hidden_states, None, False, True, False, False, _first)
        return self.post_layernorm(encoded.last_hidden_state[:, 0])


def _first(x: Array) -> Array:
    """Takes the class token: (batch, seq, width) to (batch, 1, width)."""
    return x[:, :1]


def check_channels_last(pixels: Array | None, config: CLIPVisionConfig, interpolate: bool) -> Array:
    """Checks the shape of images given to a linen module.

    Args:
        pixels: (batch, height, width, channels).
        config: The vision tower's config.
        interpolate: Whether the module accepts images of any size.

    Returns:
        The pixels.

    Raises:
        ValueError: The shape does not fit.
    """
    if pixels is None:
        return checks.check_pixels(pixels, config, interpolate)
    shape = tuple(pixels.shape)
    if len(shape) != 4 or shape[3] != config.num_channels:
        raise bad_input(
            f"The linen modules take pixel_values of shape (batch, height, width, {config.num_channels})",
            shape,
            "Transpose them, or call the model instead, which takes channels first",
        )
    checks.check_pixels(jax.ShapeDtypeStruct((shape[0], shape[3], *shape[1:3]), jnp.float32), config, interpolate)
    return pixels


class FlaxCLIPModule(Module):
    """Both towers, their projections, and the similarity of every text with every image."""

    config: CLIPConfig
    gradient_checkpointing: int = False

    def setup(self) -> None:
        config = self.config
        self.text_model = FlaxCLIPTextTransformer(config.text_config, self.dtype, self.gradient_checkpointing)
        self.vision_model = FlaxCLIPVisionTransformer(config.vision_config, self.dtype, self.gradient_checkpointing)
        self.visual_projection = linear(self, "visual_projection", config.projection_dim, bias=False)
        self.text_projection = linear(self, "text_projection", config.projection_dim, bias=False)
        self.logit_scale = self.param("logit_scale", initial(config, "logit_scale"), ())

    def get_text_features(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Array:
        """Returns the projected text: (batch, seq) to (batch, proj), not normalised."""
        output = self.text_model(
            input_ids, attention_mask, position_ids, deterministic, output_attentions, output_hidden_states
        )
        return self.text_projection(output.pooler_output)

    def get_image_features(
        self,
        pixel_values: Array | None = None,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Array:
        """Returns the projected images: (batch, height, width, channels) to (batch, proj), not normalised."""
        output = self.vision_model(
            pixel_values, deterministic, output_attentions, output_hidden_states, interpolate_pos_encoding
        )
        return self.visual_projection(output.pooler_output)

    def pooled_text(self, input_ids: Array, attention_mask: Array | None = None) -> Array:
        """Returns what `get_text_features` does, by way of the pooled state alone."""
        return self.text_projection(self.text_model.pooled(input_ids, attention_mask))

    def pooled_images(self, pixel_values: Array) -> Array:
        """Returns what `get_image_features` does, by way of the pooled state alone."""
        return self.visual_projection(self.vision_model.pooled(pixel_values))

    def __call__(
        self,
        input_ids: Array | None = None,
        pixel_values: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> CLIPOutput[Array] | Any:
        """Compares every text with every image; arguments as in `FlaxCLIPModel.__call__`, but channels last."""
        text_output = self.text_model(
            input_ids, attention_mask, position_ids, deterministic, output_attentions, output_hidden_states
        )
        vision_output = self.vision_model(
            pixel_values, deterministic, output_attentions, output_hidden_states, interpolate_pos_encoding
        )
        text_embeds = normalize(self.text_projection(text_output.pooler_output))  # (texts, proj)
        image_embeds = normalize(self.visual_projection(vision_output.pooler_output))  # (images, proj)
        logits_per_text = text_embeds @ image_embeds.T * jnp.exp(self.logit_scale.astype(self.dtype))  # (texts, images)
        output = CLIPOutput(
            loss=contrastive_loss(logits_per_text) if return_loss else None,
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_output,
            vision_model_output=vision_output,
        )
        return returned(output, return_dict, self.config.return_dict)


class FlaxCLIPTextPreTrainedModule(Module):
    """What the two text heads share."""

    config: CLIPTextConfig
    gradient_checkpointing: int = False

    def setup(self) -> None:
        self.text_model = FlaxCLIPTextTransformer(self.config, self.dtype, self.gradient_checkpointing)

    def output_of(self, output: BaseModelOutputWithPooling[Array]) -> ModelOutput:
        """Makes the output of the head from that of the tower."""
        return output

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | Any:
        """Encodes texts; arguments as in `FlaxCLIPModel.__call__`."""
        output = self.text_model(
            input_ids, attention_mask, position_ids, deterministic, output_attentions, output_hidden_states
        )
        return returned(self.output_of(output), return_dict, self.config.return_dict)


class FlaxCLIPTextModule(FlaxCLIPTextPreTrainedModule):
    """The text tower alone."""


class FlaxCLIPTextModelWithProjectionModule(FlaxCLIPTextPreTrainedModule):
    """The text tower with its projection."""

    def setup(self) -> None:
        super().setup()
        self.text_projection = linear(self, "text_projection", self.config.projection_dim, bias=False)

    def output_of(self, output: BaseModelOutputWithPooling[Array]) -> CLIPTextModelOutput[Array]:
        """Projects the pooled state; see `FlaxCLIPTextPreTrainedModule.output_of`."""
        return CLIPTextModelOutput(
            text_embeds=self.text_projection(output.pooler_output),
            last_hidden_state=output.last_hidden_state,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class FlaxCLIPVisionPreTrainedModule(Module):
    """What the two vision heads share."""

    config: CLIPVisionConfig
    gradient_checkpointing: int = False

    def setup(self) -> None:
        self.vision_model = FlaxCLIPVisionTransformer(self.config, self.dtype, self.gradient_checkpointing)

    def output_of(self, output: BaseModelOutputWithPooling[Array]) -> ModelOutput:
        """Makes the output of the head from that of the tower."""
        return output

    def __call__(
        self,
        pixel_values: Array | None = None,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> ModelOutput | Any:
        """Encodes images; arguments as in `FlaxCLIPModel.__call__`, but channels last."""
        output = self.vision_model(
            pixel_values, deterministic, output_attentions, output_hidden_states, interpolate_pos_encoding
        )
        return returned(self.output_of(output), return_dict, self.config.return_dict)


class FlaxCLIPVisionModule(FlaxCLIPVisionPreTrainedModule):
    """The vision tower alone."""


class FlaxCLIPVisionModelWithProjectionModule(FlaxCLIPVisionPreTrainedModule):
    """The vision tower with its projection."""

    def setup(self) -> None:
        super().setup()
        self.visual_projection = linear(self, "visual_projection", self.config.projection_dim, bias=False)

    def output_of(self, output: BaseModelOutputWithPooling[Array]) -> CLIPVisionModelOutput[Array]:
        """Projects the pooled state; see `FlaxCLIPVisionPreTrainedModule.output_of`."""
        return CLIPVisionModelOutput(
            image_embeds=self.visual_projection(output.pooler_output),
            last_hidden_state=output.last_hidden_state,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class FlaxCLIPForImageClassificationModule(Module):
    """The vision tower with a linear classifier over the mean of the patch states."""

    config: CLIPConfig
    gradient_checkpointing: int = False

    def __post_init__(self) -> None:
        if self.config.num_labels < 1:
            raise bad_input("num_labels must be at least 1", self.config.num_labels, "Pass num_labels= or id2label=")
        super().__post_init__()

    def setup(self) -> None:
        config = self.config
        self.vision_model = FlaxCLIPVisionTransformer(config.vision_config, self.dtype, self.gradient_checkpointing)
        self.classifier = linear(self, "classifier", config.num_labels)

    def __call__(
        self,
        pixel_values: Array | None = None,
        labels: Array | None = None,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> ImageClassifierOutput[Array] | Any:
        """Classifies images; arguments as in `FlaxCLIPForImageClassification.__call__`, but channels last."""
        output = self.vision_model(
            pixel_values, deterministic, output_attentions, output_hidden_states, interpolate_pos_encoding
        )
        logits = self.classifier(output.last_hidden_state[:, 1:].mean(axis=1))  # (batch, num_labels)
        classified = ImageClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config),
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return returned(classified, return_dict, self.config.return_dict)
