"""Compares the public names and arguments of transformers 4's CLIP classes with clipmb's, and writes what is missing.

Usage: python scripts/surface.py [--check] [GROUP ...]

Without --check, rewrites the table in docs/migrating.md: a name that clipmb has by now loses its row, a new one gets a
row with "?", to be replaced by what to use instead. With --check, writes nothing and fails where the table differs.
Needs transformers 4.57.6, and for the groups of models the framework of each.

What counts: every name without a leading underscore that a class or, where one is easily made, an object of
transformers has; the arguments of its methods, those that a method takes from its ``**kwargs`` included; and what its
modules define. The names that models have from their framework do not count, except the arguments of their call.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import os
import re
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipmb.common.former import ABSENT

os.environ.update({"TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"})

PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
START, END = "<!-- table of scripts/surface.py -->", "<!-- end of the table -->"
HEAD = ("| | transformers 4.57.6 has | instead |", "|---|---|---|")
UNSAID = "?"
CALLS = ("__init__", "__call__", "forward", "call")
FILES = ("from_pretrained", "save_pretrained")  # called with each argument that only **kwargs could take
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@dataclass(frozen=True)
class Group:
    """Classes that have their names from the same bases.

    Attributes:
        classes: Their names, the base first.
        modules: The modules of transformers that define them.
        ours: The modules of clipmb where names of those modules may be, beside the package itself.
        framework: Module and name of the class whose names do not count.
    """

    classes: tuple[str, ...]
    modules: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()
    framework: tuple[str, str] = ("builtins", "object")


def _heads(prefix: str) -> tuple[str, ...]:
    names = (
        "PreTrainedModel", "TextPreTrainedModel", "VisionPreTrainedModel", "Model", "TextModel",
        "TextModelWithProjection", "VisionModel", "VisionModelWithProjection", "ForImageClassification",
    )  # fmt: skip
    return tuple(f"{prefix}{name}" for name in names)


GROUPS = {
    "configs": Group(
        ("CLIPConfig", "CLIPTextConfig", "CLIPVisionConfig", "CLIPOnnxConfig"),
        ("configuration_clip",),
        ("common.config",),
    ),
    "tokenizers": Group(
        ("CLIPTokenizer", "CLIPTokenizerFast"),
        ("tokenization_clip", "tokenization_clip_fast"),
        ("common.text.tokenizer",),
    ),
    "image processors": Group(
        ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor"),
        ("image_processing_clip", "image_processing_clip_fast", "feature_extraction_clip"),
        ("common.image.processor",),
    ),
    "processor": Group(("CLIPProcessor",), ("processing_clip",), ("common.processor",)),
    "encodings": Group(("BatchEncoding", "BatchFeature"), (), (), ("collections", "UserDict")),
    "outputs": Group(
        ("ModelOutput", "CLIPOutput", "CLIPTextModelOutput", "CLIPVisionModelOutput", "BaseModelOutputWithPooling"),
        framework=("collections", "OrderedDict"),
    ),
    "PyTorch models": Group(
        _heads("CLIP"), ("modeling_clip",), ("pt.modeling", "pt.layers", "pt.losses"), ("torch.nn", "Module")
    ),
    "TensorFlow models": Group(
        _heads("TFCLIP"), ("modeling_tf_clip",), ("tf.modeling", "tf.layers", "tf.losses"), ("tf_keras", "Model")
    ),
    "Flax models": Group(
        _heads("FlaxCLIP"), ("modeling_flax_clip",), ("flax.modeling", "flax.modules", "flax.losses", "flax.layers")
    ),
}
FRAMEWORKS = {"PyTorch models": "torch", "TensorFlow models": "tf_keras", "Flax models": "flax"}


@dataclass
class Missing:
    """What classes of one group lack.

    Attributes:
        names: Each missing name, as the table shows it, to the classes that lack it.
        having: Each name of transformers to the classes that have it there.
    """

    names: dict[str, set[str]] = field(default_factory=dict)
    having: dict[str, set[str]] = field(default_factory=dict)

    def see(self, name: str, owner: str, present: bool) -> None:
        """Records a name that a class of transformers has."""
        self.having.setdefault(name, set()).add(owner)
        if not present:
            self.names.setdefault(name, set()).add(owner)

    def shown(self) -> list[str]:
        """Returns the missing names, with their class where another class of the group has them."""
        found = set()
        for name, owners in self.names.items():
            everywhere = owners == self.having[name]
            found.update({name} if everywhere else {f"{owner}.{name}" for owner in owners})
        return sorted(found)


def missing(group: Group) -> list[str]:
    """Returns what transformers has and clipmb lacks, for one group."""
    theirs_all, ours_all = importlib.import_module("transformers"), importlib.import_module("clipmb")
    output = importlib.import_module("transformers.modeling_outputs")
    module, name = group.framework
    base = set(dir(getattr(importlib.import_module(module), name)))
    lacking = Missing()
    for name in group.classes:
        theirs = getattr(theirs_all, name, getattr(output, name, None)) or _defined(group, name)
        ours = getattr(ours_all, name, None)
        if theirs is None:
            continue
        lacking.see(f"`{name}`", "", ours is not None)
        if ours is not None:
            _compare(name, theirs, ours, base, lacking)
    for module in group.modules:
        content = importlib.import_module(f"transformers.models.clip.{module}")
        places = [ours_all, *(importlib.import_module(f"clipmb.{place}") for place in group.ours)]
        for name, value in vars(content).items():
            own = getattr(value, "__module__", None) == content.__name__ or (
                name.isupper() and not name.endswith("DOCSTRING") and isinstance(value, str | int | float | dict)
            )
            if own and not name.startswith("_"):
                lacking.see(f"`{name}`", "", any(hasattr(place, name) for place in places))
    return lacking.shown()


def _defined(group: Group, name: str) -> Any:
    modules = (importlib.import_module(f"transformers.models.clip.{module}") for module in group.modules)
    return next((getattr(module, name) for module in modules if hasattr(module, name)), None)


def _compare(name: str, theirs: type, ours: type, base: set[str], lacking: Missing) -> None:
    """Compares one class of transformers with clipmb's of the same name."""
    their_object, our_object = _made(name, theirs), _made(name, ours)
    names = {attribute for attribute in dir(theirs) if attribute not in base}
    if their_object is not None:
        children = getattr(their_object, "_modules", ())  # the parts of a model stand in its checkpoint
        names |= {attribute for attribute in (*vars(their_object), *children) if attribute not in base}
    for attribute in sorted(names | (set(CALLS) & set(dir(theirs)))):
        if attribute.startswith("_") and attribute not in CALLS:
            continue
        present = hasattr(ours, attribute) or _has(our_object, attribute) or attribute in inspect.get_annotations(ours)
        if attribute not in CALLS:
            lacking.see(f"`{attribute}`", name, present)
        if not present or (attribute in ("__init__", "forward") and "Mixin" in theirs.__name__):
            continue
        arguments = _arguments(getattr(theirs, attribute, None))
        accepted = _acceptance(name, ours, attribute, our_object)
        for argument, default in arguments.items():
            label = name if attribute == "__init__" else attribute
            lacking.see(f"`{label}({argument}=)`", name, accepted(argument, default))


