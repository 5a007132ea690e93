"""The embeddings of a model, and a vocabulary of another size."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from clipmb.common.errors import bad_input
from clipmb.common.vocabulary import no_text_tower, resized, rows_around_mean
from clipmb.tf.layers import build_at, check_range, replace_part
from clipmb.tf.tensors import to_tensor


class VocabularyMixin(keras.Model):
    """Counts and replaces the embeddings of a model with one or both towers."""

    text_model: Any  # of heads that have it
    vision_model: Any  # of heads that have it

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Counts parameters.

        Args:
            only_trainable: Leave out frozen ones.
            exclude_embeddings: Leave out the tables of embeddings.
        """
        layers = self._flatten_layers()
        skipped = {id(w) for layer in layers if isinstance(layer, keras.layers.Embedding) for w in layer.weights}
        return sum(
            int(np.prod(weight.shape))
            for weight in self.weights
            if (weight.trainable or not only_trainable) and not (exclude_embeddings and id(weight) in skipped)
        )

    def get_input_embeddings(self) -> keras.layers.Layer:
        """Returns the token embedding, or the patch embedding of a model without text."""
        if hasattr(self, "text_model"):
            return self.text_model.embeddings.token_embedding
        return self.vision_model.embeddings.patch_embedding

    def set_input_embeddings(self, value: keras.layers.Layer) -> None:
        """Replaces the layer that `get_input_embeddings` returns; the config takes over the size of a vocabulary."""
        owner = self.text_model.embeddings if hasattr(self, "text_model") else self.vision_model.embeddings
        name = "token_embedding" if hasattr(self, "text_model") else "patch_embedding"
        replace_part(owner, name, value)
        if name == "token_embedding" and isinstance(value, keras.layers.Embedding):
            owner.config.vocab_size = value.input_dim

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> keras.layers.Layer:
        """Grows or shrinks the vocabulary. ``fit`` continues with the new table and the moments of its rows.

        Args:
            new_num_tokens: The new number of tokens; None leaves it.
            pad_to_multiple_of: Round it up to a multiple of this.
            mean_resizing: Draw new rows around the mean of the old ones; otherwise from the initial distribution.

        Returns:
            The token embedding.

        Raises:
            ValueError: The model has no text tower, a number is not positive, or the table is quantized or has LoRA.
        """
        if not hasattr(self, "text_model"):
            raise no_text_tower(type(self).__name__)
        old = self.text_model.embeddings.token_embedding
        size = resized(old.input_dim, new_num_tokens, pad_to_multiple_of)
        if size != old.input_dim:
            if len(old.weights) > 1:
                raise bad_input(
                    "A token embedding that is quantized or has LoRA keeps its size",
                    [weight.name for weight in old.weights],
                    "Resize before quantize or enable_lora",
                    shown=True,
                )
            new = type(old).from_config({**old.get_config(), "input_dim": size})
            build_at(new, old.path)
            table, added = old.get_weights()[0], new.get_weights()[0][old.input_dim :]
            if mean_resizing and len(added):
                seed = int(keras.random.randint((), 0, 2**31 - 1))
                added = rows_around_mean(table, len(added), seed).astype(table.dtype)
            new.set_weights([np.concatenate([table[:size], added])])
            new.trainable = old.trainable
            self.set_input_embeddings(new)
        return self.text_model.embeddings.token_embedding

    def check_ids(self, input_ids: Any, position_ids: Any = None) -> None:
        """Raises for ids outside the vocabulary: the check that functions compiled by XLA cannot make themselves.

        Args:
            input_ids: Integers of any shape.
            position_ids: Likewise; None for none.

        Raises:
            ValueError: Some ids are outside.
        """
        embeddings = self.text_model.embeddings
        check_range(to_tensor(input_ids), embeddings.token_embedding.input_dim, "input_ids")
        if position_ids is not None:
            check_range(to_tensor(position_ids), embeddings.position_embedding.input_dim, "position_ids")
