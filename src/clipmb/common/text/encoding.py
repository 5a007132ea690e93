"""What a tokenizer returns: the arrays for a model, and for every token its place in the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from clipmb.common.errors import bad_input
from clipmb.common.features import BatchFeature


class CharSpan(NamedTuple):
    """Characters ``start`` up to but without ``end`` of a text."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens ``start`` up to but without ``end`` of a row."""

    start: int
    end: int


@dataclass
class Encoding:
    """One row of tokens.

    Attributes:
        ids: Token ids.
        tokens: The tokens.
        offsets: Start and end of each token's characters in its text; (0, 0) for special and padding tokens.
        word_ids: Number of each token's word; None for special and padding tokens.
        sequence_ids: 0 for the text, 1 for its pair; None for special and padding tokens.
        special_tokens_mask: 1 for special and padding tokens.
        attention_mask: 0 for padding tokens.
    """

    ids: list[int]
    tokens: list[str]
    offsets: list[tuple[int, int]]
    word_ids: list[int | None]
    sequence_ids: list[int | None]
    special_tokens_mask: list[int]
    attention_mask: list[int]
    type_ids: list[int] = field(default_factory=list)

    @property
    def words(self) -> list[int | None]:
        """The same as `word_ids`."""
        return self.word_ids

    def __len__(self) -> int:
        return len(self.ids)


