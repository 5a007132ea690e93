"""JSON files: one reader, one wording of its errors, one form of what is written, and what objects of a file share."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self, overload

from clipmb.common.errors import CheckpointError, bad_input, require_file
from clipmb.common.former import UNNEEDED
from clipmb.common.hub import Source
from clipmb.common.saving import write_atomically

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class ContentError(CheckpointError, ValueError):
    """A file is readable, and something in it has the wrong type or an impossible value.

    It is a ``ValueError`` too because that is what the same value raises as an argument.
    """


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        CheckpointError: The file cannot be read, is not JSON, or holds something other than an object.
    """
    return parse_json(read_text(path), str(path))


def read_text(path: str | Path) -> str:
    """Reads a UTF-8 file.

    Raises:
        CheckpointError: It cannot be read, or is a pipe or device, which might never end.
    """
    try:
        require_file(path)
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def parse_json(text: str, origin: str) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
        text: The JSON.
        origin: Where it comes from, for the message.

    Raises:
        CheckpointError: It is not JSON, not an object, or has characters that no file can hold.
    """
    try:
        content = json.loads(text)
        if _SURROGATE.search(text):  # half a character, which could not be written again
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{origin} must hold a JSON object, but holds {type(content).__name__}.")
    return content


def json_text(content: Any, *, ascii: bool = True) -> str:
    """Returns the text of a JSON file: sorted keys, an indentation of two, a newline at the end.

    Args:
        content: JSON values; numpy's numbers and arrays become numbers and lists.
        ascii: Escape every character outside of ASCII.

    Raises:
        TypeError: A value has no form in JSON.
    """

    def plain(value: Any) -> Any:
        if hasattr(value, "tolist"):
            return value.tolist()
        raise bad_input("Settings must be JSON values", value, "Remove this attribute before saving", TypeError)

    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=ascii, default=plain) + "\n"


def json_values(value: Any, name: str = "value") -> Any:
    """Returns a value in its JSON form; NaN and infinity, which JSON does not have, as None.

    Args:
        value: Numbers, text, lists and mappings, nested; numpy's and the frameworks' scalars become numbers.
        name: What to call it in errors.

    Raises:
        TypeError: Something has no JSON form.
    """
    if isinstance(value, Mapping):
        return {str(key): json_values(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(inner, f"{name}[{i}]") for i, inner in enumerate(value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return json_values(value.item(), name)
    raise bad_input(f"{name} must be a number, a text, a list or a mapping", value, "Convert it", TypeError)


@contextmanager
def content_of(origin: object, *, changed: object = None) -> Iterator[None]:
    """Turns whatever building an object from a file raises into one error that names the file.

    Args:
        origin: The file or folder.
        changed: Arguments that override what the file says; where there are some, a wrong type or value may be theirs,
            and its error stays as it is.

    Raises:
        ContentError: The file has the wrong content.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        if changed:
            raise
        raise ContentError(f"{origin}: {error}") from error
    except (AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ContentError(f"{origin} does not have the content of its kind: {repr(error)[:200]}") from error


class JsonSettings:
    """Settings that are stored as a JSON object in a file of their own: config and image processor."""

    _kept: dict[str, Any]

    def _keep(self, unknown: Mapping[str, Any]) -> None:
        """Makes attributes of entries that the class does not know, so that they can be read and are written back.

        An entry with the name of something that objects of the class have, or of something private, is written back
        too, but is no attribute.
        """
        reserved = {name for name in unknown if name.startswith("_") or hasattr(type(self), name)}
        self._kept = {name: unknown[name] for name in reserved}
        self.__dict__.update({name: value for name, value in unknown.items() if name not in reserved})

    def to_dict(self) -> dict[str, Any]:
        """Returns every entry, as JSON values."""
        raise NotImplementedError

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns the entries that differ from the class's defaults, and the one that names the class."""
        defaults = type(self)().to_dict()
        named = ("model_type", "image_processor_type")
        return {
            key: value
            for key, value in self.to_dict().items()
            if key in named or key not in defaults or value != defaults[key]
        }

    def to_json_string(self, use_diff: bool = False) -> str:
        """Returns the text of the file: sorted keys, indented by 2, ending in a newline.

        Args:
            use_diff: Only the entries that differ from the defaults.

        Raises:
            TypeError: A value has no form in JSON.
        """
        return json_text(self.to_diff_dict() if use_diff else self.to_dict())

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = False) -> None:
        """Writes `to_json_string` to a file."""
        write_atomically(Path(json_file_path), self.to_json_string(use_diff).encode())

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Self:
        """Reads a file that `to_json_file` wrote.

        Raises:
            CheckpointError: The file is missing, not JSON, or has the wrong content.
        """
        with content_of(json_file):
            return cls.from_dict(read_json(Path(json_file)))

    @classmethod
    def _build(
        cls, entries: dict[str, Any], changes: dict[str, Any], return_unused: bool
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Builds one from the content of a file and what is to be changed in it."""
        raise NotImplementedError

    @overload
    @classmethod
    def from_dict(
        cls, entries: dict[str, Any], *, return_unused_kwargs: Literal[False] = False, **changes: Any
    ) -> Self: ...
    @overload
    @classmethod
    def from_dict(
        cls, entries: dict[str, Any], *, return_unused_kwargs: Literal[True], **changes: Any
    ) -> tuple[Self, dict[str, Any]]: ...
    @classmethod
    def from_dict(
        cls, entries: dict[str, Any], *, return_unused_kwargs: bool = False, **changes: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Builds one from the content of its file, as `to_dict` returns it.

        The text and vision configs also accept the content of a full CLIP and take their part.

        Args:
            entries: The content.
            return_unused_kwargs: Return the changes that name no entry too; otherwise a config keeps them, and an image
                processor logs them.
            **changes: Entries to override; dictionaries given for a nested config change only the keys they name.

        Raises:
            ValueError: It is the config of another model, or a value is impossible.
        """
        return cls._build(entries, changes, return_unused_kwargs)

    @classmethod
    def _read(
        cls, name_or_path: str | os.PathLike[str] | Source, options: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any], str]:
        """Returns the content of the file, the options that are no `Source`'s, and what to call the file."""
        raise NotImplementedError

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | Source,
        *,
        return_unused_kwargs: Literal[False] = False,
        **options: Any,
    ) -> Self: ...
    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | Source,
        *,
        return_unused_kwargs: Literal[True],
        **options: Any,
    ) -> tuple[Self, dict[str, Any]]: ...
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | Source,
        *,
        return_unused_kwargs: bool = False,
        **options: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Reads the file of a folder or hub id, or the file itself.

        An image processor's is the ``image_processor`` entry of processor_config.json (transformers 5) or, without one,
        preprocessor_config.json (transformers 4), as in transformers 5; a config's is config.json.

        Args:
            pretrained_model_name_or_path: Folder, hub id, or path of a ``.json`` file.
            return_unused_kwargs: As in `from_dict`.
            **options: ``subfolder``, ``revision``, ``cache_dir``, ``token``, ``local_files_only``, ``force_download``
                say where; those of transformers 4 that chose among files or loaders have no effect; all others
                override entries.

        Raises:
            CheckpointError: The file is missing, is not JSON, or has the wrong content.
            ValueError: It is the config of another model, or a value is impossible.
        """
        entries, changes, origin = cls._read(pretrained_model_name_or_path, options)
        if not return_unused_kwargs:  # otherwise the caller reads them
            changes = {name: value for name, value in changes.items() if name not in UNNEEDED}
        with content_of(origin, changed=changes):
            return cls._build(entries, changes, return_unused_kwargs)
