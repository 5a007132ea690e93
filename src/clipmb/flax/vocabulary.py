"""The embeddings of a model, and a vocabulary of another size."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax import Array

from clipmb.common.parameters import specs
from clipmb.common.vocabulary import no_text_tower, resized, rows_around_mean
from clipmb.flax.linen_model import LinenModel
from clipmb.flax.pretrained import leaves_of
from clipmb.flax.tensors import to_numpy


class VocabularyMixin(LinenModel):
    """Counts the parameters of a model with one or both towers, and replaces its token embedding."""

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Counts parameters.

        Args:
            only_trainable: Changes nothing: what is frozen is the optimizer's choice in Flax.
            exclude_embeddings: Leave out the tables of embeddings.
        """
        table = specs(self.config, self.head)
        return sum(math.prod(spec.shape) for spec in table if not (exclude_embeddings and spec.kind == "embedding"))

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Array:
        """Grows or shrinks the vocabulary of the model and its own parameters, whose optimizer state is made again.

        Args:
            new_num_tokens: The new number of tokens; None leaves it.
            pad_to_multiple_of: Round it up to a multiple of this.
            mean_resizing: Draw new rows around the mean of the old ones; otherwise from the initial distribution.

        Returns:
            The table, (tokens, width), which is in `params`.

        Raises:
            ValueError: The model has no text tower or no parameters, or a number is not positive.
        """
        path = ("text_model", "embeddings", "token_embedding", "embedding")
        leaves = leaves_of(self.params)
        if path not in leaves:
            raise no_text_tower(type(self).__name__)
        old = leaves[path]
        size = resized(len(old), new_num_tokens, pad_to_multiple_of)
        config = getattr(self.config, "text_config", self.config)
        if size != len(old):
            config.vocab_size = size
            self.key, key = jax.random.split(self.key)
            kept = {place: leaf for place, leaf in leaves.items() if place != path}
            fresh = leaves_of(self.init_weights(key, params=unflatten_dict(kept)))[path][len(old) :]
            if mean_resizing and len(fresh):
                seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
                fresh = rows_around_mean(to_numpy(old), len(fresh), seed)
            leaves[path] = jnp.concatenate([old[:size], jnp.asarray(fresh, old.dtype)])
            self.params = unflatten_dict(leaves)
        return leaves[path]
