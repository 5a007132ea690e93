"""The losses of the heads and of training, in TensorFlow."""

from __future__ import annotations

import tensorflow as tf
from tensorflow import Tensor

from clipmb.common import checks
from clipmb.common.config import CLIPConfig
from clipmb.tf.layers import check_range, statistics_dtype
from clipmb.tf.tensors import plain_errors, sizes


def normalize(embeds: Tensor) -> Tensor:
    """Scales rows to unit length; a row of zeros becomes NaN, as formerly."""
    wide = tf.cast(embeds, statistics_dtype(embeds.dtype))
    return tf.cast(wide / tf.sqrt(tf.reduce_sum(tf.square(wide), axis=-1, keepdims=True)), embeds.dtype)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of (n, classes) against (n,) class indices, leaving out labels of -100; (), at least float32.

    Source: torch.nn.functional.cross_entropy.
    """
    logits = tf.cast(logits, statistics_dtype(logits.dtype))
    kept = labels != -100
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.where(kept, labels, 0), logits)
    kept = tf.cast(kept, logits.dtype)
    return tf.reduce_sum(losses * kept) / tf.reduce_sum(kept)


def contrastive_loss(logits_per_text: Tensor) -> Tensor:
    """Mean of the cross-entropies of text against images and image against texts; (n, n) to (), at least float32.

    Source: CLIP, arXiv 2103.00020, figure 3.
    """
    texts, images = sizes(logits_per_text)
    if isinstance(texts, int) and isinstance(images, int) and texts != images:
        with plain_errors():
            raise checks.not_square(texts, images)
    return (
        cross_entropy(logits_per_text, tf.range(texts)) + cross_entropy(tf.transpose(logits_per_text), tf.range(images))
    ) / 2


def classification_loss(logits: Tensor, labels: Tensor, config: CLIPConfig) -> Tensor:
    """The loss of `clipmb.common.checks.loss_kind`, at least float32; cross-entropies leave out labels of -100."""
    logits = tf.cast(logits, statistics_dtype(logits.dtype))
    with plain_errors():
        kind = checks.loss_kind(labels, logits, config)
    if kind == "regression":
        return tf.reduce_mean(tf.math.squared_difference(tf.squeeze(logits), tf.cast(tf.squeeze(labels), logits.dtype)))
    if kind == "single_label_classification":
        labels = tf.reshape(tf.cast(labels, tf.int64), (-1,))
        with plain_errors():
            check_range(tf.where(labels != -100, labels, 0), config.num_labels, "labels")
        return cross_entropy(logits, labels)
    labels = tf.reshape(tf.cast(labels, logits.dtype), tf.shape(logits))
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels, logits))


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
    targets = tf.range(tf.shape(text_embeds)[0])[rows]
    terms = []
    for ours, others in ((text_embeds, image_embeds), (image_embeds, text_embeds)):
        logits = tf.matmul(tf.exp(logit_scale) * ours[rows], others, transpose_b=True)  # (rows, n)
        if valid is not None:
            logits = tf.where(valid, logits, tf.constant(logits.dtype.min / 2, logits.dtype))
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)  # (rows,)
        terms.append(tf.reduce_sum(losses if valid is None else tf.where(valid[rows], losses, 0)))
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
    logits = tf.matmul(tf.exp(logit_scale) * text_embeds[rows], image_embeds, transpose_b=True) + logit_bias
    signs = 2 * tf.eye(tf.shape(text_embeds)[0], dtype=logits.dtype)[rows] - 1  # (rows, n), like logits
    losses = -tf.math.log_sigmoid(signs * logits)
    if valid is not None:
        losses = tf.where(valid[rows][:, None] & valid, losses, 0)
    return tf.reduce_sum(losses) / _count(text_embeds, valid)


def _count(embeds: Tensor, valid: Tensor | None) -> Tensor:
    return tf.cast(tf.shape(embeds)[0] if valid is None else tf.math.count_nonzero(valid), embeds.dtype)
