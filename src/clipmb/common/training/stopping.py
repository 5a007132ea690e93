"""Signals that end a run: the first one after the current step, the second one at once."""

from __future__ import annotations

import os
import signal
import socket
import threading
from types import TracebackType
from typing import Any, NoReturn, Self

# Only where a signal would end the process anyway: a program's own handlers stay.
_USUAL: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Stopping:
    """Holds back SIGINT and SIGTERM while a run takes its steps.

    A thread counts the signals: Python's own handlers wait until the framework returns from a step, which may take
    minutes, and see two signals of that time as one.

    Outside of the main thread, and where the program handles a signal itself, signals do what they did before.

    Attributes:
        signal: The number of the signal that was received; 0 for none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._replaced: list[int] = []

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
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

    def _count(self) -> None:
        while received := self._ours.recv(1):
            if received[0] in self._replaced:
                if self.signal:
                    os._exit(128 + received[0])
                self.signal = received[0]


def _wait(number: int, frame: Any) -> None:
    """Does nothing: the thread has the signal already."""


def end(number: int) -> NoReturn:
    """Ends the program as a signal would have ended it.

    Raises:
        KeyboardInterrupt: It is SIGINT.
        SystemExit: It is another; the exit code is 128 and its number, as in a shell.
    """
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
