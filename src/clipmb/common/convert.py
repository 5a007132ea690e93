"""Any format to any other, tensor by tensor, without a model: ``clipmb convert``.

Nothing but numpy and the small library of a format is needed; PyTorch only for pickled files. The result is written all
or nothing, read back and compared before it takes its place, and described in ``conversion.json``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipmb import __version__
from clipmb.common.checkpoint import OwnArrays, fit, formats, openai
from clipmb.common.checkpoint.fitting import canonical_names
from clipmb.common.checkpoint.safetensors_writer import stand_in, write_stream
from clipmb.common.checkpoint.shown import names_in
from clipmb.common.config import CONFIG_NAME, BaseConfig, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from clipmb.common.dtypes import numpy_dtype
from clipmb.common.errors import CheckpointError, ClipmbError, bad_input, one_of
from clipmb.common.hub import Source
from clipmb.common.json_files import json_text, read_json
from clipmb.common.parameters import HEADS, TABLE_VERSION, specs
from clipmb.common.pretrained import config_text
from clipmb.common.processor import (
    PROCESSOR_FILES,
    has_image_processor,
    has_tokenizer,
    image_processor_of,
    tokenizer_of,
)
from clipmb.common.progress import progress_bar
from clipmb.common.saving import Transaction, finish

RECORD_NAME = "conversion.json"
DTYPES = ("float32", "float16", "bfloat16")
_CHUNK = 1 << 22  # values compared at a time
# The files of weights that some format looks for by name.
_STEM = r"(model|pytorch_model|tf_model|flax_model|open_clip_model|open_clip_pytorch_model)"
_WEIGHTS = re.compile(rf"{_STEM}([.-][\w.-]*)?\.(safetensors|bin|h5|msgpack|pt)|{_STEM}\.[\w.]*index[\w.]*\.json")
_OTHERS = (CONFIG_NAME, RECORD_NAME, "open_clip_config.json", *PROCESSOR_FILES)

# Runs source and result through the installed backends and returns what belongs in the record.
Check = Callable[[Source, Source, str], dict[str, Any]]


class Mapped(NamedTuple):
    """One parameter on its way.

    Attributes:
        source: Its name in the source.
        canonical: Its canonical name.
        target: Its name in the result.
        shape: Its canonical shape.
        dtype: Name of its dtype in the result.
    """

    source: str
    canonical: str
    target: str
    shape: tuple[int, ...]
    dtype: str


@dataclass
class Conversion:
    """What was converted, or would be.

    Attributes:
        source: Where from.
        folder: Where to.
        source_format: Key of `formats.FORMATS`.
        target_format: Key of `formats.FORMATS`.
        head: Key of `HEADS`.
        config: The config of the result.
        mapping: Every parameter.
        decisions: What was chosen and why.
        record: The content of ``conversion.json``; empty for a dry run.
    """

    source: Source
    folder: Path
    source_format: str
    target_format: str
    head: str
    config: BaseConfig
    mapping: list[Mapped]
    decisions: dict[str, str]
    record: dict[str, Any] = field(default_factory=dict)


class _Weights(Mapping[str, np.ndarray]):
    """The canonical arrays of a source in the dtype of the result, each made when it is asked for."""

    def __init__(self, tensors: Mapping[str, np.ndarray], names: dict[str, str], mapping: list[Mapped]) -> None:
        self._tensors = tensors
        self._names = names  # canonical to those in tensors
        self._mapped = {entry.canonical: entry for entry in mapping}

    def __getitem__(self, name: str) -> np.ndarray:
        return _rounded(self.original(name), numpy_dtype(self._mapped[name].dtype))

    def original(self, name: str) -> np.ndarray:
        """Returns the canonical array in the dtype of the source."""
        return self._tensors[self._names[name]].reshape(self._mapped[name].shape)

    def release(self, name: str) -> None:
        """Takes the pages of a mapped array out of memory."""
        if isinstance(self._tensors, dict):
            OwnArrays({name: self._tensors[self._names[name]]}).release(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._mapped)

    def __len__(self) -> int:
        return len(self._mapped)


def convert(
    src: str | os.PathLike[str] | Source,
    dst: str | os.PathLike[str],
    to: str = "safetensors",
    *,
    dtype: str | None = None,
    head: str | None = None,
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
        src: Folder, file of weights, or hub id, in any format, which its content tells.
        dst: A folder; made when it is missing.
        to: "safetensors", "pytorch", "tf-h5", "flax-msgpack", "openai", "open_clip" or "keras-weights".
        dtype: "float32", "float16" or "bfloat16"; each tensor's own when None.
        head: Which model to write, such as "CLIPTextModel" out of a whole; what the source is when None.
        max_shard_size: Larger results are split where the format knows shards: bytes, or text such as "5GB".
        variant: Read ``model.<variant>.safetensors``.
        overwrite: Replace the checkpoint in a folder that is not empty. Files that belong to none stay.
        dry_run: Only find out what would be done.
        progress: Show a bar on stderr, where that is a terminal.
        check: Called with source, result and dtype before the result takes its place; its return value is recorded. An
            exception of it leaves everything as it was. `clipmb.verification.verify_conversion` runs both in every
            backend.
        **options: ``subfolder``, ``revision``, ``cache_dir``, ``token``, ``local_files_only``, ``force_download``.

    Returns:
        What was done.

    Raises:
        CheckpointError: The source cannot be read or does not fit its config, the format cannot hold this model, the
            result cannot be written, or it differs from the source.
        ValueError: An argument is impossible, or the destination is not empty.
        TypeError: An option is unknown.
    """
    module = formats.module_of(to)
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
    plan, names = _plan(source, folder, loaded, to, dtype, head)
    if check is not None and plan.head != "CLIPModel":
        raise bad_input(
            "Only a whole CLIP runs through the backends", plan.head, "Leave the check (--verify) out; tensors are "
            "compared in any case"
        )  # fmt: skip
    if dry_run:
        return plan
    weights = _Weights(loaded.tensors, names, plan.mapping)
    created = not folder.exists()
    try:
        with ThreadPoolExecutor(1) as aside, Transaction(folder) as save:
            hashes = aside.submit(_hashes, source, sorted(loaded.files))  # while the weights are written and compared
            if overwrite:
                save.remove(*(path.name for path in folder.iterdir() if _belongs(path.name)))
            outline = {e.canonical: stand_in(e.shape, numpy_dtype(e.dtype)) for e in plan.mapping}
            with progress_bar(progress, f"writing {to}", len(plan.mapping)) as advance:
                counted = _Counted(weights, advance)
                if to == "safetensors":
                    files = write_stream(save, outline, counted, max_shard_size=max_shard_size)
                else:
                    files = module.write(save, counted, plan.config, plan.head, max_shard_size=max_shard_size)
            save.write(CONFIG_NAME, config_text(plan.config, plan.head, {entry.dtype for entry in plan.mapping}))
            copied = _write_processors(save, source, plan)
            result = Source(str(save.path("")))
            with progress_bar(progress, "comparing", len(plan.mapping)) as advance:
                difference = _compare(result, weights, plan, advance)
            checked = None if check is None else check(source, result, _dtype_of(plan))
            plan.record = {
                "clipmb": __version__,
                "table_version": TABLE_VERSION,
                "source": {
                    "name": str(source),
                    "commit": source.commit(),
                    "format": plan.source_format,
                    "files": {**hashes.result(), **_hashes(source, sorted({*copied, CONFIG_NAME}))},
                },
                "result": {
                    "format": to,
                    "weights": sorted(files),
                    "dtypes": sorted({entry.dtype for entry in plan.mapping}),
                    "files": _hashes(result, result.names()),
                },
                "head": plan.head,
                "tensors": len(plan.mapping),
                "decisions": plan.decisions,
                "verification": {"largest_difference": difference, "backends": checked},
                "packages": _packages(),
            }
            save.write(RECORD_NAME, json_text(plan.record))
    except (ClipmbError, ValueError, TypeError, ImportError):
        raise
    except Exception as error:  # of the file system, or of a format's library
        raise CheckpointError(
            f"{folder} cannot be written, and is as it was: {type(error).__name__}: {error}"
        ) from error
    finally:
        if created and not plan.record and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return plan


