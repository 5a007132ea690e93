"""The tokenizer by itself: published ids, round trips, files, errors, threads, copies."""

from __future__ import annotations

import copy
import json
import os
import pickle
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import output

from clipmb import BatchEncoding, CheckpointError, CLIPTokenizer, CLIPTokenizerFast
from clipmb.common.text import bpe, engine
from clipmb.common.text.tokenizer import AddedToken
from clipmb.common.text.unicode import lower, nfc

BOS, EOS = 49406, 49407
BOTH = pytest.mark.parametrize("kind", [CLIPTokenizer, CLIPTokenizerFast])
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
WORD = st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyzéß日0123456789!?.,-'"), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def fast() -> CLIPTokenizerFast:
    return CLIPTokenizerFast()


@pytest.fixture
def tiny(tmp_path):
    """A folder with a vocabulary of 12 tokens; c, a, t and only these are known."""
    tokens = [
        "c",
        "a",
        "t",
        "c</w>",
        "a</w>",
        "t</w>",
        "ca",
        "cat</w>",
        "!",
        "<unk>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    tmp_path.joinpath("vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    tmp_path.joinpath("merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    return tmp_path


@BOTH
def test_published_ids(kind):
    """Ids from OpenAI's own repository and the published models' cards."""
    tokenizer = kind()
    assert tokenizer("a diagram")["input_ids"] == [BOS, 320, 22697, EOS]
    assert tokenizer(["a photo of a cat", "a photo of a dog"])["input_ids"] == [
        [BOS, 320, 1125, 539, 320, 2368, EOS],
        [BOS, 320, 1125, 539, 320, 1929, EOS],
    ]
    assert (tokenizer.vocab_size, len(tokenizer), tokenizer.model_max_length) == (49408, 49408, 77)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, EOS, EOS)


def test_the_two_cleanings_differ_where_they_should():
    slow, fast = CLIPTokenizer(), CLIPTokenizerFast()
    assert slow.tokenize("x中y") == [*slow.tokenize("x"), *slow.tokenize("中"), *slow.tokenize("y")]
    assert fast.tokenize("x中y") != slow.tokenize("x中y")
    assert slow.tokenize("ab\u200bcd") == slow.tokenize("abcd")
    assert fast.tokenize("ab\u200bcd") != fast.tokenize("abcd")
    assert slow.decode(slow.encode("ΟΔΟΣ"), skip_special_tokens=True) == "οδος"
    assert fast.decode(fast.encode("ΟΔΟΣ"), skip_special_tokens=True) == "οδοσ"
    assert CLIPTokenizer(text_cleaning="nfc")("x中y ΟΔΟΣ") == fast("x中y ΟΔΟΣ")


def test_explicit_cleanings():
    pytest.importorskip("ftfy", reason="optional; without it the next test says what happens")
    html = "don’t &amp;lt; caf\u00c3\u00a9  ＦＵＬＬ"
    plain = CLIPTokenizerFast()
    assert CLIPTokenizer(text_cleaning="openai")(html) == plain("don't < café full")
    assert CLIPTokenizer(text_cleaning="ftfy")("don’t  caf\u00c3\u00a9") == plain("don't café")
    with pytest.raises(ValueError, match="'nfc' or 'basic'"):
        CLIPTokenizer(text_cleaning="ftfy")("a", return_offsets_mapping=True)


@pytest.mark.parametrize("cleaning", ["ftfy", "openai"])
def test_ftfy_is_named_when_missing(cleaning, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match=f"text_cleaning='{cleaning}'.*pip install ftfy"):
        CLIPTokenizer(text_cleaning=cleaning)
    assert CLIPTokenizer()("a")["input_ids"] == [BOS, 320, EOS]


@settings(max_examples=150, deadline=None)
@given(st.lists(WORD, min_size=1, max_size=8))
def test_round_trip_of_words(words):
    """Decoding gives the text back, but for spaces around punctuation and digits."""
    tokenizer = CLIPTokenizerFast()
    text = " ".join(words)
    back = tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True)
    assert back.replace(" ", "") == text.replace(" ", "")
    assert tokenizer.encode(back) == tokenizer.encode(text)


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_round_trip_of_any_text(text):
    tokenizer = CLIPTokenizerFast()
    clean = lower(nfc(text))
    back = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
    assert "".join(back.split()) == "".join(clean.split())


