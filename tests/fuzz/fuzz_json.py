"""Damaged configuration, tokenizer, processor and index files: `make fuzz`. Structure-aware, since JSON is text.

A valid folder has one value of one file replaced, removed, renamed or swapped, or its text cut. Reading it may give an
object, which must then save and load again, or a CheckpointError that names a file, in a few short lines. Nothing else:
`python tests/fuzz/fuzz_json.py --first NUMBER --files 1` repeats one.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from clipmb import (
    CheckpointError,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPTokenizerFast,
    CLIPVisionConfig,
)
from clipmb.common.checkpoint.sharding import read_shards
from clipmb.common.hub import Source

INDEX = "model.safetensors.index.json"
SECONDS = 5  # for one folder
LONGEST = 8_000  # characters of a message
RAW = "\0raw "  # what stands for text that no JSON library writes
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 77, 49407, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-320, 1e308, float("nan"),
    float("inf"), "", "a", "0", "true", "</w>", "x" * 100_000, "\u0000", "É", "../x", [], [[]], [None], [1, 2, 3],
    ["a", "b"], [{}], {}, {"": ""}, {"content": "<|x|>"}, {"content": 1}, {"height": 3}, {"__class__": "x"},
    {"type": "Sequence"}, RAW + "[" * 300 + "]" * 300, RAW + "9" * 5000,
    RAW + "-" + "9" * 5000, RAW + '"\\ud800"', RAW + '"\\ud83d\\ude00"',
    RAW + "1e999", RAW + "[" * 3000, RAW + "nul",
]  # fmt: skip
NAMES = (
    "__class__", "__dict__", "self", "to_dict", "head_dim", "num_patches", "_kept", "_special", "model_type", "dtype",
    "torch_dtype", "id2label", "label2id", "num_labels", "attn_implementation", "size", "crop_size", "image_mean",
    "preprocess", "vocab_file", "tokenizer_file", "added_tokens_decoder", "additional_special_tokens", "errors",
    "model_max_length", "pad_token", "text_cleaning", "padding_side", "encode", "init_kwargs", "content", "id", "",
    "return_unused_kwargs", "entries", "cls", "name_or_path", "use_square_size", "model_input_names", "a" * 5000,
)  # fmt: skip


# -- one valid folder -------------------------------------------------------------------------------------------------


def sample(folder: Path) -> None:
    """Writes a small checkpoint without weights, every JSON file of ours in it."""
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {**tower, "vocab_size": 600, "max_position_embeddings": 9, "eos_token_id": 513}
    CLIPConfig(
        text, {**tower, "image_size": 8, "patch_size": 4}, projection_dim=8, dtype="float32", id2label={0: "a", 1: "b"}
    ).save_pretrained(folder)
    official = CLIPTokenizer()
    symbols = {token: index for index, token in enumerate(list(official.encoder)[:512])}
    ids = {**symbols, "ca": 512, "cat</w>": 513, "<|startoftext|>": 514, "<|endoftext|>": 515}
    folder.joinpath("vocab.json").write_text(json.dumps(ids), "utf-8")
    folder.joinpath("merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n", "utf-8")
    tokenizer = CLIPTokenizerFast(folder / "vocab.json", folder / "merges.txt")
    tokenizer.add_tokens(["<new>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    CLIPProcessor(CLIPImageProcessor(size=8, crop_size=8), tokenizer).save_pretrained(folder)
    index = {"metadata": {"total_size": 8}, "weight_map": {"logit_scale": "model-00001-of-00001.safetensors"}}
    folder.joinpath(INDEX).write_text(json.dumps(index), "utf-8")
    folder.joinpath("model-00001-of-00001.safetensors").write_bytes(b"")


# -- damage -----------------------------------------------------------------------------------------------------------


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yields every object and list in a content, with each of its keys."""
    waiting = [content]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            yield holder, key
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])


def damaged(content: dict[str, Any], rng: np.random.Generator) -> str:
    """Returns the text of a file with one to three things in it changed."""
    content = copy.deepcopy(content)
    for _ in range(rng.integers(1, 4)):
        found = list(places(content))
        outer = [place for place in found if place[0] is content]  # the many tokens of a vocabulary hide the rest
        among = outer if rng.random() < 0.5 and outer else found
        if not among:
            break
        holder, key = among[rng.integers(len(among))]
        value = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
        kind = rng.integers(5)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[NAMES[rng.integers(len(NAMES))]] = holder.pop(key) if rng.random() < 0.5 else value
        elif kind == 2:
            other, at = found[rng.integers(len(found))]
            holder[key] = copy.deepcopy(other[at])
        else:
            holder[key] = value
    text = json.dumps(content)
    for value in VALUES:
        if isinstance(value, str) and value.startswith(RAW):
            text = text.replace(json.dumps(value), value.removeprefix(RAW))
    return text[: rng.integers(len(text))] if rng.random() < 0.02 else text


