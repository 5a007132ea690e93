"""Search in embeddings on disk: exact, over a text, an image, or sums and differences of several."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self, TypedDict

import numpy as np

from clipmb.common.errors import CheckpointError, bad_input, one_of, whole_number
from clipmb.common.zero_shot import unit
from clipmb.embedding import approximate as approximate_index
from clipmb.embedding import store
from clipmb.embedding.approximate import Approximate
from clipmb.embedding.passport import COMPARED, passport_of, require_equivalent
from clipmb.embedding.store import KINDS, Manifest, Rows
from clipmb.evaluation import Retrieval, retrieval
from clipmb.pipeline import CLIPPipeline, loaded

_BLOCK = 1 << 11  # rows of one product, which stay in a processor's cache
_QUERIES = 1 << 9  # of one product
_PAIRS = 1 << 12  # of which cosines are computed at once
_SPARE = 4  # times as many rows as results are asked of an approximate index, whose vectors have 8 bits a number
_FEW, _SHARE = 10_000, 20  # so many rows, or this part of all, are searched exactly
_COMPARISONS: dict[str, str] = {  # of ``where``, to pyarrow's functions
    "==": "equal", "!=": "not_equal", "<=": "less_equal", ">=": "greater_equal", "=": "equal", "<": "less",
    ">": "greater",
}  # fmt: skip


class ApproximateSearch(TypedDict):
    """What approximate search misses.

    Attributes:
        kind: "images" or "texts".
        method: "hnsw" or "ivf".
        k: How many results each query had.
        queries: How many queries there were.
        recall: The fraction of results that are as similar as the k nearest.
        milliseconds: What a query took on average, "exact" and "approximate".
    """

    kind: str
    method: str
    k: int
    queries: int
    recall: float
    milliseconds: dict[str, float]


class IndexEvaluation(TypedDict, total=False):
    """Quality of search in a folder of embeddings.

    Attributes:
        approximate: What approximate search misses.
        retrieval: How well images find their captions, and captions their images, as in `clipmb.Retrieval`.
    """

    approximate: ApproximateSearch
    retrieval: Retrieval


class Index:
    """Embeddings that `clipmb.embed` wrote. Open a folder with `Index.open`.

    Vectors are read from mapped files in blocks, and few are in memory at once; those of a kind that `vectors` returned
    are searched in memory, which takes about half the time for a single query.

    Args:
        folder: Where they are.
        manifest: What the folder holds.
        load: Loads what embeds queries.

    Attributes:
        folder: Where they are.
        manifest: What the folder holds.
        passport: What made them, as `clipmb.embedding.passport.passport_of` describes it.
    """

    def __init__(self, folder: Path, manifest: Manifest, load: Callable[[], CLIPPipeline]) -> None:
        self.folder, self.manifest, self.passport = folder, manifest, manifest.passport
        self._load = load
        self._vectors: dict[str, np.ndarray] = {}
        self._tables: dict[str, Any] = {}
        self._opened: dict[str, Rows] = {}
        self._approximates: dict[str, Approximate] = {}

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        model: CLIPPipeline | str | os.PathLike[str] | None = None,
        backend: str | None = None,
        device: Any = None,
    ) -> Self:
        """Opens a folder of embeddings. The model is loaded when a query needs it.

        Args:
            path: The folder.
            model: What embeds queries: a pipeline, or the folder or Hub id of a checkpoint; the one of the manifest
                when None. It must be equivalent to what made the embeddings.
            backend: Key of `clipmb.backends.BACKENDS`, for a model that is loaded here; the one of the manifest when
                that is installed, else the first installed one.
            device: Device, as the framework names it, for a model that is loaded here.

        Raises:
            CheckpointError: It holds no finished embeddings, or its manifest is damaged.
            ImportError: pyarrow is not installed.
        """
        store.pyarrow()
        folder = Path(path)
        manifest = Manifest.read(folder)
        if manifest is None or not manifest.sources:
            state = "no manifest.json" if manifest is None else "only an interrupted job"
            raise CheckpointError(
                f"{folder} must hold finished embeddings. Received: {state}. "
                "Make them with clipmb embed, finish a job with its --resume, or correct the path."
            )

        def load() -> CLIPPipeline:
            from clipmb import backends

            if missing := [name for name in (*COMPARED, "model", "backend") if name not in manifest.passport]:
                raise CheckpointError(
                    f"{folder / store.MANIFEST} must have the whole passport of its embeddings. "
                    f"Received: one without {', '.join(missing)}. Restore it, or embed again."
                )
            if isinstance(model, CLIPPipeline):
                pipeline = loaded(model, backend, None, device)
            else:
                known = manifest.passport["backend"]
                name = backend or (known if known in backends.installed() else None)
                pipeline = loaded(model or manifest.passport["model"], name, manifest.passport["dtype"], device)
            found = passport_of(
                pipeline, normalized=manifest.passport["normalized"], long_text=manifest.passport["long_text"]
            )
            require_equivalent(manifest.passport, found, folder)
            return pipeline

        return cls(folder, manifest, load)

    @cached_property
    def pipeline(self) -> CLIPPipeline:
        """What embeds queries; loaded at the first use.

        Raises:
            ValueError: It is not equivalent to what made the embeddings.
            CheckpointError: It cannot be loaded.
        """
        return self._load()

    def __repr__(self) -> str:
        return f"Index({str(self.folder)!r}, images={self.count('images')}, texts={self.count('texts')})"

    def count(self, kind: str) -> int:
        """Returns how many embeddings there are of "images" or of "texts"."""
        self._check_kind(kind)
        return sum(source[kind] for source in self.manifest.sources)

    def vectors(self, kind: str = "images") -> np.ndarray:
        """Returns all embeddings of a kind.

        Args:
            kind: "images" or "texts".

        Returns:
            (rows, proj), float32 or float16 as they were stored; read once.

        Raises:
            CheckpointError: Shards are missing, or cannot be read.
        """
        self._check_kind(kind)
        if kind not in self._vectors:
            whole = np.empty((self.count(kind), self.manifest.dimension), self.manifest.store)
            for numbers, block in self.rows(kind).blocks(_BLOCK):
                whole[numbers] = block
            self._vectors[kind] = whole
        return self._vectors[kind]

    def table(self, kind: str = "images") -> Any:
        """Returns the other columns of a kind, as a ``pyarrow.Table`` of as many rows; read once.

        A column that the sources have in different types is in one that holds all values: at last text.

        Args:
            kind: "images" or "texts".

        Raises:
            CheckpointError: Shards are missing, or cannot be read.
        """
        self._check_kind(kind)
        if kind not in self._tables:
            pa = store.pyarrow()
            rows = self.rows(kind)
            schema = pa.schema(list((rows.types or {"id": pa.string()}).items()))
            self._tables[kind] = pa.concat_tables([schema.empty_table(), *rows.tables(schema.names)])
        return self._tables[kind]

    def query(
        self,
        text: str | Sequence[str] | None = None,
        image: Any = None,
        *,
        minus_text: str | Sequence[str] | None = None,
        minus_image: Any = None,
    ) -> np.ndarray:
        """Embeds a query: the sum of all texts and images, less those to move away from, of unit length.

        Args:
            text: One or several texts.
            image: One or several images, as `CLIPPipeline.encode_image` takes them.
            minus_text: Texts to subtract.
            minus_image: Images to subtract.

        Returns:
            (proj,), float32.

        Raises:
            ValueError: There is nothing to search for, an image cannot be read, or the sum has no direction.
        """
        whole = np.zeros(self.manifest.dimension)
        given = False
        for sign, texts, images in ((1, text, image), (-1, minus_text, minus_image)):
            if texts is not None and not (isinstance(texts, str | list | tuple) and len(texts) == 0):
                given |= sign > 0
                options = {"long_text": self.passport["long_text"]}
                whole += sign * self.pipeline.encode_text(texts, **options).astype(np.float64).sum(axis=0)
            if images is not None and not (isinstance(images, list | tuple) and not images):
                given |= sign > 0
                whole += sign * self.pipeline.encode_image(images).astype(np.float64).sum(axis=0)
        if not given:
            raise bad_input("A query needs a text or an image", None, "Pass text= or image=")
        if not np.linalg.norm(whole):
            raise bad_input("A query must have a direction", "a sum of zeros", "Pass other texts or images", shown=True)
        return unit(whole).astype(np.float32)

    def search(
        self,
        text: str | Sequence[str] | None = None,
        image: Any = None,
        *,
        vector: np.ndarray | None = None,
        k: int = 10,
        kind: str = "images",
        where: str | Sequence[str] | None = None,
        minus_text: str | Sequence[str] | None = None,
        minus_image: Any = None,
        approximate: bool = False,
        ef: int | None = None,
        probes: int | None = None,
    ) -> list[dict[str, Any]]:
        """Returns the embeddings that are most similar to a query.

        Args:
            text: As in `query`.
            image: As in `query`.
            vector: (proj,) a query of one's own, instead of texts and images; its length does not matter.
            k: How many, at most.
            kind: "images" or "texts": what to find.
            where: Conditions on the other columns, all of which must hold: ``column=value``, with ``=``, ``!=``, ``<``,
                ``<=``, ``>`` or ``>=``, and the value as it is, without quotes. Rows without a value never match.
            minus_text: As in `query`.
            minus_image: As in `query`.
            approximate: As in `nearest`.
            ef: As in `nearest`.
            probes: As in `nearest`.

        Returns:
            For each, from the most similar: ``score``, the cosine; ``row``, its number; and all columns, of which those
            with these names are called ``score_`` and ``row_``. Rows that are equally similar keep their order.

        Raises:
            ValueError: There is no query, an argument is out of its range, or a condition names no column.
        """
        self._check_kind(kind)
        whole_number("k", k, 1)
        if vector is None:
            vector = self.query(text, image, minus_text=minus_text, minus_image=minus_image)
        elif any(value is not None for value in (text, image, minus_text, minus_image)):
            raise bad_input("A query is a vector, or texts and images", "both", "Pass one of them", shown=True)
        scores, found = self.nearest(
            np.asarray(vector)[None], k, kind=kind, where=where, approximate=approximate, ef=ef, probes=probes
        )
        return [
            {
                "score": float(score),
                "row": int(row),
                **{f"{name}_" if name in ("score", "row") else name: value for name, value in columns.items()},
            }
            for score, row, columns in zip(scores[0], found[0], self.rows(kind).take(found[0]), strict=True)
        ]

    def nearest(
        self,
        vectors: np.ndarray,
        k: int = 10,
        *,
        kind: str = "images",
        where: str | Sequence[str] | None = None,
        approximate: bool = False,
        ef: int | None = None,
        probes: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows that are most similar to each of several queries, at little more than the cost of one.

        Args:
            vectors: (queries, proj); their lengths do not matter.
            k: How many, at most.
            kind: As in `search`.
            where: As in `search`.
            approximate: Look only at rows that the index of `build` proposes: the scores are exact, but rows may be
                missed. Where conditions leave few rows, or the index proposes too few that satisfy them, the search is
                exact.
            ef: Rows that are in sight of a search in an index of "hnsw": more are slower, and miss fewer. 128 when
                None.
            probes: Lists that a search in an index of "ivf" goes through, likewise; a 16th of them when None.

        Returns:
            Cosines, float32, and numbers of rows, int64, (queries, the lesser of k and the rows), from the most
            similar. Rows that are equally similar keep their order.

        Raises:
            ValueError: As in `search`.
        """
        self._check_kind(kind)
        whole_number("k", k, 1)
        vectors = np.asarray(vectors, np.float64)
        if (
            vectors.ndim != 2
            or vectors.shape[1] != self.manifest.dimension
            or not np.isfinite(vectors).all()
            or not vectors.any(axis=1).all()
        ):
            raise bad_input(
                f"vector must have {self.manifest.dimension} finite numbers that are not all zero",
                vectors,
                "Correct it",
            )
        for name, value in (("ef", ef), ("probes", probes)):
            if value is not None and not approximate:
                raise bad_input(f"{name} is for approximate search", value, "Pass approximate=True too")
            if value is not None:
                whole_number(name, value, 1)
        rows = None if where is None else np.flatnonzero(self._matching(kind, where))
        vectors = vectors / np.abs(vectors).max(axis=1, keepdims=True)  # squares would be zero or infinite at last
        queries, known = unit(vectors).astype(np.float32), self._vectors.get(kind, self.rows(kind))
        index = self._approximate(kind) if approximate else None
        if index is None or (rows is not None and len(rows) < max(_FEW, len(known) // _SHARE)):
            return nearest(known, queries, k, rows=rows)
        most = min(k, len(known if rows is None else rows))
        scores = np.empty((len(queries), most), np.float32)
        found = np.empty((len(queries), most), np.int64)
        for i, own in enumerate(index.candidates(queries, min(_SPARE * k, len(known)), rows, ef, probes)):
            one = nearest(known, queries[i : i + 1], k, rows=own if len(own) >= most else rows)
            scores[i], found[i] = one[0][0], one[1][0]
        return scores, found

    def build(
        self,
        kind: str = "images",
        *,
        method: str = "hnsw",
        m: int | None = None,
        ef_construction: int | None = None,
        lists: int | None = None,
    ) -> dict[str, Any]:
        """Writes an index for approximate search into the folder, in place of one that is there; needs faiss.

        Worth it from some hundred thousand rows. It is of the rows that are there now: after others were appended it is
        refused, and has to be built anew.

        Args:
            kind: "images" or "texts".
            method: "hnsw", a graph: fast, slow to build; or "ivf", lists of similar rows: faster to build, and smaller.
            m: Neighbours of a row in the graph of "hnsw"; 32 when None.
            ef_construction: Rows that are in sight when one is added to the graph; 200 when None.
            lists: How many lists "ivf" has; four times the square root of the rows when None.

        Returns:
            What it is of: ``method``, ``rows``, its parameters, and ``manifest``, a hash.

        Raises:
            ValueError: An argument is out of its range or for the other method, or there are no rows.
            ImportError: faiss is not installed.
        """
        self._check_kind(kind)
        if method not in approximate_index.METHODS:
            raise one_of("method", method, approximate_index.METHODS)
        for name, value, least, own in (
            ("m", m, 2, "hnsw"), ("ef_construction", ef_construction, 1, "hnsw"), ("lists", lists, 1, "ivf")
        ):  # fmt: skip
            if value is not None and own != method:
                raise bad_input(f"{name} is for {own}", f"method {method}", f"Remove {name}", shown=True)
            if value is not None:
                whole_number(name, value, least, self.count(kind) if name == "lists" else 512)
        if not self.count(kind):
            raise bad_input("An index needs rows", f"{self.folder} without {kind}", "Build that of another kind",
                            shown=True)  # fmt: skip
        about = approximate_index.build(
            self.folder, self.manifest, kind, self.rows(kind), method=method, m=m or approximate_index.M,
            ef_construction=ef_construction or approximate_index.EF_CONSTRUCTION, lists=lists,
        )  # fmt: skip
        self._approximates.pop(kind, None)
        return about

    def _approximate(self, kind: str) -> Approximate:
        if kind not in self._approximates:
            self._approximates[kind] = approximate_index.read(self.folder, self.manifest, kind)
        return self._approximates[kind]

    def evaluate(
        self,
        k: int = 10,
        *,
        kind: str = "images",
        sample: int = 1000,
        ef: int | None = None,
        probes: int | None = None,
    ) -> IndexEvaluation:
        """Measures what approximate search misses, and how well captions find their images.

        Args:
            k: How many results of each query.
            kind: "images" or "texts", for approximate search.
            sample: How many rows, evenly spread, are the queries of approximate search; each looks for others.
            ef: As in `nearest`.
            probes: As in `nearest`.

        Returns:
            "approximate", where there is an index of the kind, and "retrieval", over all images with captions, where
            the folder has some; both are described by `IndexEvaluation`.

        Raises:
            ValueError: An argument is out of its range, or there is nothing to measure.
        """
        self._check_kind(kind)
        whole_number("k", k, 1)
        whole_number("sample", sample, 1)
        found: IndexEvaluation = {}
        if (self.folder / f"{kind}.faiss").exists():
            self._approximate(kind)  # read before the clock runs
            count = self.count(kind)
            rows = np.unique(np.linspace(0, count - 1, min(sample, count)).astype(np.int64))
            queries = np.concatenate([block for _, block in self.rows(kind).blocks(_BLOCK, rows)])
            begun = time.perf_counter()
            exact = self._others(*self.nearest(queries, k + 1, kind=kind), rows, k)
            between = time.perf_counter()
            near = self._others(
                *self.nearest(queries, k + 1, kind=kind, approximate=True, ef=ef, probes=probes), rows, k
            )
            taken = {"exact": between - begun, "approximate": time.perf_counter() - between}
            found["approximate"] = {
                "kind": kind, "method": self._approximate(kind).method, "k": k, "queries": len(rows),
                "recall": float((near >= exact[:, -1:]).mean()) if exact.size else 1.0,
                "milliseconds": {name: 1000 * seconds / len(rows) for name, seconds in taken.items()},
            }  # fmt: skip
        elif ef is not None or probes is not None:
            raise bad_input(
                f"ef and probes are for an index of {kind}", f"no {kind}.faiss", "Build it first", shown=True
            )
        if retrieval := self._retrieval():
            found["retrieval"] = retrieval
        if not found:
            raise bad_input(
                "There must be an approximate index, or images and their captions", "neither",
                f"Build an index with clipmb index {self.folder}", shown=True,
            )  # fmt: skip
        return found

    @staticmethod
    def _others(scores: np.ndarray, found: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
        """Returns the scores of up to k results of each query that are not its own row."""
        own = found == rows[:, None]
        own[~own.any(axis=1), -1:] = True  # its own row was missed, or is behind others that are equal to it
        return scores[~own].reshape(len(rows), -1)[:, :k]

    def pairs(self) -> np.ndarray:
        """Returns which images and captions belong together: those of one item, and of items with the same id.

        Returns:
            (pairs, 2): the rows of an image and of one of its captions, ascending. Ids are those of one source.

        Raises:
            CheckpointError: Shards are missing, or cannot be read.
        """
        if not self.count("images") or not self.count("texts"):
            return np.empty((0, 2), np.int64)
        _, number = np.unique(np.concatenate([self._digests(kind, "id") for kind in KINDS]), return_inverse=True)
        owners = len(number) * np.concatenate([self._sources(kind) for kind in KINDS]) + number
        wanted, owned = np.split(owners, [self.count("images")])
        order = np.argsort(owned, kind="stable")
        first, end = (np.searchsorted(owned[order], wanted, side) for side in ("left", "right"))
        counts = end - first
        place = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        return np.stack([np.repeat(np.arange(len(wanted)), counts), order[place]], axis=1)

    def _sources(self, kind: str) -> np.ndarray:
        """Returns the number of the source of each row."""
        return np.repeat(np.arange(len(self.manifest.sources)), [source[kind] for source in self.manifest.sources])

    def _columns(self, kind: str, names: Sequence[str]) -> Iterator[Any]:
        """Yields tables that have some columns of all rows: the one in memory, or blocks that are read for it."""
        return iter([self._tables[kind]] if kind in self._tables else self.rows(kind).tables(names))

    def _digests(self, kind: str, name: str) -> np.ndarray:
        """Returns a digest of each value of a column: the same for equal ones, and small however long they are."""
        found = [
            np.array(
                [blake2b(repr(value).encode(), digest_size=16).digest() for value in table.column(name).to_pylist()],
                "S16",
            )
            for table in self._columns(kind, [name])
        ]
        return np.concatenate(found)

    def _retrieval(self) -> Retrieval | None:
        """Ranks images and captions that belong together."""
        if not len(pairs := self.pairs()):
            return None
        texts = np.unique(pairs[:, 1])
        captions = self._digests("texts", "caption")[texts]
        _, first, same = np.unique(captions, return_index=True, return_inverse=True)
        order = np.argsort(first)  # of distinct captions, by their first rows
        number = np.argsort(order)[same][np.searchsorted(texts, pairs[:, 1])]
        images, starts = np.unique(pairs[:, 0], return_index=True)
        owned = [part.tolist() for part in np.split(number, starts[1:])]
        return retrieval(self._units("images", images), self._units("texts", texts[first[order]]), owned)

    def _units(self, kind: str, rows: np.ndarray) -> np.ndarray:
        """Returns some embeddings (n, proj), float32, of unit length; rows are ascending."""
        whole = np.empty((len(rows), self.manifest.dimension), np.float32)
        start = 0
        for numbers, block in self.rows(kind).blocks(_BLOCK, rows):
            whole[start : start + len(numbers)] = unit(block)
            start += len(numbers)
        return whole

    def duplicates(self, threshold: float = 0.95, kind: str = "images") -> list[list[int]]:
        """Groups embeddings that are nearly the same: chains in which each is at least this similar to another.

        Args:
            threshold: Least cosine, above 0 and at most 1.
            kind: "images" or "texts".

        Returns:
            The rows of each group of two or more, ascending; groups in the order of their first rows.

        Raises:
            ValueError: The threshold is out of its range.
        """
        self._check_kind(kind)
        if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not 0 < threshold <= 1:
            raise bad_input("threshold must be a cosine above 0 and at most 1", threshold, "Pass for example 0.95")
        vectors = self.rows(kind)
        parent = np.arange(len(vectors))

        def roots(rows: np.ndarray) -> np.ndarray:
            found = parent[rows]
            while not np.array_equal(found, above := parent[found]):
                found = above
            parent[rows] = found
            return found

        for first, left in _blocks(vectors, _BLOCK):
            left, after = unit(left), np.arange(first[0], len(vectors))
            for second, right in _blocks(vectors, _BLOCK, after):
                near = left @ unit(right).T >= threshold - 1e-6  # rounding, of equal vectors too
                near &= roots(first)[:, None] != roots(second)  # not yet in one group
                for i in np.flatnonzero(near.any(axis=1)):
                    joined = np.unique(roots(np.append(second[near[i]], first[i])))
                    parent[joined] = joined[0]
        owners = roots(np.arange(len(vectors)))  # the first row of each group
        several = np.bincount(owners, minlength=1)
        rows = np.flatnonzero(several[owners] > 1)
        rows = rows[np.argsort(owners[rows], kind="stable")]
        return [part.tolist() for part in np.split(rows, np.cumsum(several[several > 1])[:-1]) if len(part)]

    def _check_kind(self, kind: str) -> None:
        if kind not in KINDS:
            raise one_of("kind", kind, KINDS)

    def _check_count(self, kind: str, rows: int) -> None:
        if rows != self.count(kind):
            raise CheckpointError(
                f"{self.folder} must hold the {self.count(kind)} {kind} of its {store.MANIFEST}. Received: {rows}. "
                "Restore the shards that are missing or were changed, or embed again."
            )

    def _shards(self, kind: str) -> list[Path]:
        """Returns the shards that have rows of a kind, in their order."""
        numbers = (number for source in self.manifest.sources for number in range(*source["shards"]))
        return [path for number in numbers if (path := store.shard_path(self.folder, kind, number)).exists()]

    def rows(self, kind: str = "images") -> Rows:
        """Returns all embeddings of a kind, to be read in blocks.

        Args:
            kind: "images" or "texts".

        Raises:
            CheckpointError: Shards are missing, or cannot be read.
        """
        self._check_kind(kind)
        if kind not in self._opened:
            rows = Rows(self._shards(kind), self.manifest.dimension, self.manifest.store)
            self._check_count(kind, len(rows))
            self._opened[kind] = rows
        return self._opened[kind]

    def _matching(self, kind: str, where: str | Sequence[str]) -> np.ndarray:
        """Returns for every row whether it satisfies all conditions; only their columns are read, in blocks."""
        import pyarrow.compute as compute

        conditions = [_condition(text, self.rows(kind)) for text in ([where] if isinstance(where, str) else where)]
        matching = np.ones(self.count(kind), bool)
        end = 0
        for table in self._columns(kind, [name for name, _, _ in conditions]) if conditions else ():
            start, end = end, end + table.num_rows
            for name, compare, value in conditions:
                found = compare(table.column(name).cast(value.type, safe=False), value)
                matching[start:end] &= compute.fill_null(found, False).to_numpy()
        return matching


def _condition(text: str, rows: Rows) -> tuple[str, Callable[[Any, Any], Any], Any]:
    """Returns the column of a condition, the comparison, and the value that the column is compared with."""
    pa = store.pyarrow()
    import pyarrow.compute as compute

    place, sign = min(
        ((at, sign) for sign in _COMPARISONS if (at := text.find(sign)) > 0),
        key=lambda found: (found[0], -len(found[1])),
        default=(0, ""),
    )
    name, value = text[:place].strip(), text[place + len(sign) :].strip()
    if not sign or name not in rows.types:
        raise bad_input(
            "A condition must be a column, a comparison and a value", text,
            f"Write for example 'label=cat'; there are {', '.join(rows.types) or 'no rows'}",
        )  # fmt: skip
    kind, compare = rows.types[name], getattr(compute, _COMPARISONS[sign])
    kinds = [pa.string()] if pa.types.is_null(kind) else [kind, pa.float64()] if pa.types.is_integer(kind) else [kind]
    for kind in kinds:  # whole numbers are compared with others too
        try:
            wanted = pa.scalar(value).cast(kind)
            compare(pa.array([], kind), wanted)  # there are types that have no order, and none that is written as text
        except pa.ArrowException:
            continue
        return name, compare, wanted
    raise bad_input(f"The value of a condition on {name} must be {rows.types[name]}", text, "Correct it")


def nearest(
    vectors: np.ndarray | Rows, queries: np.ndarray, k: int, *, rows: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the rows with the largest cosines to each query, exactly, by blocked products.

    Products in float32 find the rows that can be among the nearest; the cosines of these are computed in float64. What
    is found depends on neither the blocks, nor the processor, nor which rows are considered besides.

    Args:
        vectors: (rows, proj), of unit length or not; float32 or float16.
        queries: (queries, proj) float32, of unit length.
        k: How many, at most.
        rows: (n,) the rows to consider, ascending; all when None.

    Returns:
        Cosines and rows, (queries, the lesser of k and the rows), from the most similar; of equal ones the first row
        comes first.
    """
    starts = range(0, max(len(queries), 1), _QUERIES)
    parts = [_nearest(vectors, queries[start : start + _QUERIES], k, rows) for start in starts]
    scores, found = zip(*parts, strict=True)
    return np.concatenate(scores), np.concatenate(found)


def _nearest(
    vectors: np.ndarray | Rows, queries: np.ndarray, k: int, rows: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    margin = 2 * queries.shape[1] * np.finfo(np.float32).eps  # more than two cosines in float32 are wrong by
    count = len(queries)
    scores, found = np.empty((count, 0), np.float32), np.empty((count, 0), np.int64)
    for numbers, block in _blocks(vectors, _BLOCK, rows):
        near = queries @ block.T
        near /= _lengths(vectors, numbers, block)  # (queries, rows)
        least = scores[:, -1:] - margin if scores.shape[1] == k else np.full((count, 1), -np.inf, np.float32)
        reach = near >= least
        if len(numbers) > k and np.count_nonzero(reach) > 2 * k * count:
            reach &= near >= np.partition(near, -k, axis=1)[:, -k, None] - margin
        query, place = np.nonzero(reach)
        new = np.empty(len(query), np.float32)
        for i in range(0, len(query), _PAIRS):
            new[i : i + _PAIRS] = _cosines(queries[query[i : i + _PAIRS]], block[place[i : i + _PAIRS]])
        most = min(k, scores.shape[1] + len(numbers))
        query = np.concatenate([np.repeat(np.arange(count), scores.shape[1]), query])
        score = np.concatenate([scores.reshape(-1), new])
        row = np.concatenate([found.reshape(-1), numbers[place]])
        order = np.lexsort((row, -score, query))
        best = order[np.searchsorted(query[order], np.arange(count))[:, None] + np.arange(most)]
        scores, found = score[best], row[best]
    return scores, found


def _lengths(vectors: np.ndarray | Rows, numbers: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Returns the lengths of rows, 1 for those of zeros; those of files are kept, since each search needs them."""
    known = vectors.lengths[numbers] if isinstance(vectors, Rows) else None
    if known is not None and not np.isnan(known).any():
        return known
    lengths = np.sqrt(np.einsum("rp,rp->r", block, block))
    lengths[lengths == 0] = 1
    if isinstance(vectors, Rows):
        vectors.lengths[numbers] = lengths
    return lengths


def _cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns the cosines of pairs of rows, computed in float64, as float32."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    lengths = np.sqrt(np.einsum("pd,pd->p", left, left) * np.einsum("pd,pd->p", right, right))
    return (np.einsum("pd,pd->p", left, right) / np.where(lengths == 0, 1, lengths)).astype(np.float32)


def _blocks(
    vectors: np.ndarray | Rows, size: int, rows: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the numbers of the rows of each block, and these rows in float32, until the next is asked for."""
    if isinstance(vectors, Rows):
        yield from vectors.blocks(size, rows, np.empty((size, vectors.dimension), np.float32))
        return
    for start in range(0, len(vectors if rows is None else rows), size):
        part = slice(start, start + size)
        some = np.arange(len(vectors))[part] if rows is None else rows[part]
        yield some, np.asarray(vectors[part] if rows is None else vectors[some], np.float32)


def columns_of(hit: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the columns of a result that hold something, as JSON has them, without its score and row."""
    return {
        name: _plain(value) for name, value in hit.items() if name not in ("score", "row") and value not in (None, "")
    }


def _plain(value: Any) -> Any:
    """Returns a value with texts in place of what JSON lacks: dates, decimals and bytes of other programs."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)
