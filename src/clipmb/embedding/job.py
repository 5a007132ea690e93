"""Embeds collections of images and texts: read, decoded, computed and written at the same time, in bounded memory."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

import numpy as np

from clipmb.common.data.pairs import Pairs
from clipmb.common.errors import CheckpointError, bad_input, boolean, logger, one_of, whole_number
from clipmb.common.progress import progress_bar
from clipmb.common.workers import default_workers
from clipmb.common.zero_shot import unit
from clipmb.embedding import clip_retrieval, store
from clipmb.embedding.passport import passport_of, require_equivalent
from clipmb.embedding.store import Manifest, writable
from clipmb.pipeline import LONG_TEXT, CLIPPipeline, loaded

if TYPE_CHECKING:
    from clipmb.embedding.cluster import Cluster

_TEXTS = 256  # texts per step
_AUTO = (16, 32, 64, 128, 256)
_BY_WORKERS = ("decode", "resize", "tokenize")
_BETTER = 1.05  # how much faster a larger batch must be to be chosen


class Embedded(TypedDict):
    """What a job did.

    ``items``, ``images``, ``texts`` and ``errors`` are counts over the job as a whole, also where parts of it were done
    before; ``seconds`` has the work done now: "decode", "resize" and "tokenize" added up over the workers, "model" and
    "write", and "total" by the clock; ``bottleneck`` is the stage that took longest, None where nothing was left to do.
    """

    out: str
    items: int
    images: int
    texts: int
    errors: int
    batch_size: int
    seconds: dict[str, float]
    bottleneck: str | None


def embed(
    source: Any,
    out: str | os.PathLike[str],
    *,
    model: CLIPPipeline | str | os.PathLike[str],
    backend: str | None = None,
    dtype: Any = None,
    device: Any = None,
    batch_size: int | str = 32,
    workers: int | None = None,
    normalize: bool = True,
    stored: str = "float32",
    long_text: str = "truncate",
    shard_size: int = 10_000,
    resume: bool = False,
    append: bool = False,
    discard: bool = False,
    layout: str | None = None,
    engine: str = "local",
    replicas: int | None = None,
    gpus_per_replica: float | None = None,
    progress: bool = False,
    **columns: Any,
) -> Embedded:
    """Embeds images and texts, and writes the embeddings as Parquet shards with a manifest.

    Every item of the source that has an image becomes a row of ``images-00000.parquet`` and the shards after it, and
    every caption a row of ``texts-00000.parquet``, …: ``id`` (as `Pairs.id`), ``path`` (absolute; None for images
    inside other files), ``caption`` (of texts), ``label``, the other columns of the source, and ``embedding``. What
    cannot be embedded is in ``errors.parquet`` with its reason; no broken image stops the job. ``manifest.json`` says
    what made the embeddings.

    A job that was killed at any moment continues with ``resume=True`` at the first shard that is not complete, and ends
    with the same rows as one that was not.

    Args:
        source: What to embed, as `Pairs.open` takes it with ``partial=True``, or opened `Pairs`.
        out: The folder for the shards.
        model: A pipeline, or the folder or Hub id of a checkpoint.
        backend: Key of `clipmb.backends.BACKENDS`, for a model that is loaded here; the first installed one when None.
        dtype: What to compute in, as `CLIPPipeline.from_pretrained` takes it, for a model that is loaded here.
        device: Device, as the framework names it, for a model that is loaded here.
        batch_size: Images per step; "auto" measures which of 16 to 256 is fastest.
        workers: Threads that read, decode, resize and tokenize. Default: one for each processor, at most 8. With Ray,
            those of each replica, and the processors that it reserves; by default those of the cluster, shared out.
        normalize: Scale the embeddings to unit length.
        stored: "float32" or "float16", the numbers in the files.
        long_text: What to do with captions longer than the model's context, as in `CLIPPipeline.encode_text`; with
            "error" they are among the errors.
        shard_size: Items of the source in a shard; a job continues at a shard's beginning.
        resume: Continue a job that was interrupted, or begin it.
        append: Add another source to the embeddings that are there.
        discard: Drop the interrupted job of the folder, with its shards, before this one begins: for a source that
            cannot be had as it was. Finished sources stay, so that this one needs ``append=True``.
        layout: "clip-retrieval" also writes all embeddings of the folder as clip-retrieval does, into its folder
            clip-retrieval: ``img_emb/img_emb_0.npy``, ``text_emb/text_emb_0.npy`` and ``metadata/metadata_0.parquet``.
            A row is an image with one of its captions, or, where there are only images or only texts, each of these.
        engine: "local" for this process, or "ray" for the Ray cluster that ``RAY_ADDRESS`` names, or this machine. The
            source, ``out`` and a model's folder must then be paths on storage that all machines share.
        replicas: With Ray, how many processes load the model and embed shards. Default: 1.
        gpus_per_replica: With Ray, the share of a GPU that each replica reserves, up to 1. Default: 0.
        progress: Show a progress bar, when there is a terminal.
        **columns: ``image_column``, ``caption_column``, ``label_column``, ``separator`` and ``image_root``, as in
            `Pairs.open`.

    Returns:
        Counts and times, as `Embedded` describes them.

    Raises:
        ValueError: An argument is out of its range; the folder holds something already, another process writes into it,
            or its embeddings were made by another model or with other options.
        FileNotFoundError: The source does not exist.
        CheckpointError: The model cannot be loaded, the manifest is damaged, or shards were removed while the job ran.
        OSError: The disk is full.
        TypeError: With Ray, the source or the model is an object that other machines cannot open.
        ClipmbError: With Ray, a shard failed twice; ``resume=True`` goes on.
        ImportError: pyarrow, or Ray, is not installed.
    """
    store.pyarrow()
    if engine not in store.ENGINES:
        raise one_of("engine", engine, store.ENGINES)
    if stored not in store.STORED:
        raise one_of("stored", stored, store.STORED)
    if layout is not None and layout not in clip_retrieval.LAYOUTS:
        raise one_of("layout", layout, clip_retrieval.LAYOUTS)
    if long_text not in LONG_TEXT:
        raise one_of("long_text", long_text, LONG_TEXT)
    if batch_size != "auto":
        whole_number("batch_size", batch_size, 1)
    whole_number("shard_size", shard_size, 1)
    if workers is not None:
        workers = whole_number("workers", workers, 1, 1024)
    if engine == "local" and (replicas is not None or gpus_per_replica is not None):
        raise bad_input(
            "replicas and gpus_per_replica are Ray's", (replicas, gpus_per_replica), 'Pass engine="ray" (--engine ray)'
        )
    normalize, progress = boolean("normalize", normalize), boolean("progress", progress)
    resume, append, discard = boolean("resume", resume), boolean("append", append), boolean("discard", discard)
    if resume and append:
        raise bad_input("A job either resumes or appends", "both", "Pass one of resume= and append=", shown=True)
    if resume and discard:
        raise bad_input("A job is resumed or discarded", "both", "Pass one of resume= and discard=", shown=True)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise bad_input("out must be a folder", str(folder), "Pass another path", shown=True)
    with ExitStack() as stack:
        if engine == "ray":
            from clipmb.embedding import cluster

            recipe = cluster.Recipe.of(
                source, columns, model, backend=backend, dtype=dtype, device=device, workers=workers,
                normalized=normalize, long_text=long_text,
            )  # fmt: skip
            pairs = Pairs.open(recipe.source, partial=True, **columns)
            maker = cluster.Cluster(recipe, pairs, 1 if replicas is None else replicas, gpus_per_replica or 0)
            passport = stack.enter_context(maker).passport
        else:
            pairs = _opened(source, columns)
            maker = Local(pairs, loaded(model, backend, dtype, device), workers or default_workers())
            passport = passport_of(maker.pipeline, normalized=normalize, long_text=long_text)
        stack.enter_context(store.writing(folder))
        manifest = _prepared(folder, pairs, passport, maker, stored, shard_size, batch_size, resume, append, discard)
        done = _Job(folder, manifest, pairs, maker, progress).run()
        if layout is not None:
            clip_retrieval.write(folder)
        return done


def _opened(source: Any, columns: Mapping[str, Any]) -> Pairs:
    if not isinstance(source, Pairs):
        return Pairs.open(source, partial=True, **columns)
    if given := [name for name, value in columns.items() if value is not None]:
        raise bad_input("Columns are chosen when the data are opened", given, "Pass them to Pairs.open, or pass a path")
    return source


def _prepared(
    folder: Path,
    pairs: Pairs,
    passport: dict[str, Any],
    maker: Local | Cluster,
    stored: str,
    shard_size: int,
    batch_size: int | str,
    resume: bool,
    append: bool,
    discard: bool,
) -> Manifest:
    """Returns the manifest with this job as the pending one, after what is in the folder allows it; writes it."""
    manifest = Manifest.read(folder)
    dropped = range(0)
    if discard:
        if manifest is None or manifest.pending is None:
            raise bad_input(
                "Only an interrupted job can be discarded", f"{folder} without one", "Leave out discard", shown=True
            )
        dropped, manifest.pending = range(*manifest.pending["shards"]), None
    if manifest is None or not (manifest.sources or manifest.pending):
        inside = [] if manifest else sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if inside or append:
            raise bad_input(
                "append needs a folder with embeddings" if append else "out must be a new or empty folder",
                f"{folder} with {', '.join(inside[:5]) or 'nothing in it'}", "Pass another folder", shown=True,
            )  # fmt: skip
        size = maker.fastest_batch() if batch_size == "auto" else batch_size
        options = {"batch_size": size, "shard_size": shard_size}
        manifest = Manifest(passport, maker.dimension, stored, options)
    elif not (resume or append):
        raise bad_input(
            "out must be a new or empty folder", f"{folder} with {store.MANIFEST}",
            "Pass resume=True (--resume) to finish an interrupted job, append=True (--append) to add another source, "
            "or another folder", shown=True,
        )  # fmt: skip
    require_equivalent(manifest.passport, passport, folder)
    if any(type(manifest.options.get(name)) is not int for name in ("batch_size", "shard_size")):
        raise CheckpointError(f"{folder / store.MANIFEST} must hold batch_size and shard_size. Embed again.")
    asked = {"stored": (manifest.store, stored), "shard_size": (manifest.options["shard_size"], shard_size)}
    if batch_size != "auto":
        asked["batch_size"] = (manifest.options["batch_size"], batch_size)
    for name, (known, wanted) in asked.items():
        if known != wanted:
            raise bad_input(f"{name} must stay what it was, {known}, in {folder}", wanted, f"Pass {name}={known}")
    own = {"fingerprint": pairs.fingerprint, "items": len(pairs) + len(pairs.left_out)}
    if manifest.pending is not None and {name: manifest.pending[name] for name in own} != own:
        raise bad_input(
            f"An interrupted job must be finished first: {manifest.pending['name']}",
            f"another source, of {own['items']} items, or a changed one",
            "Pass its source, as it was, with resume=True (--resume), or discard=True (--discard) to drop that job",
            shown=True,
        )  # fmt: skip
    done = [source for source in manifest.sources if source["fingerprint"] == own["fingerprint"]]
    if append and done:
        raise bad_input(
            "A source may be embedded only once", f"{done[0]['name']}, which is there", "Pass another", shown=True
        )
    if append and manifest.pending is not None:
        raise bad_input("An interrupted job must be finished first", folder, "Pass resume=True (--resume)")
    if resume and manifest.sources and not done and manifest.pending is None:
        raise bad_input(
            f"There is no interrupted job in {folder}", "another source than the one that is there",
            "Pass append=True (--append) to add it", shown=True,
        )  # fmt: skip
    if manifest.pending is None and not done:
        first = manifest.next_shard
        shards = [first, first + -(-len(pairs) // shard_size)]
        manifest.pending = {"name": writable(repr(pairs)), **own, "shards": shards}
        store.clear(folder, dropped)
        manifest.write(folder)
    return manifest


def fastest_batch(pipeline: CLIPPipeline) -> int:
    """Measures the steps of images of several sizes; returns the smallest that no larger one beats by much."""
    best, fastest = _AUTO[0], 0.0
    vision = pipeline.config.vision_config
    for size in _AUTO:
        pixels = np.zeros((size, vision.num_channels, vision.image_size, vision.image_size), np.float32)
        try:
            pipeline.engine.image_features(pixels)  # compiles
            begun = time.perf_counter()
            pipeline.engine.image_features(pixels)
            rate = size / (time.perf_counter() - begun)
        except (RuntimeError, MemoryError) as error:
            logger.info("A batch of %d does not fit: %s", size, str(error)[:200])
            break
        if rate < fastest * _BETTER:
            break
        best, fastest = size, rate
    return best


@dataclass
class Clock:
    """Adds up the seconds of stages over threads."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the seconds of the context to those of a stage."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            with self.lock:
                self.seconds[name] += time.perf_counter() - begun


