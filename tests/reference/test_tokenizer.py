"""Tokens, places, rows and files are those of transformers 4.57.6, and transformers 4 and 5 read what we save."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import _transformers5 as transformers5
import corpus
import numpy as np
import pytest
import transformers

import clipmb

CAPTIONS = ["a photo of a cat", "", "Two DOGS' playing, isn't it?!", "日本語 café 😀", "word " * 90, "<|endoftext|> x"]


@pytest.fixture(scope="module")
def strings() -> list[str]:
    found = corpus.strings()
    assert len(found) >= 20_000
    assert len(set(found)) > 15_000
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """vocab.json and merges.txt of the published models, built here, not by clipmb."""
    folder = tmp_path_factory.mktemp("official")
    merges = Path(clipmb.__file__).parent.joinpath("data", "merges.txt").read_text("utf-8")
    symbols = list(transformers.models.clip.tokenization_clip.bytes_to_unicode().values())
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    tokens += ["".join(line.split()) for line in merges.strip().split("\n")[1:]] + ["<|startoftext|>", "<|endoftext|>"]
    assert len(tokens) == 49408
    vocab = json.dumps({token: i for i, token in enumerate(tokens)})
    folder.joinpath("vocab.json").write_text(vocab, "utf-8")
    folder.joinpath("merges.txt").write_text(merges, "utf-8")
    return folder


def reference(name: str, files: Path, **options):
    kind = transformers.CLIPTokenizerFast if name == "fast" else transformers.CLIPTokenizer
    paths = str(files / "vocab.json"), str(files / "merges.txt")
    if name == "ftfy":
        return kind(*paths, **options)
    with mock.patch.dict(sys.modules, {"ftfy": None}):
        return kind(*paths, **options)


def ours(name: str, **options):
    if name == "fast":
        return clipmb.CLIPTokenizerFast(**options)
    return clipmb.CLIPTokenizer(**options, **({"text_cleaning": "ftfy"} if name == "ftfy" else {}))


@pytest.fixture(scope="module")
def fast(files):
    return reference("fast", files)


@pytest.fixture(scope="module")
def slow(files):
    return reference("slow", files)


def agree(ours, theirs) -> None:
    assert set(ours) == set(theirs)
    for name in theirs:
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize("name", ["fast", "slow", "ftfy"])
def test_ids_and_decoding_over_the_corpus(name, files, strings):
    oracle, tokenizer = reference(name, files), ours(name)
    expected = oracle(strings)["input_ids"]
    got = tokenizer(strings)["input_ids"]
    different = [(text, a, b) for text, a, b in zip(strings, expected, got, strict=True) if a != b]
    assert not different[:3]
    for row in expected[::7]:
        assert tokenizer.decode(row) == oracle.decode(row)
        assert tokenizer.decode(row, skip_special_tokens=True) == oracle.decode(row, skip_special_tokens=True)


def test_places_over_the_corpus(fast, strings):
    expected = fast(strings, return_offsets_mapping=True)
    got = clipmb.CLIPTokenizerFast()(strings, return_offsets_mapping=True)
    for i, text in enumerate(strings):
        assert got["offset_mapping"][i] == expected["offset_mapping"][i], text
        assert got.word_ids(i) == expected.word_ids(i), text
        assert got.tokens(i) == expected.tokens(i), text


def test_places_of_tokens_words_and_characters(fast):
    texts, pairs = ["Hello,  wörld's 😀", "a"], ["x\u0303 two words", "b c"]
    expected = fast(texts, pairs, padding=True)
    got = clipmb.CLIPTokenizerFast()(texts, pairs, padding=True)
    for row in (0, 1):
        assert got.sequence_ids(row) == expected.sequence_ids(row)
        for sequence in (0, 1):
            for at in range(18):
                for method in ("char_to_token", "char_to_word", "word_to_tokens"):
                    if method == "word_to_tokens" or at < len((texts, pairs)[sequence][row]):
                        a, b = getattr(got, method)(row, at, sequence), getattr(expected, method)(row, at, sequence)
                        assert a == (b if b is None or isinstance(b, int) else tuple(b)), (method, row, at, sequence)
            assert tuple(got.word_to_chars(row, 0, sequence)) == tuple(expected.word_to_chars(row, 0, sequence))
        for at in range(len(expected["input_ids"][row])):
            a, b = got.token_to_chars(row, at), expected.token_to_chars(row, at)
            assert (a is None) == (b is None)
            assert a is None or tuple(a) == tuple(b)
            assert got.token_to_word(row, at) == expected.token_to_word(row, at)
            assert got.token_to_sequence(row, at) == expected.token_to_sequence(row, at)
    assert got[0].offsets == expected[0].offsets
    assert got[1].attention_mask == expected[1].attention_mask


@pytest.mark.parametrize("name", ["fast", "slow"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": True},
        {"padding": "longest", "pad_to_multiple_of": 8},
        {"padding": "max_length", "max_length": 20},
        {"padding": "max_length", "max_length": 9, "truncation": True},
        {"truncation": True, "max_length": 5},
        {"max_length": 7},
        {"padding": True, "truncation": True, "max_length": 16, "pad_to_multiple_of": 4, "return_length": True},
        {"add_special_tokens": False, "padding": True, "return_special_tokens_mask": True},
        {
            "return_special_tokens_mask": True,
            "return_token_type_ids": True,
            "padding": True,
            "return_attention_mask": False,
        },
    ],
    ids=str,
)
def test_rows(name, side, options, files):
    sides = {"padding_side": side, "truncation_side": side}
    oracle, tokenizer = reference(name, files, **sides), ours(name, **sides)
    agree(tokenizer(CAPTIONS, **options), oracle(CAPTIONS, **options))
    agree(tokenizer(CAPTIONS[2], **options), oracle(CAPTIONS[2], **options))
    pairs = CAPTIONS[::-1]
    agree(tokenizer(CAPTIONS, pairs, **options), oracle(CAPTIONS, pairs, **options))
    both = list(zip(CAPTIONS, pairs, strict=True))
    agree(tokenizer(both, **options), oracle(both, **options))


@pytest.mark.parametrize("name", ["fast", "slow"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_of_pairs_at_every_length(name, side, files):
    oracle, tokenizer = reference(name, files, truncation_side=side), ours(name, truncation_side=side)
    words = "a b c d e f g h i j"
    for first, second in ((words, words[:9]), (words[:7], words), (words[:3], words), (words, words)):
        for length in range(6, 26):
            expected = oracle(first, second, truncation=True, max_length=length)
            assert tokenizer(first, second, truncation=True, max_length=length)["input_ids"] == expected["input_ids"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("stride", [0, 1])
@pytest.mark.parametrize("strategy", [True, "only_first", "only_second"])
def test_overflowing_rows(side, stride, strategy, files):
    oracle, tokenizer = reference("fast", files, truncation_side=side), ours("fast", truncation_side=side)
    options = {"truncation": strategy, "max_length": 14, "stride": stride, "return_overflowing_tokens": True}
    options |= {"padding": True, "return_offsets_mapping": True}
    texts, pairs = ["a b c d e f g h", "x y"], ["one two three four five six", "z"]
    agree(tokenizer(texts, pairs, **options), oracle(texts, pairs, **options))
    if strategy is not True:
        return
    agree(tokenizer(CAPTIONS, **options), oracle(CAPTIONS, **options))
    agree(tokenizer(texts[0], **options | {"max_length": 5}), oracle(texts[0], **options | {"max_length": 5}))


@pytest.mark.parametrize("side", ["right", "left"])
def test_overflowing_tokens_of_the_slow_tokenizer(side, files):
    oracle, tokenizer = reference("slow", files, truncation_side=side), ours("slow", truncation_side=side)
    options = {"max_length": 6, "truncation": True, "stride": 2, "return_overflowing_tokens": True}
    agree(tokenizer("a b c d e f g h", **options), oracle("a b c d e f g h", **options))
    for strategy in ("only_first", "only_second"):
        options |= {"truncation": strategy, "max_length": 15}
        agree(tokenizer("a b c d e f", "g h i j k l m", **options), oracle("a b c d e f", "g h i j k l m", **options))


@pytest.mark.parametrize("name", ["fast", "slow"])
def test_words_that_are_split_already(name, files):
    oracle, tokenizer = reference(name, files), ours(name)
    words = ["Hello", "it's", "", "wörld 2"]
    expected, got = oracle(words, is_split_into_words=True), tokenizer(words, is_split_into_words=True)
    agree(got, expected)
    batch = [words, ["x"]]
    options = {"is_split_into_words": True, "padding": True, "return_tensors": "np"}
    assert np.array_equal(tokenizer(batch, **options)["input_ids"], oracle(batch, **options)["input_ids"])
    if name == "fast":
        assert got.word_ids() == expected.word_ids()
        options = {"is_split_into_words": True, "return_offsets_mapping": True}
        agree(tokenizer(batch, batch, **options), oracle(batch, batch, **options))


@pytest.mark.filterwarnings("ignore")  # TensorFlow and JAX warn of much while they are imported
@pytest.mark.parametrize("kind", ["np", "pt", "tf", "jax"])
def test_tensors(kind, fast):
    options = {"padding": "max_length", "max_length": 12, "truncation": True, "return_tensors": kind}
    expected, got = fast(CAPTIONS, **options), clipmb.CLIPTokenizerFast()(CAPTIONS, **options)
    for name in expected:
        assert type(got[name]) is type(expected[name])
        assert got[name].dtype == expected[name].dtype
        assert np.array_equal(np.asarray(got[name]), np.asarray(expected[name]))


@pytest.mark.parametrize("name", ["fast", "slow"])
def test_other_methods(name, files):
    oracle, tokenizer = reference(name, files), ours(name)
    ids = oracle("Hello, it's wörld <|endoftext|>")["input_ids"]
    assert tokenizer.encode("a b", "c") == oracle.encode("a b", "c")
    assert tokenizer.tokenize("Hello wörld's 😀") == oracle.tokenize("Hello wörld's 😀")
    assert tokenizer.convert_ids_to_tokens([*ids, 99999]) == oracle.convert_ids_to_tokens([*ids, 99999])
    assert tokenizer.convert_ids_to_tokens(5) == oracle.convert_ids_to_tokens(5)
    tokens = ["cat</w>", "no such token", "<|startoftext|>"]
    assert tokenizer.convert_tokens_to_ids(tokens) == oracle.convert_tokens_to_ids(tokens)
    assert tokenizer.build_inputs_with_special_tokens([1], [2]) == oracle.build_inputs_with_special_tokens([1], [2])
    types = oracle.create_token_type_ids_from_sequences([1], [2])
    assert tokenizer.create_token_type_ids_from_sequences([1], [2]) == types
    mask = oracle.get_special_tokens_mask(ids, already_has_special_tokens=True)
    assert tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True) == mask
    assert tokenizer.num_special_tokens_to_add(True) == oracle.num_special_tokens_to_add(True)
    assert tokenizer.batch_decode([ids, [320]]) == oracle.batch_decode([ids, [320]])
    cleaned = {"clean_up_tokenization_spaces": True}
    assert tokenizer.decode(ids, **cleaned) == oracle.decode(ids, **cleaned)
    assert tokenizer.get_vocab() == oracle.get_vocab()
    assert (tokenizer.vocab_size, len(tokenizer)) == (oracle.vocab_size, len(oracle))
    assert tokenizer.special_tokens_map == oracle.special_tokens_map
    rows = {"input_ids": [[1, 2, 3], [4]], "attention_mask": [[1, 1, 1], [1]]}
    agree(tokenizer.pad(rows, pad_to_multiple_of=4), oracle.pad(rows, pad_to_multiple_of=4))
    listed = [{"input_ids": [1, 2]}, {"input_ids": [4]}]
    agree(tokenizer.pad(listed, padding_side="left"), oracle.pad(listed, padding_side="left"))
    prepared = {"truncation": True, "max_length": 5, "padding": "max_length"}
    agree(tokenizer.prepare_for_model([1, 2, 3, 4], **prepared), oracle.prepare_for_model([1, 2, 3, 4], **prepared))
    for with_pair in (None, [6, 7]):
        assert tokenizer.truncate_sequences([1, 2, 3, 4], with_pair, 2, "only_first", 1) == oracle.truncate_sequences(
            [1, 2, 3, 4], with_pair, 2, "only_first", 1
        )
    target = {"text_target": ["b", "c d"], "padding": True}
    agree(tokenizer(["a", "b c"], **target), oracle(["a", "b c"], **target))


@pytest.mark.parametrize("name", ["fast", "slow"])
def test_special_tokens_as_text(name, files):
    oracle, tokenizer = reference(name, files), ours(name)
    for text in ("a <|endoftext|> b", "<|StartOfText|>!<|endoftext|>"):
        got = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert got == oracle(text, split_special_tokens=True)["input_ids"]


ADDED_TEXTS = (
    "a <new> b", "foo FOO Foo food", "x<new>y", "strip  <s>  me", "a qwordy qword, qword aqword",
    "two words  two  WORDS", "é <É> <é>", "<pad>a<Pad>",
)  # fmt: skip


def add(tokenizer, added_token) -> list[int]:
    return [
        tokenizer.add_tokens(["<new>", "FOO"]),
        tokenizer.add_tokens([added_token("<s>", lstrip=True, rstrip=True), added_token("qword", single_word=True)]),
        tokenizer.add_tokens(["two words", "<É>"]),
        tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<extra>"]}),
    ]


@pytest.mark.parametrize("name", ["fast", "slow"])
def test_added_tokens(name, files, tmp_path):
    oracle, tokenizer = reference(name, files), ours(name)
    assert add(tokenizer, clipmb.common.text.tokenizer.AddedToken) == add(oracle, transformers.AddedToken)
    assert len(tokenizer) == len(oracle)
    assert tokenizer.added_tokens_encoder == oracle.added_tokens_encoder
    assert tokenizer.pad_token_id == oracle.pad_token_id

    tokenizer.save_pretrained(tmp_path / "ours")
    oracle.save_pretrained(tmp_path / "theirs")
    kind, theirs = type(tokenizer), type(oracle)
    with mock.patch.dict(sys.modules, {"ftfy": None}):
        crossed = theirs.from_pretrained(tmp_path / "ours")
    every = [tokenizer, kind.from_pretrained(tmp_path / "ours"), kind.from_pretrained(tmp_path / "theirs"), crossed]
    for text in ADDED_TEXTS:
        expected = oracle(text)["input_ids"]
        for one in every:
            assert one(text)["input_ids"] == expected, text
            assert one.decode(expected) == oracle.decode(expected)
            assert one.decode(expected, skip_special_tokens=True) == oracle.decode(expected, skip_special_tokens=True)
        if name == "fast":
            places = oracle(text, return_offsets_mapping=True)
            assert tokenizer(text, return_offsets_mapping=True)["offset_mapping"] == places["offset_mapping"]
            assert tokenizer(text).word_ids() == places.word_ids()


def test_transformers_4_reads_what_we_save(tmp_path, strings, fast):
    clipmb.CLIPTokenizerFast().save_pretrained(tmp_path)
    expected = fast(strings[::10])["input_ids"]
    for kind in (transformers.AutoTokenizer, transformers.CLIPTokenizerFast):
        loaded = kind.from_pretrained(tmp_path)
        assert isinstance(loaded, transformers.CLIPTokenizerFast)
        assert loaded(strings[::10])["input_ids"] == expected
        assert loaded.model_max_length == 77
    whole = transformers.CLIPTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert whole(strings[::10])["input_ids"] == expected


def test_vocabulary_files_equal_to_the_byte(tmp_path, slow):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected, got = slow.save_vocabulary(str(tmp_path / "a")), clipmb.CLIPTokenizer().save_vocabulary(tmp_path / "b")
    for a, b in zip(expected, got, strict=True):
        assert Path(a).name == Path(b).name
        assert Path(a).read_bytes() == Path(b).read_bytes()


def test_a_vocabulary_without_most_bytes(tmp_path):
    tokens = [
        "l",
        "o",
        "w",
        "e",
        "r",
        "s",
        "t",
        "i",
        "d",
        "n",
        "lo",
        "l</w>",
        "w</w>",
        "r</w>",
        "t</w>",
        "low</w>",
        "er</w>",
        "lowest</w>",
        "newer</w>",
        "wider",
        "<unk>",
    ]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    tmp_path.joinpath("vocab.json").write_text(json.dumps(vocab))
    tmp_path.joinpath("merges.txt").write_text("#version: 0.2\nl o\nlo w</w>\ne r</w>\n")
    paths = str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    texts = ["lower newer", "low xyz wider", "lowest é 😀 l", "<unk> low"]
    for kind in ("CLIPTokenizer", "CLIPTokenizerFast"):
        oracle = getattr(transformers, kind)(*paths, unk_token="<unk>")
        tokenizer = getattr(clipmb, kind)(*paths, unk_token="<unk>")
        for text in texts:
            assert tokenizer(text)["input_ids"] == oracle(text)["input_ids"], text
            assert (
                tokenizer.tokenize(text) == [token for token in oracle.tokenize(text) if True]
                or kind == "CLIPTokenizer"
            )


TOKENIZE_5 = """
import json, sys, transformers
kinds = [transformers.CLIPTokenizer, transformers.AutoTokenizer]
loaded = [kind.from_pretrained(sys.argv[1]) for kind in kinds]
texts = json.load(open(sys.argv[2], encoding="utf-8"))
print(json.dumps([one(texts)["input_ids"] for one in loaded]))
if len(sys.argv) > 3:
    loaded[0].save_pretrained(sys.argv[3])
