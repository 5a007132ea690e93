"""The settings of one call of a tokenizer: what is allowed, and the defaults."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clipmb.common.errors import bad_input, one_of, whole_number
from clipmb.common.features import check_tensor_type

SIDES = ("right", "left")
NO_LIMIT = 10**20  # no length; transformers 4 writes 1e30 where nothing was said
_TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")
_PADDINGS = ("longest", "max_length", "do_not_pad")


@dataclass(frozen=True)
class Options:
    """The settings of one call, checked and with every default filled in; see `clipmb.CLIPTokenizer`'s ``__call__``."""

    add_special_tokens: bool = True
    padding: str = "do_not_pad"
    truncation: str = "do_not_truncate"
    max_length: int = NO_LIMIT
    stride: int = 0
    is_split_into_words: bool = False
    pad_to_multiple_of: int | None = None
    padding_side: str = "right"
    return_tensors: str | None = None
    return_token_type_ids: bool = False
    return_attention_mask: bool = True
    return_overflowing_tokens: bool = False
    return_special_tokens_mask: bool = False
    return_offsets_mapping: bool = False
    return_length: bool = False
    split_special_tokens: bool = False
    warns_of_length: bool = False


_NAMES = tuple(name for name in Options.__dataclass_fields__ if name != "warns_of_length")


def read_options(
    given: dict[str, Any],
    *,
    max_length: int,
    padding_side: str,
    split_special_tokens: bool,
    model_input_names: Sequence[str],
    can_pad: bool,
) -> Options:
    """Checks the arguments of a call and fills in the defaults.

    Args:
        given: The arguments by name, as `clipmb.CLIPTokenizer`'s ``__call__`` describes them. It is changed.
        max_length: The length where none is given, in tokens.
        padding_side: The side where none is given, "right" or "left".
        split_special_tokens: Whether special tokens in texts are ordinary text, where nothing is given.
        model_input_names: "token_type_ids" and "attention_mask" are returned when they are among these names.
        can_pad: Whether there is a pad token.

    Raises:
        TypeError: An argument is unknown.
        ValueError: An argument is out of its range, or padding is asked for and there is no pad token.
    """
    verbose = given.pop("verbose", True)
    if given.pop("pad_to_max_length", False):  # transformers 3's name for it, which 4 still takes
        given["padding"] = "max_length"
    for name in given:
        if name not in _NAMES:
            close = difflib.get_close_matches(name, _NAMES, 1)
            fix = f"Did you mean {close[0]!r}" if close else f"Use one of {', '.join(_NAMES)}"
            raise bad_input("The tokenizer has no such argument", name, fix, TypeError)
    padding, truncation = (_plain(given.pop(name, None)) for name in ("padding", "truncation"))
    if truncation is None and given.get("max_length") is not None and padding in (None, False, "do_not_pad"):
        truncation = "longest_first"
    padding = _choice("padding", padding, _PADDINGS, off="do_not_pad")
    truncation = _choice("truncation", truncation, _TRUNCATIONS, off="do_not_truncate")
    side = given.pop("padding_side", None) or padding_side
    if side not in SIDES:
        raise one_of("padding_side", side, SIDES)
    if padding != "do_not_pad" and not can_pad:
        raise bad_input("Padding needs a pad token", None, "Set tokenizer.pad_token, or pass padding=False")
    length = given.get("max_length")
    given["warns_of_length"] = length is None and verbose
    given["max_length"] = max_length if length is None else whole_number("max_length", length)
    multiple = given.get("pad_to_multiple_of")
    if multiple is not None:
        multiple = given["pad_to_multiple_of"] = whole_number("pad_to_multiple_of", multiple)
        if padding != "do_not_pad" and truncation != "do_not_truncate" and given["max_length"] % multiple:
            raise bad_input(
                "With padding and truncation, max_length must be a multiple of pad_to_multiple_of",
                f"max_length={given['max_length']}, pad_to_multiple_of={multiple}",
                "Change one of them",
                shown=True,
            )
    given["stride"] = whole_number("stride", given.get("stride", 0), least=0)
    given["return_tensors"] = check_tensor_type(given.get("return_tensors"))
    for name in ("token_type_ids", "attention_mask"):
        if given.get(f"return_{name}") is None:
            given[f"return_{name}"] = name in model_input_names
    given.setdefault("split_special_tokens", split_special_tokens)
    return Options(padding=padding, truncation=truncation, padding_side=side, **given)


def _plain(value: Any) -> Any:
    """Returns the string of an enum of transformers 4, and anything else as it is."""
    return getattr(value, "value", value)


def _choice(field: str, value: Any, choices: tuple[str, ...], off: str) -> str:
    """Returns a padding or truncation by its name; True means the first of them."""
    if value is None or value is False:
        return off
    if value is True:
        return choices[0]
    if value not in choices:
        raise one_of(field, value, (True, False, *choices))
    return value
