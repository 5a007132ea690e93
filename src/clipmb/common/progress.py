"""Progress bars, where there is a terminal to show them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Advances a progress bar."""

    def __call__(self, count: int = 1, description: str | None = None) -> None:
        """Adds ``count`` finished items, and replaces the description when one is given."""


@contextmanager
def progress_bar(shown: bool, description: str, total: int, *, done: int = 0) -> Iterator[Advance]:
    """Shows a bar with the rate and the time left on stderr; does nothing when it is not wanted, or not on a terminal.

    Args:
        shown: Whether the caller wants one.
        description: What is being done.
        total: The number of items.
        done: The number of items that were finished before.

    Yields:
        What the caller calls after each item or batch.
    """
    if not shown or not sys.stderr.isatty():
        yield lambda count=1, description=None: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining
    from rich.text import Text

    class Rate(ProgressColumn):
        """How many items a second are done."""

        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.1f}/s", "progress.data.speed")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), Remaining())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda count=1, description=None: bar.update(task, advance=count, description=description)
