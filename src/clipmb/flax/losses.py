"""The losses of the Flax models and of their training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from clipmb.common import checks
from clipmb.common.config import CLIPConfig
from clipmb.flax.layers import checked_ids, statistics_dtype


def normalize(embeds: Array) -> Array:
    """Scales rows to unit length; a row of zeros becomes NaN, as formerly."""
    return embeds / jnp.sqrt(jnp.square(embeds).sum(axis=-1, keepdims=True))


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Mean cross-entropy of (n, classes) against (n,) class indices, of which -100 are passed over; ().

    Source: torch.nn.functional.cross_entropy. Its statistics are in at least float32, its result in the dtype given.
    """
    counted = targets != -100
    targets = checked_ids(jnp.where(counted, targets, 0), logits.shape[1], "labels")
    logarithms = jax.nn.log_softmax(logits.astype(statistics_dtype(logits.dtype)), axis=-1)
    chosen = jnp.take_along_axis(logarithms, targets[:, None], axis=1, mode="fill", fill_value=jnp.nan)[:, 0]
    return (-jnp.where(counted, chosen, 0).sum() / counted.sum()).astype(logits.dtype)


def contrastive_loss(logits_per_text: Array) -> Array:
    """Mean of the cross-entropies of text against images and image against texts; (n, n) to ().

    Source: CLIP, arXiv 2103.00020, figure 3.
    """
    texts, images = logits_per_text.shape
    if texts != images:
        raise checks.not_square(texts, images)
    targets = jnp.arange(texts)
    return (cross_entropy(logits_per_text, targets) + cross_entropy(logits_per_text.T, targets)) / 2


def classification_loss(logits: Array, labels: Array, config: CLIPConfig) -> Array:
    """The loss of `clipmb.common.checks.loss_kind`; cross-entropies leave out labels of -100."""
    kind = checks.loss_kind(labels, logits, config)
    if kind == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1))
    dtype, statistics = logits.dtype, statistics_dtype(logits.dtype)
    logits, labels = logits.astype(statistics), jnp.asarray(labels, dtype).astype(statistics)
    if kind == "regression":
        return jnp.square(logits - labels.reshape(logits.shape)).mean().astype(dtype)
    labels = labels.reshape(logits.shape)
    losses = jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return losses.mean().astype(dtype)


def clip_loss(
    text_embeds: Array,
    image_embeds: Array,
    logit_scale: Array,
    *,
    valid: Array | None = None,
    rows: slice | tuple[Any, int] | None = None,
) -> Array:
    """The mean of the cross-entropies of texts against images and of images against texts.

    Source: CLIP, arXiv 2103.00020, figure 3.

    Args:
        text_embeds: (n, proj), of unit length.
        image_embeds: (n, proj), of unit length; row i belongs to text i.
        logit_scale: (), the logarithm of the factor on the cosines.
        valid: (n,) booleans, False for rows that are padding and count nowhere; all count when None.
        rows: Only the terms of these rows, so that the losses of disjoint rows add up to that of all; all when None.
            Also (start, size), of which the start may be a traced array.

    Returns:
        ().
    """
    targets = take_rows(jnp.arange(len(text_embeds)), rows)
    terms = []
    for ours, others in ((text_embeds, image_embeds), (image_embeds, text_embeds)):
        logits = jnp.exp(logit_scale) * jnp.matmul(take_rows(ours, rows), others.T, precision="highest")  # (rows, n)
        if valid is not None:
            logits = jnp.where(valid, logits, jnp.finfo(logits.dtype).min / 2)
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        losses = jax.nn.logsumexp(logits, axis=1) - chosen  # (rows,)
        terms.append((losses if valid is None else jnp.where(take_rows(valid, rows), losses, 0)).sum())
    return (terms[0] + terms[1]) / (2 * _count(text_embeds, valid))


def siglip_loss(
    text_embeds: Array,
    image_embeds: Array,
    logit_scale: Array,
    logit_bias: Array,
    *,
    valid: Array | None = None,
    rows: slice | tuple[Any, int] | None = None,
) -> Array:
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
    cosines = jnp.matmul(take_rows(text_embeds, rows), image_embeds.T, precision="highest")  # (rows, n)
    logits = jnp.exp(logit_scale) * cosines + logit_bias
    places = jnp.arange(len(text_embeds))
    signs = jnp.where(take_rows(places, rows)[:, None] == places, 1, -1)
    losses = -jax.nn.log_sigmoid(signs * logits)
    if valid is not None:
        losses = jnp.where(take_rows(valid, rows)[:, None] & valid, losses, 0)
    return losses.sum() / _count(text_embeds, valid)


def take_rows(array: Array, rows: slice | tuple[Any, int] | None) -> Array:
    """Returns rows of an array as `clip_loss` names them."""
    if isinstance(rows, tuple):
        return jax.lax.dynamic_slice_in_dim(array, *rows)
    return array if rows is None else array[rows]


def _count(embeds: Array, valid: Array | None) -> int | Array:
    return len(embeds) if valid is None else valid.sum()
