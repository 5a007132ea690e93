"""What a training run reports: a line of JSON for each step, curves as a picture, and TensorBoard's event files.

``metrics.jsonl`` has one object a line. Each has "step", the steps done by then; lines of steps have numbers beside it,
lines of evaluations a nested object. JSON has no NaN or infinity: they are written as null.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from clipmb.common.errors import bad_input, logger
from clipmb.common.saving import write_atomically

METRICS_NAME = "metrics.jsonl"
CURVES_NAME = "curves.png"
TENSORBOARD_NAME = "tensorboard"


# The curves in their order; others follow under their own names.
_TITLES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "logit_scale": "Logit scale",
    "logit_bias": "Logit bias",
    "pairs_per_second": "Pairs per second",
    "zero_shot": "Zero-shot classification",
}
_NO_CURVES = ("step", "epoch", "batch", "images", "captions", "classes")  # places and sizes
_LOGARITHMIC = ("grad_norm",)
_BINS = 200  # that the points of a curve are gathered into when there are more than twice as many
_COLUMNS, _WIDTH, _HEIGHT, _DPI = 3, 4.4, 2.9, 120  # panels in a row, inches of a panel, dots per inch
_GREY, _RED = "#666666", "#c1272d"
_COLOURS = ("#2b5d9b", "#d9822b", "#3a8f5c", "#8b4fa1", "#7a5c3e", "#4b4b4b")


class Metrics:
    """Appends lines to ``metrics.jsonl`` of a folder, and the same values to TensorBoard's event files.

    Every line is written at once and whole, so that a killed process leaves at most a torn last line, which is dropped
    when the run continues. Event files are written into the folder ``tensorboard`` when the package is installed.

    >>> with Metrics(folder, step=0) as metrics:
    ...     metrics.write({"step": 1, "epoch": 0, "loss": 5.2})
    ...     metrics.write({"step": 1, "evaluation": {"zero_shot": {"top1": 0.5}}})

    Args:
        folder: Of the run; made when it is missing.
        step: The steps done before: 0 begins a new file; otherwise the lines of later steps, which will be taken
            again, are dropped.

    Raises:
        ValueError: A line before the last one cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], step: int) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / METRICS_NAME
        kept = [line for line, values in _lines(path) if values["step"] <= step] if step else []
        content = b"".join(line + b"\n" for line in kept)
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, content)
        self._file = open(path, "ab")  # noqa: SIM115 - close() closes it
        self._events = _Events.open(self.folder / TENSORBOARD_NAME, step)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, values: Mapping[str, Any]) -> None:
        """Writes one line.

        Args:
            values: "step", and JSON values or arrays and tensors of one number. NaN and infinity become null.

        Raises:
            ValueError: "step" is missing or not a whole number of at least 0.
            TypeError: A value is nothing that JSON has.
        """
        plain = {str(name): _plain(value, str(name)) for name, value in values.items()}
        step = plain.get("step")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise bad_input("step must be a whole number of at least 0", step, "Pass the steps done so far")
        self._file.write(json.dumps(plain, allow_nan=False).encode() + b"\n")
        self._file.flush()
        if self._events is not None:
            self._events.write(step, {"/".join(path): value for path, value in _numbers(plain)})

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the lines of a run, which may still be going on.

    Raises:
        FileNotFoundError: The folder has none.
        ValueError: A line before the last one cannot be read.
    """
    path = Path(folder) / METRICS_NAME
    if not path.is_file():
        raise bad_input(
            f"The folder of a run has a file {METRICS_NAME}", str(folder), "Pass another folder", FileNotFoundError
        )
    return [values for _, values in _lines(path)]


def draw(folder: str | os.PathLike[str]) -> Path:
    """Draws the curves of a run into ``curves.png``: every number of the steps, and of the evaluations.

    Long curves are drawn as the mean of 200 equal parts in a band from their least to their greatest value. Where a
    value was not finite there is a red cross at the bottom.

    Args:
        folder: Of a run, which may still be going on.

    Returns:
        The path of the picture.

    Raises:
        FileNotFoundError: The folder has no metrics.
        ValueError: They hold nothing to draw, or a line before the last one cannot be read.
        ImportError: matplotlib is not installed.
    """
    lines = read_metrics(folder)
    panels = [*_step_panels(lines), *_evaluation_panels(lines)]
    if not panels:
        raise bad_input("Curves are drawn of at least one step", f"none in {folder}", "Train first", shown=True)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"Drawing curves needs matplotlib, which cannot be imported ({error}). "
            'Install it: pip install "clipmb[train]"'
        ) from error
    across = min(_COLUMNS, len(panels))
    down = -(-len(panels) // across)
    figure = Figure((across * _WIDTH, down * _HEIGHT + 0.5), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    last = max(values["step"] for values in lines)
    name = Path(os.path.abspath(folder)).name
    figure.suptitle(f"{name}, {last:,} steps", x=0.01, ha="left", fontsize=12, weight="bold", parse_math=False)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        panel.draw(axes)
        axes.set_xlim(0, max(last, 1) * 1.02)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    content = io.BytesIO()
    figure.savefig(content, format="png")
    path = Path(folder) / CURVES_NAME
    write_atomically(path, content.getvalue())
    return path


class _Panel:
    """One pair of axes with one or more curves.

    Args:
        title: Above it.
        curves: (steps, values) of each by its name; NaN where a value was not finite.
        sparse: They are of evaluations: drawn with a mark for each, from zero.
        logarithmic: Draw the values on a logarithmic axis when they spread far.
    """

    def __init__(
        self,
        title: str,
        curves: dict[str, tuple[np.ndarray, np.ndarray]],
        *,
        sparse: bool = False,
        logarithmic: bool = False,
    ) -> None:
        self.title, self.curves, self.sparse, self.logarithmic = title, curves, sparse, logarithmic

    def draw(self, axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        every = np.concatenate([values for _, values in self.curves.values()])
        finite = every[np.isfinite(every)]
        for (name, (steps, values)), colour in zip(self.curves.items(), _cycled(len(self.curves)), strict=True):
            self._curve(axes, name, steps, values, colour)
        if self.logarithmic and len(finite) and finite.min() > 0 and finite.max() > 20 * finite.min():
            axes.set_yscale("log")
        elif self.sparse and len(finite) and finite.min() >= 0:
            axes.set_ylim(0, max(finite.max() * 1.08, 1e-3))
        axes.set_title(self.title, loc="left", fontsize=10, parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(True, color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, colors=_GREY)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#bbbbbb")
        if len(self.curves) > 1:
            axes.legend(fontsize=8, frameon=False)

    def _curve(self, axes: Any, name: str, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            below = axes.get_xaxis_transform()
            axes.plot(steps[~finite], np.full((~finite).sum(), 0.03), "x", color=_RED, markersize=5, transform=below)
        if finite.sum() > 2 * _BINS:
            parts = [np.array_split(part[finite], _BINS) for part in (steps, values)]
            middle, mean = ([part.mean() for part in several] for several in parts)
            least, greatest = ([end(part) for part in parts[1]] for end in (np.min, np.max))
            axes.fill_between(middle, least, greatest, color=colour, alpha=0.2, linewidth=0)
            axes.plot(middle, mean, color=colour, linewidth=1.5, label=name)
        else:
            mark = "o" if self.sparse else "." if len(steps) < 50 else ""
            axes.plot(steps, values, color=colour, linewidth=1.5, marker=mark, markersize=4, label=name)


def _step_panels(lines: list[dict[str, Any]]) -> Iterator[_Panel]:
    """Yields one panel for every number of the steps."""
    rows = [values for values in lines if not any(isinstance(value, dict) for value in values.values())]
    names = dict.fromkeys([*_TITLES, *(name for values in rows for name in values)])
    for name in names:
        points = [(values["step"], values[name]) for values in rows if name in values]
        if name not in _NO_CURVES and points and all(_is_number(value) or value is None for _, value in points):
            yield _Panel(_words(name), {name: _curve_of(points)}, logarithmic=name in _LOGARITHMIC)


def _evaluation_panels(lines: list[dict[str, Any]]) -> Iterator[_Panel]:
    """Yields one panel for every group of numbers in nested objects; ranks apart from fractions."""
    groups: dict[str, dict[str, list[tuple[int, float | None]]]] = {}
    for values in lines:
        for path, value in _numbers(values, missing=True):
            if len(path) < 2 or path[-1] in _NO_CURVES:
                continue
            where = [_words(part) for part in (path[1:] if path[0] == "evaluation" else path)]
            if path[-1].endswith("rank") and len(where) > 1:
                *where, curve, last = where
                where.append(last.lower())
            else:
                *where, curve = where
            title = ": ".join([*where[:1], *(part.lower() for part in where[1:])]) or "Evaluation"
            name = curve.lower() if path[-1].endswith("rank") else path[-1].replace("_", " ")
            groups.setdefault(title, {}).setdefault(name, []).append((values["step"], value))
    for title, curves in sorted(groups.items(), key=lambda group: group[0].endswith("rank")):
        yield _Panel(title, {name: _curve_of(points) for name, points in curves.items()}, sparse=True)


def _curve_of(points: list[tuple[int, float | None]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values in order, the last value of each step."""
    last = dict(sorted(points, key=lambda point: point[0]))
    return np.array(list(last)), np.array([math.nan if value is None else value for value in last.values()], float)


