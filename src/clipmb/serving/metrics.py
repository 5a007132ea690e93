"""Counters and histograms in the text format of Prometheus.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/, version 0.0.4.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_Labels = tuple[str, ...]


class Metrics:
    """Values by name and labels; every thread may change them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._about: dict[str, tuple[str, str, _Labels, Sequence[float]]] = {}
        self._values: dict[str, dict[_Labels, list[float]]] = {}
        self._gauges: dict[str, Callable[[], float]] = {}

    def counter(self, name: str, about: str, labels: _Labels = ()) -> Callable[..., None]:
        """Adds a counter; returns what increases it, called with the values of the labels and ``by=``."""

        def add(*values: str, by: float = 1) -> None:
            with self._lock:
                self._values[name].setdefault(values, [0.0])[0] += by

        self._add(name, "counter", about, labels)
        return add

    def histogram(self, name: str, about: str, bounds: Sequence[float], labels: _Labels = ()) -> Callable[..., None]:
        """Adds a histogram.

        Args:
            name: Its name.
            about: What it counts, with the unit.
            bounds: The upper bounds of its buckets, ascending.
            labels: The names of its labels.

        Returns:
            What adds an observation, called with the values of the labels and ``value=``.
        """

        def observe(*values: str, value: float) -> None:
            with self._lock:
                row = self._values[name].setdefault(values, [0.0] * (len(bounds) + 2))
                row[bisect_left(bounds, value)] += 1  # behind the buckets: what is above all bounds, and the sum
                row[-1] += value

        self._add(name, "histogram", about, labels, bounds)
        return observe

    def gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        """Adds a value that is read when it is asked for."""
        self._add(name, "gauge", about, ())
        self._gauges[name] = value

    def text(self) -> str:
        """Returns everything, as Prometheus reads it."""
        lines = []
        for name, (kind, about, labels, bounds) in self._about.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
            if name in self._gauges:
                lines.append(f"{name} {_number(self._gauges[name]())}")
                continue
            with self._lock:
                rows = {values: list(row) for values, row in self._values[name].items()}
            for values, row in rows.items():
                own = [f'{label}="{_escaped(value)}"' for label, value in zip(labels, values, strict=True)]
                if kind == "counter":
                    lines.append(f"{name}{_braces(own)} {_number(row[0])}")
                    continue
                total = 0.0
                for bound, count in zip([*map(_number, bounds), "+Inf"], row, strict=False):
                    total += count
                    bucket = [*own, f'le="{bound}"']
                    lines.append(f"{name}_bucket{_braces(bucket)} {_number(total)}")
                lines.append(f"{name}_sum{_braces(own)} {_number(row[-1])}")
                lines.append(f"{name}_count{_braces(own)} {_number(total)}")
        return "\n".join([*lines, ""])

    def _add(self, name: str, kind: str, about: str, labels: _Labels, bounds: Sequence[float] = ()) -> None:
        self._about[name] = kind, about, labels, bounds
        self._values[name] = {}


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def _braces(parts: list[str]) -> str:
    return "{" + ",".join(parts) + "}" if parts else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
