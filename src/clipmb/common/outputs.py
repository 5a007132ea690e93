"""The outputs of the models: one ordered dict with attributes, known to the tree utilities of every framework."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from clipmb.common.errors import bad_input

Array = TypeVar("Array")  # torch.Tensor, tf.Tensor or jax.Array


class ModelOutput(OrderedDict[str, Any], Generic[Array]):
    """Fields by name, by attribute, and by position among those that are not None.

    ``output.logits``, ``output["logits"]`` and ``output[0]`` are the same; a field that was not computed is None as an
    attribute and absent from the dict and the tuple. A subclass declares its fields as annotations.

    Args:
        *args: At most one mapping, or pairs, from field to value.
        **values: Field to value.

    Raises:
        TypeError: There is no such field.

    Attributes:
        fields: Every field of the type, in the order of positions.
    """

    fields: ClassVar[tuple[str, ...]] = ()
    types: ClassVar[list[type[ModelOutput]]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.fields = (*cls.fields, *inspect.get_annotations(cls))
        ModelOutput.types.append(cls)

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__()
        values = dict(*args, **values)
        if unknown := [name for name in values if name not in self.fields]:  # no sets: PyTorch's compiler reads this
            raise bad_input(
                f"{type(self).__name__} has the fields {', '.join(self.fields)}",
                sorted(unknown, key=str),
                "Pass only these",
                TypeError,
            )
        for name in self.fields:
            if values.get(name) is not None:
                super().__setitem__(name, values[name])

    if not TYPE_CHECKING:  # a type checker would take any name for a field

        def __getattr__(self, name: str) -> Any:
            if name in type(self).fields:
                return self.get(name)
            known = ", ".join(type(self).fields)
            raise AttributeError(f"{type(self).__name__!r} has no field {name!r}; it has {known}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).fields:
            self[name] = value
        else:
            super().__setattr__(name, value)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """Returns the values that are not None, with nested outputs as tuples too."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


Output = TypeVar("Output", bound=ModelOutput)


class BaseModelOutput(ModelOutput[Array]):
    """Output of an encoder.

    Attributes:
        last_hidden_state: (batch, seq, width), after the last block.
        hidden_states: The input of the first block and the output of each: (batch, seq, width) each.
        attentions: One per block: (batch, heads, seq, seq), after the softmax and dropout.
    """

    last_hidden_state: Array
    hidden_states: tuple[Array, ...] | None
    attentions: tuple[Array, ...] | None


class BaseModelOutputWithPooling(ModelOutput[Array]):
    """Output of one tower.

    Attributes:
        last_hidden_state: (batch, seq, width); text: after the final layer norm; vision: before the post layer norm.
        pooler_output: (batch, width); text: at the end token; vision: of the class token, after the post layer norm.
        hidden_states: The embeddings and the output of each block: (batch, seq, width) each.
        attentions: One per block: (batch, heads, seq, seq), after the softmax and dropout.
    """

    last_hidden_state: Array
    pooler_output: Array
    hidden_states: tuple[Array, ...] | None
    attentions: tuple[Array, ...] | None


class CLIPTextModelOutput(ModelOutput[Array]):
    """Output of the text tower with its projection.

    Attributes:
        text_embeds: (batch, proj), not normalised.
        last_hidden_state: As in `BaseModelOutputWithPooling`.
        hidden_states: As in `BaseModelOutputWithPooling`.
        attentions: As in `BaseModelOutputWithPooling`.
    """

    text_embeds: Array
    last_hidden_state: Array
    hidden_states: tuple[Array, ...] | None
    attentions: tuple[Array, ...] | None


class CLIPVisionModelOutput(ModelOutput[Array]):
    """Output of the vision tower with its projection.

    Attributes:
        image_embeds: (batch, proj), not normalised.
        last_hidden_state: As in `BaseModelOutputWithPooling`.
        hidden_states: As in `BaseModelOutputWithPooling`.
        attentions: As in `BaseModelOutputWithPooling`.
    """

    image_embeds: Array
    last_hidden_state: Array
    hidden_states: tuple[Array, ...] | None
    attentions: tuple[Array, ...] | None


class CLIPOutput(ModelOutput[Array]):
    """Output of the full model.

    Attributes:
        loss: (), the contrastive loss, when it was asked for.
        logits_per_image: (images, texts), the scaled cosine similarities.
        logits_per_text: (texts, images), its transpose.
        text_embeds: (texts, proj), of unit length.
        image_embeds: (images, proj), of unit length.
        text_model_output: `BaseModelOutputWithPooling` of the text tower.
        vision_model_output: `BaseModelOutputWithPooling` of the vision tower.
    """

    loss: Array | None
    logits_per_image: Array
    logits_per_text: Array
    text_embeds: Array
    image_embeds: Array
    text_model_output: BaseModelOutputWithPooling[Array]
    vision_model_output: BaseModelOutputWithPooling[Array]


# What an exported tower, or both of them, returns, in this order.
EXPORTED = {
    "both": ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"),
    "text": ("text_embeds",),
    "image": ("image_embeds",),
}


class ImageClassifierOutput(ModelOutput[Array]):
    """Output of image classification.

    Attributes:
        loss: (), when labels were given.
        logits: (batch, num_labels).
        hidden_states: As in `BaseModelOutputWithPooling`.
        attentions: As in `BaseModelOutputWithPooling`.
    """

    loss: Array | None
    logits: Array
    hidden_states: tuple[Array, ...] | None
    attentions: tuple[Array, ...] | None


def stages(output: CLIPOutput[Array], text_features: Array, image_features: Array) -> dict[str, Array]:
    """Lists the intermediate results of a full model in the order of computation, for comparison stage by stage.

    Args:
        output: Output of a `CLIPModel` called with ``output_hidden_states=True``.
        text_features: (texts, proj), not normalised.
        image_features: (images, proj), not normalised.

    Returns:
        Stage name to array: ``text.embeddings``, ``text.block.0``, …, ``text.pooled``, ``text.projected``, the same for
        ``vision``, and ``logits``.
    """
    found: dict[str, Array] = {}
    towers = (("text", output.text_model_output, text_features), ("vision", output.vision_model_output, image_features))
    for tower, states, features in towers:
        for i, hidden_state in enumerate(states.hidden_states or ()):
            found[f"{tower}.block.{i - 1}" if i else f"{tower}.embeddings"] = hidden_state
        found[f"{tower}.last_hidden_state"] = states.last_hidden_state
        found[f"{tower}.pooled"] = states.pooler_output
        found[f"{tower}.projected"] = features
    found["logits"] = output.logits_per_image
    return found


def default(value: bool | None, otherwise: bool) -> bool:
    """Returns an argument of a model, or what its config says where it is None."""
    return otherwise if value is None else value


def returned(output: Output, return_dict: bool | None, otherwise: bool) -> Output | Any:
    """Returns an output in the form requested: as it is, or as a tuple of what is not None.

    The tuple is typed as Any, here and by the models, so that the fields of the output need no cast.

    Args:
        output: What a head computed.
        return_dict: Whether it is wanted as it is.
        otherwise: What the config says, for a ``return_dict`` of None.
    """
    return output if default(return_dict, otherwise) else output.to_tuple()
