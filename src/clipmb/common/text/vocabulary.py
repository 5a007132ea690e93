"""Tokens and merges, and the files they come from: vocab.json with merges.txt, or tokenizer.json."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from clipmb.common.errors import CheckpointError, bounded_repr
from clipmb.common.json_files import json_text, read_json, read_text

SUFFIX = "</w>"
MOST_IDS = 2**31 - 1  # as the frameworks' smaller integers
MAX_MERGES = 49152 - 256 - 2  # as CLIP's first release and every one since
_HEADER = "#version: 0.2"
MARKERS = ("<|startoftext|>", "<|endoftext|>")
MARKER_PATTERN = "|".join(map(re.escape, MARKERS))
CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
# CLIP's word pattern as tokenizer.json has it; clipmb.common.text.unicode compiles the same for `re`.
_WORDS = CONTRACTIONS + r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORDS_OR_MARKERS = f"{MARKER_PATTERN}|{_WORDS}"  # as transformers 5 writes it: the markers are found before
_NORMALIZER = [
    {"type": "NFC"},
    {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
    {"type": "Lowercase"},
]


@lru_cache(maxsize=1)
def byte_symbols() -> tuple[str, ...]:
    """Returns the printable character that stands for each of the 256 bytes, as GPT-2's vocabulary defined it."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbol = {byte: chr(byte) for byte in printable}
    spare = iter(range(0x100, 0x200))
    return tuple(symbol[byte] if byte in symbol else chr(next(spare)) for byte in range(256))


@lru_cache(maxsize=1)
def symbol_bytes() -> dict[str, int]:
    """Returns the byte that each printable character stands for: the inverse of `byte_symbols`."""
    return {symbol: byte for byte, symbol in enumerate(byte_symbols())}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and merges.

    Attributes:
        ids: Token to id.
        ranks: Merge to rank; a merge is its two symbols with a space between, as in merges.txt.
    """

    ids: dict[str, int]
    ranks: dict[str, int]

    @classmethod
    def read(cls, vocab_file: str | Path, merges_file: str | Path) -> Vocabulary:
        """Reads vocab.json and merges.txt.

        Raises:
            CheckpointError: One of them cannot be read, or they do not belong together.
        """
        ids = _checked_ids(read_json(vocab_file), str(vocab_file))
        lines = _merge_lines(read_text(merges_file))[:MAX_MERGES]
        return cls(ids, _checked_ranks(lines, ids, str(merges_file)))

    @property
    def tokens(self) -> dict[int, str]:
        """Id to token."""
        return {index: token for token, index in self.ids.items()}

    def vocab_json(self) -> str:
        """Returns the text of vocab.json."""
        return json_text(self.ids, ascii=False)

    def merges_txt(self) -> str:
        """Returns the text of merges.txt."""
        return "\n".join([_HEADER, *self.ranks]) + "\n"


@lru_cache(maxsize=2)
def official(merges: int = MAX_MERGES) -> Vocabulary:
    """Returns the vocabulary of the published CLIP models, 49,408 tokens, from the merges that come with clipmb.

    Args:
        merges: How many of them; the first ones are a vocabulary too, for smaller models.
    """
    text = resources.files("clipmb").joinpath("data", "merges.txt").read_text("utf-8")
    lines = _merge_lines(text)[:merges]
    alphabet = sorted(byte_symbols())  # by code point: first the printable bytes, then their stand-ins
    tokens = [*alphabet, *(symbol + SUFFIX for symbol in alphabet), *(line.replace(" ", "") for line in lines)]
    tokens += MARKERS
    return Vocabulary({token: i for i, token in enumerate(tokens)}, {line: i for i, line in enumerate(lines)})


@dataclass
class TokenizerFile:
    """What a tokenizer.json holds.

    Attributes:
        vocabulary: Tokens and merges.
        added: Added tokens as the file has them, with their ``id``.
        special: The special tokens that the file names: ``bos_token``, ``eos_token``, ``unk_token``.
    """

    vocabulary: Vocabulary
    added: list[dict[str, Any]] = field(default_factory=list)
    special: dict[str, str] = field(default_factory=dict)


def read_tokenizer_json(path: str | Path) -> TokenizerFile:
    """Reads a tokenizer.json that describes a CLIP tokenizer, as transformers 4 and 5 write it.

    Raises:
        CheckpointError: It cannot be read, or it describes another kind of tokenizer. Lists every difference.
    """
    content = read_json(path)
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
        raise CheckpointError(f"{path} is not a valid tokenizer.json: it has no model with vocab and merges.")
    problems = []
    if model.get("type", "BPE") != "BPE":
        problems.append(f"the model is {model.get('type')!r}, not 'BPE'")
    if model.get("end_of_word_suffix") != SUFFIX:
        problems.append(f"words end in {model.get('end_of_word_suffix')!r}, not {SUFFIX!r}")
    if _inside(content, "normalizer", "normalizers") != _NORMALIZER:
        problems.append("the normalizer is not NFC, whitespace to one space, lower case")
    steps = _inside(content, "pre_tokenizer", "pretokenizers")
    kinds = [_inside(step, "type") for step in steps] if isinstance(steps, list) else []
    if kinds != ["Split", "ByteLevel"] or _inside(steps[0], "pattern", "Regex") not in (_WORDS, _WORDS_OR_MARKERS):
        problems.append("the pre-tokenizer is not CLIP's word pattern followed by bytes")
    if problems:
        raise CheckpointError(
            f"{path} does not describe CLIP's tokenizer. Put vocab.json and merges.txt in its place; "
            "transformers before 4.17 wrote this file wrongly.",
            problems,
        )
    ids = _checked_ids(model.get("vocab"), str(path))
    lines = [_joined(merge) for merge in model["merges"]]
    added = content.get("added_tokens") or []
    if not isinstance(added, list):
        raise CheckpointError(f"{path}: added_tokens must be a list.")
    for token in added:
        known = isinstance(token, dict) and type(token.get("id")) is int and isinstance(token.get("content"), str)
        if not known or not token["content"]:
            raise CheckpointError(f"{path} has an added token without id or content: {bounded_repr(token)}.")
    special = {}
    for name, place in (("bos_token", "cls"), ("eos_token", "sep")):
        end = _inside(content, "post_processor", place)
        if isinstance(end, list) and end and isinstance(end[0], str):
            special[name] = end[0]
    if isinstance(model.get("unk_token"), str):
        special["unk_token"] = model["unk_token"]
    return TokenizerFile(Vocabulary(ids, _checked_ranks(lines, ids, str(path))), added, special)


def tokenizer_json(
    vocabulary: Vocabulary,
    added: list[dict[str, Any]],
    bos: tuple[str, int | None],
    eos: tuple[str, int | None],
    unknown: str | None,
) -> str:
    """Returns the text of the tokenizer.json that transformers 4 and 5 and tokenizers read.

    Args:
        vocabulary: Tokens and merges.
        added: Added tokens with ``id``, by rising id.
        bos: Start token and its id.
        eos: End token and its id.
        unknown: The unknown token.
    """
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": _NORMALIZER},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": list(eos),
            "cls": list(bos),
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": SUFFIX,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted(vocabulary.ids.items(), key=lambda item: item[1])),
            "merges": [merge.split(" ") for merge in vocabulary.ranks],
        },
    }
    return json.dumps(content, ensure_ascii=False)


def _inside(content: Any, *keys: str) -> Any:
    """Returns what nested objects hold under these keys; None where one of them is no object or lacks its key."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _joined(merge: Any) -> Any:
    """Returns a merge as merges.txt has it, from the list of two that newer files have."""
    return " ".join(merge) if isinstance(merge, list) and all(isinstance(part, str) for part in merge) else merge


