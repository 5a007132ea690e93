"""The losses of the heads and of training, in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipmb.common import checks
from clipmb.common.config import CLIPConfig


def normalize(embeds: Tensor) -> Tensor:
    """Scales rows to unit length: (n, proj) to the same. A row of zeros becomes NaN, as in transformers."""
    return embeds / embeds.square().sum(dim=-1, keepdim=True).sqrt()


def cross_entropy(logits: Tensor, labels: Tensor, count: int | Tensor | None = None) -> Tensor:
    """Returns the mean cross-entropy over the labels that are not -100.

    Source: torch.nn.functional.cross_entropy.

    Args:
        logits: (n, classes).
        labels: (n,) class indices, or -100 for rows that do not count.
        count: By what the sum is divided; the number of rows that count when None.

    Returns:
        (), NaN where no row counts.

    Raises:
        ValueError: A label is neither a class nor -100.
    """
    try:
        if count is None:
            return F.cross_entropy(logits, labels)
        return F.cross_entropy(logits, labels, reduction="sum") / count
    except IndexError:
        checks.check_ids(labels.where(labels != -100, 0).numpy(force=True), logits.shape[1], "labels")
        raise


def contrastive_loss(logits_per_text: Tensor) -> Tensor:
    """Returns the loss of `clip_loss`, given the scaled cosines.

    Args:
        logits_per_text: (n, n); row i and column i are a pair.

    Returns:
        ().

    Raises:
        ValueError: There are not as many texts as images.
    """
    texts, images = logits_per_text.shape
    if texts != images:
        raise checks.not_square(texts, images)
    targets = torch.arange(texts, device=logits_per_text.device)
    return _symmetric(logits_per_text, logits_per_text.T, targets)


def classification_loss(logits: Tensor, labels: Tensor, config: CLIPConfig) -> Tensor:
    """Returns the loss of an image classifier.

    Source: transformers 4.57.6; `clipmb.common.checks.loss_kind` says which loss it is.

    Args:
        logits: (batch, num_labels).
        labels: (batch,) class indices, or -100 for images that do not count; or numbers of the shape of ``logits``,
            in which axes of length 1 may be left out.
        config: The classifier's config.

    Returns:
        ().

    Raises:
        TypeError: Class indices are not integers.
        ValueError: The shape of the labels does not fit, or a label is not a class.
    """
    labels = labels.to(logits.device)
    kind = checks.loss_kind(labels, logits, config)
    if kind == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1).long())
    labels = labels.reshape(logits.shape).to(logits.dtype)
    if kind == "regression":
        return F.mse_loss(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels)


def clip_loss(
    text_embeds: Tensor,
    image_embeds: Tensor,
    logit_scale: Tensor,
    *,
    valid: Tensor | None = None,
    rows: slice | None = None,
) -> Tensor:
    """Returns the mean of the cross-entropies of texts against images and of images against texts.

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
    scale, count = torch.exp(logit_scale), len(text_embeds)
    logits_per_text = scale * text_embeds[rows] @ image_embeds.T  # (rows, n)
    logits_per_image = scale * image_embeds[rows] @ text_embeds.T  # (rows, n)
    targets = torch.arange(count, device=text_embeds.device)
    if valid is not None:
        lowest = torch.finfo(logits_per_text.dtype).min / 2
        logits_per_text = torch.where(valid, logits_per_text, lowest)
        logits_per_image = torch.where(valid, logits_per_image, lowest)
        targets, count = torch.where(valid, targets, -100), valid.sum()
    return _symmetric(logits_per_text, logits_per_image, targets[rows], count)


def _symmetric(
    logits_per_text: Tensor, logits_per_image: Tensor, targets: Tensor, count: int | Tensor | None = None
) -> Tensor:
    """The formula of figure 3: (rows, n) twice and (rows,) to ()."""
    return (cross_entropy(logits_per_text, targets, count) + cross_entropy(logits_per_image, targets, count)) / 2


def siglip_loss(
    text_embeds: Tensor,
    image_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    valid: Tensor | None = None,
    rows: slice | None = None,
) -> Tensor:
    """Returns the sigmoid loss: every text with every image is a binary decision, summed over both and divided by n.

    Source: SigLIP, arXiv 2303.15343, algorithm 1.

    Args:
        text_embeds: (n, proj), of unit length.
        image_embeds: (n, proj), of unit length; row i belongs to text i.
        logit_scale: (), the logarithm of the factor on the cosines.
        logit_bias: (), added to the scaled cosines.
        valid: As in `clip_loss`.
        rows: As in `clip_loss`.

    Returns:
        ().
    """
    rows = slice(None) if rows is None else rows
    scale, count = torch.exp(logit_scale), len(text_embeds)
    logits = scale * text_embeds[rows] @ image_embeds.T + logit_bias  # (rows, n)
    places = torch.arange(count, device=text_embeds.device)
    signs = torch.where(places[rows][:, None] == places, 1, -1)  # (rows, n)
    losses = -F.logsigmoid(signs * logits)
    if valid is not None:
        losses = torch.where(valid[rows][:, None] & valid, losses, 0)
        count = valid.sum()
    return losses.sum() / count