class BatchEncoding(BatchFeature):
    """The output of a tokenizer: a dict whose entries are attributes too, and questions about single tokens.

    Args:
        data: Field name to list or array.
        tensor_type: "np", "pt", "tf", "jax", or None to leave the values as they are.
        encodings: The rows, or a function that makes them when they are first asked for.
        n_sequences: 1 for texts, 2 for pairs.
    """

    def __init__(
        self,
        data: dict[str, Any] | None = None,
        tensor_type: str | None = None,
        *,
        encodings: list[Encoding] | Callable[[], list[Encoding]] | None = None,
        n_sequences: int | None = None,
    ) -> None:
        self._encodings = encodings
        self.n_sequences = n_sequences
        super().__init__(data, tensor_type)

    def __getattr__(self, name: str) -> Any:
        if name in ("_encodings", "n_sequences"):  # not there yet, while it is being copied
            raise AttributeError(name)
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        try:
            rows = self.encodings
        except ValueError:  # the cleaning loses places: there are none to keep
            rows = None
        return {"data": self.data, "_encodings": rows, "n_sequences": self.n_sequences}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int):
            return self._row(key)
        if isinstance(key, slice):
            return {name: value[key] for name, value in self.data.items()}
        return super().__getitem__(key)

    @property
    def encodings(self) -> list[Encoding] | None:
        """The rows; None when this was not made from texts."""
        if callable(self._encodings):
            self._encodings = self._encodings()
        return self._encodings

    @property
    def is_fast(self) -> bool:
        """Whether words and places of the tokens are known."""
        return self._encodings is not None

    def tokens(self, batch_index: int = 0) -> list[str]:
        """Returns the tokens of a row.

        Args:
            batch_index: The row of the batch.

        Returns:
            The tokens, special and padding ones included.

        Raises:
            IndexError: There is no such row.
            ValueError: There are no places: not made from texts, or by a cleaning that loses them.
        """
        return self._row(batch_index).tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """Returns the number of each token's word.

        Args:
            batch_index: The row of the batch.

        Returns:
            The numbers, counted in each text from 0; None for special and padding tokens.

        Raises:
            IndexError: There is no such row.
            ValueError: There are no places: not made from texts, or by a cleaning that loses them.
        """
        return self._row(batch_index).word_ids

    def words(self, batch_index: int = 0) -> list[int | None]:
        """Returns the same as `word_ids`."""
        return self.word_ids(batch_index)

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """Returns which text each token belongs to.

        Args:
            batch_index: The row of the batch.

        Returns:
            0 for the text, 1 for its pair; None for special and padding tokens.

        Raises:
            IndexError: There is no such row.
            ValueError: There are no places: not made from texts, or by a cleaning that loses them.
        """
        return self._row(batch_index).sequence_ids

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """Returns which text a token belongs to.

        Args:
            batch_or_token_index: The row of the batch; without ``token_index`` the token, in the first row.
            token_index: The token.

        Returns:
            0 for the text, 1 for its pair; None for special and padding tokens.

        Raises:
            IndexError: There is no such row or token.
            ValueError: There are no places: not made from texts, or by a cleaning that loses them.
        """
        row, token = self._at(batch_or_token_index, token_index)
        return row.sequence_ids[token]

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """Returns the number of a token's word.

        Args:
            batch_or_token_index: The row of the batch; without ``token_index`` the token, in the first row.
            token_index: The token.

        Returns:
            The number in its text; None for special and padding tokens.

        Raises:
            IndexError: There is no such row or token.
            ValueError: There are no places: not made from texts, or by a cleaning that loses them.
        """
        row, token = self._at(batch_or_token_index, token_index)
        return row.word_ids[token]

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        """Returns the characters that a token stands for.

        Args:
            batch_or_token_index: The row of the batch; without ``token_index`` the token, in the first row.
            token_index: The token.

        Returns:
            Start and end in the text; None for special and padding tokens.

        Raises:
            IndexError: There is no such row or token.
            ValueError: There are no places: not made from texts, or by a cleaning that loses them.
        """
        row, token = self._at(batch_or_token_index, token_index)
        return None if row.sequence_ids[token] is None else CharSpan(*row.offsets[token])

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """Returns the tokens of a word.

        Args:
            batch_or_word_index: The row of the batch; without ``word_index`` the number of the word, in the first row.
            word_index: The number of the word in its text.
            sequence_index: 0 for the text, 1 for its pair.

        Returns:
            The first token and the one after the last; None when the row has none of them.

        Raises:
            IndexError: There is no such row.
            ValueError: There are no places: not made from texts, or by a cleaning that loses them.
        """
        row, word = self._row_and_index(batch_or_word_index, word_index)
        tokens = [
            i
            for i, (number, sequence) in enumerate(zip(row.word_ids, row.sequence_ids, strict=True))
            if number == word and sequence == sequence_index
        ]
        return TokenSpan(tokens[0], tokens[-1] + 1) if tokens else None

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        """Returns the characters of a word.

        Args:
            batch_or_word_index: The row of the batch; without ``word_index`` the number of the word, in the first row.
            word_index: The number of the word in its text.
            sequence_index: 0 for the text, 1 for its pair.

        Returns:
            Start and end in the text; None when the row has no token of the word.

        Raises:
            IndexError: There is no such row.
            ValueError: There are no places: not made from texts, or by a cleaning that loses them.
        """
        row, _ = self._row_and_index(batch_or_word_index, word_index)
        tokens = self.word_to_tokens(batch_or_word_index, word_index, sequence_index)
        return None if tokens is None else CharSpan(row.offsets[tokens.start][0], row.offsets[tokens.end - 1][1])

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """Returns the first token of a character.

        Args:
            batch_or_char_index: The row of the batch; without ``char_index`` the place, in the first row.
            char_index: The place of the character in its text.
            sequence_index: 0 for the text, 1 for its pair.

        Returns:
            The token; None for white space and what the row has no token of.

        Raises:
            IndexError: There is no such row.
            ValueError: There are no places: not made from texts, or by a cleaning that loses them.
        """
        row, char = self._row_and_index(batch_or_char_index, char_index)
        for i, ((start, end), sequence) in enumerate(zip(row.offsets, row.sequence_ids, strict=True)):
            if sequence == sequence_index and start <= char < end:
                return i
        return None

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """Returns the number of a character's word.

        Args:
            batch_or_char_index: The row of the batch; without ``char_index`` the place, in the first row.
            char_index: The place of the character in its text.
            sequence_index: 0 for the text, 1 for its pair.

        Returns:
            The number; None for white space and what the row has no token of.

        Raises:
            IndexError: There is no such row.
            ValueError: There are no places: not made from texts, or by a cleaning that loses them.
        """
        row, _ = self._row_and_index(batch_or_char_index, char_index)
        token = self.char_to_token(batch_or_char_index, char_index, sequence_index)
        return None if token is None else row.word_ids[token]

    def _row(self, index: int) -> Encoding:
        rows = self.encodings
        if rows is None:
            raise bad_input(
                "Tokens, words and places are only available for encodings produced from text",
                list(self.data),
                "Call the tokenizer on the texts",
                ValueError,
            )
        if not -len(rows) <= index < len(rows):
            raise bad_input(f"The batch has {len(rows)} rows", index, "Pass the index of one of them", IndexError)
        return rows[index]

    def _row_and_index(self, first: int, second: int | None) -> tuple[Encoding, int]:
        """The convention of transformers 4: one index is of the first row, two are row and index."""
        return (self._row(0), first) if second is None else (self._row(first), second)

    def _at(self, first: int, second: int | None) -> tuple[Encoding, int]:
        row, token = self._row_and_index(first, second)
        if not -len(row) <= token < len(row):
            raise bad_input(f"The row has {len(row)} tokens", token, "Pass the index of one of them", IndexError)
        return row, token