@settings(max_examples=200, deadline=None)
@given(TEXT, st.sampled_from([CLIPTokenizer, CLIPTokenizerFast]))
def test_places_cover_the_tokens_and_agree_with_the_cached_path(text, kind):
    tokenizer = kind()
    encoding = tokenizer(text, return_offsets_mapping=True)
    row = encoding[0]
    assert row.ids == encoding["input_ids"]
    starts = [start for start, _ in row.offsets[1:-1]]
    assert starts == sorted(starts)
    for at, (start, end) in list(enumerate(row.offsets))[1:-1]:
        assert 0 <= start < end <= len(text)
        assert text[start:end].strip(" \t\n\r\u3000")
        assert encoding.char_to_token(start) <= at
    assert row.offsets[0] == row.offsets[-1] == (0, 0)


@settings(max_examples=100, deadline=None)
@given(st.text("abc", min_size=1, max_size=200))
def test_short_and_long_words_merge_alike(word):
    ranks = {
        merge: i
        for i, merge in enumerate(["a b", "b c", "ab c", "a a", "aa b", "c</w> a", "bc a", "b c</w>", "ab c</w>"])
    }
    symbols = [*word[:-1], word[-1] + "</w>"]
    assert bpe._merge_short(list(symbols), ranks) == bpe._merge_long(list(symbols), ranks)


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=4), st.integers(2, 20), st.sampled_from(["left", "right"]))
def test_truncation_keeps_both_ends(texts, length, side):
    rows = CLIPTokenizerFast(truncation_side=side)(texts, truncation=True, max_length=length)["input_ids"]
    whole = CLIPTokenizerFast()(texts)["input_ids"]
    for row, full in zip(rows, whole, strict=True):
        assert len(row) == min(len(full), length)
        assert (row[0], row[-1]) == (BOS, EOS)
        inner, kept = full[1:-1], len(row) - 2
        assert row[1:-1] == (inner[:kept] if side == "right" else inner[len(inner) - kept :])


def test_truncation_to_77_is_the_default(fast):
    row = fast("word " * 100, truncation=True)["input_ids"]
    assert (len(row), row[-1]) == (77, EOS)
    assert len(fast("word " * 100)["input_ids"]) == 102
    assert fast("a", padding="max_length", return_tensors="np")["input_ids"].shape == (1, 77)


