"""What the commands share: options, errors, tables."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipmb.backends import BACKENDS
from clipmb.common.dtypes import DTYPES
from clipmb.common.errors import ClipmbError, bad_input
from clipmb.common.json_files import json_values
from clipmb.common.zero_shot import TEMPLATES, named_classes
from clipmb.pipeline import LONG_TEXT

if TYPE_CHECKING:
    from clipmb.embedding.classes import Classes
    from clipmb.pipeline import CLIPPipeline

FULL_SIZE = "openai/clip-vit-base-patch32"


def choice(*names: str, values: Collection[str], help: str, metavar: str = "NAME", **more: Any) -> Any:
    """Makes an option that takes one of the names in a table; any other name is wrong usage."""

    def parse(text: str) -> str:
        if text not in values:
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(values)}.")
        return text

    return typer.Option(*names, parser=parse, metavar=metavar, help=f"{help}: {', '.join(values)}.", **more)


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="Folder or Hub id of a CLIP checkpoint.",
        show_default="the emoji model in the package",
    ),
]
Backend = Annotated[
    str | None,
    choice("--backend", "-b", values=BACKENDS, help="Framework to compute with", show_default="the first installed"),
]
Trainer = Annotated[
    str | None,
    choice(
        "--backend",
        "-b",
        values=[name for name, backend in BACKENDS.items() if backend.trains],
        help="Framework to train with",
        show_default="the first installed",
    ),
]
Backends = Annotated[
    list[str] | None,
    choice("--backend", "-b", values=BACKENDS, help="Framework to run (repeatable)", show_default="all installed"),
]
Dtype = Annotated[
    str, choice("--dtype", values=(*DTYPES, "int8"), help="Precision to compute in (int8 with onnx only)")
]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", help="Device, as the framework names it.", show_default="its own choice"),
]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Images or texts per step.")]
Template = Annotated[
    list[str] | None,
    typer.Option(
        "--template",
        "-t",
        metavar="TEXT",
        help=f"Prompt with {{}} in place of the label, or a named set: {', '.join(TEMPLATES)}; repeatable.",
        show_default="photo",
    ),
]
Labels = Annotated[
    list[str],
    typer.Option(
        "--labels",
        "-l",
        metavar="NAMES|FILE",
        help="Class names, separated by commas, or a file with one label per line, optionally followed by a tab and "
        "the name to use in prompts; repeatable.",
        show_default=False,
    ),
]
ClassesFile = Annotated[
    str | None, typer.Option("--classes", metavar="FILE", help="Classes that clipmb classes wrote, in place of labels.")
]
Subfolder = Annotated[str, typer.Option("--subfolder", metavar="NAME", help="Subfolder of the checkpoint.")]
Revision = Annotated[str | None, typer.Option("--revision", metavar="NAME", help="Branch, tag or commit on the Hub.")]
ImageColumn = Annotated[
    str | None, typer.Option("--image-column", metavar="NAME", help="Column of image paths.", show_default="by name")
]
CaptionColumn = Annotated[
    str | None, typer.Option("--caption-column", metavar="NAME", help="Column of captions.", show_default="by name")
]
LabelColumn = Annotated[
    str | None,
    typer.Option("--label-column", metavar="NAME", help="Column of class labels.", show_default="by name"),
]
Separator = Annotated[
    str | None,
    typer.Option("--separator", metavar="TEXT", help="Column separator in text files.", show_default="by the file"),
]
ImageRoot = Annotated[
    str | None,
    typer.Option(
        "--image-root", metavar="DIR", help="Folder that image paths are relative to.", show_default="the table's"
    ),
]
LongText = Annotated[str, choice("--long-text", values=LONG_TEXT, help="What to do with text longer than the context")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_debug = False


def set_debug(debug: bool) -> None:
    """Sets whether errors show their traceback."""
    global _debug
    _debug = debug


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Reports errors of input as one line on stderr and exit code 1."""

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
    """Hides what is written to stderr meanwhile: TensorFlow's notices on import, which no setting turns off."""
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


