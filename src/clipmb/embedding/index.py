"""Search in embeddings on disk: exact, over a text, an image, or sums and differences of several."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypedDict

import numpy as np

from clipmb.common.errors import CheckpointError, bad_input, one_of, whole_number
from clipmb.common.zero_shot import unit
from clipmb.embedding import approximate as approximate_index
from clipmb.embedding import store
from clipmb.embedding.approximate import Approximate
from clipmb.embedding.passport import passport_of, require_equivalent
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

        Args:
            kind: "images" or "texts".

        Raises:
            CheckpointError: Shards are missing, or cannot be read.
        """
        self._check_kind(kind)
        if kind not in self._tables:
            pa = store.pyarrow()
            parts = list(self._read(kind))
            table = pa.concat_tables(parts, promote_options="permissive") if parts else pa.table({"id": []})
            self._check_count(kind, table.num_rows)
            self._tables[kind] = table
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
                ``<=``, ``>`` or ``>=``. Rows without a value never match.
            minus_text: As in `query`.
            minus_image: As in `query`.
            approximate: As in `nearest`.
            ef: As in `nearest`.
            probes: As in `nearest`.

        Returns:
            For each, from the most similar: ``score``, the cosine; ``row``, its number; and all columns. Rows that are
            equally similar keep their order.

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
            {"score": float(score), "row": int(row), **columns}
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
        vectors = np.asarray(vectors, np.float32)
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
        queries, known = unit(vectors), self._vectors.get(kind, self.rows(kind))
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
        captions: dict[tuple[int, str], list[int]] = {}
        for row, owner in enumerate(self._owners("texts")):
            captions.setdefault(owner, []).append(row)
        images = enumerate(self._owners("images"))
        return np.array([(row, text) for row, owner in images for text in captions.get(owner, ())]).reshape(-1, 2)

    def _owners(self, kind: str) -> list[tuple[int, str]]:
        """Returns the number of its source and the id of each row."""
        sources = np.repeat(np.arange(len(self.manifest.sources)), [source[kind] for source in self.manifest.sources])
        return list(zip(sources.tolist(), self.table(kind).column("id").to_pylist(), strict=True))

    def _retrieval(self) -> Retrieval | None:
        """Ranks images and captions that belong together."""
        if not self.count("images") or not self.count("texts") or not len(pairs := self.pairs()):
            return None
        captions = self.table("texts").column("caption").take(pairs[:, 1]).to_pylist()
        number: dict[str, int] = {}  # of every distinct caption
        owned: dict[int, list[int]] = {}
        for row, caption in zip(pairs[:, 0].tolist(), captions, strict=True):
            owned.setdefault(row, []).append(number.setdefault(caption, len(number)))
        first = dict(zip(reversed(captions), reversed(pairs[:, 1].tolist()), strict=True))  # a row of each caption
        return retrieval(
            unit(self.vectors("images")[list(owned)].astype(np.float32)),
            unit(self.vectors("texts")[[first[caption] for caption in number]].astype(np.float32)),
            list(owned.values()),
        )

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

        def root(row: int) -> int:
            while parent[row] != row:
                parent[row] = parent[parent[row]]
                row = int(parent[row])
            return row

        for first, left in _blocks(vectors, _BLOCK):
            left, after = unit(left), np.arange(first[0], len(vectors))
            for second, right in _blocks(vectors, _BLOCK, after):
                near = np.argwhere(left @ unit(right).T >= threshold - 1e-6)  # rounding, of equal vectors too
                for a, b in near + np.array([first[0], second[0]]):
                    if a < b and (one := root(int(a))) != (two := root(int(b))):
                        parent[max(one, two)] = min(one, two)
        groups: dict[int, list[int]] = {}
        for row in range(len(vectors)):
            groups.setdefault(root(row), []).append(row)
        return [rows for rows in groups.values() if len(rows) > 1]

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

    def _read(self, kind: str) -> Iterator[Any]:
        """Yields the tables of all shards, in their order, without the embedding."""
        pa = store.pyarrow()
        for path in self._shards(kind):
            with store.readable(path):
                names = [name for name in pa.parquet.read_schema(path).names if name != "embedding"]
                yield pa.parquet.read_table(path, columns=names)

    def _matching(self, kind: str, where: str | Sequence[str]) -> np.ndarray:
        """Returns for every row whether it satisfies all conditions."""
        pa = store.pyarrow()
        import pyarrow.compute as compute

        table = self.table(kind)
        matching = np.ones(table.num_rows, bool)
        for condition in [where] if isinstance(where, str) else where:
            place, sign = min(
                ((at, sign) for sign in _COMPARISONS if (at := condition.find(sign)) > 0),
                key=lambda found: (found[0], -len(found[1])),
                default=(0, ""),
            )
            name, text = condition[:place].strip(), condition[place + len(sign) :].strip()
            if not sign or name not in table.column_names:
                raise bad_input(
                    "A condition must be a column, a comparison and a value", condition,
                    f"Write for example 'label=cat'; there are {', '.join(table.column_names)}",
                )  # fmt: skip
            column = table.column(name)
            try:
                value = pa.scalar(text).cast(column.type)
            except pa.ArrowException:
                raise bad_input(
                    f"The value of a condition on {name} must be {column.type}", condition, "Correct it"
                ) from None
            found = getattr(compute, _COMPARISONS[sign])(column, value)
            matching &= compute.fill_null(found, False).to_numpy()
        return matching


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
    """Returns the columns of a result that hold something, without its score and row."""
    return {name: value for name, value in hit.items() if name not in ("score", "row") and value not in (None, "")}