def test_padding_by_hand(fast):
    right = fast(["a", "a cat"], padding=True, return_tensors="np")
    assert right["input_ids"].tolist() == [[BOS, 320, EOS, EOS], [BOS, 320, 2368, EOS]]
    assert right["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    left = fast(["a", "a cat"], padding=True, padding_side="left", pad_to_multiple_of=5)
    assert left["input_ids"] == [[EOS, EOS, BOS, 320, EOS], [EOS, BOS, 320, 2368, EOS]]
    assert left["attention_mask"] == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
    arrays = fast(["a", "a cat"], padding=True, padding_side="left", pad_to_multiple_of=5, return_tensors="np")
    assert arrays["input_ids"].tolist() == left["input_ids"]
    assert arrays["input_ids"].dtype == np.int64


@BOTH
def test_an_empty_batch_is_a_batch(kind):
    assert dict(kind()([])) == {"input_ids": [], "attention_mask": []}
    assert kind()([], padding="max_length", return_tensors="np")["input_ids"].shape == (0, 77)
    assert kind()("")["input_ids"] == [BOS, EOS]


def test_encoding_access(fast):
    encoding = fast("Hello,  wörlds")
    assert encoding.tokens() == ["<|startoftext|>", "hello</w>", ",</w>", "w", "Ã¶", "rl", "ds</w>", "<|endoftext|>"]
    assert encoding.word_ids() == [None, 0, 1, 2, 2, 2, 2, None]
    assert encoding.word_to_tokens(2) == (3, 7)
    assert encoding.word_to_chars(2) == (8, 14)
    assert encoding.char_to_token(6) is None
    assert encoding.char_to_token(9) == 4
    assert encoding.token_to_chars(2) == (5, 6)
    assert encoding.token_to_chars(0) is None
    assert encoding.input_ids == encoding["input_ids"]
    for again in (pickle.loads(pickle.dumps(encoding)), copy.deepcopy(encoding), copy.copy(encoding)):
        assert again == encoding
        assert again.word_ids() == encoding.word_ids()
    with pytest.raises(IndexError, match="has 1 rows"):
        encoding.tokens(1)
    with pytest.raises(ValueError, match="produced from text"):
        BatchEncoding({"input_ids": [1]}).tokens()


def test_decode(fast):
    ids = fast("Hello, it's me.")["input_ids"]
    assert fast.decode(ids) == "<|startoftext|>hello , it 's me . <|endoftext|>"
    assert fast.decode(np.array(ids), skip_special_tokens=True, clean_up_tokenization_spaces=True) == "hello, it's me."
    assert fast.convert_tokens_to_string(["wor", "ld"]) == "world"
    assert CLIPTokenizer().convert_tokens_to_string(["hello</w>", "wor", "ld</w>"]) == "hello world"
    assert fast.batch_decode(np.array([[320, 2368], [320, 1929]])) == ["a cat", "a dog"]
    assert fast.decode([320, 10**6]) == "a"
    assert fast.convert_ids_to_tokens([320, 10**6]) == ["a</w>", None]
    assert copy.deepcopy(fast).decode(ids) == fast.decode(ids)
    with pytest.raises(TypeError, match="batch_decode"):
        fast.decode([[320]])


@BOTH
def test_copies(kind):
    tokenizer = kind()
    tokenizer.add_tokens(["<new>"])
    for again in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert again("a <new> cat") == tokenizer("a <new> cat")
        again.add_tokens(["<other>"])
    assert len(tokenizer) == 49409


def test_threads():
    tokenizer = CLIPTokenizerFast()
    texts = [f"caption {i} of {i * 7919} things<new>" for i in range(3000)]
    before = [CLIPTokenizerFast()(text)["input_ids"] for text in texts]
    after = CLIPTokenizerFast()
    after.add_tokens(["<new>"])
    allowed = [{tuple(a), tuple(b)} for a, b in zip(before, after(texts)["input_ids"], strict=True)]
    wrong = []

    def work():
        for i, row in enumerate(tokenizer(texts)["input_ids"]):
            if tuple(row) not in allowed[i]:
                wrong.append(texts[i])

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    tokenizer.add_tokens(["<new>"])
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_caches_are_bounded(monkeypatch):
    monkeypatch.setattr(engine, "CACHE_ENTRIES", 50)
    tokenizer = CLIPTokenizerFast()
    expected = CLIPTokenizerFast(text_cleaning="basic")
    for i in range(200):
        assert tokenizer(f"w{i} x{i}")["input_ids"] == expected(f"w{i} x{i}")["input_ids"]
        assert len(tokenizer._engine._chunk_cache) <= 50
        assert len(tokenizer._engine._word_cache) <= 50
    tokenizer("y" * 1000)
    assert "y" * 1000 not in tokenizer._engine._chunk_cache


LONG_WORDS = """
import sys, clipmb
from clipmb.common.text.unicode import lower, lower_words, nfc
kind = getattr(clipmb, sys.argv[1])
for part in ("ab", "é", "\U0001f600", "\U00010428", "e\u0301", "ΑΣ"):
    word = part * 100_000
    tokenizer = kind()
    back = tokenizer.decode(tokenizer(word, truncation=False)["input_ids"], skip_special_tokens=True)
    assert back == (lower_words if kind is clipmb.CLIPTokenizer else lower)(nfc(word)), part
"""


@BOTH
def test_a_long_word_takes_no_quadratic_time(kind):
    """Some seconds in all; quadratic, an hour, which is a hang."""
    output("-c", LONG_WORDS, kind.__name__)


def test_added_tokens(fast):
    tokenizer = CLIPTokenizerFast()
    assert tokenizer.add_tokens(["<new>", AddedToken("Raw", normalized=False), "cat</w>"]) == 2
    assert tokenizer("x<NEW>y")["input_ids"] == [BOS, *fast("x")["input_ids"][1:-1], 49408, *fast("y")["input_ids"][1:]]
    assert 49409 in tokenizer("a Raw b")["input_ids"]
    assert 49409 not in tokenizer("a raw b")["input_ids"]
    slow = CLIPTokenizer()
    slow.add_tokens("FOO")
    assert 49408 in slow("a FOO")["input_ids"]
    assert 49408 not in slow("a foo")["input_ids"]
    assert tokenizer.add_special_tokens({"mask_token": "<mask>"}) == 1
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<mask>", 49410)
    tokenizer.pad_token = "!"
    assert tokenizer.pad_token_id == 0
    with pytest.raises(ValueError, match="add_special_tokens"):
        tokenizer.pad_token = "<nowhere>"
    with pytest.raises(ValueError, match="must be one of 'bos_token'"):
        tokenizer.add_special_tokens({"padd_token": "<pad>"})


@BOTH
def test_save_and_load(kind, tmp_path):
    tokenizer = kind(padding_side="left", model_max_length=40, my_key={"kept": [1]}, additional_special_tokens=["<x>"])
    tokenizer.add_tokens(["<new>", AddedToken("solo", single_word=True)])
    written = tokenizer.save_pretrained(tmp_path)
    assert {os.path.basename(path) for path in written} == {
        "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json",
    }  # fmt: skip
    again = kind.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))["my_key"] == {"kept": [1]}
    for folder in (tmp_path / "again", tmp_path / "once more"):
        again.save_pretrained(folder)
        again = kind.from_pretrained(folder)
        for name in ("tokenizer_config.json", "tokenizer.json", "merges.txt", "vocab.json", "added_tokens.json"):
            assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name
    text = ["a <new> solo soloist <x> cat"]
    assert again(text, padding="max_length") == tokenizer(text, padding="max_length")
    assert len(again(text, padding="max_length")["input_ids"][0]) == 40
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    alone = kind.from_pretrained(tmp_path, model_max_length=9)
    assert alone(text) == tokenizer(text)
    assert alone.model_max_length == 9
    kind().save_pretrained(tmp_path)
    assert not (tmp_path / "added_tokens.json").exists()


