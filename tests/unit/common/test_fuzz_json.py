"""A sample of `make fuzz` on configuration, tokenizer, processor and index files, and that the fuzzer finds faults."""

from __future__ import annotations

import fuzz_json
import pytest

from clipmb import CheckpointError, CLIPConfig


def test_damaged_files_give_an_object_or_one_clear_error():
    assert fuzz_json.work(0, 300) == []


@pytest.mark.parametrize("number", [6983, 14668])  # a shard with a name of 100,000 characters, a token that is a list
def test_what_the_fuzzer_found_once(number):
    assert fuzz_json.work(number, 1) == []


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (KeyError("x"), "KeyError"),
        (CheckpointError("something is wrong"), "names no file"),
        (CheckpointError("{folder}" + "x" * 600), "a message of"),
    ],
)
def test_the_fuzzer_finds_faults(fault, found, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_json, "LONGEST", 500)

    def read(folder):
        raise type(fault)(*(str(part).replace("{folder}", str(folder)) for part in fault.args))

    assert fuzz_json.problem_of(read, tmp_path).startswith(found)


def test_the_fuzzer_finds_what_is_lost_between_saving_and_loading(tmp_path, monkeypatch):
    CLIPConfig().save_pretrained(tmp_path)
    read = fuzz_json.settings(CLIPConfig)
    assert fuzz_json.problem_of(read, tmp_path) is None
    monkeypatch.setattr(CLIPConfig, "to_dict", lambda self: {"number": id(self), "model_type": "clip"})
    assert fuzz_json.problem_of(read, tmp_path).startswith("AssertionError")