def _words(name: str) -> str:
    text = _TITLES.get(name, name.replace("_", " "))
    return text[:1].upper() + text[1:]


def _cycled(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


class _Events:
    """A TensorBoard event file, written with TensorBoard's own records but without TensorFlow.

    TensorBoard's EventFileWriter would import TensorFlow wherever it is installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        messages = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._event = messages.Event
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        number = sum(path.name.startswith(stem) for path in folder.iterdir())
        self._records = RecordWriter(open(folder / f"{stem}.{number}", "xb"))  # noqa: SIM115 - close() closes it
        self._add(file_version="brain.Event:2")
        # Tells TensorBoard to forget what earlier files have of the steps that follow.
        self._add(step=step + 1 if step else 0, session_log=messages.SessionLog(status=messages.SessionLog.START))

    @classmethod
    def open(cls, folder: Path, step: int) -> _Events | None:
        """Opens a new file, when TensorBoard is installed."""
        if importlib.util.find_spec("tensorboard") is None:
            return None
        try:
            return cls(folder, step)
        except Exception as error:  # its protocol buffers refuse other versions with errors of their own
            logger.warning("No TensorBoard files are written: %s: %s", type(error).__name__, error)
            return None

    def write(self, step: int, values: dict[str, float]) -> None:
        numbers = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if tag != "step"]
        self._add(step=step, summary=self._summary(value=numbers))

    def close(self) -> None:
        self._records.close()

    def _add(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields the lines of a file, raw and read; a torn last one is left out."""
    raw = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate(raw, 1):
        if number == len(raw) and not line:
            return
        try:
            values = json.loads(line)
            if not isinstance(values, dict) or not isinstance(values["step"], int):
                raise ValueError("no object with a step")
        except (ValueError, KeyError) as error:
            if number == len(raw):
                return
            raise bad_input(
                f"Every line of {path} must be a JSON object with a step",
                f"line {number}: {line[:80].decode(errors='replace')}",
                "Correct or remove the line",
                shown=True,
            ) from error
        yield line, values


def _numbers(values: Mapping[str, Any], missing: bool = False) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the path and value of every number in nested objects; with ``missing`` of every null too."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from (((name, *path), number) for path, number in _numbers(value, missing))
        elif _is_number(value) or (missing and value is None):
            yield (name,), value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any, name: str) -> Any:
    """Returns a value as JSON has it; NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{name}[{i}]") for i, inner in enumerate(value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return _plain(value.item(), name)
    raise bad_input(f"{name} must be a number, a text, a list or a mapping", value, "Convert it", TypeError)