def _has(value: Any, attribute: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return value is not None and hasattr(value, attribute)


def _arguments(function: Any) -> dict[str, Any]:
    """Returns the arguments of a function to their defaults: its own, and those that it takes from its kwargs."""
    if not callable(function) or inspect.isclass(function):
        return {}
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in ("self", "cls")]
    found = {p.name: None if p.default is p.empty else p.default for p in named}
    rest = next((p.name for p in parameters if p.kind == p.VAR_KEYWORD), None)
    if rest is not None:
        with suppress(OSError, TypeError, SyntaxError):
            for argument in _taken(textwrap.dedent(inspect.getsource(inspect.unwrap(function))), rest):
                found.setdefault(argument, None)
    return {argument: default for argument, default in found.items() if not argument.startswith("_")}


def _taken(source: str, kwargs: str) -> Iterator[str]:
    """Yields the names that a function takes from its ``**kwargs``."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("pop", "get", "setdefault")
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == kwargs
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def _acceptance(name: str, ours: type, attribute: str, made: Any) -> Callable[[str, Any], bool]:
    """Returns whether clipmb's method takes an argument, at the default that it has in transformers."""
    function = getattr(ours, attribute, None) or getattr(made, attribute, None)
    if not callable(function) or inspect.isclass(function):
        return lambda argument, default: True
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return lambda argument, default: True
    open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters.values())

    def accepted(argument: str, default: Any) -> bool:
        if argument in parameters or not open_ended:
            return argument in parameters
        return _called(made, attribute, {argument: default}) if attribute in FILES else True

    return accepted


