"""Contrastive training and fine-tuning with any backend: the loop over a `Trainer`, and the files of a run."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from clipmb import backends
from clipmb.backends import Trainer
from clipmb.common.checkpoint import write_safetensors
from clipmb.common.config import CONFIG_NAME, CLIPConfig
from clipmb.common.data.augment import Augment
from clipmb.common.data.batches import Batch, Batches
from clipmb.common.data.pairs import Pairs
from clipmb.common.errors import bad_input, logger, whole_number
from clipmb.common.hub import Source
from clipmb.common.parameters import initial_weights, specs
from clipmb.common.pretrained import config_text
from clipmb.common.processor import CLIPProcessor
from clipmb.common.progress import progress_bar
from clipmb.common.saving import Transaction, current
from clipmb.common.training.metrics import METRICS_NAME, Metrics
from clipmb.common.training.plots import CURVES_NAME, draw
from clipmb.common.training.recipe import Recipe
from clipmb.common.training.state import STATE_NAME, TrainingState
from clipmb.common.training.stopping import Stopping, end
from clipmb.evaluation import Evaluation, evaluate
from clipmb.pipeline import CLIPPipeline, processor_for

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]  # what `Pairs.open` takes

LEDGER_NAME = "skipped.jsonl"
# These change how a step is computed and not its result: a run may continue with other values of them.
_FREE = ("chunk_size", "local_loss", "gradient_checkpointing", "distributed")
_LOG_SECONDS = 10.0


class TrainingResult(TypedDict):
    """What `train` returns.

    Attributes:
        out: The folder of the trained model.
        steps: Optimizer steps of the whole run.
        skipped: Unusable items that this process left out in this call.
        loss: Loss of the last step; missing if the run had already ended.
        evaluation: What `clipmb.evaluate` found at the end, with ``evaluation_data``.
    """

    out: str
    steps: int
    skipped: int
    loss: NotRequired[float]
    evaluation: NotRequired[Evaluation]


def train(
    data: Paths | Pairs,
    model: str | os.PathLike[str] | Source | None = None,
    out: str | os.PathLike[str] = "trained",
    *,
    backend: str | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    from_scratch: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    evaluation_data: Paths | Pairs | None = None,
    evaluate_every: int | None = None,
    templates: str | Sequence[str] | None = None,
    save_every: int = 1000,
    augment: str | Augment | None = None,
    workers: int | None = None,
    device: Any = None,
    progress: bool = False,
    columns: dict[str, Any] | None = None,
    **recipe: Any,
) -> TrainingResult:
    """Trains a CLIP on images with captions.

    The folder ``out`` becomes a checkpoint that every framework reads, with ``training_state.safetensors`` beside the
    weights. Each save replaces both at once, so that a run that is killed at any moment continues from its last save,
    with exactly the steps that it would have taken: in the same framework on the CPU to the bit, in another one to
    rounding error. ``metrics.jsonl`` has a line for each step, ``curves.png`` shows them at the end, and
    ``skipped.jsonl`` names the items that could not be read.

    SIGINT (Ctrl-C) and SIGTERM end the run after its current step with a save; a second signal ends the process at
    once. Of several processes all end, whichever gets the signal. Signals that the program handles itself stay its own.

    Args:
        data: Images with captions, as ``Pairs.open`` takes them, or opened `Pairs`.
        model: Folder or Hub id to begin from; not needed to resume.
        out: Folder for the trained model.
        backend: Key of `clipmb.backends.BACKENDS`; the first installed one when None. Another one may resume the run.
        epochs: Passes over the data. Pass this or ``steps``.
        steps: Optimizer steps.
        from_scratch: Draw new weights, which depend on the seed alone, and take only config, tokenizer and image
            processor from ``model``.
        resume: Continue the run in ``out``, or start it if there is none yet. The recipe is the saved one; what is
            passed must agree with it, except chunk_size, local_loss, gradient_checkpointing and distributed.
        overwrite: Start over even if ``out`` holds a checkpoint.
        evaluation_data: Held-out labelled or captioned images, for `clipmb.evaluate` during training and at the end.
        evaluate_every: Steps between evaluations; only at the end when None.
        templates: Prompts of zero-shot evaluation, as `clipmb.common.zero_shot.prompt_templates` takes them.
        save_every: Steps between saves; the end is saved too.
        augment: None, "crop" (random resized crops), or a function of an image and a ``numpy.random.Generator``.
        workers: Threads that decode images; as many as processors (at most 8) when None.
        device: Device, as the framework names it; its own choice when None.
        progress: Show a progress bar, when there is a terminal.
        columns: ``image_column``, ``caption_column``, ``separator`` and ``image_root`` of data and evaluation_data, and
            ``label_column`` of evaluation_data, as `Pairs.open` takes them. Evaluation data that lack a column of the
            training data are read by the default names.
        **recipe: The other fields of `Recipe`: ``batch_size``, ``learning_rate`` ….

    Returns:
        A `TrainingResult`.

    Raises:
        ValueError: An argument is impossible, the data are not those of the run that is resumed, or the loss is not
            finite.
        CheckpointError: The model or the state cannot be read, or they do not fit each other.
        MissingBackendError: The backend is not installed.
        KeyboardInterrupt: SIGINT ended the run; it is saved.
        SystemExit: SIGTERM ended the run; it is saved, and the exit code is 143.
    """
    folder = Path(out)
    state = _saved_state(folder, resume, overwrite)
    pairs, held_out = _opened(data, evaluation_data, columns or {})
    chosen = _recipe(recipe, state, len(pairs), epochs, steps)
    if state is not None and state.data != pairs.fingerprint:
        raise bad_input(
            "A resumed run must use the same data",
            f"other data than those of the {state.step} steps in {folder}",
            "Pass the same data, or fine-tune the result in another folder",
            shown=True,
        )
    whole_number("save_every", save_every)
    if evaluate_every is not None:
        whole_number("evaluate_every", evaluate_every)
    trainer_class = backends.trainer(backend)
    begin = model if state is None else folder
    if begin is None:
        raise bad_input("A new run needs a model to start from", None, "Pass model=, a folder or a Hub id")
    source = Source.of(begin, {})
    config = CLIPConfig.from_pretrained(source)
    processor = processor_for(source, config)
    if from_scratch and state is None:
        arrays = initial_weights(specs(config, "CLIPModel"), chosen.seed)
        trainer = trainer_class.load(None, chosen, device=device, config=config, state_dict=arrays)
    else:
        trainer = trainer_class.load(source, chosen, state, device=device)
    rank, count = trainer.processes.rank, trainer.processes.count
    ledger = folder / (LEDGER_NAME if count == 1 else f"{rank}-{LEDGER_NAME}")
    if state is None:
        ledger.unlink(missing_ok=True)
        if rank == 0:
            _begin(folder, processor)
    context = config.text_config.max_position_embeddings
    loader = Batches(
        pairs,
        processor,
        batch_size=chosen.batch_size,
        context=context,
        seed=chosen.seed,
        rank=rank,
        count=count,
        workers=workers,
        augment=augment,
        ledger=ledger,
        pad_to=context if count > 1 else None,  # processes that compute one program need one shape
    )
    logger.info("clipmb: %d pairs, steps %d to %d on %r", len(pairs), trainer.steps, chosen.steps, trainer.backend)

    result: TrainingResult = {"out": str(folder), "steps": chosen.steps, "skipped": 0}
    log = _Log(rank == 0 and not (progress and sys.stderr.isatty()), chosen.steps)
    with (
        Metrics(folder, trainer.steps) if rank == 0 else nullcontext() as metrics,
        progress_bar(progress and rank == 0, "", chosen.steps, done=trainer.steps) as advance,
    ):

        def evaluated(held_out: Pairs) -> Evaluation:
            found = evaluate(CLIPPipeline(trainer.engine(), processor), held_out, templates=templates)
            if metrics is not None:
                metrics.write({"step": trainer.steps, "evaluation": {**found, "skipped": len(found["skipped"])}})
            return found

        with Stopping() as stopping:
            for epoch, number, batch, values in _steps(trainer, loader, state):
                last = trainer.steps == chosen.steps
                if metrics is not None:
                    metrics.write({"step": trainer.steps, "epoch": epoch, **values})
                summary = f"loss {values['loss']:.4f}, {values['pairs_per_second']:.1f} pairs/s"
                advance(1, summary)
                log.write(trainer.steps, summary)
                ended = trainer.largest(stopping.signal)  # all processes of a run end together
                due = evaluate_every and trainer.steps % evaluate_every == 0 and not last and not ended
                if held_out is not None and due:
                    evaluated(held_out)
                if last or ended or trainer.steps % save_every == 0:
                    here = (epoch, number + 1) if number + 1 < loader.per_epoch else (epoch + 1, 0)
                    _save(folder, trainer, config, pairs.fingerprint, here)
                result["loss"] = values["loss"]
                result["skipped"] += batch.skipped
                if ended:
                    if rank == 0:
                        logger.warning(
                            "clipmb: %s after step %d of %d; saved in %s. Pass resume=True (--resume) to continue.",
                            signal.Signals(ended).name, trainer.steps, chosen.steps, folder,
                        )  # fmt: skip
                    end(ended)
        if stopping.signal:  # it came after the last step
            end(stopping.signal)
        if held_out is not None:
            result["evaluation"] = evaluated(held_out)
    if rank == 0:
        _draw(folder)
    return result


def _opened(data: Paths | Pairs, held_out: Paths | Pairs | None, columns: dict[str, Any]) -> tuple[Pairs, Pairs | None]:
    """Opens training and evaluation data, with the columns that apply to each."""
    both = {name: value for name, value in columns.items() if value is not None}
    label = both.pop("label_column", None)
    if label is not None and (held_out is None or isinstance(held_out, Pairs)):
        raise bad_input("label_column applies to the file of evaluation_data", label, "Leave it out, or pass a path")
    if both and isinstance(data, Pairs) and (held_out is None or isinstance(held_out, Pairs)):
        raise bad_input("Columns are chosen when the data are opened", both, "Pass them to Pairs.open, or pass a path")
    if held_out is not None and not isinstance(held_out, Pairs):
        # A misspelt name is found in the training data; where these are open already, in the evaluation data.
        optional = () if isinstance(data, Pairs) else ("image", "caption")
        held_out = Pairs.open(held_out, label_column=label, optional=optional, **both)
    return data if isinstance(data, Pairs) else Pairs.open(data, **both), held_out


def _saved_state(folder: Path, resume: bool, overwrite: bool) -> TrainingState | None:
    """Returns the state to continue from, if any, once it is certain that starting over loses nothing."""
    if resume and overwrite:
        raise bad_input(
            "resume and overwrite cannot both be set", "resume=True and overwrite=True", "Pass one", shown=True
        )
    if not folder.is_dir():
        if folder.exists():
            raise bad_input("out must be a folder", str(folder), "Pass a folder, not a file")
        return None
    if resume:
        return TrainingState.read(folder) if current(folder, STATE_NAME) is not None else None
    if not overwrite and any(current(folder, name) is not None for name in (CONFIG_NAME, STATE_NAME)):
        raise bad_input(
            "out must be a folder without a checkpoint",
            str(folder),
            "Pass resume=True to continue its run, overwrite=True to start over, or another folder",
        )
    return None


def _recipe(
    given: dict[str, Any], state: TrainingState | None, pairs: int, epochs: int | None, steps: int | None
) -> Recipe:
    """Returns the recipe of a new run, or that of a resumed one, with which what is given has to agree."""
    given = {name: value for name, value in given.items() if value is not None}
    if epochs is not None and steps is not None:
        raise bad_input(
            "Pass either epochs or steps, not both", f"epochs={epochs}, steps={steps}", "Remove one", shown=True
        )
    if epochs is not None:
        whole_number("epochs", epochs)
        size = given.get("batch_size", Recipe.batch_size if state is None else state.recipe.batch_size)
        steps = epochs * -(-pairs // Recipe(steps=1, batch_size=size).batch_size)
    if steps is not None:
        given["steps"] = steps
    if state is None:
        if steps is None:
            raise bad_input("A new run needs a length", "neither epochs nor steps", "Pass one of them", shown=True)
        return Recipe.from_dict(given)
    saved = state.recipe.to_dict()
    asked = Recipe.from_dict({**saved, **given}).to_dict()
    if different := [name for name in saved if name not in _FREE and asked[name] != saved[name]]:
        raise bad_input(
            "A resumed run must use its own recipe",
            ", ".join(f"{name}={asked[name]!r} instead of {saved[name]!r}" for name in different),
            f"Leave them out; only {', '.join(_FREE)} may change",
            shown=True,
        )
    return Recipe.from_dict(asked)


def _begin(folder: Path, processor: CLIPProcessor) -> None:
    """Removes what an earlier run left, and writes what does not change during the run."""
    with Transaction(folder) as save:
        save.remove(STATE_NAME, METRICS_NAME, CURVES_NAME)
        processor.save_pretrained(save.path(""))


def _steps(
    trainer: Trainer, loader: Batches, state: TrainingState | None
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
                    "Lower learning_rate, lengthen warmup_steps or look at the data; the last checkpoint is intact",
                )
            now = time.perf_counter()
            values["pairs_per_second"] = loader.batch_size / (now - began)
            yield epoch, number, batch, values
            began = time.perf_counter()
            if trainer.steps == trainer.recipe.steps:
                return
        epoch, start = epoch + 1, 0


def _save(folder: Path, trainer: Trainer, config: CLIPConfig, data: str, here: tuple[int, int]) -> None:
    """Replaces weights and state at once. All processes take part; the first one writes."""
    weights, tensors = trainer.weights(), trainer.moments()
    if trainer.logit_bias is not None:
        tensors["logit_bias"] = np.asarray(trainer.logit_bias)
    if trainer.processes.rank:
        return
    state = TrainingState(trainer.steps, *here, trainer.recipe, data, trainer.backend, tensors)
    with Transaction(folder) as save:
        save.write(CONFIG_NAME, config_text(config, "CLIPModel", (array.dtype.name for array in weights.values())))
        write_safetensors(save, weights)
        state.write(save)


class _Log:
    """Logs a step every ten seconds, and the last one: what is shown where there is no progress bar."""

    def __init__(self, wanted: bool, steps: int) -> None:
        self._wanted, self._steps, self._written = wanted, steps, time.monotonic()

    def write(self, step: int, summary: str) -> None:
        now = time.monotonic()
        if self._wanted and (now - self._written >= _LOG_SECONDS or step == self._steps):
            self._written = now
            logger.info("step %d/%d %s", step, self._steps, summary)


def _draw(folder: Path) -> None:
    """Draws the curves, if matplotlib is installed."""
    try:
        logger.info("clipmb: curves drawn into %s", draw(folder))
    except ImportError as error:
        logger.warning("clipmb: no curves drawn. %s", error)
