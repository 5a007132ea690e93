"""Contrastive training and fine-tuning, whichever framework computes: the loop over `Trainer` and its files."""

from __future__ import annotations

import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from clipmb import backends
from clipmb.common.checkpoint import write_safetensors
from clipmb.common.config import CONFIG_NAME, CLIPConfig
from clipmb.common.data.batches import Batch, Batches
from clipmb.common.data.pairs import Pairs
from clipmb.common.errors import bad_input, logger
from clipmb.common.hub import Source
from clipmb.common.parameters import initial_weights, specs
from clipmb.common.pretrained import config_text
from clipmb.common.processor import CLIPProcessor
from clipmb.common.saving import Transaction, finish
from clipmb.common.training.metrics import METRICS_NAME, Metrics
from clipmb.common.training.plots import CURVES_NAME, draw
from clipmb.common.training.recipe import Processes, Recipe
from clipmb.common.training.state import STATE_NAME, TrainingState
from clipmb.evaluation import evaluate
from clipmb.pipeline import CLIPPipeline, processor_for

LEDGER_NAME = "skipped.jsonl"
# What changes how a step is computed and not what it gives: a run may continue with other values of these.
_FREE = ("chunk_size", "local_loss", "gradient_checkpointing", "distributed")
_LOG_SECONDS = 10.0


