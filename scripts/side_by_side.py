"""Shows what differs between the models of two backends that are written to be read side by side.

Usage: python scripts/side_by_side.py pt tf [--count]

The layers, models and losses of each are compared definition by definition: those of one name with each other, in the
order of the first backend, and what only the second has at the end. Linen's modules and the models around them, which
are one class elsewhere, count as one. Before that, the names that each framework gives to the same thing become one
(`SAME`), and the text is formatted again, since a longer word may break a line. Comments count; docstrings do not,
since those of one backend may refer to those of another.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import subprocess
import sys
from pathlib import Path

FILES = ("layers.py", "modules.py", "modeling.py", "losses.py")
SAME = (  # what is written differently because the frameworks are called differently: nothing else is normalised
    (r"\b(TF|Flax)CLIP", "CLIP"),  # the prefix of a backend's classes
    (r"\bCLIP(|Text|Vision|TextPreTrained|VisionPreTrained)Module\b", r"CLIP\1Model"),  # linen's class of a head
    (r"\b(CLIP\w+)Module\b", r"\1"),
    (r"\bclipmb\.(tf|flax)\b", "clipmb.pt"),
    (r"\b(Array|keras\.Variable)\b", "Tensor"),
    (r"\b(nn\.Module|keras\.layers\.Layer|keras\.Model)\b", "Module"),
    (r"\b(nn|keras\.layers)\.(Linear|LayerNorm|Embedding)\b", r"\2"),
    (r"\bnn\.Dense\b", "Linear"),
    (r"\bnn\.Embed\b", "Embedding"),
    (r"\b(tf|jax)\.nn\.", "F."),  # the namespaces of functions on arrays
    (r"\b(tf|jnp)\.", "torch."),
    (r"(?<=\bdef )(__call__|call)\b|(?<=Model\.)(__call__|call)\b", "forward"),  # the method behind a call
    (r"\b(concatenate|concat)\(", "cat("),
    (r"\baxis=", "dim="),
)


def definitions(backend: str, root: Path) -> dict[str, list[str]]:
    """Returns the lines of each top-level definition of a backend, and those before them, under one name for all."""
    found: dict[str, list[str]] = {}
    for file in FILES:
        path = root / backend / file
        if not path.exists():
            continue
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        lines = without_docstrings(text.splitlines(), tree)
        end = 0
        for node in tree.body:
            target = (
                node.target
                if isinstance(node, ast.AnnAssign)
                else node.targets[0]
                if isinstance(node, ast.Assign)
                else node
            )
            name = getattr(target, "name", None) or getattr(target, "id", None) or f"the head of {path.name}"
            found.setdefault(one(name), []).extend(lines[end : node.end_lineno])
            end = node.end_lineno or end
    return {name: normalised("\n".join(lines)) for name, lines in found.items()}


def without_docstrings(lines: list[str], tree: ast.Module) -> list[str]:
    """Returns the lines of a file with those of docstrings empty."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            start, end = node.body[0].lineno - 1, node.body[0].end_lineno or 0
            lines[start:end] = [""] * (end - start)
            if len(node.body) == 1:
                lines[start] = " " * node.body[0].col_offset + "pass"
    return lines


def one(text: str) -> str:
    """Returns a text with what is `SAME` made one."""
    for pattern, word in SAME:
        text = re.sub(pattern, word, text)
    return text


def normalised(text: str) -> list[str]:
    """Returns the lines of a text of which what is `SAME` is one, formatted, without empty lines."""
    ruff = [sys.executable, "-m", "ruff", "format", "--config", "format.skip-magic-trailing-comma=true", "-"]
    text = subprocess.run(ruff, input=one(text), capture_output=True, text=True, check=True).stdout
    return [line for line in text.splitlines() if line.strip()]


def main() -> None:
    """Prints the unified diff of two backends and the number of its lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="backend: pt, tf or flax")
    parser.add_argument("second", help="the other one")
    parser.add_argument("--count", action="store_true", help="print the number of lines only")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1] / "src" / "clipmb", help="the package")
    options = parser.parse_args()
    first, second = (definitions(backend, options.root) for backend in (options.first, options.second))
    lines: list[str] = []
    both = alone = 0
    for name in [*first, *(name for name in second if name not in first)]:
        pair = first.get(name, []), second.get(name, [])
        heads = (f"{options.first}: {name}", f"{options.second}: {name}")
        found = list(difflib.unified_diff(*pair, *heads, n=0, lineterm=""))
        changed = sum(line[0] in "+-" for line in found[2:])
        both, alone = (both + changed, alone) if all(pair) else (both, alone + changed)
        lines += found
    if not options.count:
        print("\n".join(lines))
    print(
        f"{options.first} to {options.second}: {both + alone} lines differ, "
        f"{both} in what both define and {alone} in what one alone defines"
    )


if __name__ == "__main__":
    main()
