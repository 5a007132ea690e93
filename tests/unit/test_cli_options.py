"""What holds of the options of every command: quick, and worth running after each change of one."""

from __future__ import annotations

import re

import pytest
import typer
from processes import clipmb

from clipmb.backends import BACKENDS as KNOWN
from clipmb.cli import app
from clipmb.common.checkpoint.formats import FORMATS
from clipmb.common.dtypes import DTYPES
from clipmb.common.training.recipe import LOSSES

COMMANDS = typer.main.get_command(app)


def commands():
    context = typer.Context(COMMANDS)
    return {name: COMMANDS.get_command(context, name) for name in COMMANDS.list_commands(context)}


def test_the_summary_of_every_command_fits_on_a_line():
    shown = clipmb("--help", COLUMNS="80").stdout
    for name, command in commands().items():
        summary = command.help.partition("\n")[0]
        assert re.search(rf"^  {name} +{re.escape(summary)}$", shown, re.MULTILINE)
        assert summary in clipmb(name, "--help", COLUMNS="80").stdout


def test_a_short_option_means_the_same_in_every_command():
    meanings = {}
    for command in commands().values():
        for option in command.params:
            for short in option.opts + option.secondary_opts:
                if not short.startswith("--") and short.startswith("-"):
                    meanings.setdefault(short, set()).add(option.opts[0])
    assert meanings["-t"] == {"--template"}
    assert all(len(long) == 1 for long in meanings.values()), meanings


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_option_says_what_it_is_and_typer_shows_its_default(name):
    for option in commands()[name].params:
        assert option.help.endswith("."), option.name
        assert "[" not in option.help, option.name
        assert not re.match(r"(Of|As|If)\b", option.help), option.name
    shown = clipmb(name, "--help", COLUMNS="120").stdout
    assert max(map(len, shown.splitlines())) <= 120
    for option in commands()[name].params:
        for long in option.opts:
            assert not long.startswith("--") or re.search(rf"{long}\b", shown), long


def test_choices_are_those_of_the_tables():
    shown = {name: re.sub(r"\s+", " ", clipmb(name, "--help", COLUMNS="400").stdout) for name in commands()}
    assert f"Format to write: {', '.join(FORMATS)}." in shown["convert"]
    assert f"Contrastive loss: {', '.join(LOSSES)}." in shown["train"]
    assert f"train with: {', '.join(name for name, known in KNOWN.items() if known.trains)}." in shown["train"]
    for name in ("classify", "encode", "evaluate"):
        assert f"compute with: {', '.join(KNOWN)}." in shown[name]
    for name in ("demo", "doctor", "verify"):
        assert f"run (repeatable): {', '.join(KNOWN)}." in shown[name]
    for name in ("classify", "encode", "evaluate", "verify"):
        assert f"compute in (int8 with onnx only): {', '.join(DTYPES)}, int8." in shown[name]
