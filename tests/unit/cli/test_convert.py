"""``clipmb convert``, ``clipmb verify --record`` and ``scripts/convert_weights.py`` as a user runs them."""

from __future__ import annotations

import json

import pytest
from cases import CONFIGS, write_checkpoint
from conftest import BACKENDS, TESTS
from processes import clipmb, python

CONFIG = CONFIGS["plain"]
SCRIPT = TESTS.parent / "scripts" / "convert_weights.py"


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "source", CONFIG)


def test_convert_and_check_the_record(source, tmp_path):
    done = clipmb("convert", source, tmp_path / "result", "--to", "tf-h5", "--dtype", "float16")
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("tf_model.h5", "config.json", "activation", "94 tensors rounded, by at most", "conversion.json"):
        assert words in done.stdout
    assert "\x1b" not in done.stdout
    done = clipmb("verify", tmp_path / "result", "--record")
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "result" / "config.json").write_text("{}")
    done = clipmb("verify", tmp_path / "result", "--record")
    assert (done.returncode, done.stdout) == (1, "config.json has changed\n")
    done = clipmb("verify", tmp_path / "result", "--record", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["problems"] == ["config.json has changed"]


def test_json_is_the_record(source, tmp_path):
    done = clipmb("convert", source, tmp_path / "result", "--json", "--shard-size", "100KB")
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    assert record == json.loads((tmp_path / "result" / "conversion.json").read_text())
    assert len(record["result"]["weights"]) > 2
    assert record["verification"] == {"largest_difference": 0.0, "backends": None}


def test_dry_run(source, tmp_path):
    done = clipmb("convert", source, tmp_path / "result", "--to", "flax-msgpack", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("text_projection.weight", "text_projection/kernel", "(24, 32)", "float32", "94 tensors would be"):
        assert words in done.stdout
    done = clipmb("convert", source, tmp_path / "result", "--to", "flax-msgpack", "--dry-run", "--json")
    entries = {entry["canonical"]: entry for entry in json.loads(done.stdout)["mapping"]}
    assert len(entries) == 94
    assert entries["text_projection.weight"] == {
        "source": "text_projection.weight",
        "canonical": "text_projection.weight",
        "target": "text_projection/kernel",
        "shape": [24, 32],
        "dtype": "float32",
    }
    assert not (tmp_path / "result").exists()


def test_subfolder_head_and_overwrite(tmp_path):
    write_checkpoint(tmp_path / "source" / "inner", CONFIG)
    arguments = ("convert", tmp_path / "source", tmp_path / "result", "--subfolder", "inner", "--head", "CLIPTextModel")
    assert clipmb(*arguments).returncode == 0
    done = clipmb(*arguments)
    assert done.returncode == 1
    assert "--overwrite" in done.stderr
    assert clipmb(*arguments, "--overwrite").returncode == 0
    assert json.loads((tmp_path / "result" / "config.json").read_text())["architectures"] == ["CLIPTextModel"]


def test_verify_runs_the_backends(source, tmp_path):
    done = clipmb("convert", source, tmp_path / "result", "--to", "pytorch", "--verify")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "result" / "conversion.json").read_text())
    checked = record["verification"]["backends"]
    assert set(BACKENDS) <= set(checked["contenders"])
    assert checked["difference"] < 1e-5
    assert "source and result agree on" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["convert"], 2, "SRC"),
        (["convert", "SOURCE"], 2, "DST"),
        (["convert", "SOURCE", "RESULT", "--to", "onnx"], 2, "flax-msgpack"),
        (["convert", "SOURCE", "RESULT", "--dtype", "int4"], 2, "bfloat16"),
        (["convert", "SOURCE", "RESULT", "--shard-size", "much"], 1, "size"),
        (["convert", "SOURCE", "RESULT", "--head", "CLIPForImageClassification"], 1, "classifier"),
        (["convert", "SOURCE", "RESULT", "--head", "CLIPTower"], 2, "CLIPTextModelWithProjection"),
        (["convert", "SOURCE", "RESULT", "--dry-run", "--verify"], 2, "--verify needs a result"),
        (["convert", "SOURCE", "RESULT", "--revision", "main"], 2, "--revision has no effect"),
        (["convert", "SOURCE", "RESULT", "--colour"], 2, "--colour"),
        (["convert", "/no/such/folder", "RESULT"], 1, "does not exist"),
        (["convert", "SOURCE", "SOURCE", "--overwrite"], 1, "must be different folders"),
        (["verify", "SOURCE", "--record"], 1, "conversion.json"),
    ],
)
def test_errors(source, tmp_path, arguments, code, words):
    names = {"SOURCE": source, "RESULT": tmp_path / "result"}
    done = clipmb(*(names.get(argument, argument) for argument in arguments))
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "result").exists()


def test_the_script_is_the_same_function(source, tmp_path):
    options = ("--to", "flax-msgpack", "--dtype", "bfloat16")
    assert clipmb("convert", source, tmp_path / "a", *options).returncode == 0
    done = python(SCRIPT, source, tmp_path / "b", *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert "activation" in done.stdout
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    done = python(SCRIPT, source, tmp_path / "b")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert python(SCRIPT, source, tmp_path / "c", "--to", "onnx").returncode == 2
    done = python(SCRIPT, source, tmp_path / "c", "--dry-run")
    assert len([line for line in done.stdout.splitlines() if "\t" in line]) == 94
    assert not (tmp_path / "c").exists()
