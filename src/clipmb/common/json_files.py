"""Reading and writing JSON files: one reader, one wording of its errors, one form of what is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipmb.common.errors import CheckpointError, bad_input


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        CheckpointError: The file cannot be read, is not JSON, or holds something other than an object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return parse_json(text, str(path))


def parse_json(text: str, origin: str) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
        text: The JSON.
        origin: Where it comes from, for the message.

    Raises:
        CheckpointError: It is not JSON, or not an object.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin} is not valid JSON: {error}") from error
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
