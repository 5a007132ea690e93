"""The command line: one module per command, each with a function ``run``."""

from __future__ import annotations

import typer

from clipmb.cli import (
    classes,
    classify,
    convert,
    demo,
    doctor,
    duplicates,
    embed,
    encode,
    evaluate,
    export,
    index,
    info,
    search,
    serve,
    train,
    verify,
)
from clipmb.cli.common import guarded, set_debug

app = typer.Typer(
    help="CLIP on PyTorch, TensorFlow and Flax.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},
)


def _version(asked: bool) -> None:
    if asked:
        import clipmb

        typer.echo(f"clipmb {clipmb.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    set_debug(debug)


for _module in (
    classes, classify, convert, demo, doctor, duplicates, embed, encode, evaluate, export, index, info, search, serve,
    train, verify,
):  # fmt: skip
    app.command(_module.__name__.rpartition(".")[2])(guarded(_module.run))


def main() -> None:
    """Runs the command line: exit code 0 for success, 1 for an error, 2 for wrong usage."""
    app(prog_name="clipmb")
