"""CLIP in PyTorch.

Shapes: batch, seq (tokens, or patches + 1), width, heads, head_dim, patches, proj. Module and parameter names are those
of the checkpoints. Source of every behaviour not explained here: the PyTorch models of transformers 4.57.6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Generic

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
from clipmb.pt.layers import ACTIVATIONS, interpolate_positions, look_up, statistics_dtype
from clipmb.pt.losses import classification_loss, contrastive_loss, normalize
from clipmb.pt.tensors import register_output
from clipmb.pt.torch_model import TorchModel
from clipmb.pt.vocabulary import VocabularyMixin

Pick = Callable[[Tensor], Tensor]  # takes one row of each item of a batch: (batch, seq, …) to (batch, 1, …)

for _type in ModelOutput.types:
    register_output(_type)


class CLIPAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.dropout = config.attention_dropout
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, hidden_states: Tensor, bias: Tensor | None, fused: bool, causal: bool, asking: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the context (batch, seq, width) and, unless fused, the weights (batch, heads, seq, seq).

        Of ``asking``, (batch, rows, width), where only its rows of both are wanted.
        """
        asking = hidden_states if asking is None else asking
        batch, seq, width = hidden_states.shape
        rows = asking.shape[1]
        split = (batch, seq, self.num_heads, self.head_dim)
        query = self.q_proj(asking).view(batch, rows, *split[2:]).transpose(1, 2)  # (batch, heads, rows, head_dim)
        key = self.k_proj(hidden_states).view(split).transpose(1, 2)  # (batch, heads, seq, head_dim)
        value = self.v_proj(hidden_states).view(split).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        if fused:
            weights = None
            context = F.scaled_dot_product_attention(
                query, key, value, bias, dropout, is_causal=causal and bias is None, scale=self.scale
            )
        else:
            scores = query @ key.transpose(-1, -2) * self.scale  # (batch, heads, rows, seq)
            if bias is not None:
                scores = scores + bias
            statistics = statistics_dtype(scores.dtype)
            weights = torch.softmax(scores, dim=-1, dtype=statistics).to(query.dtype)
            weights = F.dropout(weights, dropout)
            context = weights @ value  # (batch, heads, rows, head_dim)
        context = context.transpose(1, 2).reshape(batch, rows, width)
        return self.out_proj(context), weights


class CLIPMLP(nn.Module):
    """The two-layer perceptron of a block."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch, seq, width) to the same."""
        return self.fc2(self.activation(self.fc1(hidden_states)))


class CLIPEncoderLayer(nn.Module):
    """One block: attention and perceptron, each behind a layer norm and beside a residual."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, hidden_states: Tensor, bias: Tensor | None, fused: bool, causal: bool, pick: Pick | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, seq, width) to the same, or to the rows that are picked, and the attention weights unless fused."""
        normed = asking = self.layer_norm1(hidden_states)
        if pick is not None:
            hidden_states, asking = pick(hidden_states), pick(normed)
            bias = None if bias is None else pick(bias[:, 0].expand(len(normed), -1, -1))[:, None]
        context, weights = self.self_attn(normed, bias, fused, causal, asking)
        hidden_states = hidden_states + context
        hidden_states = hidden_states + self.mlp(self.layer_norm2(hidden_states))
        return hidden_states, weights


