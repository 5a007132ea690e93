"""Zero-shot classification: prompt templates and the class embeddings that are made from them.

Source: CLIP, arXiv 2103.00020, section 3.1.4: a class is the normalised mean of the normalised embeddings of its name
in each template.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from clipmb.common.errors import bad_input

# "seven" is the subset of OpenAI's 80 ImageNet templates that their notebook on prompts found to be nearly as good.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of a {}.",),
    "label": ("{}",),
    "seven": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}


def prompt_templates(templates: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the templates that a name, one template, several templates, or None ("photo") stand for.

    Raises:
        ValueError: There are none, or one has no place for the label.
    """
    if templates is None:
        return TEMPLATES["photo"]
    if isinstance(templates, str):
        templates = TEMPLATES.get(templates, (templates,))
    found = tuple(templates)
    if not found or not all(isinstance(template, str) and "{}" in template for template in found):
        raise bad_input(
            "Every template must have {} where the label goes",
            found,
            f"Pass text like 'a photo of a {{}}.', or one of the names {', '.join(TEMPLATES)}",
        )
    return found


def class_embeddings(
    encode: Callable[[list[str]], np.ndarray], labels: Sequence[str], templates: str | Sequence[str] | None = None
) -> np.ndarray:
    """Embeds every label in every template.

    Args:
        encode: Texts to their embeddings (texts, proj), of unit length.
        labels: The class names.
        templates: As `prompt_templates` takes them.

    Returns:
        (labels, proj), of unit length.

    Raises:
        ValueError: There are no labels, or the templates are wrong.
    """
    return class_means(encode(class_prompts(labels, templates)), len(labels))


def class_prompts(labels: Sequence[str], templates: str | Sequence[str] | None = None) -> list[str]:
    """Returns every label in every template, label by label. Arguments and errors as in `class_embeddings`."""
    if (
        isinstance(labels, str)
        or not len(labels)
        or not all(isinstance(label, str) and label.strip() for label in labels)
    ):
        raise bad_input("labels must be a list of at least one non-empty text", labels, "Pass a list of class names")
    found = prompt_templates(templates)
    return [template.replace("{}", label) for label in labels for template in found]


def class_means(embeds: np.ndarray, labels: int) -> np.ndarray:
    """Returns the embeddings of classes, (labels, proj), from those of their prompts, (labels x templates, proj)."""
    means = embeds.reshape(labels, len(embeds) // labels, -1).mean(axis=1)
    return means if len(embeds) == labels else unit(means)


def unit(embeds: np.ndarray) -> np.ndarray:
    """Scales rows to unit length; rows of zeros, which have no direction, stay zeros."""
    lengths = np.linalg.norm(embeds, axis=-1, keepdims=True)
    return embeds / np.where(lengths == 0, 1, lengths)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