_Rows = tuple[list[dict[str, Any]], list[np.ndarray]]  # and the embedding of each


@dataclass(frozen=True)
class _Item:
    """What the workers made of an item: pixels, captions with other columns and ids, and why there are none."""

    index: int
    pixels: np.ndarray | None
    captions: list[tuple[str, dict[str, Any], list[list[int]]]]
    errors: list[tuple[str, str]]


class _Job:
    """The pending source of a manifest."""

    def __init__(self, folder: Path, manifest: Manifest, pairs: Pairs, maker: Local | Cluster, progress: bool) -> None:
        self.folder, self.manifest, self.pairs, self.maker = folder, manifest, pairs, maker
        self.progress = progress

    def run(self) -> Embedded:
        """Embeds what is left of the source, and moves it to the finished ones."""
        begun = time.perf_counter()
        done = [source for source in self.manifest.sources if source["fingerprint"] == self.pairs.fingerprint]
        if not done:
            done = [self._embedded()]
        spent = {**self.maker.clock.seconds, "total": time.perf_counter() - begun}
        counts = {name: int(done[0][name]) for name in ("items", "images", "texts", "errors")}
        shared = {
            name: value / (self.maker.workers if name in _BY_WORKERS else 1)
            for name, value in spent.items()
            if name != "total"
        }
        seconds = {name: round(value, 3) for name, value in spent.items()}
        bottleneck = max(shared, key=lambda name: shared[name]) if shared else None
        size = self.manifest.options["batch_size"]
        about = {"out": str(self.folder), **counts, "batch_size": size, "seconds": seconds}
        return cast("Embedded", {**about, "bottleneck": bottleneck})

    def _embedded(self) -> dict[str, Any]:
        pending = self.manifest.pending or {}
        first, end = pending["shards"]
        size = self.manifest.options["shard_size"]
        spans = {
            first + place: range(start, min(start + size, len(self.pairs)))
            for place, start in enumerate(range(0, len(self.pairs), size))
        }
        known = {number: found for number in range(first, end) if (found := store.finished(self.folder, number))}
        todo = {number: span for number, span in spans.items() if number not in known}
        before = sum(len(spans[number]) for number in known)
        with progress_bar(self.progress, "items", len(self.pairs), done=before) as advance:
            known.update(self.maker.written(self.folder, self.manifest, todo, advance))
        if lost := [number for number in range(first, end) if not store.is_whole(self.folder, number, known[number])]:
            raise CheckpointError(
                "Shards must stay as they were written until a job is finished. Received: "
                f"{self.folder}, where shard {lost[0]} was changed or removed meanwhile. "
                "Go on with resume=True (--resume)."
            )
        return self._finished([known[number] for number in range(first, end)])

    def _finished(self, shards: list[Mapping[str, Any]]) -> dict[str, Any]:
        """Moves the pending job to the finished ones; its errors become those of the folder."""
        pending = self.manifest.pending or {}
        left_out = [
            {"id": writable(name), "path": None, "kind": "item", "reason": writable(why)}
            for name, why in self.pairs.left_out
        ]
        errors = [*left_out, *(error for shard in shards for error in shard["errors"])]
        counts = {kind: sum(shard[kind] for shard in shards) for kind in store.KINDS}
        done = {**pending, **counts, "errors": len(errors)}
        store.write_errors(self.folder, len(self.manifest.sources), errors)
        self.manifest.sources.append(done)
        self.manifest.pending = None
        self.manifest.write(self.folder)
        store.clear(self.folder)
        return done


