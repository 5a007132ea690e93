"""Pairs of images and captions as numpy batches: the same in every framework, on any number of processes.

Everything random is drawn from a Philox generator that is positioned by seed, epoch and item: the order of an epoch,
which of several captions is used, how an image is cropped. Batch size, workers and processes change none of it.

Source: Philox4x64-10 is from "Parallel Random Numbers: As Easy as 1, 2, 3" (Salmon et al., 2011). numpy fixes its raw
output for good, so orders and choices are drawn from that.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from clipmb.common.data.augment import Augment, random_resized_crop
from clipmb.common.data.ledger import Ledger, Watch
from clipmb.common.data.pairs import Pairs
from clipmb.common.errors import bad_input, logger, whole_number
from clipmb.common.image.resampling import as_image
from clipmb.common.processor import CLIPProcessor
from clipmb.common.text.rows import cut_inside, pad_rows
from clipmb.common.workers import default_workers

_ORDER, _CAPTION, _PICTURE = range(3)  # what random numbers are for
_LARGE = 1 << 28  # bytes of a batch
_MULTIPLE = 8  # of tokens in a row


@dataclass(frozen=True)
class Batch:
    """The rows of one global batch that this process has.

    Attributes:
        input_ids: (n, seq) int64, padded on the right.
        pixel_values: (n, channels, height, width) float32, rescaled and normalised as the image processor says.
        ids: Names of the n pairs, as `Pairs.id` returns them.
        indices: (n,) int64, the numbers of the pairs in the `Pairs`.
        skipped: Number of pairs in this process's part that could not be read; they are missing from the rows.
        truncated: Number of the n captions that were cut to the context.
    """

    input_ids: np.ndarray
    pixel_values: np.ndarray
    ids: list[str]
    indices: np.ndarray
    skipped: int = 0
    truncated: int = 0


class Batches:
    """Batches of pairs for training, epoch by epoch: decoded, preprocessed and tokenized.

    The batches of an epoch depend on the pairs, the processor, ``seed``, ``batch_size`` and ``augment`` alone, so that
    a run can be resumed in the middle of an epoch, on another number of processes, and with another framework.

    Args:
        pairs: The data.
        processor: Tokenizer and image processor of the model.
        batch_size: Pairs in a global batch, at least 1.
        context: Tokens that the text tower takes (``max_position_embeddings``), at least 2. Longer captions are cut;
            their end token stays.
        seed: Seed for data order, choice of captions and augmentation, from 0 to 2**63 - 1.
        rank: Number of this process, from 0. It gets its part of each batch, divided as by `numpy.array_split`.
        count: Number of processes.
        workers: Threads that read and decode; 0 for none. Default: one for each processor, at most 8.
        augment: Random change to each image before the processor. None: no change. "crop": `random_resized_crop`
            instead of the processor's own resize and crop. A function: called with a Pillow image and a
            `numpy.random.Generator`, it returns a Pillow image.
        shuffle: Draw a different order for each epoch. Otherwise pairs keep their order.
        drop_last: Leave out a last batch that is smaller than the others.
        ledger: JSON Lines file to which broken items are appended. Without one they are logged.
        pad_to: Cut and pad all captions to this many tokens, from 2 to ``context``. Default: the longest caption of the
            batch, rounded up to a multiple of 8.

    Raises:
        ValueError: An argument is out of its range, the image processor does not give all images one size, or more
            items of the files are unusable than usable.
    """

    def __init__(
        self,
        pairs: Pairs,
        processor: CLIPProcessor,
        *,
        batch_size: int,
        context: int,
        seed: int = 0,
        rank: int = 0,
        count: int = 1,
        workers: int | None = None,
        augment: str | Augment | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        ledger: str | os.PathLike[str] | None = None,
        pad_to: int | None = None,
    ) -> None:
        self.pairs, self.processor, self.shuffle, self.drop_last = pairs, processor, shuffle, drop_last
        self.batch_size = whole_number("batch_size", batch_size, 1)
        self.context = whole_number("context", context, 2)
        self.seed = whole_number("seed", seed, 0, 2**63 - 1)
        self.count = whole_number("count", count, 1)
        self.rank = whole_number("rank", rank, 0, self.count - 1)
        self.workers = default_workers() if workers is None else whole_number("workers", workers, 0, 1024)
        self.pad_to = None if pad_to is None else whole_number("pad_to", pad_to, 2, self.context)
        if augment is not None and augment != "crop" and not callable(augment):
            raise bad_input(
                "augment must be None, 'crop', or a function of an image and a generator", augment, "Correct augment"
            )
        self.augment = augment
        self.size = _picture_size(processor.image_processor)
        if len(pairs) < self.batch_size and drop_last:
            raise bad_input(
                "With drop_last there must be at least one full batch", f"{len(pairs)} pairs, batch_size {batch_size}",
                "Pass a smaller batch_size, or drop_last=False", shown=True,
            )  # fmt: skip
        if len(pairs.left_out) > len(pairs):
            name, why = pairs.left_out[0]
            raise bad_input(
                "Most items of the files must be usable pairs",
                f"{len(pairs)} pairs and {len(pairs.left_out)} unusable items; {name}: {why}", "Fix them", shown=True,
            )  # fmt: skip
        self._ledger = Ledger(ledger)
        self._tokenizer = processor.tokenizer
        self._padding = _padding_id(self._tokenizer)
        self._limit = self.pad_to or self.context
        self._warned = False

    @property
    def per_epoch(self) -> int:
        """Number of batches in an epoch."""
        full, rest = divmod(len(self.pairs), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of an epoch.

        Broken items are missing from their batch, which may leave it empty. Closing the iterator stops the threads.

        Args:
            epoch: Number of the epoch, from 0.
            start: Number of batches to skip at its beginning; they are not read.

        Yields:
            This process's part of each batch.

        Raises:
            ValueError: More than half of 1000 successive items, or of all items, are broken.
        """
        epoch = whole_number("epoch", epoch, 0, 2**63 - 1)
        start = whole_number("start", start, 0, self.per_epoch)
        return self._run(epoch, start)

    def order(self, epoch: int) -> np.ndarray:
        """Returns the order of an epoch.

        Args:
            epoch: Number of the epoch, from 0.

        Returns:
            (pairs,) int64, the numbers of all pairs.
        """
        if not self.shuffle:
            return np.arange(len(self.pairs))
        raw = self._random(epoch, _ORDER).random_raw(len(self.pairs))
        return np.argsort(raw, kind="stable").astype(np.int64, copy=False)

    def _random(self, epoch: int, purpose: int, index: int = 0) -> np.random.Philox:
        """Returns a generator for one purpose: 2**128 numbers for each item of each epoch."""
        return np.random.Philox(
            key=np.array([self.seed, epoch], np.uint64), counter=np.array([0, 0, index, purpose], np.uint64)
        )

    def _run(self, epoch: int, start: int) -> Iterator[Batch]:
        if self.rank == 0:
            self._ledger.add([(name, why, None, None) for name, why in self.pairs.left_out])
        order = self.order(epoch)
        watch = Watch(-(-len(order) // self.count), self.count)
        ahead = self._ahead()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="clipmb-data") if self.workers else None
        submit = _Done if pool is None else pool.submit
        waiting: deque[_Decoding] = deque()
        upcoming = iter(range(start, self.per_epoch))
        try:
            for _ in range(start, self.per_epoch):
                while len(waiting) <= ahead and (number := next(upcoming, None)) is not None:
                    waiting.append(self._submit(submit, order, epoch, number))
                yield self._collect(waiting.popleft(), epoch, watch)
        finally:
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def _ahead(self) -> int:
        """Returns how many batches are decoded ahead: enough for all workers, but few of large ones."""
        if not self.workers:
            return 0
        own = -(-self.batch_size // self.count)
        few = own * 3 * self.size[0] * self.size[1] * 4 > _LARGE
        return max(1 if few else 2, -(-2 * self.workers // own))

    def _submit(self, submit: Callable[..., Any], order: np.ndarray, epoch: int, number: int) -> _Decoding:
        """Starts decoding this process's part of one batch."""
        first, last = number * self.batch_size, min((number + 1) * self.batch_size, len(order))
        part = np.array_split(np.arange(first, last), self.count)[self.rank]
        pixels = np.empty((len(part), 3, *self.size), np.float32)
        indices = order[part]
        items = [submit(self._item, epoch, index, row) for index, row in zip(indices.tolist(), pixels, strict=True)]
        return _Decoding(number, part, indices, pixels, items)

    def _collect(self, decoding: _Decoding, epoch: int, watch: Watch) -> Batch:
        """Waits for the items of one batch and assembles it."""
        results = [item.result() for item in decoding.items]
        names = [self.pairs.id(index) for index in decoding.indices.tolist()]
        good = np.array([isinstance(result, list) for result in results], bool)
        broken = [(names[i], results[i], epoch, decoding.number) for i in np.flatnonzero(~good).tolist()]
        self._ledger.add(broken)
        watch.check(decoding.places[~good], broken)
        rows: list[list[int]] = [result for result in results if isinstance(result, list)]
        long = [i for i, ids in enumerate(rows) if len(ids) > self._limit]
        kept = decoding.indices[good]
        pixels = decoding.pixels if good.all() else decoding.pixels[good]
        names = [name for name, fine in zip(names, good, strict=True) if fine]
        if long and not self._warned:
            self._warned = True
            logger.warning(
                "Captions of more than %d tokens are cut; the first belongs to %s and has %d. Each batch counts them.",
                self._limit, names[long[0]], len(rows[long[0]]),
            )  # fmt: skip
        return Batch(self._padded(rows), pixels, names, kept, len(broken), len(long))

    def _padded(self, rows: list[list[int]]) -> np.ndarray:
        """Cuts rows to the limit and pads them on the right; (n, seq) int64."""
        longest = max(map(len, rows), default=2)
        seq = self.pad_to or min(-(-longest // _MULTIPLE) * _MULTIPLE, self.context)
        return pad_rows([cut_inside(row, seq) for row in rows], seq, self._padding)

    def _item(self, epoch: int, index: int, out: np.ndarray) -> list[int] | str:
        """Reads one pair: writes its pixels into ``out`` and returns its ids, or the reason why it is broken."""
        try:
            captions = self.pairs.captions(index)
            if not captions:
                raise bad_input("A pair needs a caption", "none", "Add one, or remove the image", shown=True)
            chosen = 0
            if len(captions) > 1:
                chosen = self._random(epoch, _CAPTION, index).random_raw() % len(captions)
            ids = _encode(self._tokenizer, captions[chosen])
            image = self.pairs.decoded(index)
        except (ValueError, OSError) as error:
            return str(error)
        options: dict[str, Any] = {"input_data_format": "channels_last"}
        if self.augment is not None:
            generator = np.random.Generator(self._random(epoch, _PICTURE, index))
            if callable(self.augment):
                image = self._augmented(self.augment, as_image(image), generator, index)
            else:
                images = self.processor.image_processor
                image = random_resized_crop(
                    image, generator, self.size, resize_backend=images.resize_backend, pass_order=images.pass_order
                )
                options |= {"do_resize": False, "do_center_crop": False}
        try:
            out[:] = self.processor.image_processor(image, return_tensors="np", **options)["pixel_values"][0]
        except ValueError as error:
            return str(error)
        return ids

    def _augmented(
        self, augment: Augment, image: Image.Image, generator: np.random.Generator, index: int
    ) -> Image.Image:
        try:
            image = augment(image, generator)
        except Exception as error:
            error.add_note(f"The augment function raised this error for the image of {self.pairs.id(index)}.")
            raise
        if not isinstance(image, Image.Image):
            raise bad_input("augment must return a Pillow image", type(image), "Correct the function", TypeError)
        return image


@dataclass(frozen=True)
class _Decoding:
    """A batch that is being decoded: its number, its items' places in the epoch, and the future of each item."""

    number: int
    places: np.ndarray
    indices: np.ndarray
    pixels: np.ndarray
    items: list[Any]


class _Done:
    """A finished future, for running without threads."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._result = function(*arguments)

    def result(self) -> Any:
        return self._result


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Returns the ids of a caption; the last one is the only end token."""
    ids = list(tokenizer(text, padding=False, truncation=False, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id
    if end in ids[:-1] and tokenizer.eos_token.lower() in text.lower():  # written out: the model would pool there
        ids = list(
            tokenizer(text, padding=False, truncation=False, split_special_tokens=True, verbose=False)["input_ids"]
        )
    return ids


def _padding_id(tokenizer: Any) -> int:
    """Returns the token that pads captions. It is never larger than the end token: old models pool at the largest."""
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    if end is None or tokenizer.bos_token_id is None:
        raise bad_input("The tokenizer must have a start and an end token", tokenizer.special_tokens_map, "Set both")
    return end if padding is None or padding > end else padding


def _picture_size(processor: Any) -> tuple[int, int]:
    """Returns the (height, width) of all images that an image processor returns."""
    size = processor.crop_size if processor.do_center_crop else processor.size if processor.do_resize else {}
    if not {"height", "width"} <= set(size):
        raise bad_input(
            "The image processor must resize all images to one size", size,
            "Set do_center_crop=True and crop_size, or a size with height and width",
        )  # fmt: skip
    return size["height"], size["width"]
