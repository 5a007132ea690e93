"""A checkpoint as files that another runtime loads, compared with the checkpoint before they stay.

The folder has the layout of transformers.js and Optimum, ``onnx/model.onnx``, ``onnx/text_model.onnx`` and
``onnx/vision_model.onnx`` beside config, tokenizer and image processor, or another of `clipmb.layouts`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from clipmb import __version__, backends
from clipmb.common.config import CLIPConfig
from clipmb.common.data.pairs import Pairs
from clipmb.common.errors import CheckpointError, ClipmbError, bad_input, boolean, one_of, whole_number
from clipmb.common.hub import Source
from clipmb.common.image.processor import CLIPImageProcessor
from clipmb.common.image.resampling import rule_name
from clipmb.common.json_files import json_text
from clipmb.common.outputs import EXPORTED
from clipmb.common.parameters import specs
from clipmb.common.processor import image_processor_of
from clipmb.common.saving import prepared_beside, umask
from clipmb.common.small_model import held_out_pictures, small_model
from clipmb.evaluation import evaluate
from clipmb.layouts import INPUTS, LAYOUTS, PLAIN, Exported
from clipmb.pipeline import CLIPPipeline, processor_for
from clipmb.verification import TEXTS, demo_photos, inputs_of, relative_difference

TOWERS = tuple(PLAIN.files)
RECORD_NAME = "export.json"
BOUND = 1e-5  # of float32: max|a - b| / max|b|
BATCHES = (1, 3, 16)


@dataclass(frozen=True)
class Target:
    """What can be exported to.

    Attributes:
        backend: Key of `clipmb.backends.BACKENDS`: whose model is written.
        module: Has the `Writer`.
        dtypes: Dtype to the end of the file's name.
        package: What runs the files, where it is not of the backend.
        stored: Whether the dtype is that of the weights in the file alone, which come from a model in float32.
    """

    backend: str
    module: str
    dtypes: dict[str, str]
    package: str | None = None
    stored: bool = False


_HALF = {"float32": "", "float16": "_fp16"}
_HALVES = {**_HALF, "bfloat16": "_bf16"}
TARGETS = {
    "onnx": Target("onnx", "clipmb.onnx.export", {**_HALF, "int8": "_int8"}),
    "openvino": Target("onnx", "clipmb.onnx.openvino", _HALF, "openvino", stored=True),
    "torch-export": Target("pt", "clipmb.pt.export", _HALVES),
    "saved-model": Target("tf", "clipmb.tf.saved_model", _HALVES),
    "litert": Target("tf", "clipmb.tf.litert", _HALF, "ai-edge-litert", stored=True),
    "stablehlo": Target("flax", "clipmb.flax.export", _HALVES),
}


@dataclass(frozen=True)
class Form:
    """How a tower is written.

    The attributes are arguments of `export`; ``names`` is of `clipmb.layouts.Layout`, and ``processor`` is what is done
    to pictures in the file.
    """

    dtype: str = "float32"
    normalize: bool = False
    ids: str = "int64"
    length: int | None = None
    keep: frozenset[str] = frozenset()
    names: Mapping[str, str | None] = field(default_factory=dict)
    processor: CLIPImageProcessor | None = None


class Writer(Protocol):
    """What the module of a target has."""

    RUN: Path
    """A script that takes a written file, an npz file of inputs called ``NAME.BATCH``, and the npz file to write, of
    outputs called likewise. It runs in a process of its own and lets nothing be imported that the runtime can do
    without."""

    @staticmethod
    def write(
        model: Any,
        tower: str,
        path: Path,
        *,
        dtype: str,
        normalize: bool,
        ids: str,
        length: int | None,
        keep: Collection[str],
        names: Mapping[str, str | None],
        processor: CLIPImageProcessor | None,
    ) -> list[Path]:
        """Writes a tower.

        Args:
            model: ``engine.model`` of the backend.
            tower: "image", "text" or "both".
            path: The file without its ending.
            dtype: As in `export`, and so are the others.
            normalize: Embeddings of length 1, also from a single tower.
            ids: dtype of ``input_ids`` and ``attention_mask``.
            length: Tokens of each text, or None.
            keep: Weights that are not quantised.
            names: What inputs and outputs with other names are called, as in `clipmb.layouts.Layout`.
            processor: What is done to pictures in the file, of "onnx"; nothing when None.

        Returns:
            The files written, or the folder; the one to load first.
        """
        ...


def export(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str = "onnx",
    *,
    layout: str | None = None,
    tower: str = "all",
    dtype: str = "float32",
    normalize: bool = False,
    ids: str | None = None,
    length: int | None = None,
    keep: Collection[str] | str | int = (),
    min_cosine: float | None = None,
    data: str | os.PathLike[str] | None = None,
    with_preprocessing: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Writes a checkpoint for another runtime, and compares what that computes with what the checkpoint computes.

    The comparison loads the files in a process of its own, in which clipmb and the frameworks that the runtime can do
    without cannot be imported, over the photographs of the package and texts of several lengths, at batches of 1, 3
    and 16.

    Args:
        checkpoint: Folder, file of weights or Hub id of a full CLIP model, in any format.
        out: A folder; new or empty.
        to: "onnx": what onnxruntime, transformers.js and others load. "openvino": OpenVINO's ``.xml`` and ``.bin``, of
            the ONNX graph. "torch-export": a program of ``torch.export``, by the PyTorch model. "saved-model": a
            SavedModel, by the TensorFlow model. "litert": what LiteRT runs on phones, of the SavedModel. "stablehlo": a
            program of ``jax.export``, by the Flax model.
        layout: Of "onnx", what another program expects: "fastembed", "immich" or "triton"; transformers.js and Optimum
            when None. fastembed and immich have no "both", and their embeddings have length 1.
        tower: "image", "text", "both" in one file, or "all" of them. The tokenizer and the image processor are
            written where a tower needs them; a checkpoint without a tokenizer has none here either.
        dtype: "float32", or "float16" with inputs and outputs in float32, which "openvino" and "litert" store the
            weights in and compute with as the device does; "bfloat16" of "torch-export", "saved-model" and "stablehlo",
            likewise; "int8" of "onnx" alone: the weights of the blocks in 8 bits, what they multiply quantised when it
            is known.
        normalize: Return embeddings of length 1 from a single tower; "both" always does.
        ids: "int64" or "int32": the dtype of ``input_ids`` and ``attention_mask``. It needs a text tower. "int64" when
            None, and "int32" for immich.
        length: Tokens of every text, which are padded to it; any number up to the model's context when None, and the
            model's context for immich. It needs a text tower. Not of fastembed, which pads to the longest of its texts.
        keep: Canonical names of weights that "int8" leaves in float32, of matrices in the blocks of the chosen towers.
            "auto" leaves the fewest with which the embeddings reach ``min_cosine``, and a number that many of each
            tower: those that lose the most cosine when they alone have 8 bits.
        min_cosine: Of other dtypes than "float32": the smallest cosine of an embedding, or of all logits, to the
            checkpoint's own; 0.99 when None.
        data: Images with labels, as `clipmb.evaluate` takes them, for "int8" of both towers: the zero-shot accuracy in
            float32 and in int8 is measured on them. The held-out pictures of the small model when None, for that model.
        with_preprocessing: Of "onnx" without a layout: take ``images``, (batch, height, width, 3) uint8 in RGB of any
            size, in the place of ``pixel_values``. The file does what the checkpoint's image processor does, to the
            bit; the order of Pillow's passes, of which the bits of tall pictures depend, is that of the processor.
        **options: ``subfolder``, ``revision``, ``cache_dir``, ``token``, ``local_files_only``, ``force_download``.

    Returns:
        The record, which is also written to export.json: the arguments, the versions, ``files`` with the ``sha256`` and
        ``bytes`` of each, and ``towers``: what to ``load`` and, for each of its ``outputs``, the largest relative
        ``difference`` and the smallest ``cosine`` of an embedding, or that of all logits. ``preprocessing`` names the
        order of the passes; it is None for files without them. ``zero_shot`` has the accuracy of "float32" and "int8"
        on ``data``.

    Raises:
        CheckpointError: The checkpoint cannot be read, or a file computes something else. Nothing is written then.
        MissingBackendError: The packages of the target's backend, or what runs its files, are not installed.
        ValueError: An argument is impossible, or the folder is not empty.
        TypeError: An option is unknown.
    """
    if to not in TARGETS:
        raise one_of("to", to, tuple(TARGETS))
    target = TARGETS[to]
    if layout is not None and layout not in LAYOUTS:
        raise one_of("layout", layout, tuple(LAYOUTS))
    if layout is not None and to != "onnx":
        raise bad_input(f"The layout of {layout} is of ONNX files", f"to={to!r}", 'Pass to="onnx"', shown=True)
    program = PLAIN if layout is None else LAYOUTS[layout]
    of = "" if layout is None else f" of {layout}"
    if tower not in (*program.files, "all"):
        raise one_of(f"tower{of}", tower, (*program.files, "all"))
    if dtype not in target.dtypes:
        raise one_of(f"dtype of {to}", dtype, tuple(target.dtypes))
    if ids is not None and ids not in program.ids:
        raise one_of(f"ids{of}", ids, program.ids)
    if tower == "image" and (ids is not None or length is not None):
        raise bad_input("ids= and length= are of texts", f"tower={tower!r}", "Leave them out", shown=True)
    if length is not None and program.any_length:
        raise bad_input(f"{layout} passes texts of any length", f"length={length!r}", "Leave it out", shown=True)
    counted = isinstance(keep, int) and not isinstance(keep, bool)
    named = keep if isinstance(keep, Collection) and not isinstance(keep, str) else ()
    if not counted and keep != "auto" and named is not keep:
        raise bad_input('keep must be a list of names, "auto" or a number', keep, "Pass one of these")
    if data is not None and (dtype != "int8" or tower not in ("both", "all")):
        raise bad_input(
            "data= is for int8 of both towers", f"dtype={dtype!r}, tower={tower!r}", "Leave it out", shown=True
        )
    if keep and dtype != "int8":
        raise bad_input("keep= applies to int8 only", dtype, 'Pass dtype="int8", or no keep=')
    if min_cosine is not None and dtype == "float32":
        raise bad_input(f"float32 is held to a difference of {BOUND:g}", f"min_cosine={min_cosine!r}", "Leave it out")
    least = 0.99 if min_cosine is None else min_cosine
    if not isinstance(least, int | float) or not 0 <= least <= 1:
        raise bad_input("min_cosine must be a number from 0 to 1", min_cosine, "Correct it")
    normalize = boolean("normalize", normalize) or program.normalize
    if boolean("with_preprocessing", with_preprocessing) and (to != "onnx" or layout or tower == "text"):
        raise bad_input(
            "with_preprocessing= is of ONNX files that take pictures, without a layout",
            f"to={to!r}, layout={layout!r}, tower={tower!r}",
            "Leave it out, or change the others",
            shown=True,
        )
    source = Source.of(checkpoint, options)
    if options:
        raise bad_input("export has no such options", sorted(options), "Remove them", TypeError)
    folder = Path(out)
    _require_free(folder)
    backend = backends.engine(target.backend)
    importlib.import_module(target.module)  # before the model is loaded, because its package may be missing
    engine = backend.load(source, dtype="float32" if target.stored else dtype, compile=False)
    try:
        context = engine.config.text_config.max_position_embeddings
        if length is not None and whole_number("length", length) > context:
            raise bad_input(f"length must be at most the model's context, {context}", length, "Pass fewer tokens")
        if counted:
            whole_number("keep", keep, 0, min(len(quantised(engine.config, part)) for part in _singles(tower)))
        if unknown := sorted(frozenset(named) - quantised(engine.config, tower)):
            raise bad_input(
                "keep= must hold names of weights that are quantised",
                unknown,
                "Pass names like 'vision_model.encoder.layers.0.mlp.fc1.weight', of the towers that are written",
            )
        if program.whole_texts and tower != "image":
            length = length or context
        processor = image_processor_of(source, engine.config.vision_config) if with_preprocessing else None
        if processor is not None:
            importlib.import_module("clipmb.onnx.preprocessing").require(processor, engine.config.vision_config)
        form = Form(dtype, normalize, ids or program.ids[0], length, frozenset(), program.names, processor)
        pairs = None if data is None else Pairs.open(data)
        return _written(folder, source, engine, to, layout, tower, form, keep, least, pairs)
    finally:
        engine.free()


