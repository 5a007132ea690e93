"""The losses of the PyTorch models and of their training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipmb.common import checks
from clipmb.common.config import CLIPConfig


def normalize(embeds: Tensor) -> Tensor:
    """Scales rows to unit length; a row of zeros becomes NaN, as formerly."""
    return embeds / embeds.square().sum(dim=-1, keepdim=True).sqrt()


def contrastive_loss(logits_per_text: Tensor) -> Tensor:
    """Mean of the cross-entropies of text against images and image against texts; (n, n) to ().

    Source: CLIP, arXiv 2103.00020, figure 3.
    """
    texts, images = logits_per_text.shape
    if texts != images:
        raise checks.not_square(texts, images)
    targets = torch.arange(texts, device=logits_per_text.device)
    return (F.cross_entropy(logits_per_text, targets) + F.cross_entropy(logits_per_text.T, targets)) / 2


def classification_loss(logits: Tensor, labels: Tensor, config: CLIPConfig) -> Tensor:
    """The loss of `clipmb.common.checks.loss_kind`; cross-entropies leave out labels of -100."""
    labels = labels.to(logits.device)
    kind = checks.loss_kind(labels, logits, config)
    if kind == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
    if kind == "single_label_classification":
        labels = labels.reshape(-1).long()
        try:
            return F.cross_entropy(logits, labels)
        except IndexError:
            checks.check_ids(labels.where(labels != -100, 0).numpy(force=True), config.num_labels, "labels")
            raise
    return F.binary_cross_entropy_with_logits(logits, labels.reshape(logits.shape).to(logits.dtype))


def clip_loss(
    text_embeds: Tensor,
    image_embeds: Tensor,
    logit_scale: Tensor,
    *,
    valid: Tensor | None = None,
    rows: slice | None = None,
) -> Tensor:
    """The mean of the cross-entropies of texts against images and of images against texts.

    Source: CLIP, arXiv 2103.00020, figure 3.

    Args:
        text_embeds: (n, proj), of unit length.
        image_embeds: (n, proj), of unit length; row i belongs to text i.
        logit_scale: (), the logarithm of the factor on the cosines.
        valid: (n,) booleans, False for rows that are padding and count nowhere; all count when None.
        rows: Only the terms of these rows, so that the losses of disjoint rows add up to that of all; all when None.

    Returns:
        ().
    """
    rows = slice(None) if rows is None else rows
    targets = torch.arange(len(text_embeds), device=text_embeds.device)[rows]
    terms = []
    for ours, others in ((text_embeds, image_embeds), (image_embeds, text_embeds)):
        logits = logit_scale.exp() * ours[rows] @ others.T  # (rows, n)
        if valid is not None:
            logits = logits.masked_fill(~valid, torch.finfo(logits.dtype).min / 2)
        losses = F.cross_entropy(logits, targets, reduction="none")  # (rows,)
        terms.append((losses if valid is None else torch.where(valid[rows], losses, 0)).sum())
    return (terms[0] + terms[1]) / (2 * _count(text_embeds, valid))


def siglip_loss(
    text_embeds: Tensor,
    image_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    valid: Tensor | None = None,
    rows: slice | None = None,
) -> Tensor:
    """The sigmoid loss: every text with every image is a binary decision, summed over both and divided by n.

    Source: SigLIP, arXiv 2303.15343, algorithm 1.

    Args:
        text_embeds: As in `clip_loss`, like the other arguments.
        image_embeds: As there.
        logit_scale: As there.
        logit_bias: (), added to the scaled cosines.
        valid: As there.
        rows: As there.

    Returns:
        ().
    """
    rows = slice(None) if rows is None else rows
    logits = logit_scale.exp() * text_embeds[rows] @ image_embeds.T + logit_bias  # (rows, n)
    signs = 2 * torch.eye(len(text_embeds), dtype=logits.dtype, device=logits.device)[rows] - 1
    losses = -F.logsigmoid(signs * logits)
    if valid is not None:
        losses = torch.where(valid[rows, None] & valid, losses, 0)
    return losses.sum() / _count(text_embeds, valid)


def _count(embeds: Tensor, valid: Tensor | None) -> int | Tensor:
    return len(embeds) if valid is None else valid.sum()
