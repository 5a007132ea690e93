"""Added tokens: what they are, and how they are found in a text before it is cut into words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from clipmb.common.errors import bad_input, boolean


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before anything else is done to it.

    Attributes:
        content: The token.
        single_word: Only where it stands alone: CLIPTokenizerFast not inside a word, CLIPTokenizer between whitespace.
        lstrip: It takes the whitespace on its left with it.
        rstrip: It takes the whitespace on its right with it.
        normalized: `CLIPTokenizerFast` searches it in the cleaned text, so in any case; otherwise in the raw text.
        special: Left out by ``skip_special_tokens``. None: no.
    """

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False

    def __post_init__(self) -> None:
        if self.normalized is None:
            object.__setattr__(self, "normalized", not self.special)

    def __str__(self) -> str:
        return self.content

    @classmethod
    def of(cls, token: Any, **defaults: Any) -> AddedToken:
        """Builds one from a string, from a dict as tokenizer files hold it, or from any object with these attributes.

        Raises:
            TypeError: It is not one of these.
            ValueError: The content is empty.
        """
        names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
        if isinstance(token, str):
            made = cls(token, **defaults)
        elif isinstance(token, dict) and isinstance(token.get("content"), str):
            made = cls(**{**defaults, **{name: token[name] for name in names if name in token}})
        elif isinstance(getattr(token, "content", None), str):
            made = cls(**{**defaults, **{name: getattr(token, name) for name in names if hasattr(token, name)}})
        else:
            raise bad_input("A token must be a string or an AddedToken", token, "Pass the token's text", TypeError)
        for name in names[1:]:
            boolean(f"{name} of the token {made.content!r}", getattr(made, name))
        if not made.content:
            raise bad_input("A token must have at least one character", token, "Leave it out")
        return made

    def flags(self, *, special: bool = True) -> dict[str, Any]:
        """Returns the token as tokenizer files hold it."""
        names = ("content", "lstrip", "normalized", "rstrip", "single_word") + (("special",) if special else ())
        return {name: getattr(self, name) for name in names}


def finder(added: Iterable[tuple[AddedToken, int]], spaced: bool) -> re.Pattern[str] | None:
    """Compiles the search for added tokens: leftmost, then longest. ``spaced``: single words have whitespace around."""
    before, after = (r"(?<!\S)", r"(?!\S)") if spaced else (r"(?<!\w)", r"(?!\w)")
    alternatives = []
    for token, _ in sorted(added, key=lambda item: -len(item[0].content)):
        found = f"(?:{re.escape(token.content)})"
        found = before + found + after if token.single_word else found
        alternatives.append((r"\s*" if token.lstrip else "") + f"({found})" + (r"\s*" if token.rstrip else ""))
    return re.compile("|".join(alternatives)) if alternatives else None


def cut(text: str, pattern: re.Pattern[str] | None, ids: dict[str, int]) -> Iterator[tuple[int, int, int | None]]:
    """Yields start, end and the added token's id; None where there is text between added tokens."""
    at = 0
    if pattern is not None:
        for match in pattern.finditer(text):
            if match.start() > at:
                yield at, match.start(), None
            yield match.start(), match.end(), ids[match[match.lastindex or 0]]
            at = match.end()
    if at < len(text):
        yield at, len(text), None
