"""The errors of clipmb and the one form of its messages: the rule, what was received, the fix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_PIP = {"pt": "torch", "tf": "tensorflow", "flax": "flax", "convert": "h5py"}


class ClipmbError(Exception):
    """Base class of the errors that only clipmb raises."""


class CheckpointError(ClipmbError, OSError):
    """A checkpoint cannot be found, read, or does not fit the model. Lists every problem at once.

    It is an ``OSError`` because that is what ``from_pretrained`` always raised for unreadable checkpoints.

    Attributes:
        problems: One line for each thing that is wrong.
    """

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        self.problems = list(problems)
        super().__init__("\n  - ".join([message, *self.problems]))


class MissingBackendError(ClipmbError, ImportError):
    """A framework is needed that is not installed; the message holds the pip command."""

    def __init__(self, backend: str, *, cause: str = "") -> None:
        package = _PIP.get(backend, backend)
        detail = f" ({cause})" if cause else ""
        super().__init__(
            f"The {backend!r} backend needs {package}, which cannot be imported{detail}. "
            f'Install it: pip install "clipmb[{backend}]"'
        )


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
    text = received if shown else repr(received)
    text = str(text)
    text = text if len(text) <= 200 else text[:197] + "..."
    return kind(f"{rule}. Received: {text}. {fix}.")


def one_of(field: str, received: object, allowed: Sequence[object]) -> Exception:
    """Builds the error for a value outside a fixed set of choices."""
    return bad_input(
        f"{field} must be one of {', '.join(map(repr, allowed))}", received, f"Pass one of these as {field}"
    )
