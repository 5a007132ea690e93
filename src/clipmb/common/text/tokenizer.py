"""CLIPTokenizer and CLIPTokenizerFast: texts in, ids for CLIP's text tower out, and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, overload

from clipmb.common.errors import bad_input, logger
from clipmb.common.features import to_numpy
from clipmb.common.saving import write_atomically
from clipmb.common.text.added import AddedToken
from clipmb.common.text.encoding import BatchEncoding, CharSpan, Encoding, TokenSpan
from clipmb.common.text.engine import Aligned, Engine, TextTypeError, not_a_text
from clipmb.common.text.files import SavedTokens
from clipmb.common.text.learning import learn
from clipmb.common.text.options import Options, read_options
from clipmb.common.text.rows import Padding, Truncation, align, encode_words, encodings, surround

_SETTINGS = (  # of a tokenizer that learns a vocabulary of its own
    "errors", "clean_up_tokenization_spaces", "model_max_length", "padding_side", "truncation_side",
    "split_special_tokens", "text_cleaning", "model_input_names",
)  # fmt: skip

__all__ = ["AddedToken", "BatchEncoding", "CLIPTokenizer", "CLIPTokenizerFast", "CharSpan", "Encoding", "TokenSpan"]


class _Tokenizer(SavedTokens):
    """What both tokenizers share; the arguments are `CLIPTokenizer`'s."""

    _warned_of_length = False

    def _engine_for(self, options: Options) -> Engine:
        if not options.split_special_tokens:
            return self._engine
        left = [(token, i) for i, token in self._added.items() if self.is_fast and not token.special]
        return self._engine.with_added(left)

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Turns texts into ids.

        Args:
            text: A text, a list of texts, or a list of (text, pair) tuples; with ``is_split_into_words`` a list of
                words or a list of such lists. An empty list gives an empty batch.
            text_pair: The second texts, in the same form.
            text_target: Texts whose ids go into "labels"; on their own, the main texts.
            text_pair_target: Their pairs.
            add_special_tokens: Put the start token before and the end token after the text; a pair becomes
                start, text, end, end, pair, end.
            padding: True or "longest": to the longest row. "max_length": to ``max_length``. False or "do_not_pad".
            truncation: True or "longest_first": cut to ``max_length``, of pairs the longer one first. "only_first",
                "only_second". False or "do_not_truncate". None: "longest_first" if ``max_length`` is given without
                padding. Start and end token always stay.
            max_length: In tokens, with the special ones; `model_max_length` when None.
            stride: How many tokens an overflowing row repeats from the row before it.
            is_split_into_words: A text is a list of words; word ids count them, offsets are within each.
            pad_to_multiple_of: Make the padded length a multiple of this.
            padding_side: "right" or "left"; `padding_side` of the tokenizer when None.
            return_tensors: "np", "pt", "tf", "jax", or None for lists. Shapes (batch, seq), also of a single text;
                integers are int64 in numpy and PyTorch, int32 in TensorFlow and JAX.
            return_token_type_ids: Give "token_type_ids", zeros.
            return_attention_mask: Give "attention_mask", 0 at padding. Yes when None.
            return_overflowing_tokens: CLIPTokenizerFast: further rows for what was cut, and the number of each row's
                text as "overflow_to_sample_mapping". CLIPTokenizer: the cut ids as "overflowing_tokens", and
                "num_truncated_tokens".
            return_special_tokens_mask: Give "special_tokens_mask", 1 at special and padding tokens.
            return_offsets_mapping: Give "offset_mapping", start and end of each token's characters in the text.
            return_length: Give "length".
            verbose: Warn, once for each tokenizer, of a row longer than `model_max_length` that nothing asked to cut.
            **kwargs: ``split_special_tokens``: take special tokens inside texts for ordinary text. Nothing else.

        Returns:
            The rows: ``input_ids`` and ``attention_mask``, and what else was asked for.

        Raises:
            TypeError: A text is not a string, or an argument is unknown.
            ValueError: An argument is out of its range, or rows of different length are to become a tensor.
        """
        options = self._options(
            add_special_tokens=add_special_tokens, padding=padding, truncation=truncation, max_length=max_length,
            stride=stride, is_split_into_words=is_split_into_words, pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side, return_tensors=return_tensors, return_token_type_ids=return_token_type_ids,
            return_attention_mask=return_attention_mask, return_overflowing_tokens=return_overflowing_tokens,
            return_special_tokens_mask=return_special_tokens_mask, return_offsets_mapping=return_offsets_mapping,
            return_length=return_length, verbose=verbose, **kwargs,
        )  # fmt: skip
        if text is None and text_target is None:
            raise bad_input("A text is needed", None, "Pass text, or text_target for labels", ValueError)
        if text is None:
            return self._encode_texts(text_target, text_pair_target, options)
        result = self._encode_texts(text, text_pair, options)
        if text_target is not None:
            result["labels"] = self._encode_texts(text_target, text_pair_target, options)["input_ids"]
        return result

    def encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
        """Turns one text, or its ids, into what `__call__` returns.

        Args:
            text: A text, or a list of ids without special tokens.
            text_pair: Its pair, in the same form.
            **options: The options of `__call__`.

        Returns:
            One row: lists, or tensors of shape (1, seq) with ``return_tensors``.

        Raises:
            TypeError: The text is not a string, or an argument is unknown.
            ValueError: An argument is out of its range.
        """
        if isinstance(text, list | tuple) and text and all(isinstance(item, int) for item in text):
            return self.prepare_for_model(text, text_pair, prepend_batch_axis=True, **options)
        if not options.get("is_split_into_words") and not isinstance(text, str):
            raise not_a_text(text)
        return self(text, text_pair, **options)

    def batch_encode_plus(self, batch_text_or_text_pairs: Any, **options: Any) -> BatchEncoding:
        """Turns a list of texts, or of (text, pair) tuples, into what `__call__` returns.

        Args:
            batch_text_or_text_pairs: The list.
            **options: The options of `__call__`.

        Returns:
            The rows: lists, or tensors of shape (batch, seq) with ``return_tensors``.

        Raises:
            TypeError: It is not a list, a text is not a string, or an argument is unknown.
            ValueError: An argument is out of its range, or rows of different length are to become a tensor.
        """
        if not isinstance(batch_text_or_text_pairs, list | tuple):
            raise bad_input("A batch must be a list", batch_text_or_text_pairs, "Pass a list of str", TypeError)
        if options.get("is_split_into_words") and any(isinstance(words, str) for words in batch_text_or_text_pairs):
            raise bad_input(
                "A batch of texts that are split into words must be a list of lists",
                batch_text_or_text_pairs,
                "Pass [[word, ...], ...]",
            )
        return self(batch_text_or_text_pairs, **options)

    @overload
    def encode(self, text: Any, text_pair: Any = None, *, return_tensors: None = None, **options: Any) -> list[int]: ...
    @overload
    def encode(self, text: Any, text_pair: Any = None, *, return_tensors: str, **options: Any) -> Any: ...
    def encode(self, text: Any, text_pair: Any = None, **options: Any) -> Any:
        """Turns one text into its ids.

        Args:
            text: A text, or a list of ids without special tokens.
            text_pair: Its pair, in the same form.
            **options: The options of `__call__`.

        Returns:
            The ids as a list, or with ``return_tensors`` a tensor of shape (1, seq).

        Raises:
            TypeError: The text is not a string, or an argument is unknown.
            ValueError: An argument is out of its range.
        """
        return self.encode_plus(text, text_pair, **options)["input_ids"]

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """Cuts a text into tokens.

        Args:
            text: The text.
            pair: Its pair.
            add_special_tokens: Put start and end token around.
            **options: The options of `__call__`.

        Returns:
            The tokens as the vocabulary has them: bytes as printable characters, ``</w>`` at the end of words.

        Raises:
            TypeError: The text is not a string, or an argument is unknown.
        """
        ids = self.encode(text, pair, add_special_tokens=add_special_tokens, **options)
        return [token for token in self.convert_ids_to_tokens(ids) if token is not None]

    def prepare_for_model(
        self,
        ids: Sequence[int],
        pair_ids: Sequence[int] | None = None,
        prepend_batch_axis: bool = False,
        **options: Any,
    ) -> BatchEncoding:
        """Truncates, pads and surrounds ids that are already there; options as `__call__`, except those about text.

        Args:
            ids: Ids of a text, without special tokens.
            pair_ids: Ids of its pair.
            prepend_batch_axis: Tensors of shape (1, seq) instead of (seq,).
            **options: The options of `__call__`.

        Returns:
            One row: lists, or tensors with ``return_tensors``.

        Raises:
            TypeError: An argument is unknown.
            ValueError: An argument is out of its range, or offsets are asked for.
        """
        checked = self._options(**options)
        if checked.return_offsets_mapping:
            raise bad_input("Offsets need the text", "ids", "Call the tokenizer on the text", shown=True)
        pairs = None if pair_ids is None else [list(pair_ids)]
        result = self._assemble([list(ids)], pairs, checked, None)
        if checked.return_tensors is not None and not prepend_batch_axis:
            return BatchEncoding({name: value[0] for name, value in result.items()})
        return result if checked.return_tensors is not None else self._single(result, checked)

    def _options(self, **given: Any) -> Options:
        """Checks the arguments of a call and fills in this tokenizer's defaults."""
        return read_options(
            given,
            max_length=self.model_max_length,
            padding_side=self.padding_side,
            split_special_tokens=self.split_special_tokens,
            model_input_names=self.model_input_names,
            can_pad=self.pad_token_id is not None,
        )

    def _encode_texts(self, text: Any, text_pair: Any, options: Options) -> BatchEncoding:
        """Tokenizes one text or a batch."""
        split = options.is_split_into_words
        if not isinstance(text, str | list | tuple) or (split and isinstance(text, str)):
            raise _wrong_text(text, split)
        single = isinstance(text, str) or (split and bool(text) and isinstance(text[0], str))
        if single:
            texts, pairs = [text], None if text_pair is None else [text_pair]
        elif text_pair is not None:
            if not isinstance(text_pair, list | tuple) or len(text_pair) != len(text):
                raise bad_input(
                    "A batch of texts needs a list of as many pairs",
                    f"{len(text)} texts and {text_pair!r}",
                    "Pass lists of one length",
                    shown=True,
                )
            texts, pairs = text, text_pair
        else:
            texts, pairs = _unzip(text, split)
        engine = self._engine_for(options)
        encode = partial(encode_words, engine) if split else engine.encode
        details = partial(align, engine, texts, pairs, split)
        ids = encode(texts)
        result = self._assemble(ids, None if pairs is None else encode(pairs), options, details)
        return self._single(result, options) if single and options.return_tensors is None else result

    def _single(self, batch: BatchEncoding, options: Options) -> BatchEncoding:
        """Takes the batch axis away."""
        if self.is_fast and options.return_overflowing_tokens:
            return batch
        for name, value in batch.data.items():
            if isinstance(value[0], list) or not self.is_fast:
                batch.data[name] = value[0]
        return batch

    def _assemble(
        self,
        first: list[list[int]],
        second: list[list[int]] | None,
        options: Options,
        details: Callable[[], list[tuple[Aligned, Aligned | None]]] | None,
    ) -> BatchEncoding:
        """Makes rows of ids: truncates, adds special tokens, pads."""
        special = options.add_special_tokens
        bos, eos = (self.bos_token_id, self.eos_token_id) if special else (None, None)
        if special and (bos is None or eos is None):
            raise bad_input("Special tokens need bos_token and eos_token", self.special_tokens_map, "Set both")
        around = self.num_special_tokens_to_add(second is not None) if special else 0
        truncation = Truncation(options, around, self.truncation_side, several_rows=self.is_fast)
        sizes = [len(ids) for ids in first]
        pair_sizes: Sequence[int | None] = [None] * len(first) if second is None else [len(ids) for ids in second]
        if (
            max((size + (pair or 0) for size, pair in zip(sizes, pair_sizes, strict=True)), default=0)
            <= truncation.room
        ):
            rows, lists, pairs = None, first, second
        else:
            rows = []
            for i, (size, pair) in enumerate(zip(sizes, pair_sizes, strict=True)):
                rows.extend(truncation.rows(i, size, pair))
            lists = [first[row.sample][row.first] for row in rows]
            pairs = None if second is None else [second[row.sample][row.second] for row in rows]
        if pairs is not None:
            made = [surround(ids, pair, bos, eos) for ids, pair in zip(lists, pairs, strict=True)]
        else:
            made = [[bos, *ids, eos] for ids in lists] if special else lists
        lengths = [len(row) for row in made]
        if options.warns_of_length and not self._warned_of_length:
            self._warn_of_length(max(lengths, default=0))
        padding = Padding(options, lengths)
        data: dict[str, Any] = {"input_ids": padding.fill("input_ids", made, self.pad_token_id)}
        if options.return_token_type_ids:
            data["token_type_ids"] = padding.fill("token_type_ids", [[0] * n for n in lengths], 0)
        if options.return_attention_mask:
            data["attention_mask"] = padding.fill("attention_mask", [[1] * n for n in lengths], 0)
        if options.return_special_tokens_mask:
            one = 1 if special else None
            masks = [
                surround([0] * len(ids), None if pairs is None else [0] * len(pairs[i]), one, one)
                for i, ids in enumerate(lists)
            ]
            data["special_tokens_mask"] = padding.fill("special_tokens_mask", masks, 1)
        described = None
        if details is not None:
            ends = (bos, eos, self.pad_token_id)
            described = partial(encodings, details, rows, options, padding, self._id_to_token(), ends)
        if options.return_offsets_mapping and described is not None:
            described = described()
            offsets = [
                [place for place, used in zip(row.offsets, row.attention_mask, strict=True) if used]
                for row in described
            ]
            data["offset_mapping"] = padding.fill("offset_mapping", offsets, (0, 0))
        if options.return_length:
            unpadded = not self.is_fast and len(first) > 1  # transformers 4's CLIPTokenizer pads a batch after counting
            data["length"] = lengths if unpadded else [max(n, padding.length) for n in lengths]
        if options.return_overflowing_tokens and self.is_fast:
            data["overflow_to_sample_mapping"] = (
                list(range(len(first))) if rows is None else [row.sample for row in rows]
            )
        elif options.return_overflowing_tokens:
            if second is not None and options.truncation == "longest_first":
                raise bad_input(
                    "Overflowing tokens of pairs are available only if just one of the texts is truncated",
                    options.truncation,
                    "Pass truncation='only_first' or 'only_second', or use CLIPTokenizerFast",
                )
            cut = [truncation.overflowing(ids, None if second is None else second[i]) for i, ids in enumerate(first)]
            data["overflowing_tokens"] = [tokens for tokens, _ in cut]
            data["num_truncated_tokens"] = [count for _, count in cut]
        return BatchEncoding(data, options.return_tensors, encodings=described, n_sequences=1 if second is None else 2)

    def _warn_of_length(self, length: int) -> None:
        """Warns of a row that the model cannot take, the first time that this tokenizer makes one."""
        if length > self.model_max_length:
            self._warned_of_length = True
            logger.warning(
                "A text of %d tokens is longer than the %d that the model takes. Pass truncation=True to cut it.",
                length,
                self.model_max_length,
            )

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Returns how many special tokens go around a text, or around a pair."""
        return 4 if pair else 2

    @property
    def max_len_single_sentence(self) -> int:
        """How many tokens of a text fit beside the special ones."""
        return self.model_max_length - 2

    @property
    def max_len_sentences_pair(self) -> int:
        """How many tokens of a pair fit beside the special ones."""
        return self.model_max_length - 4

    def build_inputs_with_special_tokens(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """Puts special tokens around ids.

        Args:
            token_ids_0: Ids of a text.
            token_ids_1: Ids of its pair.

        Returns:
            Start, ids, end; with a pair start, ids, end, end, ids of the pair, end.
        """
        return surround(token_ids_0, token_ids_1, self.bos_token_id, self.eos_token_id)

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """Returns 1 for each special token and 0 for each other.

        Args:
            token_ids_0: Ids of a text.
            token_ids_1: Ids of its pair.
            already_has_special_tokens: The ids have their special tokens; otherwise the mask is for the ids with them.

        Returns:
            A list of 0 and 1, as long as the ids with their special tokens.

        Raises:
            ValueError: Ids that have their special tokens are one row, but a pair was given.
        """
        if already_has_special_tokens:
            if token_ids_1 is not None:
                raise bad_input(
                    "Ids that already have their special tokens are one row", token_ids_1, "Leave token_ids_1 out"
                )
            special = set(self.all_special_ids)
            return [int(token in special) for token in token_ids_0]
        return surround([0] * len(token_ids_0), None if token_ids_1 is None else [0] * len(token_ids_1), 1, 1)

    def create_token_type_ids_from_sequences(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """Returns a 0 for each token of the ids with their special tokens: CLIP has no token types."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pads rows that are already tokenized.

        Args:
            encoded_inputs: A dict with "input_ids", a row or a list of rows, or a list of such dicts.
            padding: As `__call__`.
            max_length: As `__call__`.
            pad_to_multiple_of: As `__call__`.
            padding_side: As `__call__`.
            return_attention_mask: Give "attention_mask"; yes when None.
            return_tensors: As `__call__`.
            verbose: Accepted for compatibility.

        Returns:
            The padded rows. Fields that are not the tokenizer's are left as they are.

        Raises:
            ValueError: There are no "input_ids", an argument is out of its range, or rows of different length are to
                become a tensor.
        """
        options = self._options(
            padding=padding, max_length=max_length, truncation=False, pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side, return_attention_mask=return_attention_mask, return_tensors=return_tensors,
        )  # fmt: skip
        if isinstance(encoded_inputs, list | tuple) and all(isinstance(item, Mapping) for item in encoded_inputs):
            names = list(encoded_inputs[0]) if encoded_inputs else ["input_ids"]
            encoded_inputs = {name: [item[name] for item in encoded_inputs] for name in names}
        if not isinstance(encoded_inputs, Mapping) or "input_ids" not in encoded_inputs:
            raise bad_input(
                "pad() needs a dict with input_ids, or a list of such dicts",
                list(encoded_inputs) if isinstance(encoded_inputs, Mapping) else encoded_inputs,
                "Pass what the tokenizer returned",
            )
        data = {name: _listed(value) for name, value in encoded_inputs.items()}
        single = bool(data["input_ids"]) and not isinstance(data["input_ids"][0], list)
        if single:
            data = {name: [value] for name, value in data.items()}
        lengths = [len(row) for row in data["input_ids"]]
        if options.return_attention_mask and "attention_mask" not in data:
            data["attention_mask"] = [[1] * n for n in lengths]
        layout = Padding(options, lengths)
        fills: dict[str, Any] = {
            "input_ids": self.pad_token_id, "attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1,
            "offset_mapping": (0, 0),
        }  # fmt: skip
        for name, fill in fills.items():
            if name in data:
                data[name] = layout.fill(name, data[name], fill)
        if single and options.return_tensors is None:
            data = {name: value[0] for name, value in data.items()}
        return BatchEncoding(data, options.return_tensors)

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        num_tokens_to_remove: int = 0,
        truncation_strategy: str = "longest_first",
        stride: int = 0,
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """Takes tokens away from a text and its pair.

        Args:
            ids: Ids of a text, without special tokens.
            pair_ids: Ids of its pair.
            num_tokens_to_remove: How many.
            truncation_strategy: As ``truncation`` of `__call__`.
            stride: How many more of the kept tokens come with those taken away.

        Returns:
            The ids, the ids of the pair or None, and the tokens that were taken away, with ``stride`` more.

        Raises:
            ValueError: The strategy does not allow so many, or an argument is out of its range.
        """
        if num_tokens_to_remove <= 0:
            return ids, pair_ids, []
        total = len(ids) + len(pair_ids or ())
        options = self._options(
            truncation=truncation_strategy, stride=stride, max_length=max(total - num_tokens_to_remove, 1)
        )
        truncation = Truncation(options, 0, self.truncation_side, several_rows=False)
        _, a, b = truncation.rows(0, len(ids), None if pair_ids is None else len(pair_ids))[0]
        return ids[a], None if pair_ids is None else pair_ids[b], truncation.overflowing(ids, pair_ids)[0]


class CLIPTokenizer(_Tokenizer):
    """CLIP's tokenizer: lower-case words, cut into byte pairs; cleaned like transformers 4's without ftfy.

    Args:
        vocab_file: vocab.json; without any file, the vocabulary of the published models is used.
        merges_file: merges.txt.
        errors: How `decode` treats bytes that are not UTF-8: "replace", "ignore" or "strict".
        unk_token: Stands for what the vocabulary lacks.
        bos_token: Goes before the text.
        eos_token: Goes after the text; CLIP's text embedding is taken there.
        pad_token: Fills short rows.
        tokenizer_file: tokenizer.json, instead of the two others. Only by name, as all that follow.
        text_cleaning: What is done to a text before it is cut into words; None for the class's own.
            "nfc": Unicode NFC, whitespace to single spaces, lower case. CLIPTokenizerFast's, and transformers 5's.
            "basic": control and format characters removed, Chinese characters cut apart, NFC, lower case.
            CLIPTokenizer's, and transformers 4's where ftfy is not installed.
            "ftfy": ftfy.fix_text, whitespace, lower case. transformers 4's CLIPTokenizer where ftfy is installed.
            "openai": ftfy.fix_text, HTML unescaped twice, whitespace, lower case. OpenAI's own code's.
        model_max_length: The length that truncation and padding="max_length" mean where no max_length is given.
        padding_side: "right" or "left".
        truncation_side: "right" or "left"; the end token always stays.
        clean_up_tokenization_spaces: Whether `decode` removes spaces before punctuation.
        additional_special_tokens: Further special tokens.
        split_special_tokens: Take special tokens inside texts for ordinary text.
        added_tokens_decoder: Id to added token, as tokenizer_config.json has it.
        **kwargs: Kept, and written back by `save_pretrained`.

    Raises:
        CheckpointError: A file cannot be read.
        ImportError: The text_cleaning needs ftfy, which is not installed.
        TypeError: A token is neither a string nor an AddedToken.
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        /,
        vocab_file: str | os.PathLike[str] | None = None,
        merges_file: str | os.PathLike[str] | None = None,
        errors: str = "replace",
        unk_token: Any = "<|endoftext|>",
        bos_token: Any = "<|startoftext|>",
        eos_token: Any = "<|endoftext|>",
        pad_token: Any = "<|endoftext|>",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            vocab_file, merges_file, errors=errors, unk_token=unk_token, bos_token=bos_token, eos_token=eos_token,
            pad_token=pad_token, **kwargs,
        )  # fmt: skip