def test_no_length_in_the_file_means_77(tiny):
    tiny.joinpath("tokenizer_config.json").write_text(json.dumps({"model_max_length": int(1e30)}))
    assert CLIPTokenizer.from_pretrained(tiny).model_max_length == 77


def test_text_cleaning_survives_saving(tmp_path):
    CLIPTokenizer(text_cleaning="nfc").save_pretrained(tmp_path / "nfc")
    assert CLIPTokenizer.from_pretrained(tmp_path / "nfc").text_cleaning == "nfc"
    CLIPTokenizer().save_pretrained(tmp_path / "own")
    assert CLIPTokenizer.from_pretrained(tmp_path / "own").text_cleaning == "basic"
    assert CLIPTokenizerFast.from_pretrained(tmp_path / "own").text_cleaning == "nfc"


def test_a_tiny_vocabulary(tiny):
    tokenizer = CLIPTokenizer(tiny / "vocab.json", tiny / "merges.txt", unk_token="<unk>")
    assert tokenizer("cat ta! x")["input_ids"] == [10, 7, 2, 4, 9, 9, 11]
    assert tokenizer.save_vocabulary(tiny, "copy") == (str(tiny / "copy-vocab.json"), str(tiny / "copy-merges.txt"))
    assert (tiny / "copy-merges.txt").read_text() == "#version: 0.2\nc a\nca t</w>\n"
    with pytest.raises(ValueError, match="folder that exists"):
        tokenizer.save_vocabulary(tiny / "nowhere")


