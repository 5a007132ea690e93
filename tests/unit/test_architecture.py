"""Imports go one way, `clipmb` alone imports no framework, and each backend works with the other two blocked."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
from cases import CONFIGS, VISION, write_checkpoint
from conftest import BACKENDS, ENGINES
from processes import excerpt, python

import clipmb
from clipmb import CLIPConfig

SOURCE = Path(clipmb.__file__).parent
FRAMEWORKS = {
    "torch",
    "tensorflow",
    "keras",
    "jax",
    "jaxlib",
    "flax",
    "transformers",
    "tf_keras",
    "onnx",
    "onnxruntime",
}
OWN = {"pt": {"torch"}, "tf": {"tensorflow", "keras"}, "flax": {"jax", "flax"}, "onnx": {"onnx", "onnxruntime"}}

CONTRIBUTING = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
# Part of the package to what it may import, and file or folder of `common` to its floor, as CONTRIBUTING prints them.
ALLOWED = {
    part: set(re.findall(r"`(\w+)`", row[2])) | {part}
    for row in re.finditer(r"^\| (`.*) \| (.*) \|$", CONTRIBUTING, re.M)
    for part in re.findall(r"`(\w+)`", row[1])
}
FLOOR = {name: int(row[1]) for row in re.finditer(r"^(\d+)  (\w.*)$", CONTRIBUTING, re.M) for name in row[2].split()}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function; for `__init__`, when it runs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path == SOURCE / "__init__.py":
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE" in ast.unparse(node.test))]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@functools.cache
def parts(folder: Path) -> dict[str, set[str]]:
    """File or folder inside of a folder of the package to all that its files import."""
    found: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        name = path.relative_to(folder).parts[0].removesuffix(".py")
        found.setdefault(name, set()).update(imports(path))
    return found


def test_the_lists_of_contributing_name_every_part():
    assert ALLOWED.keys() == parts(SOURCE).keys()
    assert FLOOR.keys() == parts(SOURCE / "common").keys()


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_go_one_way(part):
    found = parts(SOURCE)[part]
    assert {name.split(".")[0] for name in found} & FRAMEWORKS <= OWN.get(part, set())
    inside = {name.split(".")[1] for name in found if name.startswith("clipmb.")}
    assert inside - {"__version__"} <= ALLOWED[part]


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_the_floors_of_common_import_downwards(name):
    found = parts(SOURCE / "common")[name]
    needs = {module.split(".")[2] for module in found if module.startswith("clipmb.common.")} - {name}
    assert not {need for need in needs if FLOOR[need] >= FLOOR[name]}


def test_import_clipmb_imports_no_framework_and_nothing_heavy():
    done = python("-c", "import sys, clipmb; print(*sorted({name.split('.')[0] for name in sys.modules}))")
    loaded = set(done.stdout.split())
    assert "clipmb" in loaded
    assert not loaded & (FRAMEWORKS | {"numpy", "PIL", "regex", "safetensors", "huggingface_hub", "typer", "rich"})


def test_the_shared_parts_import_no_framework(tmp_path):
    write_checkpoint(tmp_path, CONFIGS["plain"])
    script = """
import sys
from clipmb import *
from clipmb.common.pretrained import read_weights
from clipmb.common.hub import Source
CLIPConfig.from_pretrained(sys.argv[1]); CLIPTokenizer(); CLIPTokenizerFast(); CLIPImageProcessor(); CLIPProcessor()
assert read_weights(Source(sys.argv[1]))
print(*sorted({name.split('.')[0] for name in sys.modules}))
"""
    done = python("-c", script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & (FRAMEWORKS | {"huggingface_hub"})


BLOCKED = """
import sys

class Block:  # a finder that does not find some packages, as if they were not installed
    names = set(sys.argv[1].split(","))
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in self.names else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Block, sys.meta_path)
"""


@pytest.mark.parametrize("backend", ENGINES)
def test_each_backend_works_with_the_others_blocked(tmp_path, backend):
    small = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1, "num_attention_heads": 4}
    write_checkpoint(tmp_path, CLIPConfig(small, VISION, projection_dim=24))
    blocked = set.union(*(names for name, names in OWN.items() if name != backend)) | {"transformers", "tf_keras"}
    script = """
from clipmb import CLIPPipeline
import numpy as np
clip = CLIPPipeline.from_pretrained(sys.argv[2], backend=sys.argv[3])
assert clip.classify(np.zeros((30, 40, 3), np.uint8), ["a", "b"]).shape == (1, 2)
"""
    done = python("-c", BLOCKED + script, ",".join(sorted(blocked)), tmp_path, backend)
    assert done.returncode == 0, excerpt(done.stderr)


@pytest.mark.parametrize(
    ("backend", "package"), [(backend, package) for backend, packages in OWN.items() for package in sorted(packages)]
)
def test_a_missing_framework_is_named_with_the_pip_command(backend, package):
    script = f"""
import clipmb
from clipmb import MissingBackendError
name = {{"pt": "CLIPModel", "tf": "TFCLIPModel", "flax": "FlaxCLIPModel"}}.get({backend!r})
for what in (lambda: getattr(clipmb, name), lambda: clipmb.backends.engine({backend!r}))[name is None :]:
    try:
        what()
    except MissingBackendError as error:
        assert isinstance(error, ImportError)
        assert 'pip install "clipmb[{backend}]"' in str(error), error
    else:
        raise SystemExit("no error")
"""
    done = python("-c", BLOCKED + script, package)
    assert done.returncode == 0, excerpt(done.stderr)


def test_public_names():
    assert clipmb.__version__
    for name in clipmb.__all__:
        assert getattr(clipmb, name) is not None
    with pytest.raises(AttributeError, match="CLIPModle"):
        _ = clipmb.CLIPModle


def test_type_checkers_and_the_interpreter_see_the_same_public_names():
    body = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8")).body
    typed = next(node for node in body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING").body
    seen = {alias.name: node.module for node in typed for alias in node.names}
    submodules = {name for name, module in seen.items() if module == "clipmb"}
    assert submodules == set(clipmb._SUBMODULES)
    assert submodules == {name for name in parts(SOURCE) if name != "cli" and not name.startswith("__")}
    assert {name: module for name, module in seen.items() if module != "clipmb"} == clipmb._MODULE_OF
    without_models = {name for name, module in clipmb._MODULE_OF.items() if module.split(".")[1] not in OWN}
    assert set(clipmb.__all__) == {"__version__", *without_models}
    assert set(dir(clipmb)) == {"__version__", *seen}


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_public_model_can_be_had(backend):
    prefix = {"pt": "CLIP", "tf": "TFCLIP", "flax": "FlaxCLIP"}[backend]
    names = [name for name in dir(clipmb) if clipmb._MODULE_OF.get(name) == f"clipmb.{backend}"]
    assert len(names) >= 7
    for name in names:
        assert name.startswith(prefix) or name == "FlaxPreTrainedModel"
        assert getattr(clipmb, name) is getattr(getattr(clipmb, backend), name)
