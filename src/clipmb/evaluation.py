"""Quality of a model on labelled or captioned images: zero-shot classification and image-text retrieval.

Source: CLIP, arXiv 2103.00020, section 3.1 (zero-shot classification) and appendix E (retrieval on Flickr30k and COCO).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NotRequired, TypedDict

import numpy as np

from clipmb.common.data.pairs import Pairs
from clipmb.common.errors import bad_input, logger
from clipmb.common.workers import default_workers
from clipmb.common.zero_shot import ReadyClasses, class_embeddings, named_classes, prompt_templates
from clipmb.pipeline import CLIPPipeline, batches, loaded

# Similarities of unit vectors that are closer than this are equal: far above the rounding of their sums in float64, and
# far below what float32 embeddings can tell apart.
_TIE = 1e-12
_QUERIES, _CANDIDATES, _PAIRS = 1024, 4096, 65536  # a block of similarities: 32 MiB


class ZeroShot(TypedDict):
    """Zero-shot classification.

    Attributes:
        top1: Fraction of images whose label is the most similar class.
        top5: Fraction of images whose label is among the five most similar classes.
        classes: Number of classes.
        images: Number of labelled images.
    """

    top1: float
    top5: float
    classes: int
    images: int


# Retrieval in one direction: fractions of queries whose best right candidate is among the first 1, 5 and 10, and the
# median of its rank, from 1.
Recall = TypedDict("Recall", {"recall@1": float, "recall@5": float, "recall@10": float, "median_rank": float})


class Retrieval(TypedDict):
    """Retrieval in both directions.

    Attributes:
        image_to_text: One query for each image.
        text_to_image: One query for each caption.
        images: Number of images.
        captions: Number of captions.
    """

    image_to_text: Recall
    text_to_image: Recall
    images: int
    captions: int


class Skipped(TypedDict):
    """An item that was left out.

    Attributes:
        id: Its name.
        reason: Why.
    """

    id: str
    reason: str


class Evaluation(TypedDict):
    """What `evaluate` returns: JSON values; fractions are in [0, 1].

    Attributes:
        zero_shot: Zero-shot classification, if images are labelled.
        retrieval: Image-text retrieval, if images have captions.
        skipped: What the data could not read as pairs, and the items whose image or text cannot be used; neither
            they nor their captions are counted.
    """

    zero_shot: NotRequired[ZeroShot]
    retrieval: NotRequired[Retrieval]
    skipped: list[Skipped]


def evaluate(
    model: CLIPPipeline | str | os.PathLike[str],
    data: str | os.PathLike[str] | Pairs,
    backend: str | None = None,
    *,
    labels: Sequence[str] | Mapping[str, str] | str | os.PathLike[str] | ReadyClasses | None = None,
    templates: str | Sequence[str] | None = None,
    batch_size: int = 32,
    long_text: str = "truncate",
    dtype: Any = None,
    device: Any = None,
    progress: bool = False,
    **columns: Any,
) -> Evaluation:
    """Measures what the data allow: classification where items have labels, retrieval where they have captions.

    Classification: an image is right when its label's class embedding (the normalised mean over the templates) is
    among the 1 or 5 most similar ones. With five classes or fewer, top-5 is always 1.

    Retrieval is over all images and all captions of the data, the protocol of COCO and Flickr30k with five captions
    for each image. Image to text: one query for each image, right when *any* of its captions is among the k most
    similar ones. Text to image: one query for each caption, right when its image is among the k most similar ones.
    When images share a caption word for word, it is right for each of them, and each of them is right for it. Every
    occurrence of a caption counts as one candidate and as one query.

    The rank of a query is that of its best right candidate, from 1. A wrong candidate that is exactly as similar
    precedes it, so that a model that gives the same embedding to everything scores no better than chance; copies of an
    image with other captions are wrong candidates too.

    Only ``batch_size`` decoded images are in memory at once, all embeddings, and a block of their similarities.

    Args:
        model: A pipeline, or the folder or Hub id of a checkpoint.
        data: Path of a data set, as ``Pairs.open`` takes it, or opened `Pairs`.
        backend: Key of `clipmb.backends.BACKENDS`, for a model that is loaded here; the first installed one when None.
        labels: The classes: names; {label in the data: its name in the prompts}; or a text file with one label per
            line, optionally followed by a tab and the name to use in prompts; or `clipmb.Classes`, whose embeddings
            exist. The labels of the data when None.
        templates: Prompts, as `clipmb.common.zero_shot.prompt_templates` takes them; None with `clipmb.Classes`.
        batch_size: Images per step.
        long_text: What to do with captions and prompts longer than the model's context, as in
            ``CLIPPipeline.encode_text``.
        dtype: "float32" (the default), "float16", "bfloat16" or "float64", for a model that is loaded here.
        device: Device, as the framework names it, for a model that is loaded here.
        progress: Show progress bars, when there is a terminal.
        **columns: ``image_column``, ``caption_column``, ``label_column``, ``separator`` and ``image_root``, as in
            `Pairs.open`.

    Returns:
        An `Evaluation`; "zero_shot" and "retrieval" are there when the data allow them.

    Raises:
        ValueError: The data are empty, have neither labels nor captions, or only images that cannot be used; labels
            of the data are not among the classes; the classes were made by another model or in another way; or the
            model's embeddings are not finite.
        CheckpointError: The model cannot be loaded.
    """
    prompt_templates(templates)
    if isinstance(labels, ReadyClasses) and templates is not None:
        raise bad_input("Classes have their templates already", templates, "Pass no templates")
    pairs = _opened(data, columns)
    owned, captions, broken = _read_texts(pairs)
    classes = _classes(labels, owned)
    pipeline = loaded(model, backend, dtype, device)
    encode_text = functools.partial(pipeline.encode_text, long_text=long_text, progress=progress)
    ready = labels.vectors_for(pipeline) if isinstance(labels, ReadyClasses) else None

    used = [i for i in range(len(pairs)) if owned[i] is not None or captions[i]]
    embeds, kept = _encode_pictures(pipeline, pairs, used, broken, batch_size, progress)
    found: Evaluation = {"skipped": []}
    if labelled := {row: label for row, i in enumerate(kept) if (label := owned[i]) is not None}:
        names = class_embeddings(encode_text, list(classes.values()), templates) if ready is None else ready
        names = _finite(names, "class")
        number = {label: place for place, label in enumerate(classes)}
        right = np.array([(query, number[label]) for query, label in enumerate(labelled.values())])
        ranks = _ranks(embeds[list(labelled)], names, right)
        found["zero_shot"] = {
            "top1": _share(ranks <= 1), "top5": _share(ranks <= 5), "classes": len(classes), "images": len(labelled),
        }  # fmt: skip
    if captioned := [row for row, i in enumerate(kept) if captions[i]]:
        found["retrieval"] = _retrieval(embeds[captioned], [captions[kept[row]] for row in captioned], encode_text)
    skipped = [*pairs.left_out, *((pairs.id(i), broken[i]) for i in sorted(broken))]
    if skipped:
        names = ", ".join(name for name, _ in skipped[:10]) + (", …" if len(skipped) > 10 else "")
        logger.warning("clipmb: %d of %d items are left out: %s", len(skipped), len(kept) + len(skipped), names)
    found["skipped"] = [{"id": name, "reason": reason} for name, reason in skipped]
    return found


def _opened(data: str | os.PathLike[str] | Pairs, columns: dict[str, Any]) -> Pairs:
    if isinstance(data, str | os.PathLike):
        data = Pairs.open(data, **columns)
    elif given := [name for name, value in columns.items() if value is not None]:
        raise bad_input("Columns are chosen when the data are opened", given, "Pass them to Pairs.open, or pass a path")
    if not len(data):
        raise bad_input("Evaluation needs at least one item", "empty data", "Pass other data", shown=True)
    return data


def _read_texts(pairs: Pairs) -> tuple[list[str | None], list[list[str]], dict[int, str]]:
    """Returns label and captions of every item, and why those that have unreadable ones are broken."""
    labels: list[str | None] = [None] * len(pairs)
    captions: list[list[str]] = [[] for _ in labels]
    broken = {}
    for i in range(len(pairs)):
        try:
            label, texts = pairs.label(i), list(pairs.captions(i))
            "".join(texts).encode()  # half characters, which JSON can hold, are no text
        except (ValueError, OSError) as error:
            broken[i] = str(error)
        else:
            labels[i], captions[i] = label, texts
    if not any(captions) and not any(label is not None for label in labels):
        first = f"; {pairs.id(min(broken))} is broken: {broken[min(broken)]}" if broken else ""
        rule = "Evaluation needs items with labels or captions"
        raise bad_input(rule, f"{len(labels)} items without{first}", "Name the columns, or pass other data", shown=True)
    return labels, captions, broken


def _classes(labels: Any, owned: list[str | None]) -> dict[str, str]:
    """Returns the name in the prompts of every label that is a class, in order."""
    present = sorted({label for label in owned if label is not None})
    if labels is None:
        return {label: label for label in present}
    if isinstance(labels, ReadyClasses):
        labels = dict(zip(labels.labels, labels.names, strict=True))
    classes = named_classes(labels)
    if not present:
        raise bad_input(
            "labels can only be passed for data with labels", f"{len(owned)} items without", "Remove labels", shown=True
        )
    if missing := [label for label in present if label not in classes]:
        raise bad_input(
            f"Every label of the data must be one of the {len(classes)} labels given",
            f"{len(missing)} others: {', '.join(map(repr, missing))}",
            "Add them to labels",
            shown=True,
        )
    return classes


def _encode_pictures(
    pipeline: CLIPPipeline, pairs: Pairs, used: list[int], broken: dict[int, str], batch_size: int, progress: bool
) -> tuple[np.ndarray, list[int]]:
    """Embeds the images of items, batch by batch.

    Args:
        pipeline: What embeds.
        pairs: The data.
        used: Which items.
        broken: Gets the items whose image cannot be used, with the reason.
        batch_size: Images per step.
        progress: Show a progress bar.

    Returns:
        Unit embeddings (usable images, proj), and the item that each is of.
    """
    parts: list[np.ndarray] = []
    kept: list[int] = []

    def read(i: int) -> Any:
        try:
            return pairs.image(i)
        except (ValueError, OSError) as error:
            return error

    def encode(batch: list[int]) -> None:
        pictures = dict(zip(batch, pool.map(read, batch), strict=True))
        broken.update({i: str(picture) for i, picture in pictures.items() if isinstance(picture, Exception)})
        pictures = {i: picture for i, picture in pictures.items() if i not in broken}
        try:
            parts.append(pipeline.encode_image(list(pictures.values()), batch_size=batch_size))
            kept.extend(pictures)
        except ValueError:  # one of them cannot be preprocessed: find out which
            for i, picture in pictures.items():
                try:
                    parts.append(pipeline.encode_image(picture))
                    kept.append(i)
                except ValueError as error:
                    broken[i] = str(error)

    with ThreadPoolExecutor(default_workers()) as pool:
        for _, batch in batches(used, batch_size, "images", progress):
            encode(batch)  # a function, so that its images are gone before the next ones are read
    if not kept:
        first = min(used)
        raise bad_input(
            "At least one image must be usable",
            f"{len(used)} that are not; the first, {pairs.id(first)}: {broken[first]}",
            "Check the paths and files",
            shown=True,
        )
    return _finite(np.concatenate(parts), "image"), kept


def _finite(embeds: np.ndarray, what: str) -> np.ndarray:
    """Checks embeddings, since comparisons with NaN would make every rank 1."""
    if bad := int((~(np.isfinite(embeds).all(axis=1) & embeds.any(axis=1))).sum()):
        rule = f"The {what} embeddings of the model must be finite and not zero"
        raise bad_input(rule, f"{bad} of {len(embeds)} that are not", "Use float32, or another model", shown=True)
    return embeds


def _retrieval(
    images: np.ndarray, captions: list[list[str]], encode_text: Callable[[list[str]], np.ndarray]
) -> Retrieval:
    """Ranks captions for images and images for captions.

    Args:
        images: (images, proj), of unit length.
        captions: Captions of each image, at least one.
        encode_text: Texts to unit embeddings.
    """
    number: dict[str, int] = {}  # of every distinct caption; each is embedded once, so that equal ones tie exactly
    owned = [[number.setdefault(text, len(number)) for text in texts] for texts in captions]
    return retrieval(images, _finite(encode_text(list(number)), "text"), owned)


def retrieval(images: np.ndarray, texts: np.ndarray, owned: Sequence[Sequence[int]]) -> Retrieval:
    """Ranks captions for images and images for captions, as `evaluate` describes.

    Args:
        images: (images, proj), of unit length.
        texts: (texts, proj), of unit length: every distinct caption once.
        owned: The numbers of the captions of each image, at least one, and as often as the image has it.

    Returns:
        Recall in both directions.
    """
    times = np.bincount([text for several in owned for text in several], minlength=len(texts))
    right = np.array([(image, text) for image, several in enumerate(owned) for text in sorted(set(several))])
    by_text = right[np.argsort(right[:, 1], kind="stable")][:, ::-1]
    to_text = _ranks(images, texts, right, times)
    to_image = np.repeat(_ranks(texts, images, by_text), times)
    return {
        "image_to_text": _recall(to_text),
        "text_to_image": _recall(to_image),
        "images": len(images),
        "captions": int(times.sum()),
    }


def _recall(ranks: np.ndarray) -> Recall:
    first, five, ten = (_share(ranks <= k) for k in (1, 5, 10))
    return {"recall@1": first, "recall@5": five, "recall@10": ten, "median_rank": float(np.median(ranks))}


def _share(right: np.ndarray) -> float:
    return float(np.count_nonzero(right) / len(right))


def _ranks(
    queries: np.ndarray, candidates: np.ndarray, right: np.ndarray, times: np.ndarray | None = None
) -> np.ndarray:
    """Returns the rank of each query's best right candidate, from 1; equal wrong candidates come first.

    Never holds more than a block of the similarities.

    Args:
        queries: (queries, proj), of unit length.
        candidates: (candidates, proj), of unit length.
        right: (pairs, 2): query and a right candidate of it, sorted by query; at least one for each query.
        times: (candidates,) how often each counts; once when None.

    Returns:
        (queries,) int64.
    """
    best = np.full(len(queries), -np.inf)
    for start in range(0, len(right), _PAIRS):
        query, candidate = right[start : start + _PAIRS].T
        similar = np.einsum("pd,pd->p", queries[query].astype(np.float64), candidates[candidate].astype(np.float64))
        np.maximum.at(best, query, similar)
    times = np.ones(len(candidates)) if times is None else times.astype(np.float64)
    higher = np.zeros(len(queries))
    for row in range(0, len(queries), _QUERIES):
        rows = queries[row : row + _QUERIES].astype(np.float64)
        lowest = best[row : row + _QUERIES, None] - _TIE
        pairs = right[slice(*np.searchsorted(right[:, 0], (row, row + len(rows))))]
        for column in range(0, len(candidates), _CANDIDATES):
            columns = candidates[column : column + _CANDIDATES].astype(np.float64)
            precedes = (rows @ columns.T >= lowest).astype(np.float64)
            inside = pairs[(pairs[:, 1] >= column) & (pairs[:, 1] < column + len(columns))]
            precedes[inside[:, 0] - row, inside[:, 1] - column] = 0
            higher[row : row + _QUERIES] += precedes @ times[column : column + _CANDIDATES]
    return 1 + higher.astype(np.int64)
