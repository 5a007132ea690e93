"""The files of a tokenizer: what is read from a folder or the Hub, and what is written for others to read."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from clipmb.common.errors import bad_input, whole_number
from clipmb.common.former import check_saving, drop_unneeded
from clipmb.common.hub import Source
from clipmb.common.json_files import content_of, json_text, read_json
from clipmb.common.saving import Transaction, read_whole
from clipmb.common.text.added import AddedToken
from clipmb.common.text.base import SPECIAL
from clipmb.common.text.decoding import DecodingTokens
from clipmb.common.text.options import NO_LIMIT
from clipmb.common.text.unicode import table_digest
from clipmb.common.text.vocabulary import MOST_IDS, read_tokenizer_json, tokenizer_json
from clipmb.common.uploading import Uploadable, uploaded


class SavedTokens(DecodingTokens, Uploadable):
    """A tokenizer's files: reading and writing them."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *init_inputs: Any, **kwargs: Any) -> Self:
        """Reads a tokenizer from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path: A folder or Hub id with vocab.json and merges.txt, or tokenizer.json.
                Where all are there, CLIPTokenizerFast reads tokenizer.json.
            *init_inputs: First arguments of the class.
            **kwargs: Options of `clipmb.common.hub.Source` (revision, subfolder, cache_dir, token, local_files_only,
                force_download), and arguments of the class, which override what the files say; ``vocab_file`` and
                ``merges_file``, or ``tokenizer_file``, take the place of all files of the vocabulary. Arguments of
                transformers 4 that choose among files or loaders have no effect.

        Returns:
            The tokenizer.

        Raises:
            CheckpointError: The files cannot be found or read, or do not fit together.
            TypeError: An argument has the wrong type.
            ValueError: An argument is out of its range.
        """
        source = Source.of(pretrained_model_name_or_path, kwargs)
        drop_unneeded(kwargs)
        return read_whole(source.folder, lambda: cls._from_files(source, init_inputs, kwargs))

    @classmethod
    def _from_files(cls, source: Source, init_inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Self:
        config = _optional_json(source, "tokenizer_config.json")
        files = {name: kwargs[name] for name in cls.vocab_files_names if kwargs.get(name) is not None}
        kwargs = {name: value for name, value in kwargs.items() if name not in cls.vocab_files_names}
        files = files or cls._files(source)
        merged: dict[str, Any] = {}
        listed: set[str] = set()
        if "tokenizer_file" in files:
            content = read_tokenizer_json(files["tokenizer_file"])
            merged.update(content.special)
            listed = {token["content"] for token in content.added}
        merged.update(_special_tokens(source))
        merged.update(config)
        length = merged.get("model_max_length")
        if isinstance(length, int | float) and length > NO_LIMIT:
            merged.pop("model_max_length")
        if merged.get("text_cleaning") is None:
            merged.pop("text_cleaning", None)
        decoder = merged.pop("added_tokens_decoder", None)
        if decoder is None:  # otherwise added_tokens.json is what an older version left, as transformers 4 reads it
            decoder = {index: token for token, index in _plain(source, "added_tokens.json").items()}
            decoder = {index: token for index, token in decoder.items() if token not in listed}
        for name in (*cls.vocab_files_names, "name_or_path"):
            merged.pop(name, None)  # paths on the machine that saved it
        settings = {**files, **merged, "added_tokens_decoder": decoder, "name_or_path": str(source), **kwargs}
        with content_of(f"The tokenizer files of {source} do not fit", changed=kwargs or init_inputs):
            return cls(*init_inputs, **settings)

    @classmethod
    def _files(cls, source: Source) -> dict[str, Path]:
        def pair() -> dict[str, Path]:
            vocab, merges = source.find("vocab.json"), source.find("merges.txt")
            return {"vocab_file": vocab, "merges_file": merges} if vocab and merges else {}

        def whole() -> dict[str, Path]:
            path = source.find("tokenizer.json")
            return {"tokenizer_file": path} if path else {}

        found = (whole() or pair()) if cls._prefers == "tokenizer.json" else (pair() or whole())
        if not found:
            source.require("tokenizer.json")  # raises, with the list of what is there
        return found

    def _config(self) -> dict[str, Any]:
        config = {
            **{name: value for name, value in self.init_kwargs.items() if name not in (*SPECIAL, "name_or_path")},
            **self._special,
            "added_tokens_decoder": {str(i): token.flags() for i, token in self.added_tokens_decoder.items()},
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "errors": self.errors,
            "model_max_length": self.model_max_length,
            "tokenizer_class": "CLIPTokenizer",
        }
        if self._additional:
            config["additional_special_tokens"] = self._additional
        unusual = (
            ("padding_side", self.padding_side, "right"),
            ("truncation_side", self.truncation_side, "right"),
            ("split_special_tokens", self.split_special_tokens, False),
            ("text_cleaning", self.text_cleaning, self._default_cleaning),
            ("model_input_names", self.model_input_names, ["input_ids", "attention_mask"]),
        )
        config.update({name: value for name, value, usual in unusual if value != usual})
        return config

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that the ids of a text depend on, the frozen Unicode table included."""
        added = [[i, token.flags()] for i, token in sorted(self.added_tokens_decoder.items())]
        content = [
            self._vocabulary.vocab_json(), self._vocabulary.merges_txt(), self.text_cleaning, added,
            self.bos_token, self.eos_token, self.unk_token, table_digest(),
        ]  # fmt: skip
        return sha256(json_text(content).encode()).hexdigest()

    def _written(self, filename_prefix: str | None = None) -> dict[str, str]:
        """Returns name and content of every file that holds this tokenizer."""
        ids = self.added_tokens_encoder
        special: dict[str, Any] = {
            name: self._added[ids[token]].flags(special=False) for name, token in self._special.items() if token in ids
        }
        if self._additional:
            special["additional_special_tokens"] = self._additional
        added = [{"id": i, **token.flags()} for i, token in self.added_tokens_decoder.items()]
        beyond = {token["content"]: token["id"] for token in added if token["content"] not in self._vocabulary.ids}
        bos, eos = self.bos_token or "<|startoftext|>", self.eos_token or "<|endoftext|>"
        ends = [(token, self.convert_tokens_to_ids(token)) for token in (bos, eos)]
        files = {
            "tokenizer_config.json": json_text(self._config(), ascii=False),
            "special_tokens_map.json": json_text(special, ascii=False),
            "vocab.json": self._vocabulary.vocab_json(),
            "merges.txt": self._vocabulary.merges_txt(),
            "tokenizer.json": tokenizer_json(self._vocabulary, added, ends[0], ends[1], self.unk_token),
        }
        if beyond:
            files["added_tokens.json"] = json_text(beyond, ascii=False)
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        return {prefix + name: content for name, content in files.items()}

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None, **kwargs: Any
    ) -> tuple[str, ...]:
        """Writes the tokenizer so that clipmb and transformers 4 and 5 read it.

        Args:
            save_directory: A folder, created when missing. All files are replaced at once.
            filename_prefix: Goes before each file's name, with a hyphen.
            **kwargs: ``legacy_format``, without effect, and the arguments of transformers 4's `save_pretrained`.

        Returns:
            The paths written; none with ``is_main_process=False``.

        Raises:
            TypeError: An argument is unknown.
            ValueError: ``save_directory`` is a file.
        """
        kwargs.pop("legacy_format", None)
        if not check_saving(kwargs):
            return ()
        files = self._written(filename_prefix)
        with uploaded(self, save_directory, kwargs), Transaction(save_directory) as save:
            for name, content in files.items():
                save.write(name, content)
            save.remove(f"{filename_prefix}-added_tokens.json" if filename_prefix else "added_tokens.json")
        return tuple(os.path.join(save_directory, name) for name in files)

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, str]:
        """Writes vocab.json and merges.txt into a folder that exists.

        Args:
            save_directory: The folder.
            filename_prefix: Goes before each file's name, with a hyphen.

        Returns:
            The paths of the two.

        Raises:
            ValueError: There is no such folder.
        """
        if not os.path.isdir(save_directory):
            raise bad_input(
                "The vocabulary can only be saved into a folder that exists",
                str(save_directory),
                "Create the folder first",
            )
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        names = (f"{prefix}vocab.json", f"{prefix}merges.txt")
        with Transaction(save_directory) as save:
            save.write(names[0], self._vocabulary.vocab_json())
            save.write(names[1], self._vocabulary.merges_txt())
        return os.path.join(save_directory, names[0]), os.path.join(save_directory, names[1])


def _optional_json(source: Source, name: str) -> dict[str, Any]:
    path = source.find(name)
    return {} if path is None else read_json(path)


def _plain(source: Source, name: str) -> dict[str, Any]:
    """Reads a file whose values are numbers; a list could not become a key."""
    content = _optional_json(source, name)
    with content_of(source.find(name)):
        for token, index in content.items():
            whole_number(f"The id of the added token {token[:100]!r}", index, 0, MOST_IDS)
        if len(set(content.values())) < len(content):
            raise bad_input("Each added token must have an id of its own", content, "Repair the file")
    return content


def _special_tokens(source: Source) -> dict[str, Any]:
    """Reads special_tokens_map.json."""
    content = _optional_json(source, "special_tokens_map.json")
    for name in {*SPECIAL, "additional_special_tokens"} & content.keys():
        value = content[name]
        tokens = value if isinstance(value, list) else [value]
        with content_of(f"{name} in special_tokens_map.json of {source}"):
            for token in tokens:
                if token is not None:
                    AddedToken.of(token)
    return content
