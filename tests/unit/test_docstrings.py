"""Every public class and function is documented: all arguments where there are three or more, and what it raises."""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import clipmb

SOURCE = Path(clipmb.__file__).parent
PAGES = Path(__file__).parents[2] / "docs" / "api"
CALLED = ("__init__", "__call__")  # the special methods that take arguments of users

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def body_of(module: str) -> list[ast.stmt]:
    path = SOURCE.parent / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8")).body


def definition(module: str, name: str) -> tuple[str, ast.stmt] | None:
    """Finds where a name is defined, through the imports of a package; None for a value."""
    for node in body_of(module):
        if isinstance(node, ast.ClassDef | Function) and node.name == name:
            return f"{module}.{name}", node
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return definition(node.module or "", name)
    return None


def documented() -> Iterator[tuple[str, str]]:
    """Module and name of everything public: the names of `clipmb`, and what the pages of docs/api show."""
    for name, module in clipmb._MODULE_OF.items():
        yield module, name
    for page in PAGES.glob("*.md"):
        for match in re.finditer(
            r"^::: ([\w.]+)\n(?:    .*\n)*?(?:      members: (.+)\n)?(?=\n|\Z)", page.read_text(), re.M
        ):
            path, members = match.groups()
            if not (SOURCE.parent / path.replace(".", "/")).with_suffix(".py").exists():
                yield tuple(path.rsplit(".", 1))
            elif members is None:
                for node in body_of(path):
                    if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
                        yield path, node.name
            elif members != "false":
                yield from ((path, name) for name in re.findall(r"\w+", members))


def functions() -> dict[str, tuple[Function, str]]:
    """Every public function and method by its path, with the docstring that speaks for it.

    For a constructor these are the docstrings of the class and of its public bases, for a setter that of its property.
    """
    nodes = dict(filter(None, (definition(*place) for place in documented())))
    about = {node.name: ast.get_docstring(node) or "" for node in nodes.values() if isinstance(node, ast.ClassDef)}
    found: dict[str, tuple[Function, str]] = {}
    for path, node in nodes.items():
        if isinstance(node, Function):
            found[path] = node, ast.get_docstring(node) or ""
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            if not isinstance(method, Function) or "overload" in map(ast.unparse, method.decorator_list):
                continue
            if method.name.startswith("_") and method.name not in CALLED:
                continue
            text = ast.get_docstring(method) or ""
            if method.name == "__init__":
                text = "\n\n".join(
                    [ast.get_docstring(node) or "", *(about.get(ast.unparse(base), "") for base in node.bases)]
                )
            former = found.get(f"{path}.{method.name}")
            found[f"{path}.{method.name}"] = method, text or (former[1] if former else "")
    return found


FUNCTIONS = functions()
CLASSES = {  # docstring of each public class by its name
    node.name: ast.get_docstring(node) or ""
    for _, node in filter(None, (definition(*place) for place in documented()))
    if isinstance(node, ast.ClassDef)
}


def arguments(function: Function) -> list[str]:
    given = function.args
    names = [given.vararg and f"*{given.vararg.arg}", given.kwarg and f"**{given.kwarg.arg}"]
    names = [*(one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)), *filter(None, names)]
    return [name for name in names if name not in ("self", "cls")]


def raises(node: ast.AST) -> bool:
    """Whether the function's own body raises an error of its own; a bare raise hands on another's."""
    if isinstance(node, ast.Raise):
        return node.exc is not None and "NotImplementedError" not in ast.unparse(node.exc)
    inner = (child for child in ast.iter_child_nodes(node) if not isinstance(child, Function | ast.Lambda))
    return any(map(raises, inner))


def described(text: str) -> set[str]:
    """The arguments that a docstring describes, or says to be as in another one, which describes them."""
    found = set(re.findall(r"^    (\*{0,2}\w+)(?: \(.*?\))?:", section(text, "Args"), re.M))
    for name in re.findall(r"[Aa]rguments(?: and errors)? as in `([\w.]+)`", text):
        ends = (f".{name}", f".{name}.__init__")
        others = (text for path, (_, text) in FUNCTIONS.items() if path.endswith(ends))
        found |= described(CLASSES.get(name) or next(others))
    return found


def section(text: str, title: str) -> str:
    return "".join(re.findall(rf"^{title}:\n((?:    .*\n|\n)*)", f"{inspect.cleandoc(text)}\n", re.M))


def test_there_is_something_to_check():
    assert {"clipmb.pt.modeling.CLIPModel.forward", "clipmb.common.convert.convert"} <= FUNCTIONS.keys()
    assert len(FUNCTIONS) > 150


@pytest.mark.parametrize("path", sorted(FUNCTIONS))
def test_it_is_documented(path):
    function, text = FUNCTIONS[path]
    assert text, f"{path} has no docstring"
    names = arguments(function)
    if len(names) >= 3:
        missing = [name for name in names if name not in described(text)]
        assert not missing, f"Args of {path} leaves out {', '.join(missing)}"
    if raises(function):
        assert section(text, "Raises"), f"{path} raises, and its docstring does not say so under Raises"


EXAMPLES = [path for path in SOURCE.rglob("*.py") if re.search("^ *>>> ", path.read_text(encoding="utf-8"), re.M)]


@pytest.mark.parametrize("path", sorted(EXAMPLES), ids=lambda path: str(path.relative_to(SOURCE)))
def test_its_examples_run(path, tmp_path):
    name = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
    done = doctest.testmod(importlib.import_module(name), extraglobs={"folder": tmp_path / "new"})
    assert done.attempted > 0
    assert not done.failed
