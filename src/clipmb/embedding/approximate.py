"""Approximate indexes of embeddings on disk, by faiss: for more rows than exact search can go through."""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from clipmb.common.errors import CheckpointError, MissingBackendError, bad_input
from clipmb.common.json_files import json_text, read_json
from clipmb.common.saving import Transaction, current
from clipmb.common.zero_shot import unit
from clipmb.embedding.store import Manifest, Rows

METHODS = ("hnsw", "ivf")
M, EF_CONSTRUCTION = 32, 200  # the defaults of HNSW
_EF = 128  # and of a search in it
_SHARE = 16  # of the lists of IVF one is searched
_PER_LIST = 40  # rows, at least, from which a list is learned; faiss warns of fewer than 39
_SAMPLE = 10_000  # rows, at most, from which the range of the 8-bit codes is learned without lists
_BLOCK = 1 << 13


class Approximate:
    """An index of all rows of one kind, whose vectors are kept in 8 bits a number.

    Args:
        index: What faiss read.

    Attributes:
        method: "hnsw" or "ivf".
    """

    def __init__(self, index: Any) -> None:
        self._index = index
        self.method = "hnsw" if hasattr(index, "hnsw") else "ivf"

    def candidates(
        self, queries: np.ndarray, count: int, rows: np.ndarray | None, ef: int | None, probes: int | None
    ) -> list[np.ndarray]:
        """Returns up to ``count`` rows that may be among the nearest of each query, ascending.

        Args:
            queries: (queries, proj) float32, of unit length.
            count: How many.
            rows: (n,) the rows to consider; all when None.
            ef: How many rows a search of HNSW keeps in sight.
            probes: How many lists a search of IVF goes through.

        Raises:
            ValueError: The index is of the other method.
        """
        for name, value, method in (("ef", ef, "hnsw"), ("probes", probes, "ivf")):
            if value is not None and method != self.method:
                raise bad_input(f"{name} is for an index of {method}", f"one of {self.method}", f"Remove {name}",
                                shown=True)  # fmt: skip
        faiss = _faiss()
        options = {}
        if rows is not None:
            allowed = np.zeros(self._index.ntotal, bool)
            allowed[rows] = True
            options["sel"] = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        if self.method == "hnsw":
            parameters = faiss.SearchParametersHNSW(efSearch=max(ef or _EF, count), **options)
        else:
            nprobe = min(probes or -(-self._index.nlist // _SHARE), self._index.nlist)
            parameters = faiss.SearchParametersIVF(nprobe=nprobe, **options)
        _, found = self._index.search(queries, count, params=parameters)
        return [np.unique(row[row >= 0]) for row in found]


def build(
    folder: Path,
    manifest: Manifest,
    kind: str,
    rows: Rows,
    *,
    method: str,
    m: int,
    ef_construction: int,
    lists: int | None,
) -> dict[str, Any]:
    """Writes the index of a kind; readers find the old one or the new one.

    Args:
        folder: The folder of the embeddings.
        manifest: What is in it.
        kind: "images" or "texts".
        rows: Its embeddings.
        method: "hnsw" or "ivf".
        m: Neighbours of a row in the graph of HNSW.
        ef_construction: How many rows are in sight when one is added to the graph.
        lists: Into how many lists IVF sorts the rows; when None, four times the square root of their number.

    Returns:
        What its JSON file says.
    """
    faiss = _faiss()
    count, width = len(rows), manifest.dimension
    about: dict[str, Any] = {"manifest": digest(manifest), "method": method, "rows": count}
    codes, product = faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    if method == "hnsw":
        index = faiss.IndexHNSWSQ(width, codes, m, product)
        index.hnsw.efConstruction = ef_construction
        about |= {"m": m, "ef_construction": ef_construction}
        sample = _SAMPLE
    else:
        lists = lists or max(1, min(int(4 * count**0.5), count // _PER_LIST))
        index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(width), width, lists, codes, product)
        index.cp.spherical = True
        about["lists"] = lists
        sample = max(_SAMPLE, _PER_LIST * lists)
    chosen = None if count <= sample else np.linspace(0, count - 1, sample).astype(np.int64)
    index.train(np.concatenate([unit(block) for _, block in rows.blocks(_BLOCK, chosen)]))
    for _, block in rows.blocks(_BLOCK):
        index.add(unit(block))
    with Transaction(folder) as save:
        faiss.write_index(index, str(save.path(f"{kind}.faiss")))
        save.write(f"{kind}.faiss.json", json_text(about))
    return about


def read(folder: Path, manifest: Manifest, kind: str) -> Approximate:
    """Reads the index of a kind.

    Raises:
        ValueError: There is none, or it is one of other embeddings.
        CheckpointError: It is damaged.
        ImportError: faiss is not installed.
    """
    rule = f"Approximate search needs an index of the {kind} that are there"
    described, path = current(folder, f"{kind}.faiss.json"), current(folder, f"{kind}.faiss")
    if described is None or path is None:
        raise bad_input(rule, f"no {kind}.faiss", f"Make it with clipmb index {folder}", shown=True)
    if read_json(described).get("manifest") != digest(manifest):
        found = f"a {kind}.faiss from before others were added"
        raise bad_input(rule, found, f"Make it anew with clipmb index {folder}", shown=True)
    try:
        index = _faiss().read_index(str(path))
    except RuntimeError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Make it anew with clipmb index {folder}.") from error
    rows = sum(source[kind] for source in manifest.sources)
    if (index.ntotal, index.d) != (rows, manifest.dimension):
        raise CheckpointError(
            f"{path} must have {rows} rows of {manifest.dimension} numbers. Received: {index.ntotal} of {index.d}. "
            f"Make it anew with clipmb index {folder}."
        )
    return Approximate(index)


def digest(manifest: Manifest) -> str:
    """SHA-256 of what the rows of a folder depend on."""
    about = [manifest.passport, manifest.dimension, manifest.store, manifest.sources]
    return sha256(json_text({"rows": about}).encode()).hexdigest()


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingBackendError("search", "faiss-cpu", cause=str(error)) from error
    if sys.platform == "darwin":  # where its OpenMP and PyTorch's in one process can crash
        faiss.omp_set_num_threads(1)
    return faiss
