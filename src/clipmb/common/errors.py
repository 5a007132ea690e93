"""The errors and notices of clipmb, and the one form of an error's message: the rule, what was received, the fix."""

from __future__ import annotations

import logging
import operator
import os
import reprlib
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

logger = logging.getLogger("clipmb")
_said: set[str] = set()
_LINES, _LINE, _MESSAGE, _VALUE = 20, 300, 4000, 200  # what is shown of problems, one of them, a message, a value


class _Bounded(reprlib.Repr):
    """A ``repr`` that is cut while it is built: of damaged files, values may be nested, shared and of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 3, _VALUE, _VALUE, _VALUE
        self.maxtuple = self.maxlist = self.maxdict = self.maxset = self.maxfrozenset = 20

    def repr_instance(self, x: Any, level: int) -> str:
        """Shows subclasses of dictionaries and lists like those, and everything else by its own ``repr``."""
        if isinstance(x, dict):
            return self.repr_dict(x, level)
        if isinstance(x, list | tuple):
            return self.repr_list(list(x), level)
        return super().repr_instance(x, level)

    def repr_int(self, x: int, level: int) -> str:
        """Shows integers, of which Python writes no more than 4,300 digits."""
        return super().repr_int(x, level) if x.bit_length() < 8 * _VALUE else f"<int of {x.bit_length()} bits>"


_bounded = _Bounded()


def bounded_repr(value: object) -> str:
    """Returns the ``repr`` of a value, cut to 200 characters without building more of it than that needs."""
    return _cut(_bounded.repr(value), _VALUE)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


class ClipmbError(Exception):
    """Base class of the errors that only clipmb raises."""


class CheckpointError(ClipmbError, OSError):
    """A checkpoint cannot be found, read, or does not fit the model. Lists the problems at once, up to 20 of them.

    It is an ``OSError`` because that is what ``from_pretrained`` always raised for unreadable checkpoints.

    Attributes:
        problems: One line for each thing that is wrong, all of them.
    """

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        self.problems = list(problems)
        lines = [_cut(problem, _LINE) for problem in self.problems[:_LINES]]
        if (more := len(self.problems) - len(lines)) > 0:
            lines.append(f"and {more} more")
        super().__init__("\n  - ".join([_cut(message, _MESSAGE), *lines]))


class ShapeMismatchError(CheckpointError, RuntimeError):
    """A checkpoint does not fit the model, and weights of another shape are among the reasons.

    It is a ``RuntimeError`` too, which is what transformers 4 raises for these.
    """


class MissingBackendError(ClipmbError, ImportError):
    """A package is needed that cannot be imported; the message holds the pip command.

    Args:
        extra: The extra of clipmb that installs it; that of a backend has the backend's name.
        package: The package.
        cause: Why it cannot be imported.
    """

    def __init__(self, extra: str, package: str, *, cause: str = "") -> None:
        self._made_of = extra, package, cause
        detail = f" ({cause})" if cause else ""
        super().__init__(
            f"clipmb[{extra}] needs {package}, which cannot be imported{detail}. "
            f'Install it: pip install "clipmb[{extra}]"'
        )

    def __reduce__(self) -> Any:
        """Lets it be pickled, as errors of other processes are; by default their arguments would be its message."""
        extra, package, cause = self._made_of
        return partial(type(self), cause=cause), (extra, package)


def bad_input(
    rule: str, received: object, fix: str, kind: type[Exception] = ValueError, *, shown: bool = False
) -> Exception:
    """Builds the error for bad input: the rule, then ``Received: …``, then the fix.

    Args:
        rule: What has to hold, as one sentence without its full stop.
        received: The offending value; its ``repr`` is shown, cut to 200 characters.
        fix: What the caller should do, as one sentence without its full stop.
        kind: The exception type.
        shown: ``received`` is already text meant for the reader; show it without quotes.

    Returns:
        The exception, to be raised by the caller.
    """
    text = _cut(str(received), _VALUE) if shown else bounded_repr(received)
    return kind(f"{rule}. Received: {text}. {fix}.")


def require_file(path: str | os.PathLike[str]) -> None:
    """Refuses what is there and no file, before it is opened.

    Raises:
        OSError: It is a folder, or a pipe or device, which might never end.
    """
    if not Path(path).is_file() and Path(path).exists():
        raise OSError("it is a folder, pipe or device, and no file")


def one_of(field: str, received: object, allowed: Sequence[object]) -> Exception:
    """Builds the error for a value outside a fixed set of choices."""
    return bad_input(
        f"{field} must be one of {', '.join(map(repr, allowed))}", received, f"Pass one of these as {field}"
    )


def whole_number(field: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """Checks a whole number and returns it as an ``int``; numpy's integers are numbers, booleans are not.

    Args:
        field: The name of the argument, for the message.
        value: What the caller passed.
        least: The smallest number allowed.
        most: The largest number allowed; no limit when None.

    Raises:
        ValueError: It is not a whole number, or outside of the limits.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise bad_input(f"{field} must be a whole number {span}", value, f"Correct {field}")
    return number


def boolean(field: str, value: Any) -> bool:
    """Checks a choice between true and false; numpy's booleans are some, and None is false.

    Args:
        field: The name of the argument, for the message.
        value: What the caller passed.

    Raises:
        ValueError: It is something else.
    """
    if value is not None and not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise bad_input(f"{field} must be True or False", value, f"Correct {field}")
    return bool(value)


def warn_once(message: str, *, stacklevel: int = 3) -> None:
    """Issues a ``UserWarning`` the first time this message occurs in the process.

    Args:
        message: The warning.
        stacklevel: As in `warnings.warn`, counted from here: 2 is the caller, 3 (the default) is whoever called it.
    """
    if message not in _said:
        _said.add(message)
        warnings.warn(message, UserWarning, stacklevel=stacklevel)


def log_once(message: str) -> None:
    """Logs a warning the first time this message occurs in the process."""
    if message not in _said:
        _said.add(message)
        logger.warning(message)