def train(
    data: Any,
    model: str | os.PathLike[str] | Source | None = None,
    out: str | os.PathLike[str] = "trained",
    *,
    backend: str | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    from_scratch: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    evaluation_data: Any = None,
    evaluate_every: int | None = None,
    templates: Any = None,
    save_every: int = 1000,
    augment: Any = None,
    workers: int | None = None,
    device: Any = None,
    progress: bool = False,
    columns: dict[str, Any] | None = None,
    **recipe: Any,
) -> dict[str, Any]:
    """Trains a CLIP on pictures with captions.

    The folder ``out`` becomes a checkpoint that every framework reads, with ``training_state.safetensors`` beside the
    weights. Each save replaces both at once, so that a run that is killed at any moment continues from its last save,
    with exactly the steps that it would have taken: in the same framework on the CPU to the bit, in another one to
    rounding. ``metrics.jsonl`` has a line for each step, ``curves.png`` shows them at the end, and ``skipped.jsonl``
    names the items that could not be read.

    Args:
        data: Pictures with captions, as ``clipmb.common.data.pairs.Pairs.open`` takes them, or opened `Pairs`.
        model: Folder or hub id of what to begin from; not needed to resume.
        out: Where the trained model goes.
        backend: "pt", "tf" or "flax"; the first installed one when None. A run may be resumed with another.
        epochs: Passes over the data. Give this or ``steps``.
        steps: Optimizer steps.
        from_scratch: Draw new weights, of which only the seed decides, and take only config, tokenizer and image
            processor from ``model``.
        resume: Continue the run in ``out``, or begin it when there is none yet. The recipe is the saved one; what is
            given must agree with it, except chunk_size, local_loss, gradient_checkpointing and distributed.
        overwrite: Begin anew although ``out`` holds a checkpoint.
        evaluation_data: Held-out labelled or captioned pictures, for `clipmb.evaluate` during training and at the end.
        evaluate_every: Steps between evaluations; at the end only when None.
        templates: Of zero-shot evaluation, as `clipmb.common.zero_shot.prompt_templates` takes them.
        save_every: Steps between saves; the end is saved too.
        augment: None, "crop" (random resized crops), or a function of a picture and a ``numpy.random.Generator``.
        workers: Threads that decode pictures; as many as processors (at most 8) when None.
        device: Where to compute, as the framework names it; its own choice when None.
        progress: Show a progress bar, when there is a terminal.
        columns: ``image_column``, ``caption_column`` and ``separator`` of data and evaluation_data, and
            ``label_column`` of evaluation_data, as `Pairs.open` takes them. Evaluation data that lack a column of the
            training data are read by the default names.
        **recipe: The other fields of `Recipe`: ``batch_size``, ``learning_rate`` ….

    Returns:
        ``out``, ``steps``, ``loss`` of the last step, ``skipped`` (items left out by this process in this call) and,
        with ``evaluation_data``, ``evaluation``.

    Raises:
        ValueError: An argument is impossible, the data are not those of the run that is resumed, or the loss is not
            finite.
        CheckpointError: The model or the state cannot be read, or they do not fit each other.
        MissingBackendError: The backend is not installed.
    """
    folder = Path(out)
    state = _saved_state(folder, resume, overwrite)
    pairs, held_out = _opened(data, evaluation_data, columns or {})
    chosen = _recipe(recipe, state, len(pairs), epochs, steps)
    if state is not None and state.data != pairs.fingerprint:
        raise bad_input(
            "A run continues on the data that it began with",
            f"other data than those of the {state.step} steps in {folder}",
            "Pass the same data, or fine-tune the result in another folder",
            shown=True,
        )
    for name, value in (("save_every", save_every), ("evaluate_every", evaluate_every)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise bad_input(f"{name} must be a whole number of at least 1", value, f"Correct {name}")

    engine_class = backends.engine(backend)
    framework = importlib.import_module(f"clipmb.{engine_class.backend}.training")
    processes: Processes = framework.start_processes(chosen)
    begin = model if state is None else folder
    if begin is None:
        raise bad_input("A new run needs a model to begin from", None, "Pass model=, a folder or a hub id")
    source = Source.of(begin, {})
    loading: dict[str, Any] = {"dtype": "float64" if chosen.precision == "float64" else "float32"}
    loading["device"] = framework.local_device() if device is None else device
    config = CLIPConfig.from_pretrained(source)
    processor = processor_for(source, config)
    with framework.scope():
        if from_scratch and state is None:
            arrays = initial_weights(specs(config, "CLIPModel"), chosen.seed)
            engine = engine_class.load(None, config=config, state_dict=arrays, **loading)
        else:
            engine = engine_class.load(source, **loading)
        trainer = framework.Trainer(engine.model, chosen, state)
    ledger = folder / (LEDGER_NAME if processes.count == 1 else f"{processes.rank}-{LEDGER_NAME}")
    if state is None:
        _begin(folder, processor, ledger, processes)
    loader = Batches(
        pairs,
        processor,
        batch_size=chosen.batch_size,
        context=config.text_config.max_position_embeddings,
        seed=chosen.seed,
        rank=processes.rank,
        count=processes.count,
        workers=workers,
        augment=augment,
        ledger=ledger,
        # The processes of JAX compute one program, whose shapes must agree.
        pad_to=config.text_config.max_position_embeddings if processes.count > 1 else None,
    )
    logger.info("clipmb: %d pairs, steps %d to %d on %r", len(pairs), trainer.steps, chosen.steps, engine.backend)

    def evaluated() -> dict[str, Any]:
        found = evaluate(CLIPPipeline(trainer.engine(), processor), held_out, templates=templates)
        told = {**found, "skipped": len(found["skipped"])}
        metrics.write({"step": trainer.steps, "evaluation": told})
        return found

    result: dict[str, Any] = {"out": str(folder), "steps": chosen.steps, "skipped": 0}
    with (
        _report(folder, trainer.steps, processes) as metrics,
        _bar(progress, chosen.steps, trainer.steps, processes) as show,
    ):
        for epoch, number, batch, values in _steps(trainer, loader, state):
            last = trainer.steps == chosen.steps
            metrics.write({"step": trainer.steps, "epoch": epoch, **values})
            show(trainer.steps, values)
            if held_out is not None and evaluate_every and trainer.steps % evaluate_every == 0 and not last:
                evaluated()
            if last or trainer.steps % save_every == 0:
                here = (epoch, number + 1) if number + 1 < loader.per_epoch else (epoch + 1, 0)
                _save(folder, trainer, config, pairs.fingerprint, here, processes)
            result |= {"loss": values["loss"], "skipped": result["skipped"] + batch.skipped}
        if held_out is not None:
            result["evaluation"] = evaluated()
    if processes.rank == 0:
        _draw(folder)
    return result


def _opened(data: Any, held_out: Any, columns: dict[str, Any]) -> tuple[Pairs, Pairs | None]:
    """Opens training and evaluation data, with the columns that apply to each."""
    both = {name: value for name, value in columns.items() if value is not None}
    label = both.pop("label_column", None)
    if label is not None and (held_out is None or isinstance(held_out, Pairs)):
        raise bad_input("label_column applies to the file of evaluation_data", label, "Leave it out, or pass a path")
    if both and isinstance(data, Pairs) and (held_out is None or isinstance(held_out, Pairs)):
        raise bad_input("Columns are chosen when data are opened", both, "Pass them to Pairs.open, or pass a path")
    if held_out is not None and not isinstance(held_out, Pairs):
        # A misspelt name is found in the training data; where these are open already, in the evaluation data.
        optional = () if isinstance(data, Pairs) else ("image", "caption")
        held_out = Pairs.open(held_out, label_column=label, optional=optional, **both)
    return data if isinstance(data, Pairs) else Pairs.open(data, **both), held_out


def _saved_state(folder: Path, resume: bool, overwrite: bool) -> TrainingState | None:
    """Returns the state to continue from, if any, once it is certain that nothing is lost by beginning anew."""
    if resume and overwrite:
        raise bad_input("A run is resumed or begun anew", "resume=True and overwrite=True", "Pass one", shown=True)
    if not folder.is_dir():
        if folder.exists():
            raise bad_input("A model is trained into a folder", str(folder), "Pass a folder, not a file")
        return None
    finish(folder)
    if resume:
        return TrainingState.read(folder) if (folder / STATE_NAME).is_file() else None
    if not overwrite and ((folder / CONFIG_NAME).exists() or (folder / STATE_NAME).exists()):
        raise bad_input(
            "out must be a folder without a checkpoint",
            str(folder),
            "Pass resume=True to continue its run, overwrite=True to begin anew, or another folder",
        )
    return None


def _recipe(
    given: dict[str, Any], state: TrainingState | None, pairs: int, epochs: int | None, steps: int | None
) -> Recipe:
    """Returns the recipe of a new run, or that of a resumed one, with which what is given has to agree."""
    given = {name: value for name, value in given.items() if value is not None}
    if epochs is not None and steps is not None:
        raise bad_input("The length of a run is given once", f"epochs={epochs}, steps={steps}", "Pass one", shown=True)
    if epochs is not None:
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise bad_input("epochs must be a whole number of at least 1", epochs, "Correct epochs")
        size = given.get("batch_size", Recipe.batch_size if state is None else state.recipe.batch_size)
        steps = epochs * -(-pairs // Recipe(steps=1, batch_size=size).batch_size)
    if steps is not None:
        given["steps"] = steps
    if state is None:
        if steps is None:
            raise bad_input("A new run needs its length", "neither epochs nor steps", "Pass one of them", shown=True)
        return Recipe.from_dict(given)
    saved = state.recipe.to_dict()
    asked = Recipe.from_dict({**saved, **given}).to_dict()
    if different := [name for name in saved if name not in _FREE and asked[name] != saved[name]]:
        raise bad_input(
            "A run continues with its own recipe",
            ", ".join(f"{name}={asked[name]!r} instead of {saved[name]!r}" for name in different),
            f"Leave them out; only {', '.join(_FREE)} may change",
            shown=True,
        )
    return Recipe.from_dict(asked)


def _begin(folder: Path, processor: CLIPProcessor, ledger: Path, processes: Processes) -> None:
    """Removes what an earlier run left, and writes what does not change during the run."""
    ledger.unlink(missing_ok=True)
    if processes.rank == 0:
        for name in (STATE_NAME, METRICS_NAME, CURVES_NAME):
            (folder / name).unlink(missing_ok=True)
        processor.save_pretrained(folder)


def _steps(
    trainer: Any, loader: Batches, state: TrainingState | None
) -> Iterator[tuple[int, int, Batch, dict[str, float]]]:
    """Takes every step that is left; yields epoch, number of the batch in it, the batch, and what the step returned."""
    epoch, start = (0, 0) if state is None else (state.epoch, state.batch)
    began = time.perf_counter()
    while trainer.steps < trainer.recipe.steps:
        for number, batch in enumerate(loader.epoch(epoch, start), start):
            if not len(batch.ids) and loader.count == 1:
                continue  # every item of it is broken
            values = trainer.step({"input_ids": batch.input_ids, "pixel_values": batch.pixel_values})
            if not math.isfinite(values["loss"]):
                raise bad_input(
                    f"The loss of step {trainer.steps} must be finite",
                    values["loss"],
                    "Lower learning_rate, lengthen warmup_steps or look at the data; the last save is as it was",
                )
            now = time.perf_counter()
            values["pairs_per_second"] = loader.batch_size / (now - began)
            yield epoch, number, batch, values
            began = time.perf_counter()
            if trainer.steps == trainer.recipe.steps:
                return
        epoch, start = epoch + 1, 0


def _save(
    folder: Path, trainer: Any, config: CLIPConfig, data: str, here: tuple[int, int], processes: Processes
) -> None:
    """Replaces weights and state at once. All processes take part; the first one writes."""
    weights, tensors = trainer.weights(), trainer.moments()
    if trainer.logit_bias is not None:
        tensors["logit_bias"] = np.asarray(trainer.logit_bias)
    if processes.rank:
        return
    state = TrainingState(trainer.steps, *here, trainer.recipe, data, trainer.backend, tensors)
    with Transaction(folder) as save:
        save.write(CONFIG_NAME, config_text(config, "CLIPModel", (array.dtype.name for array in weights.values())))
        write_safetensors(save, weights)
        state.write(save)


def _report(folder: Path, step: int, processes: Processes) -> Any:
    """Opens the metrics of a run; those of further processes go nowhere."""
    return Metrics(folder, step) if processes.rank == 0 else nullcontext(_Nowhere())


class _Nowhere:
    def write(self, values: dict[str, Any]) -> None: ...


@contextmanager
def _bar(
    wanted: bool, steps: int, done: int, processes: Processes
) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Shows loss, throughput and the time left: as a bar where there is a terminal, else as lines of the log."""
    if not (wanted and processes.rank == 0 and sys.stderr.isatty()):
        told = time.monotonic()

        def log(step: int, values: dict[str, float]) -> None:
            nonlocal told
            if time.monotonic() - told >= _LOG_SECONDS or step == steps:
                told = time.monotonic()
                logger.info("step %d/%d %s", step, steps, _shown(values))

        yield log if processes.rank == 0 else lambda step, values: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=steps, completed=done)
        yield lambda step, values: bar.update(task, completed=step, description=_shown(values))


def _shown(values: dict[str, float]) -> str:
    return f"loss {values['loss']:.4f}, {values['pairs_per_second']:.1f} pairs/s"


def _draw(folder: Path) -> None:
    """Draws the curves, if there is something to draw with."""
    try:
        logger.info("clipmb: curves drawn into %s", draw(folder))
    except ImportError as error:
        logger.warning("clipmb: no curves drawn. %s", error)