def check_record(folder: str | os.PathLike[str]) -> list[str]:
    """Compares the files of a converted checkpoint with those that ``conversion.json`` recorded.

    Args:
        folder: Where the conversion wrote them.

    Returns:
        One line for each file that changed, is missing, or came to the checkpoint since; empty when all is as it was.

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
        raise bad_input("A conversion writes into another folder than it reads", str(folder), "Pass another folder")
    finish(folder)
    if not overwrite and (names := sorted(p.name for p in folder.iterdir() if not p.name.startswith(".clipmb-"))):
        raise bad_input(
            "The destination must be new or empty",
            f"{folder} with {', '.join(names[:5])}{', …' if len(names) > 5 else ''}",
            "Pass another folder, or overwrite=True (--overwrite) to replace the checkpoint in it",
            shown=True,
        )


def _belongs(name: str) -> bool:
    """Whether a file is part of a checkpoint, so that it must not stay beside a new one."""
    return name in _OTHERS or name in openai.NAMES or _WEIGHTS.fullmatch(name) is not None


def _plan(
    source: Source, folder: Path, loaded: formats.Loaded, to: str, dtype: str | None, head: str | None
) -> tuple[Conversion, dict[str, str]]:
    """Chooses head and config, and maps every parameter; nothing but names, shapes and dtypes is looked at.

    Returns:
        The conversion, and canonical names to those in ``loaded``.
    """
    path = source.find(CONFIG_NAME)
    decisions = dict(loaded.decisions)
    if path is not None:  # which then decides these, whatever the file's own config says
        decisions = {key: why for key, why in decisions.items() if key not in ("activation", "pooling")}
    if path is None and loaded.config is None:
        source.require(CONFIG_NAME)  # raises, with the list of what is there
    fields = read_json(path) if path is not None else loaded.config.to_dict() if loaded.config else {}
    origin = CONFIG_NAME if path is not None else f"the {loaded.format} file"
    seen = {}
    for name in loaded.tensors:
        array = loaded.tensors[name]
        seen[name] = stand_in(array.shape, array.dtype)
    if head is None:
        head, decisions["head"] = _head(fields, canonical_names(seen, "CLIPModel"), origin)
    else:
        decisions["head"] = f"{head}: asked for"
    config: BaseConfig = _config_class(head).from_dict(fields)
    table = specs(config, head)
    try:
        fit(seen, table, head, origin=source)
    except CheckpointError as error:
        raise CheckpointError(
            f"{source} does not fit {head} with the config of {origin}; head= (--head) chooses another one. Problems:",
            error.problems or [str(error)],
        ) from None
    names = canonical_names(seen, head)
    if to in ("openai", "open_clip"):
        openai.need_whole(head, to)
    shown = names_in(decisions.get("dialect", loaded.format).partition(",")[0], table)
    shown |= {canonical: name for canonical, name in names.items() if name != canonical}
    targets = names_in(to, table)
    mapping = [
        Mapped(shown[s.name], s.name, targets[s.name], s.shape, dtype or seen[names[s.name]].dtype.name) for s in table
    ]
    if left := sorted(seen.keys() - {names[spec.name] for spec in table}):
        decisions["left out"] = f"{', '.join(left)}: not part of {head}"
    _explain_config(config, origin, decisions)
    return Conversion(source, folder, loaded.format, to, head, config, mapping, decisions), names


def _head(fields: dict[str, Any], names: Mapping[str, str], origin: str) -> tuple[str, str]:
    """Returns what a source is, and why: what its config declares, else what its tensors make up."""
    declared = fields.get("architectures")
    for name in declared if isinstance(declared, list) else ():
        if (head := str(name).removeprefix("TF").removeprefix("Flax")) in HEADS:
            return head, f"{head}: {origin} declares it"
    text = any(name.startswith("text_model.") for name in names)
    vision = any(name.startswith("vision_model.") for name in names)
    if text and vision:
        head, why = "CLIPModel", "both towers are there"
    elif vision and "classifier.weight" in names:
        head, why = "CLIPForImageClassification", "the vision tower and a classifier are there"
    elif text or vision:
        tower, projection = ("Text", "text_projection") if text else ("Vision", "visual_projection")
        projected = f"{projection}.weight" in names
        head = f"CLIP{tower}Model{'WithProjection' if projected else ''}"
        why = f"only the {tower.lower()} tower is there, {'with' if projected else 'without'} its projection"
    else:
        raise CheckpointError("There is neither a text nor a vision tower of CLIP. The names:", list(names)[:20])
    return head, f"{head}: {why}"


def _config_class(head: str) -> type[BaseConfig]:
    text, vision, others = HEADS[head]
    if (text and vision) or "classifier.weight" in others:
        return CLIPConfig
    return CLIPTextConfig if text else CLIPVisionConfig


def _explain_config(config: BaseConfig, origin: str, decisions: dict[str, str]) -> None:
    """Adds what the config decides about the computation, unless the format already gave its reasons."""
    text = config.text_config if isinstance(config, CLIPConfig) else config
    vision = config.vision_config if isinstance(config, CLIPConfig) else config
    towers = {"text": text, "vision": vision} if text is not vision else {"": config}
    acts = ", ".join(f"{tower} {part.hidden_act}".strip() for tower, part in towers.items())  # type: ignore[attr-defined]
    decisions.setdefault("activation", f"{acts}: {origin}")
    if isinstance(text, CLIPTextConfig):
        end = text.eos_token_id
        rule = "at the largest id" if end == 2 else f"at the first token {end}"
        decisions.setdefault("pooling", f"{rule}: eos_token_id is {end} in {origin}")


# -- during -----------------------------------------------------------------------------------------------------------


class _Counted(Mapping[str, np.ndarray]):
    """Weights whose use is counted for a progress bar."""

    def __init__(self, weights: _Weights, advance: Callable[[], None]) -> None:
        self._weights, self._advance, self._seen = weights, advance, set[str]()

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._weights[name]
        if name not in self._seen:
            self._seen.add(name)
            self._advance()
        return array

    def release(self, name: str) -> None:
        self._weights.release(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _write_processors(save: Transaction, source: Source, plan: Conversion) -> list[str]:
    """Copies the files of tokenizer and image processor, or writes CLIP's own where there are none.

    Returns:
        The names of the files that were copied.
    """
    has_text, has_vision, _ = HEADS[plan.head]
    found = {name: path for name in PROCESSOR_FILES if (path := source.find(name)) is not None}
    for name, path in found.items():
        save.write(name, path.read_bytes())
    config = plan.config
    text = config.text_config if isinstance(config, CLIPConfig) else config
    vision = config.vision_config if isinstance(config, CLIPConfig) else config
    if has_text and isinstance(text, CLIPTextConfig) and not has_tokenizer(source):
        try:
            tokenizer_of(source, text).save_pretrained(save.path(""))
            plan.decisions["tokenizer"] = "CLIP's own: the source has none, and its vocabulary has the size of CLIP's"
        except CheckpointError:
            plan.decisions["tokenizer"] = f"none: the source has none, and {text.vocab_size} tokens are not CLIP's own"
    if has_vision and isinstance(vision, CLIPVisionConfig) and not has_image_processor(source):
        image_processor_of(source, vision).save_pretrained(save.path(""))
        plan.decisions["image processor"] = f"CLIP's, for pictures of {vision.image_size}: the source has none"
    return list(found)


def _compare(result: Source, weights: _Weights, plan: Conversion, advance: Callable[[], None]) -> float:
    """Reads the result back and compares every tensor.

    Returns:
        The largest relative difference to the source, max|a - b| / max|b| of one tensor; 0 unless the dtype changed.

    Raises:
        CheckpointError: A tensor differs from the source's, rounded to the dtype asked for, or does not fit that dtype.
    """
    written = formats.load(result)
    if written.format != plan.target_format:
        raise CheckpointError(f"The result is read as {written.format} and not as {plan.target_format}.")
    names = canonical_names(written.tensors, plan.head)
    problems = [f"missing: {entry.canonical}" for entry in plan.mapping if entry.canonical not in names]
    worst = 0.0
    for entry in [] if problems else plan.mapping:
        got = written.tensors[names[entry.canonical]]
        original = weights.original(entry.canonical)
        difference, problem = _difference(got, _rounded(original, numpy_dtype(entry.dtype)), original)
        worst = max(worst, difference)
        if problem:
            problems.append(f"{entry.canonical} {problem}")
        if isinstance(written.tensors, dict):
            OwnArrays({"": got}).release("")
        weights.release(entry.canonical)
        advance()
    if problems:
        raise CheckpointError("The result does not hold the source's values; nothing was changed. Problems:", problems)
    return worst


def _difference(got: np.ndarray, expected: np.ndarray, original: np.ndarray) -> tuple[float, str]:
    """Compares one tensor in chunks: its relative difference to the original, and what is wrong with it."""
    if got.shape not in (expected.shape, expected.shape or (1,)):  # some formats have no scalars
        return np.inf, f"has the shape {got.shape} and not {expected.shape}"
    flat = [np.ascontiguousarray(array).reshape(-1) for array in (got, expected, original)]
    gap = scale = 0.0
    for start in range(0, expected.size, _CHUNK):
        mine, rounded, exact = (array[start : start + _CHUNK] for array in flat)
        mine = _rounded(mine, rounded.dtype)  # a format without bfloat16 holds the same values in float32
        bits = f"u{rounded.itemsize}"
        if not np.array_equal(mine.view(bits), rounded.view(bits)):
            return np.inf, "has other values than the source"
        if rounded.dtype != exact.dtype:
            # The difference of a number and its rounding is exact in the wider of their dtypes.
            wide = np.float64 if np.float64 in (exact.dtype, rounded.dtype) else np.float32
            before, after = exact.astype(wide, copy=False), rounded.astype(wide, copy=False)
            if not np.isfinite(after).all():
                finite = np.isfinite(before)
                before, after = before[finite], after[finite]
                if not np.isfinite(after).all():
                    return np.inf, f"has values too large for {expected.dtype}, such as {np.abs(before).max():.3g}"
            gap = max(gap, float(np.abs(after - before).max(initial=0.0)))
            scale = max(scale, float(np.abs(before).max(initial=0.0)))
    return gap / scale if scale else 0.0, ""


# -- the record -------------------------------------------------------------------------------------------------------


def _rounded(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns the array in a dtype; values too large for it become infinite, which `_difference` reports by name."""
    with np.errstate(over="ignore"):
        return array if array.dtype == dtype else array.astype(dtype)


def _dtype_of(plan: Conversion) -> str:
    dtypes = {entry.dtype for entry in plan.mapping}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _hashes(source: Source, names: list[str]) -> dict[str, dict[str, Any]]:
    paths = {name: source.find(name) for name in names}
    return {name: {"sha256": _sha256(p), "bytes": p.stat().st_size} for name, p in paths.items() if p is not None}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _packages() -> dict[str, str]:
    """Versions of what took part: Python, numpy, and the libraries of formats that were imported."""
    names = ["numpy", "ml_dtypes", "safetensors", *(n for n in ("h5py", "msgpack", "torch") if n in sys.modules)]
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
