"""Images and texts in, numpy out, whichever framework computes."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Self

import numpy as np

from clipmb import backends
from clipmb.backends import Engine
from clipmb.common.checkpoint.tensors import not_finite
from clipmb.common.config import CLIPConfig
from clipmb.common.dtypes import dtype_name
from clipmb.common.errors import CheckpointError, bad_input, logger, one_of, whole_number
from clipmb.common.hub import Source
from clipmb.common.processor import CLIPProcessor, image_processor_of, tokenizer_of
from clipmb.common.progress import progress_bar
from clipmb.common.saving import read_whole, stamps
from clipmb.common.text.rows import cut_inside, pad_rows
from clipmb.common.zero_shot import ReadyClasses, class_embeddings, named_classes, softmax, unit

LONG_TEXT = ("error", "truncate", "mean")


class CLIPPipeline:
    """A model with its tokenizer and image processor.

    Args:
        engine: A model loaded by a backend.
        processor: Tokenizer and image processor of the same model.
    """

    def __init__(self, engine: Engine, processor: CLIPProcessor) -> None:
        self.engine = engine
        self.processor = processor
        self.config: CLIPConfig = engine.config
        self.source: Source | None = None  # of the checkpoint, where it was loaded from one
        self.stamps: dict[str, tuple[int, int, int]] = {}  # of its files, as `clipmb.common.saving.stamps` has them
        self.few_shapes: bool = getattr(engine, "few_shapes", False)  # as `clipmb.backends.Engine` has it
        quantised = getattr(engine.model, "quantised", False)
        found = getattr(engine.model, "compute_dtype", None) or getattr(engine.model, "dtype", None)
        self.dtype = "int8" if quantised else dtype_name(found) or "float32"  # what it computes in

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        backend: str | None = None,
        dtype: Any = None,
        device: Any = None,
        compile: bool | None = None,
        **options: Any,
    ) -> Self:
        """Loads a model.

        Args:
            name_or_path: Folder or Hub id.
            backend: Key of `clipmb.backends.BACKENDS`; the first installed one when None. ``pipeline.backend`` is the
                one that was used.
            dtype: "float32" (the default), "float16", "bfloat16" or "float64"; with ``backend="onnx"`` also "int8", but
                not "bfloat16".
            device: Where to compute, in the framework's own words; its default when None.
            compile: Use the framework's compiler: slower first calls, faster later ones. All but PyTorch do
                when None.
            **options: ``subfolder``, ``revision``, ``cache_dir``, ``token``, ``local_files_only``, ``force_download``.

        Raises:
            CheckpointError: The files cannot be found or read, or do not fit.
            MissingBackendError: The backend is not installed.
        """
        source = Source.of(name_or_path, options)
        engine_class = backends.engine(backend)
        if backend is None:
            logger.info("clipmb: using the %r backend", engine_class.backend)

        place = source.file or source.folder

        def read() -> Self:  # of one save: another process may replace the checkpoint meanwhile
            found = stamps(place)
            engine = engine_class.load(source, dtype=dtype, device=device, compile=compile, **options)
            pipeline = cls(engine, processor_for(source, engine.config))
            pipeline.source, pipeline.stamps = source, found
            return pipeline

        return read_whole(None if source.file is not None else source.folder, read)

    @property
    def backend(self) -> str:
        """The backend that computes."""
        return self.engine.backend

    def __repr__(self) -> str:
        return f"CLIPPipeline({self.config.name_or_path!r}, backend={self.backend!r})"

    def encode_image(
        self, images: Any, batch_size: int = 32, normalize: bool = True, progress: bool = False
    ) -> np.ndarray:
        """Embeds images.

        Args:
            images: One or a list of paths, PIL images or arrays; an array of four axes is a batch.
            batch_size: Images per step.
            normalize: Scale the embeddings to unit length.
            progress: Show a progress bar, when there is a terminal.

        Returns:
            (images, proj), float32 (float64 for such a model); one image gives (1, proj).

        Raises:
            ValueError: An image cannot be read, or its embedding is not finite, or has no direction and is to be
                normalised; the message has its index.
            TypeError: Something is not one image; the message has its index.
            CheckpointError: The model's weights are not finite.
        """
        images = _images(images)
        parts = []
        for start, batch in batches(images, batch_size, "images", progress):
            try:
                pixels = self.processor.image_processor(batch, return_tensors="np")["pixel_values"]
            except (ValueError, TypeError) as error:
                if not start:
                    raise
                raise type(error)(_renumbered(str(error), start)) from error
            features = self.engine.image_features(pixels)
            self._check(features, normalize, "image", lambda row, start=start: start + row, pixels)
            parts.append(features)
        return self._joined(parts, normalize)

    def encode_text(
        self,
        texts: str | Sequence[str],
        batch_size: int = 256,
        normalize: bool = True,
        progress: bool = False,
        long_text: str = "error",
        split_special_tokens: bool = True,
    ) -> np.ndarray:
        """Embeds texts.

        Args:
            texts: One or several.
            batch_size: Texts per step; texts of similar length share a step, so that little is spent on padding.
            normalize: Scale the embeddings to unit length.
            progress: Show a progress bar, when there is a terminal.
            long_text: What to do with text that is longer than the model's context: "error"; "truncate" to its
                beginning; "mean": the mean of the unit embeddings of consecutive pieces.
            split_special_tokens: Whether "<|endoftext|>" and the like within a text are text too, as in training. False
                makes them the tokens of these names, as calling the tokenizer does.

        Returns:
            (texts, proj), float32 (float64 for such a model); one text gives (1, proj).

        Raises:
            ValueError: A text is too long and ``long_text`` is "error"; or its embedding is not finite, or has no
                direction and is to be normalised. The message has the text's index.
            TypeError: Something is not text; the message has its index.
            CheckpointError: The model's weights are not finite.
        """
        if long_text not in LONG_TEXT:
            raise one_of("long_text", long_text, LONG_TEXT)
        texts = _texts(texts)
        rows, owners = self.token_rows(texts, long_text, split_special_tokens)
        return self.encode_rows(rows, owners, batch_size=batch_size, normalize=normalize, progress=progress)

    def encode_rows(
        self,
        rows: list[list[int]],
        owners: list[int],
        *,
        batch_size: int = 256,
        normalize: bool = True,
        progress: bool = False,
        check: bool = True,
    ) -> np.ndarray:
        """Embeds texts that `token_rows` has turned into ids.

        Args:
            rows: The ids of every text or piece of one.
            owners: The text that each belongs to, from 0, ascending.
            batch_size: Rows per step.
            normalize: Scale the embeddings to unit length.
            progress: Show a progress bar, when there is a terminal.
            check: Raise where an embedding cannot be used, instead of returning it.

        Returns:
            (texts, proj), float32 (float64 for such a model).

        Raises:
            ValueError: The embedding of a text is not finite, or has no direction and is to be normalised.
            CheckpointError: The model's weights are not finite.
        """
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        parts = []
        for _, batch in batches(order, batch_size, "texts", progress):
            longest = len(rows[batch[-1]])
            ids = pad_rows([rows[i] for i in batch], longest, self.processor.tokenizer.pad_token_id)
            mask = pad_rows([[1] * len(rows[i]) for i in batch], longest, 0)
            features = self.engine.text_features(ids, mask)
            if check:
                self._check(features, normalize, "text", lambda row, batch=batch: owners[batch[row]])
            parts.append(features)
        features = self._joined(parts, False)
        restored = np.empty_like(features)
        restored[order] = features
        if owners and len(rows) > owners[-1] + 1:
            restored = piece_means(restored, owners)
        return unit(restored) if normalize and len(restored) else restored

    def token_rows(
        self, texts: list[str], long_text: str = "error", split_special_tokens: bool = True
    ) -> tuple[list[list[int]], list[int]]:
        """Turns texts into ids, as `encode_text` does.

        Args:
            texts: The texts.
            long_text: As in `encode_text`.
            split_special_tokens: As in `encode_text`.

        Returns:
            The ids of every text or piece of one, and the number of the text that each belongs to.

        Raises:
            ValueError: A text is too long and ``long_text`` is "error"; the message has its index.
        """
        if not texts:
            return [], []
        limit = self.config.text_config.max_position_embeddings
        tokenizer = self.processor.tokenizer
        encoded = tokenizer(
            texts, truncation=False, padding=False, split_special_tokens=split_special_tokens, verbose=False
        )
        rows, owners = [], []
        for i, ids in enumerate(encoded["input_ids"]):
            ids = list(ids)
            if len(ids) <= limit:
                pieces = [ids]
            elif long_text == "error":
                raise bad_input(
                    f"A text may have at most {limit - 2} tokens",
                    f"text {i} with {len(ids) - 2} tokens: {texts[i]!r:.80}",
                    "Shorten it, or pass long_text='truncate' or long_text='mean' (--long-text)",
                    shown=True,
                )
            elif long_text == "truncate":
                pieces = [cut_inside(ids, limit)]
            else:
                first, *inner, last = ids
                room = limit - 2
                pieces = [[first, *inner[at : at + room], last] for at in range(0, len(inner), room)]
            rows += pieces
            owners += [i] * len(pieces)
        return rows, owners

    def similarity(self, images: Any, texts: str | Sequence[str], **options: Any) -> np.ndarray:
        """Returns the scaled cosine similarities (images, texts): the logits of the model.

        Args:
            images: As in `encode_image`.
            texts: As in `encode_text`.
            **options: ``batch_size``, ``progress``, ``long_text``, ``split_special_tokens``.

        Raises:
            ValueError: As in `encode_image` and `encode_text`, or the logits are not finite.
        """
        of_text = {name: options.pop(name) for name in ("long_text", "split_special_tokens") if name in options}
        return self.logits(self.encode_image(images, **options), self.encode_text(texts, **of_text, **options))

    def classify(
        self,
        images: Any,
        labels: Sequence[str] | Mapping[str, str] | str | os.PathLike[str] | ReadyClasses,
        templates: str | Sequence[str] | None = None,
        batch_size: int = 32,
        progress: bool = False,
        long_text: str = "error",
    ) -> np.ndarray:
        """Returns how well each label fits each image.

        Args:
            images: As in `encode_image`.
            labels: The class names; {label: its name in prompts}; a text file with one label per line, optionally
                followed by a tab and the name to use in prompts; or `clipmb.Classes`, whose embeddings exist.
            templates: Text with {} for the label, or several, or a name of `clipmb.TEMPLATES`; "a photo of a {}." when
                None. `clipmb.Classes` have their own.
            batch_size: Images per step.
            progress: Show a progress bar, when there is a terminal.
            long_text: What to do with prompts longer than the model's context, as in `encode_text`.

        Returns:
            (images, labels) probabilities; rows sum to 1.

        Raises:
            ValueError: As in `encode_image` and `encode_text`, there are no labels, the templates are wrong, or the
                classes were made by another model or in another way.
        """
        if isinstance(labels, ReadyClasses):
            if templates is not None:
                raise bad_input("Classes have their templates already", templates, "Pass no templates")
            classes = labels.vectors_for(self)
        else:
            if isinstance(labels, str | os.PathLike | Mapping):
                labels = list(named_classes(labels).values())
            classes = class_embeddings(functools.partial(self.encode_text, long_text=long_text), labels, templates)
        embeds = self.encode_image(images, batch_size=batch_size, progress=progress)
        return softmax(self.logits(embeds, classes))

    def logits(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """Returns the scaled cosine similarities (images, texts) of embeddings.

        Args:
            images: (images, proj), of unit length.
            texts: (texts, proj), of unit length.

        Raises:
            CheckpointError: The factor of the model is not finite.
        """
        scale = self.engine.logit_scale
        if not scale < np.finfo(np.float32).max:
            raise CheckpointError(
                "The factor on similarities, the exponential of logit_scale, must be finite. Received: "
                f"{scale}. Repair or replace the checkpoint."
            )
        return scale * (images @ texts.T)

    def _check(
        self,
        features: np.ndarray,
        normalize: bool,
        kind: str,
        place: Callable[[int], int],
        pixels: np.ndarray | None = None,
    ) -> None:
        """Refuses embeddings that are no numbers, with the likely cause.

        Args:
            features: (batch, proj), not normalised.
            normalize: Whether they are to have unit length, which zero cannot have.
            kind: "image" or "text".
            place: The index of the item of a row.
            pixels: What the images were computed from.
        """
        finite = np.all(np.isfinite(features), axis=1)  # (batch,)
        good = finite & np.any(features, axis=1) if normalize else finite
        if good.all():
            return
        row = int(np.argmin(good))
        if broken := not_finite(self.engine.weights()):
            raise CheckpointError(
                f"The weights of a model must be finite. Received: {len(broken)} with NaN or infinity, such as "
                f"{broken[0]}. Repair or replace the checkpoint."
            )
        if not finite[row]:
            rule, found = f"The embedding of {kind} {place(row)} must be finite", "NaN or infinity"
        else:
            rule, found = f"The embedding of {kind} {place(row)} must have a direction", "zeros only"
        if pixels is not None and not np.isfinite(pixels[row]).all():
            found += ", from pixel values that are not finite"
            fix = "Correct the image, or the image processor's mean and standard deviation"
        elif not finite[row]:
            fix = "Compute in float32 (16 bits may overflow), or use another model"
        else:
            fix = "Use another model, or pass normalize=False"
        raise bad_input(rule, found, fix, shown=True)

    def _joined(self, parts: list[np.ndarray], normalize: bool) -> np.ndarray:
        if not parts:
            return np.zeros((0, self.config.projection_dim), np.float32)
        features = np.concatenate(parts)
        return unit(features) if normalize else features


def piece_means(features: np.ndarray, owners: Sequence[int]) -> np.ndarray:
    """Puts the pieces of long texts together: the mean of the unit embeddings of those of one text.

    Args:
        features: (pieces, proj), not normalised.
        owners: The text that each belongs to, from 0, ascending.

    Returns:
        (texts, proj); a text of one piece keeps its embedding.
    """
    count = owners[-1] + 1
    means = np.zeros((count, features.shape[1]), features.dtype)
    ends = np.searchsorted(owners, np.arange(count + 1))  # the pieces of a text follow each other
    for text in range(count):
        pieces = features[ends[text] : ends[text + 1]]
        means[text] = pieces[0] if len(pieces) == 1 else unit(pieces).mean(axis=0)
    return means


def loaded(
    model: CLIPPipeline | str | os.PathLike[str], backend: str | None = None, dtype: Any = None, device: Any = None
) -> CLIPPipeline:
    """Returns a pipeline as it is, or loads one.

    Args:
        model: A pipeline, or the folder or Hub id of a checkpoint.
        backend: As in `CLIPPipeline.from_pretrained`; None for a pipeline, and so are ``dtype`` and ``device``.
        dtype: As in `CLIPPipeline.from_pretrained`.
        device: As in `CLIPPipeline.from_pretrained`.

    Raises:
        TypeError: ``model`` is something else.
        ValueError: Something is asked of a pipeline that was decided when it was created.
        CheckpointError: The files cannot be found or read, or do not fit.
    """
    if isinstance(model, str | os.PathLike):
        return CLIPPipeline.from_pretrained(model, backend=backend, dtype=dtype, device=device)
    if not isinstance(model, CLIPPipeline):
        raise bad_input("model must be a CLIPPipeline, a folder or a Hub id", model, "Pass one of these", TypeError)
    if given := [value for value in (backend, dtype, device) if value is not None]:
        raise bad_input(
            "backend, dtype and device are fixed when the pipeline is created",
            given,
            "Pass them to CLIPPipeline.from_pretrained",
        )
    return model


def processor_for(source: Source, config: CLIPConfig) -> CLIPProcessor:
    """Loads the tokenizer and image processor of a checkpoint; a checkpoint without them gets CLIP's own.

    Raises:
        CheckpointError: There is no tokenizer and the vocabulary is not CLIP's.
    """
    return CLIPProcessor(image_processor_of(source, config.vision_config), tokenizer_of(source, config.text_config))


def batches(items: list, size: int, what: str, progress: bool) -> Iterator[tuple[int, list]]:
    """Yields where each batch starts, and the batch.

    Args:
        items: What to cut into batches.
        size: Items per batch; the last may have fewer.
        what: Plural noun for the progress bar.
        progress: Show a progress bar, when there is a terminal.

    Raises:
        ValueError: ``size`` is not a positive integer.
    """
    whole_number("batch_size", size)
    starts = range(0, len(items), size)
    with progress_bar(progress, what, len(items)) as advance:
        for start in starts:
            yield start, items[start : start + size]
            advance(min(size, len(items) - start))


def _images(images: Any) -> list:
    """Returns the images given, one entry each."""
    several = isinstance(images, Iterator | Sequence) and not isinstance(images, str | bytes | bytearray)
    images = list(images) if several or getattr(images, "ndim", None) == 4 else [images]
    for index, image in enumerate(images):
        if isinstance(image, list | tuple | Mapping | Set) or getattr(image, "ndim", 0) > 3:
            raise _not_one("image", index, image, "Pass a path, a PIL image or an array of two or three axes")
    return images


def _renumbered(message: str, start: int) -> str:
    """Adds the number of earlier images to that in an image processor's message, which counts within the batch."""
    return re.sub(r"\b([Ii]mage) (\d+)", lambda found: f"{found[1]} {start + int(found[2])}", message)


def _texts(texts: str | Iterable[str]) -> list[str]:
    """Returns the texts given, one entry each."""
    if isinstance(texts, Mapping | Set | bytes) or not isinstance(texts, Iterable):
        raise bad_input("texts must be a text or a list of texts", texts, "Pass one of these", TypeError)
    texts = [texts] if isinstance(texts, str) else list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise _not_one("text", index, text, "Pass a list of texts")
    return texts


def _not_one(kind: str, index: int, value: Any, fix: str) -> Exception:
    found = f"{type(value).__name__} at index {index}"
    return bad_input(f"Every entry must be one {kind}", found, fix, TypeError, shown=True)
