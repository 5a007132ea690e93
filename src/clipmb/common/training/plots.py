"""The curves of a training run as an image."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from clipmb.common.errors import bad_input
from clipmb.common.saving import write_atomically
from clipmb.common.training.metrics import is_number, numbers, read_metrics

CURVES_NAME = "curves.png"

# The first curves, in order; others follow under their own names.
_TITLES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "logit_scale": "Logit scale",
    "logit_bias": "Logit bias",
    "pairs_per_second": "Pairs per second",
    "zero_shot": "Zero-shot classification",
}
_NO_CURVES = ("step", "epoch", "batch", "images", "captions", "classes")  # places and counts
_LOGARITHMIC = ("grad_norm",)
_BINS = 200  # a curve of more than twice as many points is drawn by the means of so many parts
_COLUMNS, _WIDTH, _HEIGHT, _DPI = 3, 4.4, 2.9, 120  # panels in a row, inches of a panel, dots per inch
_GREY, _RED = "#666666", "#c1272d"
_COLOURS = ("#2b5d9b", "#d9822b", "#3a8f5c", "#8b4fa1", "#7a5c3e", "#4b4b4b")


def draw(folder: str | os.PathLike[str]) -> Path:
    """Draws the curves of a run into ``curves.png``: every number of its steps and evaluations.

    Long curves are drawn as the means of 200 equal parts, in a band from the minimum to the maximum of each. A red
    cross at the bottom marks a value that was not finite.

    Args:
        folder: Folder of a run, which may still be running.

    Returns:
        The path of the image.

    Raises:
        FileNotFoundError: The folder has no metrics.
        ValueError: They hold nothing to plot, or a line before the last one cannot be read.
        ImportError: matplotlib is not installed.
    """
    lines = read_metrics(folder)
    panels = [*_step_panels(lines), *_evaluation_panels(lines)]
    if not panels:
        raise bad_input("There are no steps to plot yet", f"none in {folder}", "Train first", shown=True)
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
        sparse: The values are evaluations: mark each of them, and begin the axis at zero.
        logarithmic: Use a logarithmic axis when the values spread far.
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
    """Yields one panel for each number of the steps."""
    rows = [values for values in lines if not any(isinstance(value, dict) for value in values.values())]
    names = dict.fromkeys([*_TITLES, *(name for values in rows for name in values)])
    for name in names:
        points = [(values["step"], values[name]) for values in rows if name in values]
        if name not in _NO_CURVES and points and all(is_number(value) or value is None for _, value in points):
            yield _Panel(_words(name), {name: _curve_of(points)}, logarithmic=name in _LOGARITHMIC)


def _evaluation_panels(lines: list[dict[str, Any]]) -> Iterator[_Panel]:
    """Yields one panel for each group of numbers in nested objects; ranks are separate from fractions."""
    groups: dict[str, dict[str, list[tuple[int, float | None]]]] = {}
    for values in lines:
        for path, value in numbers(values, missing=True):
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
    """Returns steps and values in order; the last value of a step counts."""
    last = dict(sorted(points, key=lambda point: point[0]))
    return np.array(list(last)), np.array([math.nan if value is None else value for value in last.values()], float)


def _words(name: str) -> str:
    text = _TITLES.get(name, name.replace("_", " "))
    return text[:1].upper() + text[1:]


def _cycled(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]