def _called(made: Any, attribute: str, options: dict[str, Any]) -> bool:
    """Whether reading or saving takes an argument at its default."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if made is None:
            return True
        if attribute == "from_pretrained" and ABSENT.keys() & options.keys():
            return False
        try:
            if attribute == "from_pretrained":
                made.save_pretrained(folder)
            getattr(made, attribute)(folder, **options)
        except TypeError:
            return False
        except ValueError:  # it knows the argument, and refuses the value
            return True
    return True


def _made(name: str, cls: type) -> Any:
    """Makes a small object of a class; None where that takes more than this comparison is worth."""
    ours = cls.__module__.startswith("clipmb")
    text, vision = {**SMALL, "vocab_size": 99, "eos_token_id": 98}, {**SMALL, "image_size": 8, "patch_size": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if (name.endswith("Config") and name != "CLIPOnnxConfig") or name.startswith(("CLIPImage", "CLIPFeature")):
            with suppress(ImportError):  # transformers' fast image processor without torchvision
                return cls()
            return None
        if name in ("CLIPTokenizer", "CLIPTokenizerFast"):
            return cls() if ours else cls.from_pretrained(_tokenizer_folder())  # type: ignore[attr-defined]
        if name == "CLIPProcessor":
            if ours:
                return cls()
            library = importlib.import_module("transformers")
            return cls(library.CLIPImageProcessor(), library.CLIPTokenizerFast.from_pretrained(_tokenizer_folder()))
        if name.endswith(("Model", "Projection", "Classification")):  # a base by its first head
            library = importlib.import_module("clipmb" if ours else "transformers")
            config = library.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
            tower = re.search("(Text|Vision)", name)
            config = getattr(config, f"{tower[0].lower()}_config") if tower else config
            return getattr(library, name.replace("PreTrained", ""))(config) if ours or name[:2] != "TF" else None
    return None


def _tokenizer_folder() -> str:
    folder = Path(tempfile.gettempdir()) / "clipmb-surface-tokenizer"
    importlib.import_module("clipmb").CLIPTokenizer().save_pretrained(folder)
    return str(folder)


def rows_of(page: str) -> dict[tuple[str, str], str]:
    """Returns group and name to what the table of a page says to use instead."""
    table = page[page.index(START) : page.index(END)]
    found = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0] in GROUPS:
            found.update({(cells[0], name): cells[2] for name in cells[1].split(", ")})
    return found


def table(rows: dict[tuple[str, str], str]) -> str:
    """Returns the table: one line for the names of a group that share a text."""
    lines = list(HEAD)
    for group in GROUPS:
        texts: dict[str, list[str]] = {}
        for (owner, name), text in sorted(rows.items()):
            if owner == group:
                texts.setdefault(text, []).append(name)
        lines += [f"| {group} | {', '.join(names)} | {text} |" for text, names in texts.items()]
    return "\n".join([START, "", *lines, "", END])


def main() -> int:
    """Rewrites or checks the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="only these: " + ", ".join(GROUPS))
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the table differs")
    given = parser.parse_args()
    page = PAGE.read_text("utf-8")
    known = rows_of(page)
    rows = {key: text for key, text in known.items() if given.groups and key[0] not in given.groups}
    chosen = [name for name in GROUPS if name in given.groups or not given.groups]
    for framework in ("torch", "tf_keras", "flax"):  # torch before TensorFlow: the other order can crash
        if framework in {FRAMEWORKS.get(name) for name in chosen}:
            importlib.import_module(framework)
    for group in chosen:
        rows.update({(group, name): known.get((group, name), UNSAID) for name in missing(GROUPS[group])})
    if given.check:
        gone, new = sorted(known.keys() - rows.keys()), sorted(rows.keys() - known.keys())
        unsaid = sorted(key for key in rows.keys() & known.keys() if rows[key] == UNSAID)
        for what, keys in (("clipmb has by now", gone), ("has no row", new), ('has "?" for a text', unsaid)):
            sys.stdout.writelines(f"{group}: {name} {what}\n" for group, name in keys)
        return int(bool(gone or new or unsaid))
    written = page[: page.index(START)] + table(rows) + page[page.index(END) + len(END) :]
    PAGE.write_text(written, "utf-8")
    sys.stdout.writelines(f"{group}: {name} needs a text\n" for (group, name), text in rows.items() if text == UNSAID)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
