"""The losses of the heads and of training, in TensorFlow."""

from __future__ import annotations

import tensorflow as tf
from tensorflow import Tensor

from clipmb.common import checks
from clipmb.common.config import CLIPConfig
from clipmb.tf.layers import check_range, statistics_dtype
from clipmb.tf.tensors import plain_errors, sizes


def normalize(embeds: Tensor) -> Tensor:
    """Scales rows to unit length: (n, proj) to the same. A row of zeros becomes NaN, as in transformers."""
    wide = tf.cast(embeds, statistics_dtype(embeds.dtype))
    return tf.cast(wide / tf.sqrt(tf.reduce_sum(tf.square(wide), axis=-1, keepdims=True)), embeds.dtype)


def cross_entropy(logits: Tensor, labels: Tensor, count: int | Tensor | None = None) -> Tensor:
    """Returns the mean cross-entropy over the labels that are not -100.

    Source: torch.nn.functional.cross_entropy.

    Args:
        logits: (n, classes).
        labels: (n,) class indices, or -100 for rows that do not count.
        count: By what the sum is divided; the number of rows that count when None.

    Returns:
        () in at least float32, NaN where no row counts, and under XLA where a label is neither a class nor -100.

    Raises:
        ValueError: A label is neither a class nor -100; in a graph an InvalidArgumentError is raised at the call.
    """
    kept = labels != -100
    labels = tf.where(kept, labels, 0)
    classes = logits.shape[1]
    if classes is not None:
        with plain_errors():
            check_range(labels, classes, "labels")
    logits = tf.cast(logits, statistics_dtype(logits.dtype))
    losses = tf.where(kept, tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits), 0)
    return tf.reduce_sum(losses) / tf.cast(tf.math.count_nonzero(kept) if count is None else count, losses.dtype)


def contrastive_loss(logits_per_text: Tensor) -> Tensor:
    """Returns the loss of `clip_loss`, given the scaled cosines.

    Args:
        logits_per_text: (n, n); row i and column i are a pair.

    Returns:
        () in at least float32.

    Raises:
        ValueError: There are not as many texts as images.
    """
    texts, images = sizes(logits_per_text)
    if isinstance(texts, int) and isinstance(images, int) and texts != images:
        with plain_errors():
            raise checks.not_square(texts, images)
    return _symmetric(logits_per_text, tf.transpose(logits_per_text), tf.range(texts))


def classification_loss(logits: Tensor, labels: Tensor, config: CLIPConfig) -> Tensor:
    """Returns the loss of an image classifier.

    Source: transformers 4.57.6; `clipmb.common.checks.loss_kind` says which loss it is.

    Args:
        logits: (batch, num_labels).
        labels: (batch,) class indices, or -100 for images that do not count; or numbers of the shape of ``logits``,
            in which axes of length 1 may be left out.
        config: The classifier's config.

    Returns:
        () in at least float32.

    Raises:
        TypeError: Class indices are not integers.
        ValueError: The shape of the labels does not fit, or a label is not a class.
    """
    with plain_errors():
        kind = checks.loss_kind(labels, logits, config)
    if kind == "single_label_classification":
        return cross_entropy(logits, tf.reshape(tf.cast(labels, tf.int64), (-1,)))
    logits = tf.cast(logits, statistics_dtype(logits.dtype))
    labels = tf.reshape(tf.cast(labels, logits.dtype), sizes(logits))
    if kind == "regression":
        return tf.reduce_mean(tf.math.squared_difference(logits, labels))
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels, logits))


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
    scale, count = tf.exp(logit_scale), sizes(text_embeds)[0]
    logits_per_text = tf.matmul(scale * text_embeds[rows], image_embeds, transpose_b=True)  # (rows, n)
    logits_per_image = tf.matmul(scale * image_embeds[rows], text_embeds, transpose_b=True)  # (rows, n)
    targets = tf.range(count)
    if valid is not None:
        lowest = tf.constant(logits_per_text.dtype.min / 2, logits_per_text.dtype)
        logits_per_text = tf.where(valid, logits_per_text, lowest)
        logits_per_image = tf.where(valid, logits_per_image, lowest)
        targets, count = tf.where(valid, targets, -100), tf.math.count_nonzero(valid)
    return _symmetric(logits_per_text, logits_per_image, targets[rows], count)


def _symmetric(
    logits_per_text: Tensor, logits_per_image: Tensor, targets: Tensor, count: int | Tensor | None = None
) -> Tensor:
    """The formula of `clip_loss` on scaled cosines: (rows, n) twice and (rows,) targets to ()."""
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
    scale, count = tf.exp(logit_scale), sizes(text_embeds)[0]
    logits = tf.matmul(scale * text_embeds[rows], image_embeds, transpose_b=True) + logit_bias  # (rows, n)
    places = tf.range(count)
    signs = tf.where(places[rows][:, None] == places, tf.ones((), logits.dtype), -1)  # (rows, n)
    losses = -tf.math.log_sigmoid(signs * logits)
    if valid is not None:
        losses = tf.where(valid[rows][:, None] & valid, losses, 0)
        count = tf.math.count_nonzero(valid)
    return tf.reduce_sum(losses) / tf.cast(count, losses.dtype)