def _merge_lines(text: str) -> list[str]:
    lines = text.strip().split("\n")
    return lines[1:] if "#version:" in lines[0] else lines


def _checked_ids(ids: Any, path: str) -> dict[str, int]:
    if not isinstance(ids, dict) or not ids:
        raise CheckpointError(f"{path} has no vocabulary: an object from token to id is needed.")
    wrong = [token for token, i in ids.items() if type(i) is not int or not 0 <= i <= MOST_IDS]
    if wrong:
        shown = [f"{token[:100]!r} has the id {repr(ids[token])[:100]}" for token in wrong[:20]]
        raise CheckpointError(f"{path} must give every token an id of 0 or more.", shown)
    if len(set(ids.values())) < len(ids):
        first: dict[int, str] = {}
        twice = [f"{i}: {first[i]!r} and {token!r}" for token, i in ids.items() if first.setdefault(i, token) != token]
        raise CheckpointError(f"{path} gives several tokens one id.", [line[:200] for line in twice[:20]])
    return ids


def _checked_ranks(lines: list[Any], ids: dict[str, int], path: str) -> dict[str, int]:
    problems = []
    ranks: dict[str, int] = {}
    for line in lines:
        left, space, right = line.partition(" ") if isinstance(line, str) else ("", "", "")
        if not left or not right or not space or " " in right:
            problems.append(f"merge {len(ranks) + 1}: {repr(line)[:200]} is not two symbols with a space between")
        elif not (left in ids and right in ids and left + right in ids):
            missing = [symbol for symbol in (left, right, left + right) if symbol not in ids]
            problems.append(
                f"merge {len(ranks) + 1}: {', '.join(repr(symbol[:100]) for symbol in missing)} not in the vocabulary"
            )
        ranks.setdefault(line if isinstance(line, str) else repr(line), len(ranks))
        if len(problems) >= 20:
            break
    if problems:
        raise CheckpointError(f"{path} does not hold the merges of this vocabulary.", problems)
    return ranks
