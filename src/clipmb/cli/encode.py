"""``clipmb encode``: the embeddings of pictures and texts."""

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

FORMATS = (".npy", ".npz", ".safetensors")


def run(
    images: Annotated[list[str] | None, typer.Argument(metavar="[IMAGE...]", help="Picture files.")] = None,
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="A text; may be repeated.")] = None,
    texts: Annotated[str | None, typer.Option("--texts", help="File with one text a line.")] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help=".npy: one matrix, of pictures or of texts; .npz or .safetensors: images, texts. Else JSON on stdout.",
        ),
    ] = None,
    model: common.Model = common.DEFAULT_MODEL,
    backend: common.Backend = None,
    normalize: Annotated[bool, typer.Option(help="Scale to unit length.")] = True,
    long_text: Annotated[str, typer.Option(help="error, truncate or mean: text beyond the context.")] = "error",
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16 or float64.")] = "float32",
    device: Annotated[str | None, typer.Option(help="As the framework names it.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures or texts per step.")] = 32,
) -> None:
    """Embed pictures and texts: rows of a matrix, in the order given."""
    paths, lines = list(images or []), [*(text or []), *_lines(texts)]
    if not paths and not lines:
        raise bad_input("There must be something to encode", "no picture and no text", "Name some", shown=True)
    _check(out, paths, lines)
    model, _ = common.chosen(model)
    common.load_framework(backend)
    from clipmb.pipeline import CLIPPipeline

    pipeline = CLIPPipeline.from_pretrained(model, backend=backend, dtype=dtype, device=device)
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
        typer.echo(json.dumps({"model": model, "backend": pipeline.backend, **rows}, ensure_ascii=False))
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
            "--texts must be a readable UTF-8 file", f"{path} ({error})", "Correct the path", shown=True
        ) from None


def _check(out: str | None, paths: list[str], lines: list[str]) -> None:
    """Refuses what cannot be written before anything is computed."""
    if out is None:
        return
    if Path(out).suffix not in FORMATS:
        raise bad_input(f"--out must end in {', '.join(FORMATS)}", out, "Change its ending")
    if Path(out).suffix == ".npy" and paths and lines:
        raise bad_input("A .npy file holds one matrix", "pictures and texts", "Write .npz or .safetensors", shown=True)
    if not Path(out).absolute().parent.is_dir():
        raise bad_input("--out must be in a folder that exists", out, "Make the folder first")


def _write(path: Path, embeds: dict[str, np.ndarray], names: dict[str, list[str]], made: dict[str, str]) -> None:
    """Writes the file whole: it appears under its name when it is complete."""
    if path.suffix == ".safetensors":
        from safetensors.numpy import save

        told = {kind: json.dumps(names[kind], ensure_ascii=False) for kind in embeds}
        content = save(embeds, metadata={**made, **{f"{kind}_names": value for kind, value in told.items()}})
    else:
        buffer = io.BytesIO()
        if path.suffix == ".npy":
            np.save(buffer, next(iter(embeds.values())))
        else:
            np.savez(buffer, **embeds, **{f"{kind}_names": np.array(names[kind]) for kind in embeds})
        content = buffer.getvalue()
    write_atomically(path, content)
