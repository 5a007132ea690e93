"""The command line: one module per command, each with a function ``run``."""

from __future__ import annotations

import typer

from clipmb.cli import classify, convert, demo, doctor, encode, evaluate, info, train, verify
from clipmb.cli.common import guarded, set_debug

app = typer.Typer(
    name="clipmb",
    help="CLIP on PyTorch, TensorFlow and Flax.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
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


app.command("classify")(guarded(classify.run))
app.command("convert")(guarded(convert.run))
app.command("demo")(guarded(demo.run))
app.command("doctor")(guarded(doctor.run))
app.command("encode")(guarded(encode.run))
app.command("evaluate")(guarded(evaluate.run))
app.command("info")(guarded(info.run))
app.command("train")(guarded(train.run))
app.command("verify")(guarded(verify.run))


def main() -> None:
    """Runs the command line: exit code 0 for success, 1 for an error, 2 for wrong usage."""
    app()
