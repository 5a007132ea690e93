"""``clipmb encode``: the embeddings of images and texts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from clipmb.cli import common
from clipmb.common.errors import bad_input
from clipmb.common.saving import write_atomically

SUFFIXES = (".npy", ".npz", ".safetensors")


def run(
    context: typer.Context,
    images: Annotated[list[str] | None, typer.Argument(metavar="IMAGE", help="Image files.")] = None,
    text: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Text to encode; repeatable.")] = None,
    texts: Annotated[str | None, typer.Option(metavar="FILE", help="File with one text per line.")] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Output file: .npy (one matrix, of images or of texts), .npz or .safetensors (images and texts).",
            show_default="JSON on stdout",
        ),
    ] = None,
    model: common.Model = None,
    backend: common.Backend = None,
    normalize: Annotated[bool, typer.Option(help="Scale embeddings to unit length.")] = True,
    long_text: common.LongText = "error",
    dtype: common.Dtype = "float32",
    device: common.Device = None,
    batch_size: common.BatchSize = 32,
) -> None:
    """Encode images and texts as embeddings.

    Each image and each text becomes one row of a matrix, in the order given.
    """
    paths, lines = list(images or []), [*(text or []), *_lines(texts)]
    if not paths and not lines:
        raise bad_input("encode needs an image or a text", "neither", "Pass image files, --text or --texts", shown=True)
    if not lines:
        common.refuse(context, {"long_text"}, "has no effect without text.")
    _check(out, paths, lines)
    model, _ = common.chosen(model)
    pipeline = common.load_pipeline(model, backend, dtype, device)
    options: dict[str, Any] = {"batch_size": batch_size, "normalize": normalize, "progress": True}
    embeds = {}
    if paths:
        embeds["images"] = pipeline.encode_image(paths, **options)
    if lines:
        embeds["texts"] = pipeline.encode_text(lines, long_text=long_text, **options)
    names = {"images": paths, "texts": lines}
    if out is None:
        rows = {
            kind: [{"name": name, "embedding": row.tolist()} for name, row in zip(names[kind], matrix, strict=True)]
            for kind, matrix in embeds.items()
        }
        result = {"model": model, "backend": pipeline.backend, **rows}
        typer.echo(json.dumps(result, ensure_ascii=False, allow_nan=False))
        return
    _write(Path(out), embeds, names, {"model": model, "backend": pipeline.backend})
    shapes = ", ".join(f"{kind} {' x '.join(map(str, matrix.shape))}" for kind, matrix in embeds.items())
    typer.echo(f"{out}: {shapes} {next(iter(embeds.values())).dtype}")


def _lines(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        return [line for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise bad_input(
            "--texts must be a readable UTF-8 file", f"{path} ({error})", "Check the path", shown=True
        ) from None


def _check(out: str | None, paths: list[str], lines: list[str]) -> None:
    """Raises, before anything is computed, if the result could not be written."""
    if out is None:
        return
    if Path(out).suffix not in SUFFIXES:
        raise bad_input(f"--out must end in {', '.join(SUFFIXES)}", out, "Change the suffix")
    if Path(out).suffix == ".npy" and paths and lines:
        raise bad_input("A .npy file holds one matrix", "images and texts", "Use .npz or .safetensors", shown=True)
    if not Path(out).absolute().parent.is_dir():
        raise bad_input("--out must be in a folder that exists", out, "Create the folder first")


def _write(path: Path, embeds: dict[str, np.ndarray], names: dict[str, list[str]], made: dict[str, str]) -> None:
    """Writes the file; it appears under its name only when it is complete."""
    if path.suffix == ".safetensors":
        from safetensors.numpy import save

        listed = {f"{kind}_names": json.dumps(names[kind], ensure_ascii=False) for kind in embeds}
        content = save(embeds, metadata={**made, **listed})
    else:
        buffer = io.BytesIO()
        if path.suffix == ".npy":
            np.save(buffer, next(iter(embeds.values())))
        else:
            arrays: dict[str, Any] = {f"{kind}_names": np.array(names[kind]) for kind in embeds}
            np.savez(buffer, **embeds, **arrays)
        content = buffer.getvalue()
    write_atomically(path, content)
