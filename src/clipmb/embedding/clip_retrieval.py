"""Embeddings as clip-retrieval's `clip-retrieval inference` writes them, for the tools that read those."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from clipmb.common.errors import bad_input, logger
from clipmb.embedding import store
from clipmb.embedding.index import Index

FOLDER = "clip-retrieval"
LAYOUTS = (FOLDER,)  # that `embed` writes
_BLOCK = 1 << 13


def write(folder: Path) -> Path:
    """Writes the finished embeddings of a folder into its folder ``clip-retrieval``, in place of an earlier one.

    The caller holds the folder, as `store.writing` does. A kill at any moment leaves the earlier files, the new ones,
    or none.

    There are ``img_emb/img_emb_0.npy`` and ``text_emb/text_emb_0.npy``, (rows, proj) in the numbers of the shards, and
    ``metadata/metadata_0.parquet`` with as many rows in the same order: ``image_path``, ``caption`` and the other
    columns. A row is an image with one of its captions, or, where there are only images or only texts, each of these.

    Args:
        folder: The folder.

    Returns:
        The folder that was written.

    Raises:
        ValueError: There are images and texts, and no image has a caption; or there is neither.
        OSError: The disk is full.

    Source: OutputSink in clip_retrieval/clip_inference/writer.py, and the readers beside it, which leave out images
    without a text.
    """
    index = Index.open(folder)
    kinds = [kind for kind in store.KINDS if index.count(kind)]
    rows: dict[str, np.ndarray]
    if len(kinds) > 1:
        pairs = index.pairs()  # (pairs, 2)
        rows = dict(zip(store.KINDS, pairs.T, strict=True))
        left = {kind: index.count(kind) - len(np.unique(own)) for kind, own in rows.items()}
        if not len(pairs):
            raise bad_input(
                "clip-retrieval's layout is of images with captions, of images, or of texts",
                f"{folder}, in which no image has one of the texts as its caption", "Embed them separately", shown=True,
            )  # fmt: skip
        if any(left.values()):
            counts = " and ".join(f"{count:,} {kind}" for kind, count in left.items() if count)
            logger.warning("clipmb: clip-retrieval's layout has pairs only: %s are left out of it", counts)
    elif kinds:
        rows = {kind: np.arange(index.count(kind)) for kind in kinds}
    else:
        raise bad_input(
            "clip-retrieval's layout needs an image or a text", f"{folder}, with errors only", "See its errors.parquet",
            shown=True,
        )  # fmt: skip
    new, out = folder / f"{store.LAYOUT_BEGUN}{os.getpid()}", folder / FOLDER
    try:
        for kind, name in zip(store.KINDS, ("img_emb", "text_emb"), strict=True):
            if kind in rows:
                (new / name).mkdir(parents=True)
                _write_vectors(new / name / f"{name}_0.npy", index, kind, rows[kind])
        (new / "metadata").mkdir()
        _write_metadata(new / "metadata" / "metadata_0.parquet", index, rows)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # the disk may be full
        raise
    earlier = folder / f"{store.LAYOUT_BEGUN}earlier"  # the next job removes what a killed one leaves
    if out.exists():
        os.rename(out, earlier)
    os.rename(new, out)
    shutil.rmtree(earlier, ignore_errors=True)
    return out


def _write_vectors(path: Path, index: Index, kind: str, rows: np.ndarray) -> None:
    """Writes the embeddings of some rows, in any order and any number of times, without having them in memory."""
    order = np.argsort(rows, kind="stable")
    shape = (len(rows), index.manifest.dimension)
    stored = np.dtype(index.manifest.store)
    with open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(stored), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, len(rows), _BLOCK):  # takes its room: without that, mapped memory ends the process
            file.write(bytes(min(_BLOCK, len(rows) - first) * shape[1] * stored.itemsize))
    values = np.lib.format.open_memmap(path, mode="r+")
    start = 0
    for numbers, block in index.rows(kind).blocks(_BLOCK, rows[order]):
        values[order[start : start + len(numbers)]] = block
        start += len(numbers)
    values.flush()


def _write_metadata(path: Path, index: Index, rows: dict[str, np.ndarray]) -> None:
    pa = store.pyarrow()
    columns: dict[str, Any] = {}
    tables = {kind: index.table(kind).take(own) for kind, own in rows.items()}
    if "images" in tables:
        image = tables["images"]
        named = zip(image.column("path").to_pylist(), image.column("id").to_pylist(), strict=True)
        columns["image_path"] = pa.array([path or name for path, name in named], pa.string())  # as its shards' keys
    if "texts" in tables:
        columns["caption"] = tables["texts"].column("caption")
    rest = tables["texts" if "texts" in tables else "images"]  # captions may have columns of their own rows
    others = [name for name in rest.column_names if name != "path" and not (name == "caption" and "texts" in tables)]
    for name, called in store.column_names(others, tuple(columns)).items():
        columns[called] = rest.column(name)
    pa.parquet.write_table(pa.table(columns), path)