def given(context: typer.Context) -> set[str]:
    """Returns the names of the parameters that the command line sets."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}


def refuse(context: typer.Context, names: Collection[str], why: str) -> None:
    """Makes options that would have no effect wrong usage.

    Args:
        context: The command line.
        names: Names of the parameters behind these options.
        why: A sentence about them, which follows the options that were given.

    Raises:
        typer.BadParameter: One of them was given.
    """
    options = [param.opts[0] for param in context.command.params if param.name in given(context) & set(names)]
    if options:
        raise typer.BadParameter(f"{', '.join(options)} {why}")


def split(text: str) -> list[str]:
    """Splits names at commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def named_labels(texts: list[str]) -> dict[str, str]:
    """Returns the name in prompts of every class that --labels gives, in names and in files."""
    files = [text for text in texts if os.path.isfile(text)]  # false where the names are longer than those of files
    if not files:
        if missing := [text for text in texts if text.lower().endswith(".txt")]:
            raise bad_input("A file of labels must exist", missing[0], "Correct the path")
        names = [name for text in texts for name in split(text)]
        return named_classes(names)
    if len(texts) > 1:
        raise bad_input("--labels must be one file, or names", texts, "Put all labels into the file")
    return named_classes(files[0])


def templates(texts: list[str] | None) -> list[str] | str | None:
    """Returns prompt templates as the package takes them: one may be the name of a set."""
    return texts[0] if texts and len(texts) == 1 else texts or None


def chosen(model: str | None, texts: list[str] | None = None) -> tuple[str, list[str] | str | None]:
    """Returns the model and the templates to use; without a model the one in the package, with a note on stderr."""
    if model is not None:
        return model, templates(texts)
    from clipmb.common.small_model import TEMPLATES, small_model

    typer.echo(
        "Using the small model in the package, which recognises emoji-style images only; "
        f"use --model {FULL_SIZE} for a full-size model.",
        err=True,
    )
    return str(small_model()), templates(texts or list(TEMPLATES))


def chosen_classes(
    context: typer.Context, model: str | None, texts: list[str] | None, labels: list[str], classes: str | None
) -> tuple[str, list[str] | str | None, dict[str, str] | Classes]:
    """Returns the model, the templates and the classes to use: {label: its name in prompts}, or those of a file."""
    if bool(labels) == (classes is not None):
        raise typer.BadParameter("Pass either --labels or --classes.")
    if classes is None:
        return *chosen(model, texts), named_labels(labels)
    from clipmb.embedding.classes import Classes

    refuse(context, ("template", "long_text"), "was decided when the classes were made: leave it out with --classes.")
    return chosen(model)[0], None, Classes.open(classes)


def load_framework(backend: str | None) -> None:
    """Imports a framework quietly, before the command needs it."""
    from clipmb import backends

    with quiet():
        backends.engine(backend)


def load_pipeline(model: str, backend: str | None, dtype: str, device: str | None) -> CLIPPipeline:
    """Loads a model with its tokenizer and image processor."""
    load_framework(backend)
    from clipmb.pipeline import CLIPPipeline

    return CLIPPipeline.from_pretrained(model, backend=backend, dtype=dtype, device=device)


def print_json(values: Any) -> None:
    """Prints JSON, with null for NaN and infinity."""
    typer.echo(json.dumps(json_values(values), indent=2, allow_nan=False))


def table(title: str, columns: list[str], rows: list[list[str]], right: tuple[int, ...] = ()) -> None:
    """Prints a table; without a terminal it is plain and as wide as necessary."""
    from rich.console import Console
    from rich.table import Table

    console = Console(
        width=None if sys.stdout.isatty() else 200, soft_wrap=True, markup=False, emoji=False, highlight=False
    )

    def shown(text: str) -> str:
        return text.encode(errors="backslashreplace").decode()  # of names of files that are no text

    drawn = Table(title=shown(title) or None, title_justify="left")
    for place, column in enumerate(columns):
        drawn.add_column(column, justify="right" if place in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*map(shown, row))
    console.print(drawn)
