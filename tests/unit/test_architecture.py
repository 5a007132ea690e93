"""Imports go one way, `clipmb` alone imports no framework, and each backend works with the other two blocked."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from cases import CONFIGS, VISION, write_checkpoint
from conftest import BACKENDS

import clipmb
from clipmb import CLIPConfig

SOURCE = Path(clipmb.__file__).parent
FRAMEWORKS = {"torch", "tensorflow", "keras", "jax", "jaxlib", "flax", "transformers", "tf_keras"}
OWN = {"pt": {"torch"}, "tf": {"tensorflow", "keras"}, "flax": {"jax", "flax"}}

# Who may import whom inside the package; a file may always import its own folder.
LAYERS = [
    {"__init__", "errors", "small_model", "dtypes", "workers", "progress"},
    {"features", "outputs", "saving", "zero_shot", "json_files", "former"},
    {"hub"},
    {"config", "image", "text"},
    {"checks", "parameters", "processor"},
    {"checkpoint", "data"},
    {"pretrained", "training"},
    {"convert"},
]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    found = imports(path)
    frameworks = {name.split(".")[0] for name in found} & FRAMEWORKS
    assert frameworks <= OWN.get(part, set())
    inside = {name.split(".")[1] for name in found if name.startswith("clipmb.")}
    allowed = {
        "common": {"common"},
        "pt": {"common", "pt"},
        "tf": {"common", "tf"},
        "flax": {"common", "flax"},
        "backends": {"common"},
        "pipeline": {"common", "backends"},
        "verification": {"common", "backends"},
        "doctor": {"common", "backends", "verification"},
        "testing": {"verification"},
        "evaluation": {"common", "backends", "pipeline"},
        "training": {"common", "backends", "pipeline", "evaluation"},
        "cli": {"common", "backends", "pipeline", "verification", "doctor", "evaluation", "training", "cli"},
        "__init__": set(),
        "__main__": {"cli"},
    }
    assert inside <= allowed[part]


def test_the_common_layers_have_no_cycle():
    """Sorting the files of `common` by their imports succeeds, and they come in the order of the design."""
    graph = {}
    for path in (SOURCE / "common").rglob("*.py"):
        name = path.relative_to(SOURCE / "common").parts[0].removesuffix(".py")
        graph.setdefault(name, set()).update(
            module.split(".")[2] for module in imports(path) if module.startswith("clipmb.common.")
        )
    from graphlib import TopologicalSorter

    order = list(TopologicalSorter({name: needs - {name} for name, needs in graph.items()}).static_order())
    assert order
    rank = {name: level for level, names in enumerate(LAYERS) for name in names}
    assert rank.keys() == graph.keys()
    for name, needs in graph.items():
        for need in needs:
            assert rank[need] <= rank[name], f"{name} imports {need}"


def python(script: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_import_clipmb_imports_no_framework_and_nothing_heavy():
    done = python("import sys, clipmb; print(*sorted({name.split('.')[0] for name in sys.modules}))")
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
    done = python(script, tmp_path)
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


@pytest.mark.parametrize("backend", BACKENDS)
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
    done = python(BLOCKED + script, ",".join(sorted(blocked)), tmp_path, backend)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("backend", "package"), [("pt", "torch"), ("tf", "tensorflow"), ("tf", "keras"), ("flax", "jax"), ("flax", "flax")]
)
def test_a_missing_framework_is_named_with_the_pip_command(backend, package):
    script = f"""
import clipmb
from clipmb import MissingBackendError
name = {{"pt": "CLIPModel", "tf": "TFCLIPModel", "flax": "FlaxCLIPModel"}}[{backend!r}]
for what in (lambda: getattr(clipmb, name), lambda: clipmb.backends.engine({backend!r})):
    try:
        what()
    except MissingBackendError as error:
        assert isinstance(error, ImportError)
        assert 'pip install "clipmb[{backend}]"' in str(error), error
    else:
        raise SystemExit("no error")
"""
    done = python(BLOCKED + script, package)
    assert done.returncode == 0, done.stderr[-3000:]


def test_public_names():
    assert clipmb.__version__
    listed = set(dir(clipmb))
    assert {"CLIPModel", "TFCLIPModel", "FlaxCLIPModel", "CLIPTokenizer", "CLIPPipeline"} <= listed
    for name in clipmb.__all__:
        assert getattr(clipmb, name) is not None
    with pytest.raises(AttributeError, match="CLIPModle"):
        _ = clipmb.CLIPModle


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_public_model_can_be_had(backend):
    prefix = {"pt": "CLIP", "tf": "TFCLIP", "flax": "FlaxCLIP"}[backend]
    names = [name for name in dir(clipmb) if clipmb._MODULE_OF.get(name) == f"clipmb.{backend}"]
    assert len(names) >= 7
    for name in names:
        assert name.startswith(prefix)
        assert getattr(clipmb, name) is getattr(getattr(clipmb, backend), name)