class CLIPEncoder(nn.Module):
    """The blocks of a tower."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.checkpointing = 0  # the first of every so many blocks is recomputed in the backward pass; none at 0
        self.checkpointing_options: dict[str, Any] = {}  # of torch.utils.checkpoint

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        causal: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        pick: Pick | None = None,
    ) -> BaseModelOutput[Tensor]:
        """Runs the blocks over (batch, seq, width); the last one over what ``pick`` takes, where it is given."""
        output_attentions = default(output_attentions, self.config.output_attentions)
        output_hidden_states = default(output_hidden_states, self.config.output_hidden_states)
        fused = self.config.attn_implementation != "eager"
        if fused and output_attentions:
            fused = False
            if not torch.compiler.is_compiling():
                warn_once(checks.ATTENTIONS_NEED_EAGER)
        bias = None
        if causal and (attention_mask is not None or pick is not None or not fused):
            bias = attention_bias(attention_mask, hidden_states)
        states, attentions = [hidden_states], []
        for i, layer in enumerate(self.layers):
            if self.training and self.checkpointing and i % self.checkpointing == 0:
                options = self.checkpointing_options
                hidden_states, weights = checkpoint(layer, hidden_states, bias, fused, causal, **options)
            elif pick is not None and i == len(self.layers) - 1:
                hidden_states, weights = layer(hidden_states, bias, fused, causal, pick)
            else:
                hidden_states, weights = layer(hidden_states, bias, fused, causal)
            states.append(hidden_states)
            attentions.append(weights)
        if pick is not None and not len(self.layers):
            hidden_states = pick(hidden_states)
        return BaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


def attention_bias(attention_mask: Tensor | None, hidden_states: Tensor) -> Tensor:
    """Returns what is added to the scores: 0 where a token may look, the dtype's minimum where it may not.

    The minimum of the causal part and that of the padding are added, so that a key hidden by both is at minus infinity:
    a row in which everything before it is padding shares its weight among the keys that only one of the two hides.
    Source: transformers 4.57.6, PyTorch; its other frameworks differ from it at such rows.

    Args:
        attention_mask: (batch, seq), 1 for tokens that may be looked at; None for all.
        hidden_states: (batch, seq, width), for dtype and device.

    Returns:
        (batch or 1, 1, seq, seq) in the dtype of ``hidden_states``.
    """
    dtype, device, seq = hidden_states.dtype, hidden_states.device, hidden_states.shape[1]
    lowest = torch.finfo(dtype).min
    steps = torch.arange(seq, device=device)
    zero = torch.zeros((), dtype=dtype, device=device)
    bias = torch.where(steps[:, None] < steps[None, :], lowest, zero)[None, None]  # (1, 1, seq, seq)
    if attention_mask is not None:
        bias = bias + torch.where(attention_mask[:, None, None, :] == 1, zero, lowest)  # (batch, 1, seq, seq)
    return bias


class CLIPTextEmbeddings(nn.Module):
    """Token plus position embeddings."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """(batch, seq) to (batch, seq, width)."""
        tokens = look_up(self.token_embedding, input_ids, "input_ids")  # (batch, seq, width)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # (1, seq)
        return tokens + look_up(self.position_embedding, position_ids, "position_ids")


class CLIPVisionEmbeddings(nn.Module):
    """Class token and patch embeddings plus position embeddings."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        width, size = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=size, stride=size, bias=False)
        self.position_embedding = nn.Embedding(config.num_patches + 1, width)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """(batch, channels, height, width) to (batch, patches + 1, width)."""
        patches = self.patch_embedding(
            pixel_values.to(self.patch_embedding.weight.dtype)
        )  # (batch, width, rows, columns)
        rows, columns = patches.shape[2:]
        patches = patches.flatten(2).transpose(1, 2)  # (batch, patches, width)
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)  # (batch, 1, width)
        places = torch.arange(self.config.num_patches + 1, device=patches.device)
        positions = self.position_embedding(places)  # (patches + 1, width)
        if interpolate_pos_encoding:
            positions = interpolate_positions(positions, rows, columns)
        return torch.cat([class_token, patches], dim=1) + positions


class CLIPTextTransformer(nn.Module):
    """The text tower."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling[Tensor]:
        """Runs the tower over (batch, seq)."""
        input_ids = checks.check_text(input_ids, attention_mask, position_ids, self.config)
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
        encoded = self.encoder(self.embeddings(input_ids), attention_mask, True, False, False, pick)
        return self.final_layer_norm(encoded.last_hidden_state)[:, 0]


def end_tokens(input_ids: Tensor, eos_token_id: int) -> Pick:
    """Returns what takes the state at the end token of each row: (batch, seq, …) to (batch, 1, …).

    The end token is the first ``eos_token_id``, or the first token where there is none. The configs of the OpenAI
    checkpoints say 2, which is not their end token: there it is the largest id of the row.
    """
    chosen = input_ids if eos_token_id == 2 else input_ids == eos_token_id
    positions = chosen.to(torch.int).argmax(dim=-1)  # (batch,)
    return lambda x: x[torch.arange(positions.shape[0], device=x.device), positions][:, None]


class CLIPVisionTransformer(nn.Module):
    """The vision tower."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> BaseModelOutputWithPooling[Tensor]:
        """Runs the tower over (batch, channels, height, width)."""
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
        encoded = self.encoder(hidden_states, None, False, False, False, lambda x: x[:, :1])
        return self.post_layernorm(encoded.last_hidden_state[:, 0])