class Local:
    """Makes shards with the model in this process.

    Args:
        pairs: The source.
        pipeline: The model.
        workers: Threads that read, decode, resize and tokenize.

    Attributes:
        dimension: Numbers in an embedding.
        clock: The seconds spent.
    """

    def __init__(self, pairs: Pairs, pipeline: CLIPPipeline, workers: int) -> None:
        self.pairs, self.pipeline, self.workers = pairs, pipeline, workers
        self.dimension: int = pipeline.config.projection_dim
        self.clock = Clock()

    def fastest_batch(self) -> int:
        """Measures which number of images per step is best."""
        return fastest_batch(self.pipeline)

    def written(
        self, folder: Path, manifest: Manifest, spans: Mapping[int, range], advance: Callable[..., None]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Embeds and writes shards; yields the number of each and what is known of it, when its files are complete.

        Args:
            folder: Where.
            manifest: What the folder holds.
            spans: Number of each shard to its items.
            advance: Is called with the count of items done, and perhaps with how to name them.
        """
        shards = _Shards(folder, manifest, self.pairs, self.pipeline, self.workers, self.clock)
        with (
            ThreadPoolExecutor(self.workers, thread_name_prefix="clipmb-embed") as pool,
            ThreadPoolExecutor(1, thread_name_prefix="clipmb-write") as writer,
        ):
            items = shards.ahead(pool, (index for span in spans.values() for index in span))
            writing: deque[tuple[int, Future[dict[str, Any]]]] = deque()
            broken = 0
            for number, span in spans.items():
                shard = shards.computed(len(span), items, advance, broken)
                broken += len(shard[2])
                while writing:  # one shard at most waits for the disk
                    earlier, written = writing.popleft()
                    yield earlier, written.result()
                writing.append((number, writer.submit(shards.write, number, *shard)))
            for earlier, written in writing:
                yield earlier, written.result()


class _Shards:
    """How the shards of a job are computed and written."""

    def __init__(
        self, folder: Path, manifest: Manifest, pairs: Pairs, pipeline: CLIPPipeline, workers: int, clock: Clock
    ) -> None:
        self.folder, self.manifest, self.pairs, self.pipeline = folder, manifest, pairs, pipeline
        self.workers, self.clock = workers, clock
        self.passport = manifest.passport
        self.size: int = manifest.options["batch_size"]
        self.types = store.column_types(pairs.kinds)

    def ahead(self, pool: ThreadPoolExecutor, indices: Iterable[int]) -> Iterator[_Item]:
        """Yields the items in their order, while workers make the next ones."""
        waiting: deque[Future[_Item]] = deque()
        upcoming = iter(indices)
        most = max(2 * self.size, 4 * self.workers)
        try:
            while True:
                while len(waiting) < most and (index := next(upcoming, None)) is not None:
                    waiting.append(pool.submit(self._item, index))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _item(self, index: int) -> _Item:
        """Reads one item; what is wrong with it is in its errors."""
        errors: list[tuple[str, str]] = []
        pixels, captions, texts, fields = None, [], [], []
        has_image = self.pairs.has_image(index)
        if has_image:
            try:
                with self.clock.stage("decode"):
                    picture = self.pairs.decoded(index)
                with self.clock.stage("resize"):
                    pixels = self.pipeline.processor.image_processor(
                        picture, input_data_format="channels_last", return_tensors="np"
                    )["pixel_values"][0]
            except (ValueError, OSError, TypeError) as error:
                errors.append(("image", str(error)))
        try:
            texts = self.pairs.captions(index)
            fields = self.pairs.caption_fields(index) if self.types else [{} for _ in texts]
        except (ValueError, OSError) as error:
            errors.append(("text", str(error)))
        with self.clock.stage("tokenize"):
            for text, own in zip(texts, fields, strict=True):
                try:
                    rows, _ = self.pipeline.token_rows([text], self.passport["long_text"])
                    captions.append((text, own, rows))
                except (ValueError, TypeError) as error:
                    errors.append(("text", str(error)))
        if not has_image and not texts and not errors:
            errors.append(("item", "It has neither an image nor a caption."))
        return _Item(index, pixels, captions, errors)

    def computed(
        self, count: int, items: Iterator[_Item], advance: Callable[..., None], broken: int = 0
    ) -> tuple[_Rows, _Rows, list[dict[str, Any]]]:
        """Computes one shard: rows and embeddings of images and of texts, and the errors, after so many ``broken``."""
        vision = self.pipeline.config.vision_config
        errors: list[dict[str, Any]] = []
        pictures: list[dict[str, Any]] = []
        embeds: list[np.ndarray] = []
        waiting: list[tuple[dict[str, Any], np.ndarray]] = []
        captions: list[tuple[dict[str, Any], list[list[int]]]] = []

        def flush() -> None:
            if not waiting:
                return
            rows, pixels = zip(*waiting, strict=True)
            with self.clock.stage("model"):
                features = self.pipeline.engine.image_features(np.stack(pixels))
            self._sort(rows, features, "image", pictures, embeds, errors)
            waiting.clear()

        for _ in range(count):
            item = next(items)
            row = self._row(item.index)
            errors += [{**_named(row), "kind": kind, "reason": writable(reason)} for kind, reason in item.errors]
            if item.pixels is not None:
                if item.pixels.shape[1:] != (vision.image_size,) * 2:  # every batch needs one size
                    reason = (
                        f"The image processor gave {item.pixels.shape}, not the model's {vision.image_size} pixels."
                    )
                    errors.append({**_named(row), "kind": "image", "reason": reason})
                else:
                    waiting.append((row, item.pixels))
            captions += [({**row, "caption": text, "fields": own}, ids) for text, own, ids in item.captions]
            if len(waiting) == self.size:
                flush()
            found = broken + len(errors)
            advance(1, f"items, {found:,} {'error' if found == 1 else 'errors'}" if found else None)
        flush()
        written: list[dict[str, Any]] = []
        vectors: list[np.ndarray] = []
        if captions:
            features = self._texts([ids for _, ids in captions])
            self._sort([row for row, _ in captions], features, "text", written, vectors, errors)
        return (pictures, embeds), (written, vectors), errors

    def _texts(self, rows: list[list[list[int]]]) -> np.ndarray:
        """Embeds the captions of a shard; those whose embedding is not finite stay so."""
        pieces = [piece for own in rows for piece in own]
        owners = [number for number, own in enumerate(rows) for _ in own]
        with self.clock.stage("model"), np.errstate(invalid="ignore"):
            return self.pipeline.encode_rows(pieces, owners, batch_size=_TEXTS, normalize=False, check=False)

    def _sort(
        self,
        rows: Iterable[dict[str, Any]],
        features: np.ndarray,
        kind: str,
        kept: list[dict[str, Any]],
        embeds: list[np.ndarray],
        errors: list[dict[str, Any]],
    ) -> None:
        """Adds rows with a usable embedding to the kept ones, the others to the errors."""
        stored = np.dtype(self.manifest.store)
        with np.errstate(over="ignore", invalid="ignore"):
            ready = (unit(features) if self.passport["normalized"] else features).astype(stored)
        good = np.asarray(np.isfinite(ready).all(axis=1))
        if self.passport["normalized"]:
            good &= np.asarray(features.any(axis=1))
        for row, vector, fine in zip(rows, ready, good, strict=True):
            if fine:
                kept.append(row)
                embeds.append(vector)
            else:
                reason = f"Its embedding is not finite in {self.manifest.store}, or has no direction."
                errors.append({**_named(row), "kind": kind, "reason": reason})

    def _row(self, index: int) -> dict[str, Any]:
        try:
            label = self.pairs.label(index)
        except ValueError:
            label = None
        return {
            "id": writable(self.pairs.id(index)), "path": writable(self.pairs.path(index)), "label": writable(label),
            "fields": self.pairs.fields(index) if self.types else {},
        }  # fmt: skip

    def write(self, number: int, pictures: _Rows, texts: _Rows, errors: list[dict[str, Any]]) -> dict[str, Any]:
        """Writes the files of a shard, and then that they are complete."""
        with self.clock.stage("write"):
            about: dict[str, Any] = {"errors": errors}
            for kind, (rows, vectors) in zip(store.KINDS, (pictures, texts), strict=True):
                path = store.shard_path(self.folder, kind, number)
                about[kind] = len(rows)
                if rows:
                    store.write_shard(path, rows, np.stack(vectors), self.types, self.passport)
                else:
                    path.unlink(missing_ok=True)
            store.finish(self.folder, number, about)
        return about


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": row["id"], "path": row["path"]}