# -- reading ----------------------------------------------------------------------------------------------------------


def settings(cls: Any) -> Callable[[Path], None]:
    """Returns what reads a config or image processor, and writes and reads it again."""

    def read(folder: Path) -> None:
        made = cls.from_pretrained(folder)
        assert type(made) is cls
        made.save_pretrained(folder / "again")
        assert cls.from_pretrained(folder / "again").to_dict() == made.to_dict() or "NaN" in made.to_json_string()

    return read


def tokenizer(cls: Any) -> Callable[[Path], None]:
    """Returns what reads a tokenizer, uses it, and writes and reads it again."""

    def read(folder: Path) -> None:
        made = cls.from_pretrained(folder)
        assert type(made) is cls
        made.save_pretrained(folder / "again")
        again = cls.from_pretrained(folder / "again")
        assert again.get_vocab() == made.get_vocab()
        if made.bos_token and made.eos_token:
            ids = made("a cat <new>", verbose=False)["input_ids"]
            assert again("a cat <new>", verbose=False)["input_ids"] == ids
            if None not in ids:  # a special token may have none
                made.decode(ids)

    return read


def index(folder: Path) -> None:
    """Reads the index of shards, each of which holds the one tensor."""
    read_shards(Source(str(folder)), folder / INDEX, lambda path: {"logit_scale": path})


TOKENIZERS = (tokenizer(CLIPTokenizer), tokenizer(CLIPTokenizerFast))
IMAGES = (settings(CLIPImageProcessor),)
FILES: dict[str, tuple[Callable[[Path], None], ...]] = {
    "config.json": (settings(CLIPConfig), settings(CLIPTextConfig), settings(CLIPVisionConfig)),
    "preprocessor_config.json": IMAGES,
    "processor_config.json": (*IMAGES, CLIPProcessor.from_pretrained),
    "tokenizer_config.json": (*TOKENIZERS, CLIPProcessor.from_pretrained),
    "special_tokens_map.json": TOKENIZERS,
    "added_tokens.json": TOKENIZERS,
    "vocab.json": TOKENIZERS,
    "tokenizer.json": TOKENIZERS,
    INDEX: (index,),
}


def problem_of(read: Callable[[Path], None], folder: Path) -> str | None:
    """Returns what is wrong with how one reader took a folder; None where nothing is."""
    start = time.monotonic()
    try:
        read(folder)
    except CheckpointError as error:
        message = str(error)
        if str(folder) not in message:
            return f"names no file: {message[:300]}"
        if len(message) > LONGEST:
            return f"a message of {len(message)} characters: {message[:300]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        shutil.rmtree(folder / "again", ignore_errors=True)
    seconds = time.monotonic() - start
    return f"took {seconds:.1f} s" if seconds > SECONDS else None


def work(first: int, count: int, seed: int = 0) -> list[str]:
    """Damages and reads; returns a line for each problem."""
    problems = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sample(folder)
        contents = {file: folder.joinpath(file).read_text("utf-8") for file in FILES}
        parsed = {file: json.loads(text) for file, text in contents.items()}
        for number in range(first, first + count):
            rng = np.random.default_rng((seed, number))
            file = list(FILES)[number % len(FILES)]
            text = damaged(parsed[file], rng)
            folder.joinpath(file).write_text(text, "utf-8")
            hidden = {  # what would be read instead
                "preprocessor_config.json": "processor_config.json",
                "added_tokens.json": "tokenizer_config.json",
            }.get(file)
            if hidden:
                folder.joinpath(hidden).unlink()
            found = [problem_of(read, folder) for read in FILES[file]]
            problems.extend(f"{number} {file}: {problem}" for problem in found if problem)
            for changed in filter(None, (file, hidden)):
                folder.joinpath(changed).write_text(contents[changed], "utf-8")
    return problems


def main() -> int:
    """Runs the fuzzer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20_000, help="how many [20000]")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    problems = work(given.first, given.files, given.seed)
    sys.stdout.writelines(f"{line}\n" for line in problems)
    sys.stdout.write(f"{given.files} damaged JSON files: {len(problems)} problems\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