class CLIPPreTrainedModel(VocabularyMixin, TorchModel):
    """What the six heads share: construction, files, embeddings, checkpointing.

    Args:
        config: The head's config.

    Raises:
        TypeError: It is not of the class that the head needs.
    """

    config_class = CLIPConfig
    _no_split_modules: ClassVar[list[str]] = ["CLIPEncoderLayer", "CLIPTextEmbeddings", "CLIPVisionEmbeddings"]
    text_model: CLIPTextTransformer  # of heads that have it
    vision_model: CLIPVisionTransformer  # of heads that have it

    def post_init(self) -> None:
        """Initialises every parameter, and turns gradient checkpointing on where the config asks for it."""
        super().post_init()
        if getattr(self.config, "gradient_checkpointing", False):
            self.gradient_checkpointing_enable()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1
    ) -> None:
        """Recomputes blocks in the backward pass of training instead of keeping their intermediate results.

        Args:
            gradient_checkpointing_kwargs: Keywords of ``torch.utils.checkpoint.checkpoint``; ``use_reentrant`` is False
                unless they say otherwise.
            every_n_layers: Recompute the first block of every so many.

        Raises:
            ValueError: ``every_n_layers`` is not a positive number.
        """
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        self._set_checkpointing(whole_number("every_n_layers", every_n_layers), options)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Does what `gradient_checkpointing_enable` does, by the name that the Trainer of transformers 5 calls.

        Args:
            activation_checkpointing_kwargs: As ``gradient_checkpointing_kwargs``.
            every_n_layers: As in `gradient_checkpointing_enable`.
            offload: Must be False: what is kept stays on its device.

        Raises:
            ValueError: ``offload`` is asked for, or ``every_n_layers`` is not a positive number.
        """
        if offload:
            raise bad_input("Checkpointed activations stay on their device", f"offload={offload!r}", "Leave it out")
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers)

    def gradient_checkpointing_disable(self) -> None:
        """Undoes `gradient_checkpointing_enable`."""
        self._set_checkpointing(0, {})

    def _set_checkpointing(self, every_n_layers: int, options: dict[str, Any]) -> None:
        for module in self.modules():
            if isinstance(module, CLIPEncoder):
                module.checkpointing, module.checkpointing_options = every_n_layers, options

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether gradient checkpointing is on."""
        return any(isinstance(m, CLIPEncoder) and m.checkpointing for m in self.modules())

    activation_checkpointing_disable = gradient_checkpointing_disable
    is_activation_checkpointing = is_gradient_checkpointing


