"""The embeddings of a model, and a vocabulary of another size."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from clipmb.common.errors import bad_input
from clipmb.common.vocabulary import no_text_tower, resized, rows_around_mean
from clipmb.pt.tensors import from_numpy, to_numpy


class VocabularyMixin(nn.Module):
    """Counts and replaces the embeddings of a model with one or both towers."""

    text_model: Any  # of heads that have it
    vision_model: Any  # of heads that have it

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Counts parameters.

        Args:
            only_trainable: Leave out frozen ones.
            exclude_embeddings: Leave out the tables of embeddings.
        """
        skipped = {id(p) for m in self.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        return sum(
            parameter.numel()
            for parameter in self.parameters()
            if (parameter.requires_grad or not only_trainable) and not (exclude_embeddings and id(parameter) in skipped)
        )

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embedding, or the patch embedding of a model without text."""
        if hasattr(self, "text_model"):
            return self.text_model.embeddings.token_embedding
        return self.vision_model.embeddings.patch_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the module that `get_input_embeddings` returns; the config takes over the size of a vocabulary."""
        owner = self.text_model.embeddings if hasattr(self, "text_model") else self.vision_model.embeddings
        name = "token_embedding" if hasattr(self, "text_model") else "patch_embedding"
        setattr(owner, name, value)
        if name == "token_embedding" and isinstance(value, nn.Embedding):
            owner.config.vocab_size = value.num_embeddings

    @torch.no_grad()
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Grows or shrinks the vocabulary.

        Args:
            new_num_tokens: The new number of tokens; None leaves it.
            pad_to_multiple_of: Round it up to a multiple of this.
            mean_resizing: Draw new rows around the mean of the old ones; otherwise from the initial distribution.

        Returns:
            The token embedding.

        Raises:
            ValueError: The model has no text tower, a number is not positive, or the table has an adapter or is
                offloaded.
        """
        if not hasattr(self, "text_model"):
            raise no_text_tower(type(self).__name__)
        old = self.text_model.embeddings.token_embedding
        current, width = old.weight.shape
        size = resized(current, new_num_tokens, pad_to_multiple_of)
        if size != current:
            if len(parts := list(old.state_dict())) > 1 or old.weight.is_meta:
                raise bad_input(
                    "A token embedding that has an adapter or is offloaded keeps its size",
                    ", ".join(parts),
                    "Resize before adding adapters and before offloading",
                    shown=True,
                )
            new = nn.Embedding(size, width, device=old.weight.device, dtype=old.weight.dtype)
            new.weight.normal_(0.0, 0.02 * self.text_model.config.initializer_factor)
            kept = min(size, current)
            new.weight[:kept] = old.weight[:kept]
            if mean_resizing and size > kept:
                seed = int(torch.randint(2**31 - 1, ()))
                new.weight[kept:] = from_numpy(rows_around_mean(to_numpy(old.weight.double()), size - kept, seed))
            new.weight.requires_grad_(old.weight.requires_grad)
            self.set_input_embeddings(new)
        self.vocab_size = size  # which programs read after this
        return self.text_model.embeddings.token_embedding
