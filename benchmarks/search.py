"""Exact search in mapped files by `clipmb.Index`, beside numpy in memory, faiss Flat and usearch where they are there.

All get the same vectors and queries, and must find the same rows. The peers have their vectors in memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from _compare import compare

from clipmb import Index
from clipmb.embedding.store import Manifest, shard_path, write_shard

ROWS, WIDTH, QUERIES, K = 40_000, 512, 200, 10
SHARD = 10_000


def unit(random: np.random.Generator, count: int) -> np.ndarray:
    vectors = random.standard_normal((count, WIDTH), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def written(folder: Path, vectors: np.ndarray) -> Index:
    """Writes vectors as clipmb embed does."""
    for number, start in enumerate(range(0, len(vectors), SHARD)):
        part = vectors[start : start + SHARD]
        rows = [{"id": str(start + i), "path": None, "label": None, "fields": {}} for i in range(len(part))]
        write_shard(shard_path(folder, "images", number), rows, part, {}, {})
    counts = {"items": len(vectors), "images": len(vectors), "texts": 0, "errors": 0}
    source = {"name": "random", "fingerprint": "", **counts, "shards": [0, -(-len(vectors) // SHARD)]}
    Manifest({"model": ""}, WIDTH, "float32", {}, [source]).write(folder)
    return Index.open(folder)


def in_numpy(vectors: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    def search(queries: np.ndarray) -> np.ndarray:
        scores = queries @ vectors.T
        some = np.argpartition(scores, -K, axis=1)[:, -K:]
        order = np.argsort(-np.take_along_axis(scores, some, 1), axis=1)
        return np.take_along_axis(some, order, 1)

    return search


def in_faiss(vectors: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return lambda queries: index.search(queries, K)[1]


def in_usearch(vectors: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    from usearch.index import search

    return lambda queries: search(vectors, queries, K, "ip", exact=True).keys.reshape(len(queries), -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    vectors, queries = unit(random, arguments.rows), unit(random, QUERIES)
    with tempfile.TemporaryDirectory() as folder:
        index = written(Path(folder), vectors)
        expected = index.nearest(queries, K)[1]
        for name, peer in {"numpy": in_numpy, "faiss": in_faiss, "usearch": in_usearch}.items():
            if importlib.util.find_spec(name) is None:
                print(f"{name} is not installed")
                continue
            search = peer(vectors)
            if (same := np.mean(np.asarray(search(queries)) == expected)) < 0.999:  # equal but for rounding
                raise SystemExit(f"{name} finds other rows ({same:.1%} are the same), so that the times mean nothing.")
            for count in (1, QUERIES):
                some = queries[:count]
                compare(
                    f"{arguments.rows:,} rows, {count} at a time", lambda q=some: index.nearest(q, K),
                    lambda q=some, search=search: search(q), count=count, unit="queries", rounds=arguments.rounds,
                    peer=name,
                )  # fmt: skip


if __name__ == "__main__":
    main()
