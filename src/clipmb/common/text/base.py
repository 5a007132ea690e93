"""The vocabulary of a tokenizer: tokens, ids, special and added tokens."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar, Self, overload

import numpy as np

from clipmb.common.errors import bad_input, boolean, one_of, whole_number
from clipmb.common.features import to_numpy
from clipmb.common.text.added import AddedToken
from clipmb.common.text.engine import Engine
from clipmb.common.text.options import SIDES
from clipmb.common.text.vocabulary import (
    MOST_IDS,
    Vocabulary,
    official,
    read_tokenizer_json,
)

MODEL_MAX_LENGTH = 77
INPUT_NAMES = ("input_ids", "attention_mask")
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class SpecialToken:
    """A special token as an attribute: its text, or None."""

    def __set_name__(self, owner: type[Tokens], name: str) -> None:
        self._name = name
        self.__doc__ = f"The {name.replace('_', ' ')}, or None."

    @overload
    def __get__(self, tokens: None, owner: type[Tokens]) -> Self: ...
    @overload
    def __get__(self, tokens: Tokens, owner: type[Tokens]) -> str | None: ...
    def __get__(self, tokens: Tokens | None, owner: type[Tokens]) -> Self | str | None:
        return self if tokens is None else tokens._special.get(self._name)

    def __set__(self, tokens: Tokens, token: str | AddedToken | None) -> None:
        if token is None:
            tokens._special.pop(self._name, None)
        else:
            tokens._special[self._name] = tokens._known_token(self._name, AddedToken.of(token, special=True).content)
        tokens._rebuild()


class SpecialTokenId:
    """The id of one special token, or None; assigned, it makes the token of that id the special one."""

    def __set_name__(self, owner: type[Tokens], name: str) -> None:
        self._name = name.removesuffix("_id")
        self.__doc__ = f"The id of the {self._name.replace('_', ' ')}, or None."

    @overload
    def __get__(self, tokens: None, owner: type[Tokens]) -> Self: ...
    @overload
    def __get__(self, tokens: Tokens, owner: type[Tokens]) -> int | None: ...
    def __get__(self, tokens: Tokens | None, owner: type[Tokens]) -> Self | int | None:
        if tokens is None:
            return self
        token = tokens._special.get(self._name)
        return None if token is None else tokens.convert_tokens_to_ids(token)

    def __set__(self, tokens: Tokens, index: int | None) -> None:
        setattr(tokens, self._name, None if index is None else tokens._token_at(self._name, index))


class _AddedIds(MutableMapping[str, int]):
    """Added token to id, as a view of id to added token: what changes one of them changes both."""

    def __init__(self, added: dict[int, AddedToken]) -> None:
        self._added = added

    def _ids(self) -> dict[str, int]:
        return {token.content: index for index, token in self._added.items()}

    def __getitem__(self, content: str) -> int:
        return self._ids()[content]

    def __setitem__(self, content: str, index: int) -> None:
        if self._ids().get(content) != index:
            self._added[index] = AddedToken.of(content)

    def __delitem__(self, content: str) -> None:
        self._added.pop(self._ids().get(content, -1), None)  # already gone when it was taken out of the other side

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids())

    def __len__(self) -> int:
        return len(self._added)


class Tokens:
    """What a tokenizer knows about its tokens; the arguments are `CLIPTokenizer`'s."""

    vocab_files_names: ClassVar[dict[str, str]] = {
        "vocab_file": "vocab.json",
        "merges_file": "merges.txt",
        "tokenizer_file": "tokenizer.json",
    }
    is_fast: ClassVar[bool] = False
    slow_tokenizer_class: ClassVar[type[Tokens] | None] = None
    SPECIAL_TOKENS_ATTRIBUTES: ClassVar[list[str]] = [*SPECIAL, "additional_special_tokens"]
    chat_template = None
    verbose = False
    _default_cleaning: ClassVar[str] = "basic"
    _prefers: ClassVar[str] = "vocab.json"

    bos_token = SpecialToken()
    eos_token = SpecialToken()
    unk_token = SpecialToken()
    sep_token = SpecialToken()
    pad_token = SpecialToken()
    cls_token = SpecialToken()
    mask_token = SpecialToken()
    bos_token_id = SpecialTokenId()
    eos_token_id = SpecialTokenId()
    unk_token_id = SpecialTokenId()
    sep_token_id = SpecialTokenId()
    pad_token_id = SpecialTokenId()
    cls_token_id = SpecialTokenId()
    mask_token_id = SpecialTokenId()
    pad_token_type_id = 0
    init_inputs: tuple[Any, ...] = ()

    def __init__(
        self,
        /,
        vocab_file: str | os.PathLike[str] | None = None,
        merges_file: str | os.PathLike[str] | None = None,
        tokenizer_file: str | os.PathLike[str] | None = None,
        *,
        errors: str = "replace",
        unk_token: Any = "<|endoftext|>",
        bos_token: Any = "<|startoftext|>",
        eos_token: Any = "<|endoftext|>",
        pad_token: Any = "<|endoftext|>",
        text_cleaning: str | None = None,
        model_max_length: int | None = None,
        padding_side: str = "right",
        truncation_side: str = "right",
        clean_up_tokenization_spaces: bool = False,
        additional_special_tokens: Sequence[Any] | None = None,
        split_special_tokens: bool = False,
        added_tokens_decoder: Mapping[Any, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        vocabulary, added = self._open(vocab_file, merges_file, tokenizer_file)
        for side, field in ((padding_side, "padding_side"), (truncation_side, "truncation_side")):
            if side not in SIDES:
                raise one_of(field, side, SIDES)
        if errors not in ("replace", "ignore", "strict"):
            raise one_of("errors", errors, ("replace", "ignore", "strict"))
        self.errors = errors
        self.padding_side = padding_side
        self.truncation_side = truncation_side
        self.clean_up_tokenization_spaces = boolean("clean_up_tokenization_spaces", clean_up_tokenization_spaces)
        self.split_special_tokens = boolean("split_special_tokens", split_special_tokens)
        self.model_max_length = (
            MODEL_MAX_LENGTH if model_max_length is None else whole_number("model_max_length", model_max_length)
        )
        self.model_input_names = _names("model_input_names", kwargs.pop("model_input_names", None) or INPUT_NAMES)
        self.name_or_path = str(kwargs.pop("name_or_path", ""))
        self.text_cleaning = self._default_cleaning if text_cleaning is None else text_cleaning

        special: dict[str, Any] = {
            "bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token, "pad_token": pad_token,
            **{name: kwargs.pop(name) for name in SPECIAL if name in kwargs},
        }  # fmt: skip
        # Start, end and unknown token are found in any case when cleaned; other special tokens only as they are.
        tokens = {
            name: AddedToken.of(token, special=True, normalized=name in ("bos_token", "eos_token", "unk_token"))
            for name, token in special.items()
            if token is not None
        }
        if not isinstance(additional_special_tokens, list | tuple | None):
            raise _no_list(additional_special_tokens)
        extra = [AddedToken.of(token, special=True) for token in additional_special_tokens or ()]
        kwargs.pop("tokenizer_class", None)
        self.init_kwargs: dict[str, Any] = {
            **kwargs, **tokens, "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces, "errors": errors,
            "model_max_length": self.model_max_length, "name_or_path": self.name_or_path,
        }  # fmt: skip
        self._special: dict[str, str] = {name: token.content for name, token in tokens.items()}
        self._additional = [token.content for token in extra]
        self._vocabulary = vocabulary
        self._added: dict[int, AddedToken] = {}
        if added_tokens_decoder is not None and not isinstance(added_tokens_decoder, Mapping):
            raise bad_input(
                "added_tokens_decoder must map ids to tokens", added_tokens_decoder, "Correct added_tokens_decoder"
            )
        for index, token in (added_tokens_decoder or {}).items():
            self._add_at(token, index)
        for token in added:
            self._add_at(token, token["id"])
        for token in (*tokens.values(), *extra):
            if token.content not in self.added_tokens_encoder:
                self._add([token], special=True)
        self._engine = self._new_engine()
        self._tokens_of_ids: tuple[Engine | None, dict[int, str]] = (None, {})

    @staticmethod
    def _open(vocab_file: Any, merges_file: Any, tokenizer_file: Any) -> tuple[Vocabulary, list[dict[str, Any]]]:
        if (vocab_file is None) != (merges_file is None) and tokenizer_file is None:
            raise bad_input(
                "vocab.json and merges.txt belong together",
                f"vocab_file={vocab_file!r}, merges_file={merges_file!r}",
                "Pass both, or neither for the published models' vocabulary",
                shown=True,
            )
        if tokenizer_file is not None:
            content = read_tokenizer_json(os.fspath(tokenizer_file))
            return content.vocabulary, content.added
        if vocab_file is None or merges_file is None:
            return official(), []
        return Vocabulary.read(os.fspath(vocab_file), os.fspath(merges_file)), []

    def _add_at(self, token: Any, index: Any) -> None:
        """Adds a token under the id that a file gives it."""
        made = AddedToken.of(token)
        plain = int(index) if isinstance(index, str) and index.isdecimal() and len(index) < 20 else index
        number = whole_number(f"The id of the added token {made.content[:100]!r}", plain, 0, MOST_IDS)
        known = self._vocabulary.ids.get(made.content, number)
        if known != number or self._added.get(number, made).content != made.content:
            other = f"elsewhere {known}" if known != number else f"that is the id of {self._added[number].content!r}"
            raise bad_input(
                "An added token must have exactly one id",
                f"{number} for {made.content!r}, but {other}",
                "Repair the files",
                shown=True,
            )
        self._added[number] = made

    @property
    def vocab_size(self) -> int:
        """Number of tokens without the added ones."""
        return len(self._vocabulary.ids)

    def __len__(self) -> int:
        return self.vocab_size + sum(token.content not in self._vocabulary.ids for token in self._added.values())

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, "
            f"model_max_length={self.model_max_length}, text_cleaning={self.text_cleaning!r}, "
            f"padding_side={self.padding_side!r}, truncation_side={self.truncation_side!r}, "
            f"special_tokens={self.special_tokens_map})"
        )

    @property
    def encoder(self) -> dict[str, int]:
        """Token to id, without the added ones."""
        return dict(self._vocabulary.ids)

    @property
    def decoder(self) -> dict[int, str]:
        """Id to token, without the added ones."""
        return self._vocabulary.tokens

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Added token to id, the special ones among them."""
        return {token.content: index for index, token in self._added.items()}

    # By the next three names, programs written for transformers take added tokens out again.

    @property
    def _added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Id to added token, to be changed in place; `_update_trie` makes it take effect."""
        return self._added

    @property
    def _added_tokens_encoder(self) -> MutableMapping[str, int]:
        """The same, seen from the other side."""
        return _AddedIds(self._added)

    def _update_trie(self) -> None:
        self._rebuild()

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Id to added token, the special ones among them, by rising id."""
        return dict(sorted(self._added.items()))

    def get_vocab(self) -> dict[str, int]:
        """Returns token to id, with the added ones."""
        return {**self._vocabulary.ids, **self.added_tokens_encoder}

    @property
    def vocab(self) -> dict[str, int]:
        """The same as `get_vocab`."""
        return self.get_vocab()

    def get_added_vocab(self) -> dict[str, int]:
        """Returns added token to id."""
        return self.added_tokens_encoder

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        """Name (``bos_token``, …) to special token."""
        named: dict[str, Any] = {name: self._special[name] for name in SPECIAL if name in self._special}
        return {**named, "additional_special_tokens": list(self._additional)} if self._additional else named

    @property
    def additional_special_tokens(self) -> list[str]:
        """Special tokens without a name."""
        return list(self._additional)

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Sequence[str | AddedToken] | None) -> None:
        if not isinstance(tokens, list | tuple | None):
            raise _no_list(tokens)
        name = "additional_special_tokens"
        self._additional = [
            self._known_token(name, AddedToken.of(token, special=True).content) for token in tokens or ()
        ]
        self._rebuild()

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """Ids of the special tokens without a name."""
        return self._known_ids(self._additional)

    @additional_special_tokens_ids.setter
    def additional_special_tokens_ids(self, ids: Sequence[int]) -> None:
        self.additional_special_tokens = [self._token_at("additional_special_tokens", index) for index in ids]

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token once."""
        return list(dict.fromkeys([*(self._special[n] for n in SPECIAL if n in self._special), *self._additional]))

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of `all_special_tokens`."""
        return self._known_ids(self.all_special_tokens)

    @property
    def special_tokens_map_extended(self) -> dict[str, Any]:
        """Name to special token, as `AddedToken`."""
        added = {token.content: token for token in self._added.values()}

        def extended(token: str) -> AddedToken | str:
            return added.get(token, token)

        return {
            name: [extended(one) for one in token] if isinstance(token, list) else extended(token)
            for name, token in self.special_tokens_map.items()
        }

    @property
    def all_special_tokens_extended(self) -> list[AddedToken | str]:
        """Every special token once, as `AddedToken`."""
        added = {token.content: token for token in self._added.values()}
        return [added.get(token, token) for token in self.all_special_tokens]

    def sanitize_special_tokens(self) -> int:
        """Adds the special tokens that the vocabulary lacks, and returns how many these were."""
        return self.add_tokens(self.all_special_tokens, special_tokens=True)

    def _token_at(self, name: str, index: int) -> str:
        """Returns the token of an id that a special token is to have."""
        token = self._id_to_token().get(whole_number(f"The id of {name}", index, 0))
        if token is None:
            raise bad_input(f"The {name} must be in the vocabulary", index, "Pass the id of a token")
        return token

    def _known_ids(self, tokens: list[str]) -> list[int]:
        return [index for index in self.convert_tokens_to_ids(tokens) if index is not None]

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Adds tokens that are found in texts before anything else.

        CLIPTokenizer finds them exactly as they are written; CLIPTokenizerFast finds those with ``normalized=True``,
        the default, in the cleaned text and so in any case.

        Args:
            new_tokens: A string or AddedToken, or a list of them.
            special_tokens: Whether they are special: left out by ``skip_special_tokens``.

        Returns:
            How many of them are new. The model's embeddings must then be enlarged to ``len(tokenizer)``.

        Raises:
            TypeError: A token is neither a string nor an AddedToken.
            ValueError: A token is empty.
        """
        single = not isinstance(new_tokens, list | tuple | set)
        count = self._add([new_tokens] if single else new_tokens, special=special_tokens)
        self._rebuild()
        return count

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_additional_special_tokens: bool = True
    ) -> int:
        """Sets special tokens by name, and adds those that the vocabulary lacks.

        Args:
            special_tokens_dict: Name to token: ``{"pad_token": "<pad>"}``; "additional_special_tokens" to a list.
            replace_additional_special_tokens: The additional ones so far are no longer special; they stay added tokens.

        Returns:
            How many of them are new.

        Raises:
            TypeError: A token is neither a string nor an AddedToken, or the additional ones are not a list.
            ValueError: A name is unknown, or a token is empty.
        """
        names = (*SPECIAL, "additional_special_tokens")
        for name in special_tokens_dict:
            if name not in names:
                raise one_of("The name of a special token", name, names)
        count = 0
        for name, value in special_tokens_dict.items():
            several = name == "additional_special_tokens"
            if several and not isinstance(value, list | tuple):
                raise _no_list(value)
            tokens = [AddedToken.of(token, special=True) for token in (value if several else [value])]
            count += self._add(tokens, special=True)
            if several:
                kept = [] if replace_additional_special_tokens else self._additional
                self._additional = list(dict.fromkeys([*kept, *(token.content for token in tokens)]))
            else:
                self._special[name] = tokens[0].content
        self._rebuild()
        return count

    def _add(self, tokens: Iterable[Any], *, special: bool) -> int:
        count = 0
        for token in tokens:
            made = AddedToken.of(token, special=special)
            if special and not made.special:
                made = AddedToken(**{**made.flags(), "special": True})
            if made.content in self.added_tokens_encoder:
                index = self.added_tokens_encoder[made.content]
                if special:
                    self._added[index] = AddedToken(**{**self._added[index].flags(), "special": True})
                continue
            index = self._vocabulary.ids.get(made.content)
            if index is None:
                index = max(max(self._vocabulary.ids.values()), max(self._added, default=-1)) + 1
                count += 1
            self._added[index] = made
        return count

    def _known_token(self, name: str, token: str) -> str:
        if token not in self._vocabulary.ids and token not in self.added_tokens_encoder:
            raise bad_input(
                f"The {name} must be in the vocabulary",
                token,
                f"Add it with add_special_tokens({{{name!r}: {token!r}}}), and enlarge the model's embeddings",
            )
        return token

    def _new_engine(self) -> Engine:
        added = [(token, index) for index, token in self._added.items()]
        return Engine(self._vocabulary, self.text_cleaning, added, self.unk_token)

    def _rebuild(self) -> None:
        """Replaces the engine, so that threads that use the old one are not disturbed."""
        self._engine = self._new_engine()

    @overload
    def convert_tokens_to_ids(self, tokens: None) -> None: ...
    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str] | tuple[str, ...]) -> list[int | None]: ...
    def convert_tokens_to_ids(self, tokens: str | list[str] | tuple[str, ...] | None) -> int | list[int | None] | None:
        """Looks up the ids of tokens.

        Args:
            tokens: A token, a list of tokens, or None.

        Returns:
            Its id, or a list of ids. What the vocabulary lacks gets the unknown token's id, or None without such a
            token; so does None.

        Raises:
            TypeError: A token is not a string.
        """
        if tokens is None:
            return None
        added = self.added_tokens_encoder
        unknown = self._special.get("unk_token")
        default = added.get(unknown or "", self._vocabulary.ids.get(unknown or ""))

        def find(token: str) -> int | None:
            if not isinstance(token, str):
                raise bad_input("A token must be a string", token, "Pass str or a list of str", TypeError)
            return added[token] if token in added else self._vocabulary.ids.get(token, default)

        return find(tokens) if isinstance(tokens, str) else [find(token) for token in tokens]

    @overload
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = False) -> str | None: ...
    @overload
    def convert_ids_to_tokens(
        self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False
    ) -> list[str | None]: ...
    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> str | list[str | None] | None:
        """Looks up the tokens of ids.

        Args:
            ids: An id, a list of ids, or an array or tensor of shape (seq,).
            skip_special_tokens: Leave special tokens out; not of a single id.

        Returns:
            The token, or a list of tokens; None for an id outside the vocabulary.

        Raises:
            TypeError: There are several rows of ids, or ids that are not numbers.
        """
        tokens = self._id_to_token()
        if isinstance(ids, int | np.integer):
            return tokens.get(flat_ids([ids])[0])
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        return [tokens.get(index) for index in flat_ids(ids) if index not in skipped]

    def _id_to_token(self) -> dict[int, str]:
        engine, tokens = self._tokens_of_ids
        if engine is not self._engine:  # a token was added since
            engine = self._engine
            tokens = {**self._vocabulary.tokens, **{i: token.content for i, token in self._added.items()}}
            self._tokens_of_ids = engine, tokens
        return tokens


def flat_ids(ids: Any) -> list[int]:
    """Returns the ids of a list, array or tensor of shape (seq,).

    Raises:
        TypeError: There are several rows, or an id is not a whole number.
        ValueError: An id is negative, or larger than any id can be.
    """
    array = ids if isinstance(ids, list | tuple) else to_numpy(ids)
    try:
        found = [operator.index(index) for index in (array if np.ndim(array) else np.reshape(array, -1))]
    except TypeError:
        raise bad_input(
            "Ids must be whole numbers, in a list or array of shape (seq,)", ids, "Use batch_decode for several rows",
            TypeError,
        ) from None  # fmt: skip
    if found and not (min(found) >= 0 and max(found) <= MOST_IDS):
        raise bad_input("An id is at least 0 and below 2**31", [i for i in found if not 0 <= i <= MOST_IDS], "Drop it")
    return found


def _names(field: str, names: Any) -> list[str]:
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise bad_input(f"{field} must be a list of names", names, f"Correct {field}")
    return list(names)


def _no_list(received: Any) -> Exception:
    return bad_input("additional_special_tokens must be a list", received, "Pass a list of tokens", TypeError)
