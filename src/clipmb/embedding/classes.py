"""Class embeddings on disk: computed once for labels and templates, with the passport of what made them."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from clipmb.common.errors import CheckpointError, bad_input, one_of, require_file
from clipmb.common.json_files import parse_json
from clipmb.common.saving import write_atomically
from clipmb.common.zero_shot import class_embeddings, named_classes, prompt_templates
from clipmb.embedding.passport import passport_of, require_equivalent
from clipmb.pipeline import LONG_TEXT, CLIPPipeline, loaded

_FORMAT = "1"


@dataclass(frozen=True, eq=False)
class Classes:
    """Classes for zero-shot classification, with their embeddings. Make them with `Classes.build`, or read a file.

    `CLIPPipeline.classify` and `clipmb.evaluate` take them in place of labels, and then embed no prompt.

    Attributes:
        labels: The labels.
        names: The name of each in the prompts.
        templates: The prompts, with {} for the name.
        vectors: (labels, proj), float32 (float64 for such a model), of unit length.
        passport: What made them, as `clipmb.embedding.passport.passport_of` describes it.
    """

    labels: tuple[str, ...]
    names: tuple[str, ...]
    templates: tuple[str, ...]
    vectors: np.ndarray
    passport: Mapping[str, Any]

    @classmethod
    def build(
        cls,
        model: CLIPPipeline | str | os.PathLike[str],
        labels: Sequence[str] | Mapping[str, str] | str | os.PathLike[str],
        templates: str | Sequence[str] | None = None,
        *,
        backend: str | None = None,
        dtype: Any = None,
        device: Any = None,
        long_text: str = "error",
        progress: bool = False,
    ) -> Self:
        """Embeds every label in every template.

        Args:
            model: A pipeline, or the folder or Hub id of a checkpoint.
            labels: Names; {label: its name in prompts}; or a text file with one label per line, optionally followed by
                a tab and the name to use in prompts.
            templates: Text with {} for the label, or several, or a name of `clipmb.TEMPLATES`; "a photo of a {}." when
                None.
            backend: Key of `clipmb.backends.BACKENDS`, for a model that is loaded here; the first installed one when
                None.
            dtype: As in `CLIPPipeline.from_pretrained`, for a model that is loaded here.
            device: As in `CLIPPipeline.from_pretrained`, for a model that is loaded here.
            long_text: What to do with prompts longer than the model's context, as in `CLIPPipeline.encode_text`.
            progress: Show a progress bar, when there is a terminal.

        Raises:
            ValueError: There are no labels, two are equal, the templates are wrong, a prompt is too long, or an
                embedding is not finite.
            CheckpointError: The model cannot be loaded.
        """
        if long_text not in LONG_TEXT:
            raise one_of("long_text", long_text, LONG_TEXT)
        named, prompts = named_classes(labels), prompt_templates(templates)
        pipeline = loaded(model, backend, dtype, device)
        encode = functools.partial(pipeline.encode_text, long_text=long_text, progress=progress)
        vectors = class_embeddings(encode, list(named.values()), prompts)
        passport = passport_of(pipeline, normalized=True, long_text=long_text)
        return cls(tuple(named), tuple(named.values()), prompts, vectors, passport)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a file that `save` wrote.

        Args:
            path: The file.

        Raises:
            CheckpointError: It cannot be read, or is no such file.
        """
        try:
            require_file(path)
            with safe_open(path, "np") as file:
                about = file.metadata() or {}
                if about.get("clipmb_classes") != _FORMAT:
                    raise CheckpointError(
                        f"{path} must be a file of clipmb classes, format {_FORMAT}. Received: another file. "
                        "Make one with clipmb classes, or install a newer clipmb."
                    )
                content = parse_json(about["content"], str(path))
                vectors = file.get_tensor("classes")
            labels, names, templates = (tuple(content[name]) for name in ("labels", "names", "templates"))
            if vectors.ndim != 2 or not len(labels) == len(names) == len(vectors):
                raise ValueError(f"{len(labels)} labels, {len(names)} names, vectors of shape {vectors.shape}")
            return cls(labels, names, templates, vectors, dict(content["passport"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} cannot be read as classes: {error!r}. Make it again.") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the classes; the file appears under its name only when it is complete.

        Args:
            path: A file whose name ends in .safetensors, in a folder that exists.

        Raises:
            ValueError: The name ends in something else, or there is no such folder.
        """
        path = checked_path(path)
        about = {name: getattr(self, name) for name in ("labels", "names", "templates", "passport")}
        metadata = {"clipmb_classes": _FORMAT, "content": json.dumps(about)}
        write_atomically(path, save({"classes": np.ascontiguousarray(self.vectors)}, metadata))

    def vectors_for(self, pipeline: CLIPPipeline) -> np.ndarray:
        """Returns the embeddings, for comparison with those of a pipeline.

        Args:
            pipeline: What embeds the images.

        Raises:
            ValueError: Another model made the classes, or in another way. The image processor may differ, since no
                text depends on it.
        """
        found = passport_of(pipeline, normalized=True, long_text=self.passport.get("long_text", "error"))
        same = {"image_processor": self.passport.get("image_processor")}
        require_equivalent(self.passport, {**found, **same}, f"{self!r}")
        return self.vectors

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Classes({len(self)} labels in {len(self.templates)} templates of {self.passport.get('model')!r})"


def checked_path(path: str | os.PathLike[str]) -> Path:
    """Returns the path of a file of classes that can be written.

    Raises:
        ValueError: Its name does not end in .safetensors, it is a folder, or its folder does not exist.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise bad_input("A file of classes must end in .safetensors", str(path), "Change the suffix")
    if path.is_dir():
        raise bad_input("Classes must be written to a file", f"{path}, a folder", "Pass another name", shown=True)
    if not path.absolute().parent.is_dir():
        raise bad_input(
            "A file of classes must be in a folder that exists", str(path), "Create the folder first", shown=True
        )
    return path
