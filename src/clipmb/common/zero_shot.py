"""Zero-shot classification: prompt templates and the class embeddings that are made from them.

Source: CLIP, arXiv 2103.00020, section 3.1.4: a class is the normalised mean of the normalised embeddings of its name
in each template.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from clipmb.common.errors import bad_input, require_file

# "imagenet80" is OpenAI's, from their notebook on prompts; "seven" the subset that they chose from it one by one, and
# found to be a bit better. LICENSE-imagenet_templates.txt has the source.
_IMAGENET = resources.files("clipmb").joinpath("data", "imagenet_templates.txt").read_text("utf-8")
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
    "imagenet80": tuple(_IMAGENET.splitlines()),
}


@runtime_checkable
class ReadyClasses(Protocol):
    """Classes whose embeddings exist already, in place of their names: `clipmb.Classes`."""

    @property
    def labels(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def names(self) -> Sequence[str]: ...  # noqa: D102
    def vectors_for(self, pipeline: Any) -> np.ndarray: ...  # noqa: D102


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


def named_classes(labels: Any) -> dict[str, str]:
    """Returns the name in prompts of every class.

    Args:
        labels: Names; {label: its name in prompts}; or a text file with one label per line, optionally followed by a
            tab and the name to use in prompts.

    Raises:
        ValueError: There are none, one is no text or empty, two are equal, or the file cannot be read.
    """
    if isinstance(labels, str | os.PathLike):
        entries = _read_labels(Path(labels))
    elif isinstance(labels, Mapping):
        entries = list(labels.items())
    else:
        entries = [(label, label) for label in labels] if isinstance(labels, Sequence) else []
    if not entries or not all(isinstance(text, str) and text.strip() for entry in entries for text in entry):
        raise bad_input("labels must be a list of at least one non-empty text", labels, "Pass a list of class names")
    if double := [label for label, times in Counter(label for label, _ in entries).items() if times > 1]:
        raise bad_input("labels must be distinct", double, "Name every class once")
    return dict(entries)


def _read_labels(path: Path) -> list[tuple[str, str]]:
    """Reads one label a line, or label, tab and name in the prompts."""
    try:
        require_file(path)
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        rule = "labels must be a list of class names or a readable text file of them"
        raise bad_input(rule, f"{path} ({error})", "Correct the path", shown=True) from error
    if not any("\t" in line for line in lines):
        return [(line, line) for line in lines]
    parts = [[part.strip() for part in line.split("\t")] for line in lines]
    if bad := [number for number, part in enumerate(parts) if len(part) != 2 or not all(part)]:
        rule = "Every line of labels must be a label, a tab and a name, or none may have a tab"
        raise bad_input(rule, lines[bad[0]], f"Correct {path}")
    return [(label, name) for label, name in parts]


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
