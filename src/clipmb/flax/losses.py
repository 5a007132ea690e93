"""The losses of the heads and of training, in Flax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from clipmb.common import checks
from clipmb.common.config import CLIPConfig
from clipmb.flax.layers import checked_ids, statistics_dtype


def normalize(embeds: Array) -> Array:
    """Scales rows to unit length: (n, proj) to the same. A row of zeros becomes NaN, as in transformers."""
    return embeds / jnp.sqrt(jnp.square(embeds).sum(axis=-1, keepdims=True))


def cross_entropy(logits: Array, labels: Array, count: int | Array | None = None) -> Array:
    """Returns the mean cross-entropy over the labels that are not -100.

    Source: torch.nn.functional.cross_entropy.

    Args:
        logits: (n, classes).
        labels: (n,) class indices, or -100 for rows that do not count.
        count: By what the sum is divided; the number of rows that count when None.

    Returns:
        (), NaN where no row counts, and under a transformation where a label is neither a class nor -100.

    Raises:
        ValueError: A label is neither a class nor -100, and this is not under a transformation.
    """
    kept = labels != -100
    labels = checked_ids(jnp.where(kept, labels, 0), logits.shape[1], "labels")
    logarithms = jax.nn.log_softmax(logits.astype(statistics_dtype(logits.dtype)), axis=-1)
    losses = -jnp.take_along_axis(logarithms, labels[:, None], axis=1, mode="fill", fill_value=jnp.nan)[:, 0]
    count = kept.sum() if count is None else count
    return (jnp.where(kept, losses, 0).sum() / count).astype(logits.dtype)


def contrastive_loss(logits_per_text: Array) -> Array:
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
    targets = jnp.arange(texts)
    return _symmetric(logits_per_text, logits_per_text.T, targets)


def classification_loss(logits: Array, labels: Array, config: CLIPConfig) -> Array:
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
    kind = checks.loss_kind(labels, logits, config)
    if kind == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1))
    dtype, statistics = logits.dtype, statistics_dtype(logits.dtype)
    labels = jnp.asarray(labels, dtype).reshape(logits.shape).astype(statistics)
    logits = logits.astype(statistics)
    if kind == "regression":
        return jnp.square(logits - labels).mean().astype(dtype)
    losses = jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return losses.mean().astype(dtype)


def clip_loss(
    text_embeds: Array,
    image_embeds: Array,
    logit_scale: Array,
    *,
    valid: Array | None = None,
    rows: slice | Array | None = None,
) -> Array:
    """Returns the mean of the cross-entropies of texts against images and of images against texts.

    Source: CLIP, arXiv 2103.00020, figure 3.

    Args:
        text_embeds: (n, proj), of unit length.
        image_embeds: (n, proj), of unit length; row i belongs to text i.
        logit_scale: (), the logarithm of the factor on the cosines.
        valid: (n,) booleans, False for rows that are padding and count nowhere; all count when None.
        rows: Only the terms of these rows, so that the losses of disjoint rows add up to that of all; all when None.
            Also their numbers, (rows,), which may be traced.

    Returns:
        ().
    """
    rows = slice(None) if rows is None else rows
    scale, count = jnp.exp(logit_scale), len(text_embeds)
    logits_per_text = scale * jnp.matmul(text_embeds[rows], image_embeds.T, precision="highest")  # (rows, n)
    logits_per_image = scale * jnp.matmul(image_embeds[rows], text_embeds.T, precision="highest")  # (rows, n)
    targets = jnp.arange(count)
    if valid is not None:
        lowest = jnp.finfo(logits_per_text.dtype).min / 2
        logits_per_text = jnp.where(valid, logits_per_text, lowest)
        logits_per_image = jnp.where(valid, logits_per_image, lowest)
        targets, count = jnp.where(valid, targets, -100), valid.sum()
    return _symmetric(logits_per_text, logits_per_image, targets[rows], count)


def _symmetric(
    logits_per_text: Array, logits_per_image: Array, targets: Array, count: int | Array | None = None
) -> Array:
    """The formula of figure 3: (rows, n) twice and (rows,) to ()."""
    return (cross_entropy(logits_per_text, targets, count) + cross_entropy(logits_per_image, targets, count)) / 2


def siglip_loss(
    text_embeds: Array,
    image_embeds: Array,
    logit_scale: Array,
    logit_bias: Array,
    *,
    valid: Array | None = None,
    rows: slice | Array | None = None,
) -> Array:
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
    scale, count = jnp.exp(logit_scale), len(text_embeds)
    logits = scale * jnp.matmul(text_embeds[rows], image_embeds.T, precision="highest") + logit_bias  # (rows, n)
    places = jnp.arange(count)
    signs = jnp.where(places[rows][:, None] == places, 1, -1)  # (rows, n)
    losses = -jax.nn.log_sigmoid(signs * logits)
    if valid is not None:
        losses = jnp.where(valid[rows][:, None] & valid, losses, 0)
        count = valid.sum()
    return losses.sum() / count
