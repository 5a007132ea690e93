"""Signals that end a run: the first one after the current step, the second one at once."""

from __future__ import annotations

import os
import signal
import socket
import threading
from types import TracebackType
from typing import Any, Self

# Only where a signal would end the process anyway: a program's own handlers stay.
_USUAL: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Stopping:
    """Holds back SIGINT and SIGTERM while a run takes its steps.

    A thread counts the signals: Python's own handlers wait until the framework returns from a step, which may take
    minutes, and see two signals of that time as one.

    Args:
        wanted: Otherwise signals do what they did before. They do so too outside of the main thread, and where the
            program handles them itself.

    Attributes:
        signal: The signal that was received; None so far.
    """

    def __init__(self, wanted: bool = True) -> None:
        self.signal: signal.Signals | None = None
        self._wanted = wanted and threading.current_thread() is threading.main_thread()
        self._replaced: list[int] = []

    def __enter__(self) -> Self:
        if self._wanted:
            self._replaced = [number for number, usual in _USUAL.items() if signal.getsignal(number) == usual]
        if self._replaced:
            self._ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            self._theirs, self._before = theirs, signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
            for number in self._replaced:
                signal.signal(number, _wait)
            self._thread = threading.Thread(target=self._count, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._replaced:
            for number in self._replaced:
                signal.signal(number, _USUAL[number])
            signal.set_wakeup_fd(self._before)
            self._theirs.close()  # which ends the thread
            self._thread.join()
            self._ours.close()

    def check(self) -> None:
        """Ends the run as the signal would have ended the process, if there was one.

        Raises:
            KeyboardInterrupt: It was SIGINT.
            SystemExit: It was SIGTERM; the exit code is 143.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            raise SystemExit(128 + self.signal)

    def _count(self) -> None:
        while received := self._ours.recv(1):
            if received[0] in self._replaced:
                if self.signal is not None:
                    os._exit(128 + received[0])
                self.signal = signal.Signals(received[0])


def _wait(number: int, frame: Any) -> None:
    """Does nothing: the thread has the signal already."""