@BOTH
def test_files_of_the_vocabulary_by_name_take_the_place_of_those_in_the_folder(kind, tiny, tmp_path):
    kind(tiny / "vocab.json", tiny / "merges.txt", unk_token="<unk>").save_pretrained(tmp_path / "small")
    kind(tiny / "vocab.json", tiny / "merges.txt", unk_token="<unk>").save_pretrained(tmp_path / "other")
    other = {**json.loads((tiny / "vocab.json").read_text()), "b</w>": 12}
    (tmp_path / "other" / "vocab.json").write_text(json.dumps(other))
    none = dict.fromkeys(("vocab_file", "merges_file", "tokenizer_file"))
    files = {"vocab_file": tmp_path / "other" / "vocab.json", "merges_file": tmp_path / "other" / "merges.txt"}
    assert len(kind.from_pretrained(tmp_path / "small", **none)) == 12
    assert len(kind.from_pretrained(tmp_path / "small", **{**none, **files})) == 13


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("vocab.json", "{", "vocab.json is not valid JSON"),
        ("vocab.json", "[]", "vocab.json must hold a JSON object"),
        ("vocab.json", "{}", "vocab.json has no vocabulary"),
        ("vocab.json", '{"a": "x"}', "vocab.json must give every token an id"),
        ("vocab.json", '{"a": 1, "b": 1}', "vocab.json gives several tokens one id"),
        ("vocab.json", b"\xff\xfe", "vocab.json cannot be read"),
        ("merges.txt", "#version: 0.2\nc a t\n", "merge 1: 'c a t' is not two symbols"),
        ("merges.txt", "#version: 0.2\nc a\nx y\n", "merge 2: 'x', 'y', 'xy' not in the vocabulary"),
        ("tokenizer_config.json", "nonsense", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", '{"padding_side": "up"}', "padding_side must be one of"),
        ("added_tokens.json", '{"cat</w>": 3}', "3 for 'cat</w>', but elsewhere 7"),
    ],
)
def test_broken_files(tiny, name, content, told):
    tiny.joinpath(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError) as caught:
        CLIPTokenizer.from_pretrained(tiny)
    assert told in str(caught.value)
    assert str(tiny) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda file: file.pop("model"), "has no model"),
        (lambda file: file["model"].update(end_of_word_suffix=None), "words end in None"),
        (lambda file: file["model"].update(type="WordPiece"), "'WordPiece', not 'BPE'"),
        (lambda file: file["normalizer"]["normalizers"].pop(), "the normalizer is not"),
        (lambda file: file.update(pre_tokenizer={"type": "ByteLevel"}), "the pre-tokenizer is not"),
        (lambda file: file["model"]["merges"].append(["q", "zzz"]), "'zzz'"),
        (lambda file: file["added_tokens"].append({"content": "x"}), "without id"),
    ],
)
def test_broken_tokenizer_json(tiny, change, told):
    CLIPTokenizerFast.from_pretrained(tiny).save_pretrained(tiny)
    path = tiny / "tokenizer.json"
    file = json.loads(path.read_text("utf-8"))
    change(file)
    path.write_text(json.dumps(file), "utf-8")
    with pytest.raises(CheckpointError) as caught:
        CLIPTokenizerFast.from_pretrained(tiny)
    assert told in str(caught.value)
    assert "tokenizer.json" in str(caught.value)


