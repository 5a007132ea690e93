"""Any format to any other, tensor by tensor, without a model: ``clipmb convert``.

Only numpy and the small library of a format are needed, and PyTorch for pickled files. The result is written all or
nothing, read back and compared before it takes its place, and described in ``conversion.json``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipmb import __version__
from clipmb.common.checkpoint import formats
from clipmb.common.checkpoint.comparing import compare
from clipmb.common.checkpoint.planning import Conversion, plan
from clipmb.common.checkpoint.tensors import Deferred, Lazy, is_finite
from clipmb.common.config import CONFIG_NAME, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from clipmb.common.dtypes import numpy_dtype
from clipmb.common.errors import CheckpointError, ClipmbError, bad_input, one_of
from clipmb.common.hub import Source
from clipmb.common.json_files import json_text, read_json
from clipmb.common.parameters import HEADS, TABLE_VERSION
from clipmb.common.pretrained import config_text, warn_not_finite
from clipmb.common.processor import (
    PROCESSOR_FILES,
    has_image_processor,
    has_tokenizer,
    image_processor_of,
    tokenizer_of,
)
from clipmb.common.progress import Advance, progress_bar
from clipmb.common.saving import Transaction, version

RECORD_NAME = "conversion.json"
DTYPES = ("float32", "float16", "bfloat16")
_OTHERS = (CONFIG_NAME, RECORD_NAME, *PROCESSOR_FILES)

# Runs source and result through the installed backends and returns what belongs in the record.
Check = Callable[[Source, Source, str], dict[str, Any]]


def convert(
    src: str | os.PathLike[str] | Source,
    dst: str | os.PathLike[str],
    to: str = formats.OWN,
    *,
    dtype: str | None = None,
    head: str | None = None,
    config: Any = None,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool = False,
    check: Check | None = None,
    **options: Any,
) -> Conversion:
    """Writes a checkpoint in another format, with its config, tokenizer and image processor, and verifies it.

    The result is read back before it takes its place, and every tensor is compared with the source: to the bit, or with
    ``dtype`` to the bit of the source's values rounded to it.

    Args:
        src: Folder, file of weights, or Hub id, in any format; the format is detected from the content.
        dst: A folder; made when it is missing.
        to: Name of a format: a key of `clipmb.common.checkpoint.formats.FORMATS`.
        dtype: "float32", "float16" or "bfloat16"; each tensor's own when None.
        head: The model to write, for example "CLIPTextModel" to take the text tower out of a CLIPModel; what the source
            is when None.
        config: A config, or where to read one, for weights that have none or another; the source's own when None.
        max_shard_size: Split larger results if the format has shards: bytes, or text like "5GB".
        variant: Read ``model.<variant>.safetensors``.
        overwrite: Replace the checkpoint in a folder that is not empty. Files that belong to no checkpoint stay.
        dry_run: Only find out what would be done.
        progress: Show a progress bar on stderr, if that is a terminal.
        check: Called with source, result and dtype before the result takes its place; its return value is recorded. If
            it raises, the destination is left unchanged. `clipmb.verification.verify_conversion` runs source and result
            through every backend.
        **options: ``subfolder``, ``revision``, ``cache_dir``, ``token``, ``local_files_only``, ``force_download``.

    Returns:
        What was done.

    Raises:
        CheckpointError: The source cannot be read or does not fit its config, the format cannot hold this model, the
            result cannot be written, or it differs from the source.
        ValueError: An argument is impossible, or the destination is not empty.
        TypeError: An option is unknown.
    """
    target = formats.format_of(to)
    source = Source.of(src, options)
    if options:
        raise bad_input("convert has no such options", sorted(options), "Remove them", TypeError)
    if dtype not in (None, *DTYPES):
        raise one_of("dtype", dtype, DTYPES)
    if head not in (None, *HEADS):
        raise one_of("head", head, tuple(HEADS))
    folder = Path(dst)
    _require_free(folder, source, overwrite)
    loaded = formats.load(source, variant)
    done, originals = plan(source, folder, loaded, to, dtype, head, config)
    if check is not None and done.head != "CLIPModel":
        raise bad_input(
            "check= (--verify) needs a full CLIPModel", done.head, "Leave it out; tensors are compared in any case"
        )
    if dry_run:
        return done
    before = _version(source)
    try:
        with ThreadPoolExecutor(1) as aside, Transaction(folder) as save:
            _require_free(folder, source, overwrite)  # again, now that nobody else writes into it
            hashes = aside.submit(_hashes, source, sorted(loaded.files))  # while the weights are written and compared
            if overwrite:
                save.remove(*(path.name for path in folder.iterdir() if _belongs(path.name)))
            weights = {e.canonical: originals[e.canonical].astype(numpy_dtype(e.dtype)) for e in done.mapping}
            save.reserve(sum(tensor.nbytes for tensor in weights.values()))
            with progress_bar(progress, f"writing {to}", len(done.mapping)) as advance:
                broken: dict[str, None] = {}
                counted = _counted(weights, advance, broken)
                files = target.write(save, counted, done.config, done.head, max_shard_size=max_shard_size)
            save.write(CONFIG_NAME, config_text(done.config, done.head, done.dtypes))
            copied = _write_processors(save, source, done)
            result = Source(str(save.path("")))
            written = formats.load(result)
            with progress_bar(progress, "comparing", len(done.mapping)) as advance:
                difference = compare(written, originals, done, advance)
            warn_not_finite(source, list(broken))
            checked = None if check is None else check(source, result, _common_dtype(done))
            done.record = {
                "clipmb": __version__,
                "table_version": TABLE_VERSION,
                "source": {
                    "name": str(source),
                    "commit": source.commit(),
                    "format": done.source_format,
                    "files": {**hashes.result(), **_hashes(source, sorted({*copied, CONFIG_NAME}))},
                },
                "result": {
                    "format": to,
                    "weights": sorted(files),
                    "dtypes": sorted(done.dtypes),
                    "files": _hashes(result, result.names()),
                },
                "head": done.head,
                "tensors": len(done.mapping),
                "decisions": done.decisions,
                "verification": {"largest_difference": difference, "backends": checked},
                "packages": _versions({*loaded.packages, *written.packages}),
            }
            save.write(RECORD_NAME, json_text(done.record))
            if _version(source) != before:
                raise CheckpointError(f"{source} changed while it was converted. Convert it again.")
    except (ClipmbError, ValueError, TypeError, ImportError):
        raise
    except Exception as error:  # of the file system, or of a format's library
        raise CheckpointError(
            f"{folder} could not be written and was left unchanged: {type(error).__name__}: {error}"
        ) from error
    return done


def check_record(folder: str | os.PathLike[str]) -> list[str]:
    """Compares the files of a converted checkpoint with those that ``conversion.json`` recorded.

    Args:
        folder: Where the conversion wrote them.

    Returns:
        One line for each file that changed, is missing, or was added to the checkpoint; empty if there is none.

    Raises:
        CheckpointError: There is no readable record.
    """
    source = Source(os.fspath(folder))
    record = read_json(source.require(RECORD_NAME))
    result = record.get("result")
    recorded = result.get("files") if isinstance(result, dict) else None
    if not isinstance(recorded, dict) or not recorded:
        raise CheckpointError(f"{RECORD_NAME} of {source} does not name the files of a result.")
    problems = []
    for name, entry in recorded.items():
        path = source.find(name) if name == os.path.basename(name) else None
        if path is None:
            problems.append(f"{name} is missing")
        elif not isinstance(entry, dict) or _sha256(path) != entry.get("sha256"):
            problems.append(f"{name} has changed")
    new = (name for name in source.names() if _belongs(name) and name not in recorded and name != RECORD_NAME)
    return problems + [f"{name} is not in the record" for name in new]


# -- before -----------------------------------------------------------------------------------------------------------


def _require_free(folder: Path, source: Source, overwrite: bool) -> None:
    if not folder.is_dir():
        return  # missing, or a file, which the transaction refuses
    if source.folder is not None and source.folder.is_dir() and os.path.samefile(source.folder, folder):
        raise bad_input("Source and destination must be different folders", str(folder), "Pass another destination")
    if not overwrite and (names := sorted(p.name for p in folder.iterdir() if not p.name.startswith(".clipmb-"))):
        raise bad_input(
            "The destination must be new or empty",
            f"{folder} with {', '.join(names[:5])}{', …' if len(names) > 5 else ''}",
            "Pass another folder, or overwrite=True (--overwrite) to replace the checkpoint in it",
            shown=True,
        )


def _version(source: Source) -> object:
    return None if source.folder is None else version(source.folder)


def _belongs(name: str) -> bool:
    """Whether a file is part of a checkpoint, so that it must not stay beside a new one."""
    return name in _OTHERS or formats.owns(name)


# -- during -----------------------------------------------------------------------------------------------------------


def _counted(tensors: Mapping[str, Lazy], advance: Advance, broken: dict[str, None]) -> Deferred:
    """Returns arrays that advance a progress bar when they are made, and note their names if they are not finite."""

    def counting(name: str, tensor: Lazy) -> Lazy:
        def make() -> Any:
            advance()
            array = tensor.make()
            if not is_finite(array):
                broken[name] = None
            return array

        return replace(tensor, make=make)

    return Deferred({name: counting(name, tensor) for name, tensor in tensors.items()})


def _write_processors(save: Transaction, source: Source, done: Conversion) -> list[str]:
    """Copies the files of tokenizer and image processor, or writes CLIP's own where there are none.

    Returns:
        The names of the files that were copied.
    """
    has_text, has_vision, _ = HEADS[done.head]
    found = {name: path for name in PROCESSOR_FILES if (path := source.find(name)) is not None}
    for name, path in found.items():
        save.write(name, path.read_bytes())
    config = done.config
    text = config.text_config if isinstance(config, CLIPConfig) else config
    vision = config.vision_config if isinstance(config, CLIPConfig) else config
    if has_text and isinstance(text, CLIPTextConfig) and not has_tokenizer(source):
        try:
            tokenizer_of(source, text).save_pretrained(save.path(""))
            done.decisions["tokenizer"] = "CLIP's own: the source has none, and its vocabulary has the size of CLIP's"
        except CheckpointError:
            done.decisions["tokenizer"] = f"none: the source has none, and {text.vocab_size} tokens are not CLIP's own"
    if has_vision and isinstance(vision, CLIPVisionConfig) and not has_image_processor(source):
        image_processor_of(source, vision).save_pretrained(save.path(""))
        done.decisions["image processor"] = f"CLIP's, for images of {vision.image_size}: the source has none"
    return list(found)


# -- the record -------------------------------------------------------------------------------------------------------


def _common_dtype(done: Conversion) -> str:
    return next(iter(done.dtypes)) if len(done.dtypes) == 1 else "float32"


def _hashes(source: Source, names: list[str]) -> dict[str, dict[str, Any]]:
    paths = {name: source.find(name) for name in names}
    return {name: {"sha256": _sha256(p), "bytes": p.stat().st_size} for name, p in paths.items() if p is not None}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions(packages: set[str]) -> dict[str, str]:
    """Returns the versions of Python, of numpy and its dtypes, and of the packages that took part."""
    names = sorted({"numpy", "ml_dtypes", *packages})
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
