"""What is served, without HTTP: embeddings, classification, search and thumbnails, over one model."""

from __future__ import annotations

import asyncio
import functools
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from clipmb.common.errors import CheckpointError, bad_input, logger
from clipmb.common.image import pixels as px
from clipmb.common.zero_shot import class_means, class_prompts, softmax, unit
from clipmb.embedding.gallery import thumbnail
from clipmb.embedding.index import Index, columns_of
from clipmb.embedding.passport import passport_digest, passport_of
from clipmb.embedding.store import KINDS
from clipmb.pipeline import CLIPPipeline, piece_means
from clipmb.serving.batching import Batcher
from clipmb.serving.metrics import Metrics
from clipmb.serving.requests import Classification, Input, Refused, Search, image_bytes, invalid

_CLASSES = 32  # sets of labels whose embeddings are kept
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SMALL = 10_000  # what takes less than a millisecond; a turn of a thread would take a tenth of one
_THUMBNAILS = 512  # kept, of some 10 kB


class Service:
    """A model, perhaps with the embeddings of a collection, and what computes for many clients at once.

    Args:
        pipeline: The model.
        index: What is searched; None to serve the model alone.
        name: What the model is called.
        long_text: What to do with text longer than the context, as in `CLIPPipeline.encode_text`; that of the index
            where there is one.
        batch_size: Images or texts of a step, at most.
        max_wait: Milliseconds that an item waits for others.
        queue: Items in the server, at most.
        workers: Threads that decode and resize images and tokenize texts.
        metrics: Where it counts.
    """

    def __init__(
        self,
        pipeline: CLIPPipeline,
        index: Index | None,
        *,
        name: str,
        long_text: str,
        batch_size: int,
        max_wait: float,
        queue: int,
        workers: int,
        metrics: Metrics,
    ) -> None:
        self.pipeline, self.index, self.name, self.queue = pipeline, index, name, queue
        self.passport = index.passport if index else passport_of(pipeline, normalized=True, long_text=long_text)
        self.digest = passport_digest(self.passport)
        self.created = int(time.time())
        self.dimension: int = pipeline.config.projection_dim
        self.items = 0  # in the server; changed by the event loop alone
        self._size = pipeline.config.vision_config.image_size
        self._classes: OrderedDict[Any, np.ndarray] = OrderedDict()
        self._thumbnail = functools.lru_cache(_THUMBNAILS)(thumbnail)
        self._requests = ThreadPoolExecutor(2, thread_name_prefix="clipmb-requests")  # never behind many images
        self._images = ThreadPoolExecutor(workers, thread_name_prefix="clipmb-images")
        self._searcher = ThreadPoolExecutor(1, thread_name_prefix="clipmb-search")
        if index:
            for kind in filter(index.count, KINDS):  # read now, not at the first search
                index.search(vector=np.ones(self.dimension, np.float32), k=1, kind=kind)
                index.table(kind)
        steps = metrics.histogram("clipmb_batch_size", "Items of the steps of the model.", _BATCHES, ("kind",))
        done = metrics.counter("clipmb_items_total", "Images and texts that were computed.", ("kind",))
        busy = metrics.counter("clipmb_model_seconds_total", "Seconds that the model computed.", ("kind",))
        metrics.gauge("clipmb_queue_items", "Images and texts in the server.", lambda: self.items)

        def observe(kind: str, items: int, seconds: float) -> None:
            steps(kind, value=items)
            done(kind, by=items)
            busy(kind, by=seconds)

        self.batcher = Batcher(
            {"image": self._image_step, "text": functools.partial(self._text_step, batch_size)},
            dict.fromkeys(("image", "text"), batch_size), max_wait / 1000, observe, few_sizes=pipeline.few_shapes,
        )  # fmt: skip

    def close(self) -> None:
        """Computes what was accepted, and ends the threads."""
        self.batcher.close()
        for pool in (self._requests, self._images, self._searcher):
            pool.shutdown()

    async def run(self, work: Callable[..., Any], *arguments: Any, size: int) -> Any:
        """Runs what may take some milliseconds in a thread, so that other requests go on; what is small, at once.

        Args:
            work: What to do.
            *arguments: Of it.
            size: Bytes or letters that it has to do with.
        """
        if size <= _SMALL:
            return work(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._requests, work, *arguments)

    async def embed(self, inputs: Sequence[Input], normalize: bool) -> tuple[np.ndarray, int]:
        """Embeds texts and images.

        Args:
            inputs: What to embed.
            normalize: Scale the embeddings to unit length.

        Returns:
            (inputs, proj); and the tokens of the texts.

        Raises:
            Refused: The queue is full, an image cannot be read, or a text is too long.
        """
        self._check_count(len(inputs))
        places: dict[str, list[int]] = {"text": [], "image": []}
        for place, given in enumerate(inputs):
            places[given.kind].append(place)
        rows: list[list[int]] = []
        owners: list[int] = []
        if places["text"]:
            texts = [inputs[place] for place in places["text"]]
            rows, owners = await self.run(self._tokenized, texts, size=sum(len(text.value) for text in texts))
        features = np.empty((len(inputs), self.dimension), np.float32)
        with self._room(len(rows) + len(places["image"])):
            try:
                words, images = await _all(
                    self._computed("text", rows, [self._length(row) for row in rows]),
                    self._pictures([inputs[place] for place in places["image"]]),
                )
            except BaseException:
                self.batcher.withdraw()
                raise
        if rows:
            features[places["text"]] = piece_means(words, owners)
        if places["image"]:
            features[places["image"]] = images
        for given, row in zip(inputs, features, strict=True):
            if not np.isfinite(row).all() or not row.any():
                rule = f"The embedding of {given.param} must be finite and have a direction"
                fix = "Serve the model in float32 (16 bits may overflow), or another model"
                raise Refused(500, str(bad_input(rule, "NaN, infinity or zeros", fix, shown=True)), "not_finite")
        return (unit(features) if normalize else features), sum(map(len, rows))

    async def classify(self, asked: Classification) -> np.ndarray:
        """Returns how well each label fits each image, as `CLIPPipeline.classify` does.

        Args:
            asked: Images, labels and templates.

        Returns:
            (images, labels) probabilities; rows sum to 1.

        Raises:
            Refused: As in `embed`, or the templates are wrong.
        """
        try:
            prompts = class_prompts(asked.labels, asked.templates)
        except ValueError as error:
            raise invalid("templates", error) from None
        key = tuple(prompts), len(asked.labels)
        known = self._classes.get(key)  # may be dropped while this waits
        texts = [Input("text", prompt, "labels") for prompt in prompts] if known is None else []
        embeds, _ = await self.embed([*texts, *asked.images], True)
        classes = class_means(embeds[: len(texts)], len(asked.labels)) if known is None else known
        self._classes[key] = classes
        self._classes.move_to_end(key)
        while len(self._classes) > _CLASSES:
            self._classes.popitem(last=False)
        return softmax(self.pipeline.logits(embeds[len(texts) :], classes))

    async def search(self, asked: Search) -> list[dict[str, Any]]:
        """Returns the most similar rows of the index, as `Index.search` does.

        Args:
            asked: The query.

        Returns:
            For each ``score``, ``row``, its columns but ``path``, and ``thumbnail``, where there is one.

        Raises:
            Refused: As in `embed`, a condition is wrong, or the query has no direction.
        """
        index = self.searched()
        embeds, _ = await self.embed([*asked.plus, *asked.minus], True)
        plus = len(asked.plus)
        vector = embeds[:plus].astype(np.float64).sum(axis=0) - embeds[plus:].astype(np.float64).sum(axis=0)
        if not np.linalg.norm(vector) > 1e-6:
            rule = "A query must have a direction"
            raise invalid("minus_text", bad_input(rule, "a sum of zeros", "Pass other texts or images", shown=True))
        search = functools.partial(
            index.search, vector=unit(vector).astype(np.float32), k=asked.k, kind=asked.kind, where=asked.where or None
        )
        try:
            hits = await asyncio.get_running_loop().run_in_executor(self._searcher, search)
        except ValueError as error:
            raise invalid("where", error) from None
        except CheckpointError as error:
            logger.error("clipmb: %s", error)  # with paths of this machine
            message = "The embeddings were changed or removed since the server began. It must be started again."
            raise Refused(503, message, "index_changed") from None
        return [
            {
                "score": hit["score"], "row": hit["row"],
                **{name: value for name, value in columns_of(hit).items() if name != "path"},
                **({"thumbnail": f"thumbnail/{asked.kind}/{hit['row']}"} if hit.get("path") else {}),
            }
            for hit in hits
        ]  # fmt: skip

    async def thumbnail(self, kind: str, row: int) -> bytes | None:
        """Returns the JPEG file of a row of the index; None where there is no such row, or no readable image of it."""
        index = self.searched()
        if kind not in KINDS or row >= index.count(kind):
            return None
        path = index.table(kind).column("path")[row].as_py()
        loop = asyncio.get_running_loop()
        made = await loop.run_in_executor(self._images, self._thumbnail, path) if path else None
        return made[0] if made else None

    def searched(self) -> Index:
        """Returns the index.

        Raises:
            Refused: A model alone is served.
        """
        if self.index is None:
            message = "There is nothing to search: this server has a model alone. Serve a folder of clipmb embed."
            raise Refused(404, message, "no_index")
        return self.index

    def _check_count(self, count: int) -> None:
        """Refuses more items in a request than the server ever has room for."""
        if count > self.queue:
            rule = f"A request may have at most {self.queue} images and texts, pieces of long texts included"
            fix = "Send several requests, one after the other, or serve with a larger --queue"
            raise invalid(None, bad_input(rule, count, fix), "too_many_inputs")

    @contextmanager
    def _room(self, count: int) -> Iterator[None]:
        """Counts items as being in the server meanwhile."""
        self._check_count(count)
        if self.items + count > self.queue:
            message = f"The queue is full: {self.items} of at most {self.queue} images and texts wait. Try again later."
            raise Refused(429, message, "queue_full", headers={"retry-after": "1"})
        self.items += count
        try:
            yield
        finally:
            self.items -= count

    async def _pictures(self, inputs: Sequence[Input]) -> np.ndarray | None:
        loop = asyncio.get_running_loop()
        pixels = await _all(*(loop.run_in_executor(self._images, self._decoded, given) for given in inputs))
        return await self._computed("image", pixels, [0] * len(pixels))

    async def _computed(self, kind: str, values: Sequence[Any], lengths: Sequence[int]) -> np.ndarray | None:
        return await asyncio.wrap_future(self.batcher.submit(kind, values, lengths)) if values else None

    def _length(self, row: Sequence[int]) -> int:
        """Returns the tokens that a row is computed as, at least."""
        return -(-len(row) // 8) * 8 if self.pipeline.few_shapes else len(row)

    def _decoded(self, given: Input) -> np.ndarray:
        """Decodes and resizes an image, in a thread."""
        try:
            picture = px.read_image("The image", image_bytes(given))
            pixels = self.pipeline.processor.image_processor(
                picture, input_data_format="channels_last", return_tensors="np"
            )["pixel_values"][0]
        except (ValueError, TypeError) as error:
            raise invalid(given.param, error, "image_unreadable") from None
        if pixels.shape[1:] != (self._size,) * 2:
            message = f"The image processor gave {pixels.shape}, not the model's {self._size} pixels."
            raise invalid(given.param, message, "image_unreadable")
        return pixels

    def _tokenized(self, inputs: Sequence[Input]) -> tuple[list[list[int]], list[int]]:
        """Turns texts into ids, in a thread."""
        rows: list[list[int]] = []
        owners: list[int] = []
        for number, given in enumerate(inputs):
            try:
                pieces, _ = self.pipeline.token_rows([given.value], self.passport["long_text"])
            except ValueError as error:
                damaged = re.search("[\ud800-\udfff]", given.value)
                raise invalid(given.param, error, "invalid_value" if damaged else "text_too_long") from None
            rows += pieces
            owners += [number] * len(pieces)
        return rows, owners

    def _image_step(self, pixels: list[np.ndarray]) -> np.ndarray:
        """Computes a step of images, in the model's thread."""
        return self.pipeline.engine.image_features(np.stack(pixels))

    def _text_step(self, batch_size: int, rows: list[list[int]]) -> np.ndarray:
        """Computes a step of texts, in the model's thread."""
        return self.pipeline.encode_rows(
            rows, list(range(len(rows))), batch_size=batch_size, normalize=False, check=False
        )


async def _all(*works: Awaitable[Any]) -> list[Any]:
    """Waits for several at once and returns their results; the first error ends all of them."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def name_of(source: Any) -> str:
    """Returns what a model is called where nobody says: its Hub id, or the name of its folder or file."""
    return Path(source).name if Path(source).exists() else str(source)
