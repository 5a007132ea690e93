"""`clipmb.verification`, `clipmb.testing` and `clipmb verify`: agreement is reported, and so is every disagreement."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cases import CONFIGS, VISION, random_arrays, write_checkpoint
from conftest import BACKENDS
from processes import clipmb

from clipmb import CheckpointError, CLIPConfig
from clipmb.common.checkpoint import write_safetensors
from clipmb.common.saving import Transaction
from clipmb.testing import assert_backends_agree
from clipmb.verification import compare, relative_difference

TEXT = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = CLIPConfig({**TEXT, "hidden_act": "gelu"}, VISION, projection_dim=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("small"), CONFIG)


def changed(folder, config=CONFIG, **changes):
    """The same checkpoint with some weights or another config."""
    arrays = {**random_arrays(CONFIG, "CLIPModel"), **changes}
    with Transaction(folder) as save:
        save.write("config.json", config.to_json_string())
        write_safetensors(save, arrays)
    return folder


@pytest.mark.several
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_backends_agree(folder, dtype):
    report = assert_backends_agree(folder, backends=BACKENDS, dtype=dtype)
    assert report.agrees
    assert report.first_divergence is None
    assert report.standard == BACKENDS[0]
    stages = [entry.stage for entry in report.comparisons if entry.contender == BACKENDS[1]]
    assert stages[:4] == ["ids", "pixels", "weights", "text.embeddings"]
    assert stages[-1] == "logits"
    assert len(stages) == 3 + 2 * 6 + 1
    assert "agree" in report.explain()


@pytest.mark.several
def test_backends_agree_without_a_tokenizer(tmp_path):
    report = assert_backends_agree(write_checkpoint(tmp_path, CONFIGS["stress"]), backends=BACKENDS, dtype="float64")
    assert max(entry.difference for entry in report.comparisons) > 0


def test_the_first_wrong_tensor_is_named(folder, tmp_path):
    name = "text_model.encoder.layers.1.mlp.fc1.bias"
    bias = random_arrays(CONFIG, "CLIPModel")[name]
    bias[5] += 1
    other = changed(tmp_path, **{name: bias})
    report = compare(other, backends=BACKENDS[:1], against=folder)
    assert not report.agrees
    assert report.first_divergence.stage == "weights"
    assert name in report.first_divergence.detail
    assert "[5]" in report.first_divergence.detail
    wrong = [entry.stage for entry in report.comparisons if not entry.agrees]
    assert "text.block.0" not in wrong
    assert {"text.block.1", "text.pooled", "text.projected", "logits"} <= set(wrong)
    with pytest.raises(AssertionError, match="weights"):
        assert_backends_agree(other, backends=BACKENDS[:1], against=folder)


def test_the_first_wrong_stage_is_named_where_the_weights_are_equal(folder, tmp_path):
    fields = CONFIG.to_dict()
    fields["text_config"]["hidden_act"] = "gelu_new"
    other = changed(tmp_path, CLIPConfig.from_dict(fields))
    report = compare(other, backends=BACKENDS[:1], against=folder)
    assert report.first_divergence.stage == "text.block.0"
    assert all(entry.agrees for entry in report.comparisons if entry.stage.startswith("vision"))
    again = json.loads(json.dumps(report.to_dict()))
    assert again["first_divergence"]["stage"] == "text.block.0"


def test_another_image_processor_is_seen_in_the_pixels(folder, tmp_path):
    from clipmb import CLIPImageProcessor

    size = {"height": 20, "width": 20}
    CLIPImageProcessor(size={"shortest_edge": 20}, crop_size=size, image_mean=[0.5, 0.5, 0.5]).save_pretrained(tmp_path)
    report = compare(changed(tmp_path), backends=BACKENDS[:1], against=folder)
    assert report.first_divergence.stage == "pixels"


def test_what_is_not_finite_never_agrees():
    nan = np.array([1.0, np.nan])
    assert relative_difference(nan, nan) == float("inf")
    assert relative_difference(np.ones(2), np.ones(3)) == float("inf")
    assert relative_difference(np.array([1.0, 2.0]), np.array([1.0, 4.0])) == 0.5


def test_nothing_to_compare(folder):
    with pytest.raises(ValueError, match="against"):
        compare(folder, backends=BACKENDS[:1])
    with pytest.raises(ValueError, match="dtype"):
        compare(folder, backends=BACKENDS[:1], against=folder, dtype="auto")
    with pytest.raises(TypeError, match="colour"):
        compare(folder, backends=BACKENDS[:1], against=folder, colour="red")


def named(backends):
    return [part for backend in backends for part in ("--backend", backend)]


@pytest.mark.several
def test_verify(folder):
    done = clipmb("verify", folder, *named(BACKENDS))
    assert (done.returncode, done.stderr) == (0, "")
    assert "text.block.1" in done.stdout
    assert "agree" in done.stdout
    found = json.loads(clipmb("verify", folder, *named(BACKENDS[:2]), "--json").stdout)
    assert found["agrees"]
    assert {entry["contender"] for entry in found["comparisons"]} == {BACKENDS[1]}


def test_verify_against_another_checkpoint(folder, tmp_path):
    scale = np.asarray(2.1, np.float32)
    other = changed(tmp_path, logit_scale=scale)
    done = clipmb("verify", other, "--backend", BACKENDS[0], "--against", folder)
    assert done.returncode == 1
    assert "logit_scale" in done.stdout
    assert "Traceback" not in done.stderr
    assert clipmb("verify", folder, "--backend", BACKENDS[0], "--against", folder).returncode == 0
    assert clipmb("verify", "/no/such/folder", "--backend", BACKENDS[0], "--against", folder).returncode == 1


@pytest.mark.parametrize("file", ["tokenizer.json", "preprocessor_config.json"])
def test_a_damaged_tokenizer_or_image_processor_is_no_agreement(folder, tmp_path, file):
    (changed(tmp_path) / file).write_text("{")
    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")):
        compare(tmp_path, backends=BACKENDS[:1], against=folder)
