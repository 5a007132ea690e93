"""TensorBoard's event files, written without TensorFlow."""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
import time
from pathlib import Path
from typing import Any

from clipmb.common.errors import logger

TENSORBOARD_NAME = "tensorboard"


class Events:
    """A TensorBoard event file, written with TensorBoard's own records.

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
        # Makes TensorBoard drop the steps from here on that it found in earlier files.
        self._add(step=step + 1 if step else 0, session_log=messages.SessionLog(status=messages.SessionLog.START))

    @classmethod
    def open(cls, folder: Path, step: int) -> Events | None:
        """Opens a new file, when TensorBoard is installed."""
        if importlib.util.find_spec("tensorboard") is None:
            return None
        try:
            return cls(folder, step)
        except Exception as error:  # its protocol buffers refuse other versions with errors of their own
            logger.warning("No TensorBoard files are written: %s: %s", type(error).__name__, error)
            return None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the values of a step, each under its tag."""
        numbers = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if tag != "step"]
        self._add(step=step, summary=self._summary(value=numbers))

    def close(self) -> None:
        """Closes the file."""
        self._records.close()

    def _add(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()