class CLIPModel(CLIPPreTrainedModel):
    """Both towers, their projections, and the similarity of every text with every image."""

    head = "CLIPModel"
    config: CLIPConfig

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        config = self.config
        text, vision = config.text_config, config.vision_config
        self.projection_dim, self.text_embed_dim = config.projection_dim, text.hidden_size
        self.vision_embed_dim = vision.hidden_size
        self.text_model = CLIPTextTransformer(text)
        self.vision_model = CLIPVisionTransformer(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    def get_text_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Tensor:
        """Returns the projected texts, not normalised.

        Args:
            input_ids: (batch, seq) integers.
            attention_mask: (batch, seq), 1 for tokens that may be looked at; all when None.
            position_ids: (batch or 1, seq); 0, 1, … when None.
            output_attentions: Changes nothing here; part of the signature of every call.
            output_hidden_states: Like ``output_attentions``.
            return_dict: Like ``output_attentions``.

        Returns:
            (batch, proj).

        Raises:
            ValueError: A shape or a value does not fit.
        """
        output = self.text_model(input_ids, attention_mask, position_ids, output_attentions, output_hidden_states)
        return self.text_projection(output.pooler_output)

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
    ) -> Tensor:
        """Returns the projected images, not normalised.

        Args:
            pixel_values: (batch, channels, height, width).
            output_attentions: Changes nothing here; part of the signature of every call.
            output_hidden_states: Like ``output_attentions``.
            interpolate_pos_encoding: Accept images of any size.
            return_dict: Like ``output_attentions``.

        Returns:
            (batch, proj).

        Raises:
            ValueError: A shape or a value does not fit.
        """
        output = self.vision_model(pixel_values, output_attentions, output_hidden_states, interpolate_pos_encoding)
        return self.visual_projection(output.pooler_output)

    def forward(
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

        Raises:
            ValueError: A shape or a value does not fit.
        """
        text_output = self.text_model(input_ids, attention_mask, position_ids, output_attentions, output_hidden_states)
        vision_output = self.vision_model(
            pixel_values, output_attentions, output_hidden_states, interpolate_pos_encoding
        )
        text_embeds = normalize(self.text_projection(text_output.pooler_output))  # (texts, proj)
        image_embeds = normalize(self.visual_projection(vision_output.pooler_output))  # (images, proj)
        logits_per_text = text_embeds @ image_embeds.T * self.logit_scale.exp()  # (texts, images)
        output = CLIPOutput(
            loss=contrastive_loss(logits_per_text) if return_loss else None,
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_output,
            vision_model_output=vision_output,
        )
        return returned(output, return_dict, self.config.use_return_dict)

    if TYPE_CHECKING:

        @called_like(forward)
        def __call__(self) -> Any:
            """Runs `forward` and its hooks."""


class CLIPTextPreTrainedModel(CLIPPreTrainedModel, Generic[Output]):
    """What the two text heads share."""

    config_class = CLIPTextConfig
    config: CLIPTextConfig

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__(config)
        self.text_model = CLIPTextTransformer(self.config)

    def output_of(self, output: BaseModelOutputWithPooling[Tensor]) -> ModelOutput:
        """Makes the output of the head from that of the tower."""
        return output

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Output | Any:
        """Encodes texts; arguments and errors as in `CLIPModel.forward`."""
        output = self.text_model(input_ids, attention_mask, position_ids, output_attentions, output_hidden_states)
        return returned(self.output_of(output), return_dict, self.config.use_return_dict)

    if TYPE_CHECKING:

        @called_like(forward)
        def __call__(self) -> Any:
            """Runs `forward` and its hooks."""


class CLIPTextModel(CLIPTextPreTrainedModel[BaseModelOutputWithPooling[Tensor]]):
    """The text tower alone."""

    head = "CLIPTextModel"

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__(config)
        self.post_init()


class CLIPTextModelWithProjection(CLIPTextPreTrainedModel[CLIPTextModelOutput[Tensor]]):
    """The text tower with its projection."""

    head = "CLIPTextModelWithProjection"

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__(config)
        self.text_projection = nn.Linear(self.config.hidden_size, self.config.projection_dim, bias=False)
        self.post_init()

    def output_of(self, output: BaseModelOutputWithPooling[Tensor]) -> CLIPTextModelOutput[Tensor]:
        """Projects the pooled state; see `CLIPTextPreTrainedModel.output_of`."""
        return CLIPTextModelOutput(
            text_embeds=self.text_projection(output.pooler_output),
            last_hidden_state=output.last_hidden_state,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class CLIPVisionPreTrainedModel(CLIPPreTrainedModel, Generic[Output]):
    """What the two vision heads share."""

    config_class = CLIPVisionConfig
    config: CLIPVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.vision_model = CLIPVisionTransformer(self.config)

    def output_of(self, output: BaseModelOutputWithPooling[Tensor]) -> ModelOutput:
        """Makes the output of the head from that of the tower."""
        return output

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
    ) -> Output | Any:
        """Encodes images; arguments and errors as in `CLIPModel.forward`."""
        output = self.vision_model(pixel_values, output_attentions, output_hidden_states, interpolate_pos_encoding)
        return returned(self.output_of(output), return_dict, self.config.use_return_dict)

    if TYPE_CHECKING:

        @called_like(forward)
        def __call__(self) -> Any:
            """Runs `forward` and its hooks."""


class CLIPVisionModel(CLIPVisionPreTrainedModel[BaseModelOutputWithPooling[Tensor]]):
    """The vision tower alone."""

    head = "CLIPVisionModel"

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.post_init()


class CLIPVisionModelWithProjection(CLIPVisionPreTrainedModel[CLIPVisionModelOutput[Tensor]]):
    """The vision tower with its projection."""

    head = "CLIPVisionModelWithProjection"

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.visual_projection = nn.Linear(self.config.hidden_size, self.config.projection_dim, bias=False)
        self.post_init()

    def output_of(self, output: BaseModelOutputWithPooling[Tensor]) -> CLIPVisionModelOutput[Tensor]:
        """Projects the pooled state; see `CLIPVisionPreTrainedModel.output_of`."""
        return CLIPVisionModelOutput(
            image_embeds=self.visual_projection(output.pooler_output),
            last_hidden_state=output.last_hidden_state,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class CLIPForImageClassification(CLIPPreTrainedModel):
    """The vision tower with a linear classifier over the mean of the patch states.

    Raises:
        ValueError: The config has no labels.
    """

    head = "CLIPForImageClassification"
    config: CLIPConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        config = self.config
        if config.num_labels < 1:
            raise bad_input("num_labels must be at least 1", config.num_labels, "Pass num_labels= or id2label=")
        self.num_labels = config.num_labels
        self.vision_model = CLIPVisionTransformer(config.vision_config)
        self.classifier = nn.Linear(config.vision_config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput[Tensor] | Any:
        """Classifies images.

        Args:
            pixel_values: (batch, channels, height, width).
            labels: (batch,) class indices, or (batch,) numbers for one label, or (batch, num_labels) numbers in [0, 1].
            output_attentions: As in `CLIPModel.forward`.
            output_hidden_states: As in `CLIPModel.forward`.
            interpolate_pos_encoding: As in `CLIPModel.forward`.
            return_dict: As in `CLIPModel.forward`.

        Raises:
            TypeError: Class indices are not integers.
            ValueError: A shape or a value does not fit.
        """
        output = self.vision_model(pixel_values, output_attentions, output_hidden_states, interpolate_pos_encoding)
        logits = self.classifier(output.last_hidden_state[:, 1:].mean(dim=1))  # (batch, num_labels)
        classified = ImageClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config),
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return returned(classified, return_dict, self.config.use_return_dict)

    if TYPE_CHECKING:

        @called_like(forward)
        def __call__(self) -> Any:
            """Runs `forward` and its hooks."""