def quantised(config: CLIPConfig, tower: str) -> set[str]:
    """Returns the names of the weights that int8 has in 8 bits: those of products with a bias."""
    names = {spec.name for spec in specs(config, "CLIPModel") if len(spec.shape) == 2}
    biases = {spec.name for spec in specs(config, "CLIPModel") if spec.name.endswith(".bias")}
    parts = {"text": ("text_model.",), "image": ("vision_model.",)}.get(tower, ("text_model.", "vision_model."))
    return {name for name in names if f"{name.removesuffix('weight')}bias" in biases and name.startswith(parts)}


def _written(
    folder: Path,
    source: Source,
    engine: Any,
    to: str,
    layout: str | None,
    tower: str,
    form: Form,
    keep: Any,
    min_cosine: float,
    pairs: Pairs | None,
) -> dict[str, Any]:
    target, program = TARGETS[to], PLAIN if layout is None else LAYOUTS[layout]
    towers = tuple(program.files) if tower == "all" else (tower,)
    end = target.dtypes[form.dtype]
    writer: Writer | Any = importlib.import_module(target.module)
    expected = _expected(source, engine, form)
    standard = expected.pop("standard")
    if isinstance(keep, int) or keep == "auto":
        form = replace(form, keep=_most_sensitive(engine, tower, expected, keep, min_cosine))
    else:
        form = replace(form, keep=frozenset(keep))
    try:
        with prepared_beside(folder) as staging:
            found: dict[str, dict[str, Any]] = {}
            files: dict[str, dict[str, Any]] = {}
            stems = {part: staging / program.files[part].format(to=to, end=end) for part in towers}
            for stem in stems.values():
                stem.parent.mkdir(parents=True, exist_ok=True)
            program.save_beside(staging, Exported(source, engine.config, towers, form.ids, form.length))
            if form.processor is not None:
                path = writer.write_preprocessing(engine.model, form.processor, staging / "preprocessing.onnx")
                _require_pixels(_computed(writer.RUN, path, _images(expected)), expected)
                path.unlink()
            for part, stem in stems.items():
                written = writer.write(engine.model, part, stem, **asdict(form))
                outputs = _compared(writer.RUN, written[0], part, expected, form)
                _require_agreement(written[0].name, outputs, form.dtype, min_cosine)
                own = {
                    path.relative_to(staging).as_posix(): {"sha256": _sha256(path), "bytes": path.stat().st_size}
                    for path in (file for path in written for file in _files(path))
                }
                found[part] = {
                    "load": written[0].relative_to(staging).as_posix(),
                    "files": sorted(own),
                    "outputs": outputs,
                }
                files |= own
            scores = None
            if form.dtype == "int8" and (
                pairs is not None or (len(_singles(tower)) == 2 and source.folder == small_model())
            ):
                scores = _zero_shot(source, engine, form, pairs)
            record = {
                "clipmb": __version__,
                "source": str(source),
                "commit": source.commit(),
                "to": to,
                "layout": layout,
                "tower": tower,
                "dtype": form.dtype,
                "normalize": form.normalize,
                "ids": form.ids,
                "length": form.length,
                "keep": sorted(form.keep),
                "preprocessing": form.processor and rule_name(form.processor.pass_order),
                "zero_shot": scores,
                "compared_with": standard,
                "batches": list(BATCHES),
                "versions": engine.environment()["versions"] | _runtime(target),
                "towers": found,
                "files": files,
            }
            (staging / RECORD_NAME).write_text(json_text(record), encoding="utf-8")
            staging.chmod(0o777 & ~umask())
            _require_free(folder)
            if folder.exists():
                folder.rmdir()
            os.rename(staging, folder)
    except ClipmbError:  # which is an OSError too
        raise
    except OSError as error:
        raise OSError(error.errno, f"The export could not be written: {error.strerror}", str(folder)) from error
    return record


