"""Text from ids and tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from clipmb.common.errors import bad_input
from clipmb.common.features import to_numpy
from clipmb.common.text.base import Tokens, flat_ids
from clipmb.common.text.vocabulary import SUFFIX, symbol_bytes


class DecodingTokens(Tokens):
    """The decoding half of a tokenizer: from ids and tokens to text."""

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Joins tokens to text.

        Args:
            tokens: Tokens as the vocabulary has them: bytes as printable characters, ``</w>`` at the end of words.

        Returns:
            CLIPTokenizer: the text, with a space after each word. CLIPTokenizerFast: the tokens' bytes as text, as in
            transformers; `decode` makes words of them.

        Raises:
            UnicodeDecodeError: The bytes are not UTF-8, and ``errors`` of a CLIPTokenizer is "strict".
        """
        if self.is_fast:
            return self._content(tokens).decode("utf-8", errors="replace")
        return self._words(tokens)

    def _words(self, tokens: Sequence[str]) -> str:
        parts = ((token[: -len(SUFFIX)], " ") if token.endswith(SUFFIX) else (token,) for token in tokens)
        return self._content(chain.from_iterable(parts)).decode("utf-8", errors=self.errors).strip()

    @staticmethod
    def _content(tokens: Iterable[str]) -> bytes:
        symbol = symbol_bytes()
        content = bytearray()
        for token in tokens:
            if all(char in symbol for char in token):
                content.extend(symbol[char] for char in token)
            else:
                content.extend(token.encode("utf-8", errors="replace"))
        return bytes(content)

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
        **kwargs: Any,
    ) -> str:
        """Turns ids back into text.

        Args:
            token_ids: An id, a list of ids, or an integer array or tensor of shape (seq,), of any framework. Ids
                outside the vocabulary are left out.
            skip_special_tokens: Leave special tokens out.
            clean_up_tokenization_spaces: Remove spaces before punctuation; the tokenizer's own setting when None.
            spaces_between_special_tokens: CLIPTokenizer: spaces around added tokens that are not special.
            **kwargs: ``use_source_tokenizer``, without effect. Nothing else.

        Returns:
            The text, in lower case as the ids hold it: words, punctuation and digits with a space between.

        Raises:
            TypeError: There are several rows of ids, ids are not whole numbers, or an argument is unknown.
            ValueError: An id is negative, or larger than any id can be.
            UnicodeDecodeError: The bytes are not UTF-8, and the tokenizer's ``errors`` is "strict".
        """
        kwargs.pop("use_source_tokenizer", None)
        if kwargs:
            raise bad_input("decode has no such argument", next(iter(kwargs)), "Leave it out", TypeError)
        ids = flat_ids([token_ids] if isinstance(token_ids, int | np.integer) else token_ids)
        known = self._id_to_token()
        skipped: set[int] = set()
        if skip_special_tokens:
            skipped = {*self.all_special_ids, *(i for i, token in self._added.items() if token.special)}
        apart = {i for i, token in self._added.items() if not token.special and not self.is_fast}
        parts: list[str] = []
        run: list[str] = []
        for index in ids:
            if index in skipped or index not in known:
                continue
            if index in apart:
                parts.extend([self._words(run)] if run else [])
                parts.append(known[index])
                run = []
            else:
                run.append(known[index])
        if run:
            parts.append(self._words(run))
        text = (" " if spaces_between_special_tokens else "").join(part for part in parts if part)
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if clean else text

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """Turns rows of ids back into texts.

        Args:
            sequences: A list of rows, or an integer array or tensor of shape (batch, seq), of any framework.
            skip_special_tokens: Leave special tokens out.
            **options: The other arguments of `decode`.

        Returns:
            One text for each row.

        Raises:
            TypeError: Ids are not whole numbers, or an argument is unknown.
            ValueError: An id is negative, or larger than any id can be.
            UnicodeDecodeError: The bytes are not UTF-8, and the tokenizer's ``errors`` is "strict".
        """
        rows = sequences if isinstance(sequences, list | tuple) else to_numpy(sequences)
        return [self.decode(row, skip_special_tokens, **options) for row in rows]

    @staticmethod
    def clean_up_tokenization(out_string: str) -> str:
        """Removes the spaces that tokens leave before English punctuation and contractions.

        Source: ``clean_up_tokenization`` of transformers 4.
        """
        for spaced in (" .", " ?", " !", " ,"):
            out_string = out_string.replace(spaced, spaced[1:])
        out_string = out_string.replace(" ' ", "'")
        for spaced in (" n't", " 'm", " 's", " 've", " 're"):
            out_string = out_string.replace(spaced, spaced[1:])
        return out_string