"""


def test_transformers_5_reads_what_we_save_and_we_read_what_it_saves(tmp_path, strings, fast):
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(strings[::10]), "utf-8")
    clipmb.CLIPTokenizerFast().save_pretrained(tmp_path / "ours")
    expected = fast(strings[::10])["input_ids"]
    output = transformers5.run(TOKENIZE_5, tmp_path / "ours", texts, tmp_path / "five")
    assert json.loads(output.strip().split("\n")[-1]) == [expected, expected]
    written = {path.name for path in (tmp_path / "five").iterdir()}
    assert "tokenizer.json" in written
    assert not written & {"vocab.json", "merges.txt"}
    assert clipmb.CLIPTokenizerFast.from_pretrained(tmp_path / "five")(strings[::10])["input_ids"] == expected
    slow = clipmb.CLIPTokenizer.from_pretrained(tmp_path / "five")
    assert slow("日本語 two")["input_ids"] == clipmb.CLIPTokenizer()("日本語 two")["input_ids"]


def test_transformers_5_reads_our_added_tokens(tmp_path):
    tokenizer = clipmb.CLIPTokenizerFast()
    add(tokenizer, clipmb.common.text.tokenizer.AddedToken)
    tokenizer.save_pretrained(tmp_path / "ours")
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(ADDED_TEXTS), "utf-8")
    output = transformers5.run(TOKENIZE_5, tmp_path / "ours", texts, tmp_path / "five")
    expected = [tokenizer(text)["input_ids"] for text in ADDED_TEXTS]
    assert json.loads(output.strip().split("\n")[-1]) == [expected, expected]
    again = clipmb.CLIPTokenizerFast.from_pretrained(tmp_path / "five")
    assert [again(text)["input_ids"] for text in ADDED_TEXTS] == expected
    assert again.pad_token == "<pad>"


@pytest.mark.parametrize(
    "options", [{}, {"new_special_tokens": ["<new>"]}, {"special_tokens_map": {"<|startoftext|>": "<s>"}}]
)
def test_a_vocabulary_learned_from_texts(options, files, tmp_path):
    texts = ["a cat and a dog", "hello hello", "Ein Hund läuft"] * 20
    theirs = reference("fast", files).train_new_from_iterator(texts, 600, **options)
    ours = clipmb.CLIPTokenizerFast().train_new_from_iterator(texts, 600, **options)
    # Merges that are equally frequent come in any order, in transformers too: the ids of two runs differ.
    assert set(ours.get_vocab()) == set(theirs.get_vocab())
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.tokenize("hello Dog <new>") == theirs.tokenize("hello Dog <new>")
    ours.save_pretrained(tmp_path)
    again = transformers.CLIPTokenizerFast.from_pretrained(tmp_path)
    assert again("hello Dog <new>")["input_ids"] == ours("hello Dog <new>")["input_ids"]
