"""What a training run reports: a line of JSON for each step, in ``metrics.jsonl`` and in TensorBoard's event files.

``metrics.jsonl`` has one object a line. Each has "step", the steps done by then; lines of steps have numbers beside it,
lines of evaluations a nested object. JSON has no NaN or infinity: they are written as null.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from clipmb.common.errors import bad_input, whole_number
from clipmb.common.json_files import json_values
from clipmb.common.saving import write_atomically
from clipmb.common.training.tensorboard import TENSORBOARD_NAME, Events

METRICS_NAME = "metrics.jsonl"


class Metrics:
    """Appends lines to ``metrics.jsonl`` of a folder, and the same values to TensorBoard's event files.

    Every line is written at once, so that a killed process leaves at most a torn last line, which is dropped when the
    run is resumed. Event files are written into the folder ``tensorboard`` when the package is installed.

    >>> with Metrics(folder, step=0) as metrics:
    ...     metrics.write({"step": 1, "epoch": 0, "loss": 5.2})
    ...     metrics.write({"step": 1, "evaluation": {"zero_shot": {"top1": 0.5}}})

    Args:
        folder: Folder of the run; created when it is missing.
        step: Steps done before. 0 starts a new file; otherwise the lines of later steps, which will be taken again, are
            dropped.

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
        self._events = Events.open(self.folder / TENSORBOARD_NAME, step)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, values: Mapping[str, Any]) -> None:
        """Writes one line.

        Args:
            values: "step", and JSON values, arrays of one number or tensors of one number. NaN and infinity become
                null.

        Raises:
            ValueError: "step" is missing or not a whole number of at least 0.
            TypeError: A value has no form in JSON.
        """
        plain = {str(name): json_values(value, str(name)) for name, value in values.items()}
        step = whole_number("step", plain.get("step"), 0)
        self._file.write(json.dumps(plain, allow_nan=False).encode() + b"\n")
        self._file.flush()
        if self._events is not None:
            self._events.write(step, {"/".join(path): value for path, value in numbers(plain)})

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the lines of a run, which may still be running.

    Args:
        folder: Folder of the run.

    Returns:
        One dictionary for each line, in their order.

    Raises:
        FileNotFoundError: The folder has no metrics.
        ValueError: A line before the last one cannot be read.
    """
    path = Path(folder) / METRICS_NAME
    if not path.is_file():
        raise bad_input(
            f"The folder of a run must contain {METRICS_NAME}", str(folder), "Pass another folder", FileNotFoundError
        )
    return [values for _, values in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields the lines of a file, as bytes and parsed, without a torn last one."""
    raw = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate(raw, 1):
        if number == len(raw) and not line:
            return
        try:
            values = json.loads(line)
            if not isinstance(values, dict) or not isinstance(values["step"], int):
                raise ValueError("not an object with a step")
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


def numbers(values: Mapping[str, Any], missing: bool = False) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the path and value of every number in nested objects; with ``missing`` of every null too."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from (((name, *path), number) for path, number in numbers(value, missing))
        elif is_number(value) or (missing and value is None):
            yield (name,), value


def is_number(value: Any) -> bool:
    """Whether this is a number of JSON; booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)
