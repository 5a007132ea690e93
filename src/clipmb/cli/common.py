"""What the commands share: options, errors, tables."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from clipmb.common.errors import ClipmbError

FULL_SIZE = "openai/clip-vit-base-patch32"
DEFAULT_MODEL: str | None = None  # the small model that comes with the package: `chosen`

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Folder or hub id of a CLIP checkpoint; clipmb's own small emoji model if not given."
    ),
]
Backend = Annotated[
    str | None, typer.Option("--backend", "-b", help="pt, tf or flax; the first installed one if not given.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_debug = False


def set_debug(debug: bool) -> None:
    """Chooses whether errors show their traceback."""
    global _debug
    _debug = debug


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turns the errors of bad input into one line on stderr and exit code 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        try:
            command(*args, **kwargs)
        except (ClipmbError, ValueError, TypeError, OSError, ImportError) as error:
            if _debug:
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    return run


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides what is written to stderr within: TensorFlow's notices on import, which no setting turns off."""
    if _debug:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def chosen(model: str | None, templates: list[str] | str | None = None) -> tuple[str, list[str] | str | None]:
    """Returns the model and the templates to use: without a model the small one, which a note on stderr tells."""
    if model is not None:
        return model, templates
    from clipmb.common.small_model import TEMPLATES, small_model

    typer.echo(
        f"No --model given: clipmb's small model knows emoji-like pictures only; --model {FULL_SIZE} takes a "
        "full-size model.",
        err=True,
    )
    return str(small_model()), templates or list(TEMPLATES)


def load_framework(backend: str | None) -> None:
    """Imports a framework quietly, before the command needs it."""
    from clipmb import backends

    with quiet():
        backends.engine(backend)


def table(title: str, columns: list[str], rows: list[list[str]], right: tuple[int, ...] = ()) -> None:
    """Prints a table; plain and as wide as it needs to be where there is no terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(
        width=None if sys.stdout.isatty() else 200, soft_wrap=True, markup=False, emoji=False, highlight=False
    )
    drawn = Table(title=title or None, title_justify="left")
    for place, column in enumerate(columns):
        drawn.add_column(column, justify="right" if place in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    console.print(drawn)