def _runtime(target: Target) -> dict[str, str]:
    return {target.package: metadata.version(target.package)} if target.package else {}


def _singles(tower: str) -> tuple[str, ...]:
    return (tower,) if tower in ("image", "text") else ("image", "text")


def _most_sensitive(
    engine: Any, tower: str, expected: dict[str, Any], keep: str | int, min_cosine: float
) -> frozenset[str]:
    """Returns the weights that int8 leaves in float32: a number of each tower, or the fewest that reach a cosine."""
    sensitivity = importlib.import_module("clipmb.onnx.sensitivity")
    kept: list[str] = []
    for part in _singles(tower):
        names = quantised(engine.config, part)
        batches = [{name: expected[f"{name}.{batch}"] for name in (part, "pixel_values")} for batch in (3, 1, 16)]
        for batch, given in zip((3, 1, 16), batches, strict=True):  # of the graph in memory, which takes int64
            given |= {name: expected[f"{name}.{batch}"].astype(np.int64) for name in ("input_ids", "attention_mask")}
        if keep == "auto":
            kept += sensitivity.fewest(engine.model, part, names, batches, min_cosine)
        else:
            kept += [name for _, name in sensitivity.ranked(engine.model, part, names, batches[0])[:keep]]
    return frozenset(kept)


def _zero_shot(source: Source, engine: Any, form: Form, pairs: Pairs | None) -> dict[str, Any]:
    """Returns what the accuracy was measured on, the held-out pictures of the small model if None, and that of both."""
    if pairs is None:
        with tempfile.TemporaryDirectory() as folder:
            return _zero_shot(source, engine, form, _held_out(Path(folder))) | {"data": "held_out_pictures()"}
    processor = processor_for(source, engine.config)
    model: Any = engine.model
    found: dict[str, Any] = {"data": repr(pairs)}
    for dtype, form_of in (("float32", {}), ("int8", {"quantised": True, "keep": form.keep})):
        pipeline = CLIPPipeline(type(engine)(type(model)(model.config, model.arrays, **form_of)), processor)
        scores = evaluate(pipeline, pairs)
        if "zero_shot" not in scores:
            raise bad_input(
                "data= must have labels", "data without", "Name the folders by class, or leave it out", shown=True
            )
        found[dtype] = scores["zero_shot"]
    return found