def test_nothing_to_read(tmp_path):
    with pytest.raises(CheckpointError, match=r"none of the files tokenizer\.json"):
        CLIPTokenizer.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        CLIPTokenizer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="belong together"):
        CLIPTokenizer(vocab_file="vocab.json")


@BOTH
@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda t: t(), ValueError, "A text is needed"),
        (lambda t: t(3), TypeError, "must be a string. Received: 3"),
        (lambda t: t(b"bytes"), ValueError, "must be a string"),
        (lambda t: t(["a", None]), TypeError, "Received: None"),
        (lambda t: t(np.array(["a"])), TypeError, "must be a string"),
        (lambda t: t("a", ["b"]), TypeError, "must be a string"),
        (lambda t: t(["a"], ["b", "c"]), ValueError, "as many pairs"),
        (lambda t: t([("a", "b"), ("c",)]), ValueError, "(text, pair)"),
        (lambda t: t("a", paddin=True), TypeError, "Did you mean 'padding'"),
        (lambda t: t("a", padding="longst"), ValueError, "'longest', 'max_length'"),
        (lambda t: t("a", padding=["longest"]), ValueError, "padding must be one of"),
        (lambda t: t("a", truncation="only"), ValueError, "'only_first'"),
        (lambda t: t("a", padding_side="up"), ValueError, "padding_side must be one of"),
        (lambda t: t("a", return_tensors="mx"), ValueError, "return_tensors must be one of"),
        (lambda t: t(["a", "b c"], return_tensors="np"), ValueError, "one length"),
        (lambda t: t("a b", truncation=True, max_length=1), ValueError, "room for the 2 special tokens"),
        (lambda t: t("a", max_length=0), ValueError, "Received: 0"),
        (lambda t: t("a", max_length=2.5), ValueError, "Received: 2.5"),
        (lambda t: t("a b c", truncation="only_second", max_length=3), ValueError, "needs pairs"),
        (lambda t: t("a b c", "d e f", truncation="only_first", max_length=6), ValueError, "longest_first"),
        (lambda t: t("a", padding=True, truncation=True, max_length=9, pad_to_multiple_of=4), ValueError, "multiple"),
        (lambda t: t("a", stride=-1), ValueError, "stride"),
        (lambda t: t("a", is_split_into_words=True), TypeError, "list of words"),
        (lambda t: t("\ud800x"), ValueError, "surrogates"),
        (lambda t: t.decode("text"), TypeError, "Ids must be"),
        (lambda t: t.decode([1], skip=True), TypeError, "'skip'"),
        (lambda t: t.pad({"ids": []}), ValueError, "input_ids"),
        (lambda t: t.encode(["a", "b"]), TypeError, "must be a string"),
        (lambda t: t.convert_tokens_to_ids([1]), TypeError, "A token must be a string"),
        (lambda t: t.add_tokens([""]), ValueError, "at least one character"),
        (lambda t: t.add_tokens([7]), TypeError, "AddedToken"),
    ],
)
def test_errors(kind, call, error, told):
    tokenizer = kind()
    if told == "surrogates" and kind is CLIPTokenizer:
        assert tokenizer("\ud800x") == tokenizer("x")  # "basic" removes them
        return
    with pytest.raises(error) as caught:
        call(tokenizer)
    assert told in str(caught.value)
    assert "Received: " in str(caught.value)


def test_stride_must_leave_something_new(fast):
    with pytest.raises(ValueError, match="less than the 2 tokens"):
        fast("a b c d", truncation=True, max_length=4, stride=2, return_overflowing_tokens=True)
    with pytest.raises(ValueError, match="only_first"):
        CLIPTokenizer()("a b c", "d", truncation=True, max_length=6, return_overflowing_tokens=True)


