"""The README and the documentation do what they say: Python blocks run and print what is below them, commands parse.

A Python block runs in the session of its page, after the blocks above it. A ``text`` block right below it is what it
prints, where … stands for anything. The comment ``<!-- not run: why -->`` above a block leaves it out.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from processes import excerpt, python

import clipmb
from clipmb.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs/exporting").glob("*.md")),
    ROOT / "src/clipmb/data/emoji/README.md",
]
BLOCK = re.compile(
    r"^(?P<why><!-- not run: [^\n]+ -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```\n"
    r"(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
NEEDS = {
    "pt": r"\bCLIP(Model|Text|Vision|For|Pipeline)|clipmb\.pt|\"pt\"|torch",
    "tf": r"\bTFCLIP|clipmb\.tf|\"tf\"|tensorflow|keras|litert",
    "onnx": r"clipmb\.export|onnxruntime",
    "flax": r"\bFlaxCLIP|clipmb\.flax|\"flax\"|\bjax\b",
}
SESSION = """
import contextlib, io, json, os, sys
session = json.load(open(sys.argv[1], encoding="utf-8"))
os.chdir(os.path.dirname(sys.argv[1]))
printed, names = [], {"__name__": "__main__"}
for code, line in session:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile("\\n" * line + code, sys.argv[2], "exec"), names)
    printed.append(output.getvalue())
print(json.dumps(printed))
"""


def blocks(page: Path, language: str) -> list[re.Match[str]]:
    return [block for block in BLOCK.finditer(page.read_text("utf-8")) if block["language"] == language]


def runnable(page: Path) -> list[re.Match[str]]:
    return [block for block in blocks(page, "python") if not block["why"]]


def sessions() -> list[Any]:
    """The pages with blocks to run, each marked with the backends that these need."""
    found = []
    for page in filter(runnable, PAGES):
        code = "".join(block["code"] for block in runnable(page))
        marks = [pytest.mark.backend(name) for name, pattern in NEEDS.items() if re.search(pattern, code)]
        found.append(pytest.param(page, marks=marks, id=str(page.relative_to(ROOT))))
    return found


def commands(text: str) -> list[str]:
    """The lines of a shell block that run clipmb, continued lines joined."""
    return [line for line in text.replace("\\\n", " ").splitlines() if re.search(r"(^|\s)clipmb\s", line.split("#")[0])]


@pytest.mark.parametrize("page", sessions())
def test_python_blocks_run_and_print_what_is_below_them(page, tmp_path):
    found = runnable(page)
    starts = [page.read_text("utf-8")[: block.start("code")].count("\n") for block in found]
    session = tmp_path / "session.json"
    session.write_text(
        json.dumps([[block["code"], start] for block, start in zip(found, starts, strict=True)]), "utf-8"
    )
    done = python("-c", SESSION, session, page.name)
    assert done.returncode == 0, excerpt(done.stderr)
    for block, printed in zip(found, json.loads(done.stdout.splitlines()[-1]), strict=True):
        expected = ".*".join(map(re.escape, (block["output"] or "").split("…")))
        assert re.fullmatch(expected, printed, re.DOTALL), f"{block['code']}\nprints\n{printed}"


@pytest.mark.backend("pt")
def test_the_second_command_prints_what_is_below_it(tmp_path):
    """The one block of the README that shows what a command prints."""
    above, expected = re.search(r"```sh\n([^`]*)```\n\nThe second command prints:\n\n```text\n(.*?)```",
                                PAGES[0].read_text("utf-8"), re.DOTALL).groups()  # fmt: skip
    images, names = clipmb.held_out_pictures()
    images[names.index("rocket")].save(tmp_path / "rocket.png")
    script = "import os, sys; os.chdir(sys.argv.pop(1)); from clipmb.cli import main; main()"
    _, *arguments = shlex.split(commands(above)[1], comments=True)
    done = python("-c", script, tmp_path, *arguments, PYTHONUTF8="1")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(re.escape(expected).replace("…", ".*"), done.stdout), done.stdout


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_accepted(page):
    group = typer.main.get_command(app)
    for block in blocks(page, "sh"):
        for line in commands(block["code"]):
            words = shlex.split(line.replace(" train …", " train DATA --out DIR"), comments=True)
            name, *arguments = words[words.index("clipmb") + 1 :]
            command = group.get_command(typer.Context(group), name)
            assert command is not None, line
            command.make_context(name, arguments)  # raises for an option that does not exist or is missing


def test_the_blocks_are_found():
    """The convention above is the one that the pages follow."""
    readme = PAGES[0]
    assert len(blocks(readme, "python")) >= 6
    assert sum(block["output"] is not None for block in blocks(readme, "python")) >= 4
    assert sum(len(commands(block["code"])) for block in blocks(readme, "sh")) >= 15
    for page in PAGES:
        text = page.read_text("utf-8")
        assert text.count("```") == 2 * len(re.findall(r"^```\w+$", text, re.MULTILINE)), page
        assert "clipmb.common" not in "".join(block["code"] for block in blocks(page, "python")), page


def test_the_examples_use_public_names():
    """What a program needs has a home outside clipmb.common, and none of it begins with an underscore."""
    programs = list((ROOT / "examples").rglob("*.py"))
    assert programs
    for path in programs:
        found = re.findall(r"clipmb\.common|(?<!self)\._[a-z]\w*", path.read_text("utf-8"))
        assert not found, (path, found)


def test_the_reference_has_every_public_name():
    """But constants, the second name of a class, and the heads that read like PyTorch's."""
    pages = "\n".join(path.read_text("utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^::: clipmb\.(\w+)$", pages, re.M))
    heads = {name for name in dir(clipmb) if name.startswith("CLIP") and name.endswith(("Model", "Projection"))}
    expected = {name for name in {*clipmb.__all__, *heads} if not name.isupper() and name != "CLIPFeatureExtractor"}
    assert not expected - {"__version__"} - shown
    assert not shown - set(dir(clipmb))