def _held_out(folder: Path) -> Pairs:
    """Writes the held-out pictures of the small model as a table."""
    rows = []
    for i, (picture, label) in enumerate(zip(*held_out_pictures(), strict=True)):
        picture.save(folder / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "label": label}))
    (folder / "pictures.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return Pairs.open(folder / "pictures.jsonl")


def _require_free(folder: Path) -> None:
    if folder == Path():
        raise bad_input(
            "out must be a folder other than the working directory", str(folder), "Pass its path", shown=True
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise bad_input("out must be a new or empty folder", str(folder), "Pass another", shown=True)


# -- comparison -------------------------------------------------------------------------------------------------------


def _expected(source: Source, engine: Any, form: Form) -> dict[str, Any]:
    """Returns inputs and features of all batches, and which engine is the standard: a framework's where there is one.

    The arrays are called ``input_ids.3``, ``attention_mask.3``, ``pixel_values.3``, ``text.3`` and ``image.3`` for the
    batch of 3; and ``images.3`` where pictures are preprocessed in the file.
    """
    config: CLIPConfig = engine.config
    others = [name for name in backends.installed("float32") if name != engine.backend]
    name = others[0] if others else engine.backend
    standard = backends.engine(name).load(source, compile=False)
    found: dict[str, Any] = {"standard": name}
    ids, mask, pixels = inputs_of(source, config, TEXTS, demo_photos())
    for batch, share in zip(BATCHES, (2, 1, 1), strict=True):
        texts, pictures = (np.arange(batch) % len(array) for array in (ids, pixels))
        seq = -(-ids.shape[1] // share)
        rows, looked = _fitted(ids[texts, :seq], mask[texts, :seq], form.length)
        light = np.linspace(1, 0.5, batch, dtype=np.float32)[:, None, None, None]
        if form.names.get("attention_mask", "") is None:
            looked = np.ones_like(looked)
        found[f"input_ids.{batch}"], found[f"attention_mask.{batch}"] = rows.astype(form.ids), looked.astype(form.ids)
        if form.processor is None:
            found[f"pixel_values.{batch}"] = pixels[pictures] * light
        else:
            images = _pictures(batch, config.vision_config.image_size) * light
            found[f"images.{batch}"] = images.astype(np.uint8)
            found[f"pixel_values.{batch}"] = form.processor(
                found[f"images.{batch}"], input_data_format="channels_last", return_tensors="np"
            )["pixel_values"]
        found[f"text.{batch}"] = standard.text_features(rows, looked)
        found[f"image.{batch}"] = standard.image_features(found[f"pixel_values.{batch}"])
    found["scale"] = np.asarray(standard.logit_scale)
    standard.free()
    return found


def _pictures(batch: int, side: int) -> np.ndarray:
    """Returns photographs, (batch, height, width, 3): a wide one, tall ones, or small ones that grow."""
    size = {1: (side * 4, side * 3), 3: (side * 5 // 4, side * 3), 16: (side, max(side * 2 // 3, 1))}[batch]
    photos = [np.asarray(Image.open(path).convert("RGB").resize(size)) for path in demo_photos()]
    return np.stack([photos[i % len(photos)] for i in range(batch)])


def _images(expected: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: array for name, array in expected.items() if name.startswith("images.")}


def _require_pixels(found: dict[str, np.ndarray], expected: dict[str, Any]) -> None:
    for batch in BATCHES:
        mine, wanted = found[f"pixel_values.{batch}"], expected[f"pixel_values.{batch}"]
        if not np.array_equal(mine, wanted):
            different = np.mean(mine != wanted) if mine.shape == wanted.shape else 1
            raise CheckpointError(
                "The file must preprocess pictures to the bits of the image processor. Received: "
                f"{different:.2%} of the values of {expected[f'images.{batch}'].shape[1:3]} pictures differ. Nothing "
                "was written. Report this, and export without with_preprocessing=."
            )


def _fitted(ids: np.ndarray, mask: np.ndarray, length: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Cuts texts to a length, or pads them with their last id and a mask of 0."""
    if length is None:
        return ids, mask
    more = ((0, 0), (0, max(length - ids.shape[1], 0)))
    return np.pad(ids[:, :length], more, mode="edge"), np.pad(mask[:, :length], more)


def _compared(run: Path, path: Path, tower: str, expected: dict[str, Any], form: Form) -> dict[str, dict[str, float]]:
    """Returns the largest difference of each output of a file, and the smallest cosine of its rows, of all batches.

    All logits are one row: those of few pictures and texts may be near to 0, and then have no direction.

    Raises:
        CheckpointError: The file cannot be run, or has other outputs.
    """
    called = {name: form.names.get(name, name) for name in (*INPUTS[tower], *EXPORTED[tower])}
    given = {f"{called[name]}.{batch}": expected[f"{name}.{batch}"] for name in INPUTS[tower] for batch in BATCHES}
    if form.processor is not None and tower != "text":
        given |= _images(expected)
    computed = _computed(run, path, given)
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in sorted(EXPORTED[tower])}
    for batch in BATCHES:
        features = {name: expected[f"{name}.{batch}"] for name in ("text", "image")}
        unit = {name: array / np.linalg.norm(array, axis=1, keepdims=True) for name, array in features.items()}
        shown = unit if form.normalize or tower == "both" else features
        right = {f"{name}_embeds": array for name, array in shown.items()}
        right["logits_per_image"] = unit["image"] @ unit["text"].T * expected["scale"]
        right["logits_per_text"] = right["logits_per_image"].T
        for name in EXPORTED[tower]:
            mine, wanted = computed.get(f"{called[name]}.{batch}"), right[name]
            if mine is None or mine.shape != wanted.shape:
                shape = "none" if mine is None else f"one of shape {mine.shape}"
                raise CheckpointError(
                    f"{path.name} must have an output {called[name]} of shape {wanted.shape}. Received: {shape}. "
                    "Nothing was written. Report this, and use the checkpoint itself."
                )
            pairs[name].append((mine, wanted) if name.endswith("_embeds") else (mine.reshape(-1), wanted.reshape(-1)))
    found = {}
    for name, arrays in pairs.items():
        mine, wanted = (np.atleast_2d(np.concatenate(side)) for side in zip(*arrays, strict=True))
        with np.errstate(all="ignore"):
            lengths = np.linalg.norm(mine, axis=1) * np.linalg.norm(wanted, axis=1)
            cosines = np.nan_to_num((mine * wanted).sum(1) / lengths, nan=-1)  # nothing finite is near to that
        found[name] = {"difference": relative_difference(mine, wanted), "cosine": float(cosines.min())}
    return found


def _require_agreement(file: str, outputs: dict[str, dict[str, float]], dtype: str, min_cosine: float) -> None:
    for name, entry in outputs.items():
        exact = dtype == "float32"
        if entry["difference"] <= BOUND if exact else entry["cosine"] >= min_cosine:
            continue
        bound = f"differ by at most {BOUND:g}" if exact else f"have a cosine of at least {min_cosine:g}"
        fix = (
            "Report this, and use the checkpoint itself"
            if exact
            else "Pass another dtype, keep= or a lower min_cosine="
        )
        raise CheckpointError(
            f"{name} of {file} must {bound} to the checkpoint's own. Received: a difference of "
            f"{entry['difference']:.1e}, a cosine of {entry['cosine']:.6f}. Nothing was written. {fix}."
        )


def _computed(run: Path, path: Path, arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    """Runs a file in a process of its own; returns its outputs, called ``image_embeds.3`` for the batch of 3."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "given.npz", Path(folder) / "found.npz"
        np.savez(given, allow_pickle=False, **arrays)
        done = subprocess.run(
            [sys.executable, "-P", run, path, given, found], capture_output=True, text=True, check=False
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise CheckpointError(f"{path.name} cannot be run, so nothing was written: {reason[:500]}")
        with np.load(found) as file:
            return dict(file)


def _files(path: Path) -> Iterator[Path]:
    """Yields a file, or those in a folder."""
    yield from [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