def test_construction_needs_no_network_or_framework():
    script = (
        "import sys, clipmb\n"
        "print(clipmb.CLIPTokenizer()('a cat')['input_ids'], "
        "[name for name in ('torch', 'tensorflow', 'jax', 'ftfy', 'regex', 'transformers') if name in sys.modules])"
    )
    assert output("-c", script).strip() == f"[{BOS}, 320, 2368, {EOS}] []"


@pytest.mark.parametrize("kind", [CLIPTokenizer, CLIPTokenizerFast])
def test_a_text_longer_than_the_model_takes_warns_once(kind, caplog):
    tokenizer = kind()
    tokenizer(["a " * 200], truncation=True)
    tokenizer(["a " * 200], max_length=300)
    tokenizer(["a " * 200], verbose=False)
    assert caplog.messages == []
    tokenizer(["a", "a " * 200])
    tokenizer("a " * 200)
    assert caplog.messages == [
        "A text of 202 tokens is longer than the 77 that the model takes. Pass truncation=True to cut it."
    ]


@pytest.mark.parametrize("kind", [CLIPTokenizer, CLIPTokenizerFast])
def test_left_over_added_tokens_are_ignored_where_the_config_has_its_own(kind, tmp_path):
    kind().save_pretrained(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<old>": 49408}')
    assert len(kind.from_pretrained(tmp_path)) == 49408
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert kind.from_pretrained(tmp_path).convert_tokens_to_ids("<old>") == 49408


@pytest.mark.parametrize("kind", [CLIPTokenizer, CLIPTokenizerFast])
@pytest.mark.parametrize(("ids", "error"), [([1.5], TypeError), ([-1], ValueError), ([10**12], ValueError)])
def test_what_is_no_id_is_refused(kind, ids, error):
    tokenizer = kind()
    for call in (tokenizer.decode, tokenizer.convert_ids_to_tokens, lambda ids: tokenizer.decode(np.array(ids))):
        with pytest.raises(error, match="Received: "):
            call(ids)
    assert tokenizer.decode([320, 60_000]) == "a"  # an id that the vocabulary lacks is left out, as in transformers


@pytest.mark.parametrize("kind", [CLIPTokenizer, CLIPTokenizerFast])
def test_special_tokens_are_set_by_their_ids(kind):
    tokenizer = kind()
    tokenizer.pad_token_id = 320
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("a</w>", 320)
    tokenizer.pad_token_id = None
    assert tokenizer.pad_token is tokenizer.pad_token_id is None
    tokenizer.additional_special_tokens = ["cat</w>"]
    assert tokenizer.additional_special_tokens_ids == [2368]
    tokenizer.additional_special_tokens_ids = [320, 321]
    assert tokenizer.additional_special_tokens == ["a</w>", "b</w>"]
    tokenizer.additional_special_tokens = None
    assert "additional_special_tokens" not in tokenizer.special_tokens_map
    with pytest.raises(ValueError, match="unk_token must be in the vocabulary"):
        tokenizer.unk_token_id = 999_999
    with pytest.raises(ValueError, match="additional_special_tokens must be in the vocabulary"):
        tokenizer.additional_special_tokens = ["<nowhere>"]


def test_special_tokens_with_their_flags():
    tokenizer = CLIPTokenizer(additional_special_tokens=["<x>"])
    extended = tokenizer.special_tokens_map_extended
    assert {name: str(token) for name, token in extended.items() if isinstance(token, AddedToken)} == {
        name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
    }
    assert extended["additional_special_tokens"] == [tokenizer.added_tokens_decoder[49408]]
    assert [str(token) for token in tokenizer.all_special_tokens_extended] == tokenizer.all_special_tokens
    assert tokenizer._added_tokens_decoder == tokenizer.added_tokens_decoder
    assert tokenizer.sanitize_special_tokens() == 0


@pytest.mark.parametrize("kind", [CLIPTokenizer, CLIPTokenizerFast])
def test_added_tokens_are_taken_out_by_the_names_of_transformers(kind):
    tokenizer = kind()
    before = tokenizer("a <one> and <two>").input_ids
    tokenizer.add_tokens(["<one>", "<two>"])
    first, second = tokenizer.convert_tokens_to_ids(["<one>", "<two>"])
    del tokenizer._added_tokens_decoder[first]
    del tokenizer._added_tokens_encoder["<one>"]
    tokenizer._added_tokens_decoder[first] = tokenizer._added_tokens_decoder.pop(second)
    tokenizer._added_tokens_encoder["<two>"] = first
    tokenizer._update_trie()
    assert tokenizer.added_tokens_encoder == dict(tokenizer._added_tokens_encoder)
    assert tokenizer.convert_tokens_to_ids("<two>") == first
    assert first in tokenizer("a <one> and <two>").input_ids
    del tokenizer._added_tokens_encoder["<two>"]
    tokenizer._update_trie()
    assert tokenizer("a <one> and <two>").input_ids == before
    assert len(tokenizer) == len(kind())


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("special_tokens_map.json", {"pad_token": [1]}, "pad_token in special_tokens_map.json"),
        ("special_tokens_map.json", {"pad_token": {"content": "x", "lstrip": 3}}, "lstrip of the token 'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder must map"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": "x"}}, "The id of the added token 'x'"),
        ("tokenizer_config.json", {"additional_special_tokens": "abc"}, "additional_special_tokens must be a list"),
        ("tokenizer_config.json", {"split_special_tokens": "no"}, "split_special_tokens must be True or False"),
        ("tokenizer_config.json", {"model_input_names": [1]}, "model_input_names must be a list"),
        ("added_tokens.json", {"<x>": []}, "The id of the added token '<x>'"),
        ("added_tokens.json", {"<x>": 10**30}, "The id of the added token '<x>'"),
        ("vocab.json", {"a": 10**30}, "vocab.json must give every token an id"),
    ],
)
def test_wrong_content_names_file_and_field(tiny, name, content, told):
    tiny.joinpath(name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        CLIPTokenizer.from_pretrained(tiny)
    assert told in str(caught.value)
    assert str(tiny) in str(caught.value)


def test_no_key_of_a_file_becomes_an_attribute_that_exists(tiny):
    config = {"self": 1, "__class__": "x", "encode": 2, "decode": None}
    tiny.joinpath("tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = CLIPTokenizer.from_pretrained(tiny)
    assert type(tokenizer) is CLIPTokenizer
    assert callable(tokenizer.encode)
    tokenizer.save_pretrained(tiny)
    written = json.loads((tiny / "tokenizer_config.json").read_text("utf-8"))
    assert {name: written[name] for name in config} == config


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_pipes_are_refused_at_once(tiny, name):
    tiny.joinpath(name).unlink()
    os.mkfifo(tiny / name)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read: it is a folder, pipe or device"):
        CLIPTokenizer(tiny / "vocab.json", tiny / "merges.txt")


def test_saving_needs_a_name(fast):
    with pytest.raises(ValueError, match="destination must be a folder"):
        fast.save_pretrained("")


def test_a_learned_vocabulary_keeps_the_settings():
    tokenizer = CLIPTokenizerFast(model_max_length=12, padding_side="left", additional_special_tokens=["<x>"])
    learned = tokenizer.train_new_from_iterator(["a cat", "a cat"], 530, new_special_tokens=["<y>"])
    assert (learned.model_max_length, learned.padding_side) == (12, "left")
    assert learned.additional_special_tokens == ["<x>", "<y>"]
    assert learned.decode(learned("a CAT <y>")["input_ids"], skip_special_tokens=True) == "a cat"
    assert len(learned) <= 530


def test_learning_names_the_library_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        CLIPTokenizerFast().train_new_from_iterator(["a"], 600)