class CLIPTokenizerFast(_Tokenizer):
    """CLIP's tokenizer: lower-case words, cut into byte pairs; cleaned like transformers 4's fast one.

    Other arguments as in `CLIPTokenizer`.

    Args:
        tokenizer_file: A tokenizer.json, instead of ``vocab_file`` and ``merges_file``.
    """

    is_fast = True
    slow_tokenizer_class = CLIPTokenizer
    _default_cleaning = "nfc"
    _prefers = "tokenizer.json"

    def __init__(
        self,
        /,
        vocab_file: str | os.PathLike[str] | None = None,
        merges_file: str | os.PathLike[str] | None = None,
        tokenizer_file: str | os.PathLike[str] | None = None,
        unk_token: Any = "<|endoftext|>",
        bos_token: Any = "<|startoftext|>",
        eos_token: Any = "<|endoftext|>",
        pad_token: Any = "<|endoftext|>",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            vocab_file, merges_file, tokenizer_file, unk_token=unk_token, bos_token=bos_token, eos_token=eos_token,
            pad_token=pad_token, **kwargs,
        )  # fmt: skip

    def train_new_from_iterator(
        self,
        text_iterator: Iterable[str] | Iterable[list[str]],
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: Sequence[str | AddedToken] | None = None,
        special_tokens_map: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Learns a vocabulary from texts with the tokenizers library, and returns a tokenizer with these settings.

        Args:
            text_iterator: Texts, or batches of them.
            vocab_size: Number of tokens, the special ones and the 256 bytes included.
            length: Number of texts, for the progress bar of the library.
            new_special_tokens: Further special tokens.
            special_tokens_map: Special token of this tokenizer to the one in its place.
            **kwargs: Other arguments of ``tokenizers.trainers.BpeTrainer``, such as ``min_frequency``.

        Returns:
            The tokenizer. A model needs new embeddings of its size.

        Raises:
            ImportError: The tokenizers library is not installed.
            TypeError: A token is neither a string nor an AddedToken.
        """
        renamed = special_tokens_map or {}
        kept = {name: renamed.get(token, token) for name, token in self._special.items()}
        further = [renamed.get(token, token) for token in self._additional]
        further += [AddedToken.of(token, special=True).content for token in new_special_tokens or ()]
        ordered = [renamed.get(token.content, token.content) for token in self._added.values() if token.special]
        special = list(dict.fromkeys([*ordered, *kept.values(), *further]))
        vocabulary = learn(text_iterator, vocab_size, special, length=length, **kwargs)
        with TemporaryDirectory() as folder:
            files = [os.path.join(folder, name) for name in ("vocab.json", "merges.txt")]
            for file, content in zip(files, (vocabulary.vocab_json(), vocabulary.merges_txt()), strict=True):
                write_atomically(Path(file), content.encode())
            settings = {name: value for name, value in self._config().items() if name in _SETTINGS}
            return type(self)(*files, **{**settings, **kept, "additional_special_tokens": further})


def _wrong_text(text: Any, split: bool) -> Exception:
    if not split:
        return not_a_text(text)
    return bad_input("With is_split_into_words a text must be a list of words", text, "Pass [word, ...]", TextTypeError)


def _unzip(batch: Sequence[Any], split: bool) -> tuple[Sequence[Any], Sequence[Any] | None]:
    """Takes a batch of (text, pair) tuples apart; a batch of texts has no pairs."""

    def paired(item: Any) -> bool:
        inner = item[0] if split and isinstance(item, list | tuple) and item else item
        return isinstance(inner, list | tuple) and (not split or inner is not item)

    if not batch or not paired(batch[0]):
        return batch, None
    for item in batch:
        if not isinstance(item, list | tuple) or len(item) != 2:
            raise bad_input("A batch of pairs must be a list of (text, pair) tuples", item, "Pass two texts for each")
    return [item[0] for item in batch], [item[1] for item in batch]


def _listed(value: Any) -> Any:
    """Returns an array or tensor, or a list of them, as plain lists."""
    if isinstance(value, list | tuple):
        return [item if isinstance(item, int | str | tuple) or item is None else _listed(item) for item in value]
    return to_numpy(value).tolist()
