"""What transformers' CLIP classes have, clipmb's have too, or docs/migrating.md says what to use instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from processes import python

import clipmb

SCRIPT = Path(__file__).parents[2] / "scripts" / "surface.py"
WITHOUT_FRAMEWORK = ("configs", "tokenizers", "image processors", "processor", "encodings", "outputs")


@pytest.mark.parametrize(
    "groups",
    [
        pytest.param(WITHOUT_FRAMEWORK, id="common"),
        pytest.param(("PyTorch models",), marks=pytest.mark.backend("pt"), id="pt"),
        pytest.param(("TensorFlow models",), marks=pytest.mark.backend("tf"), id="tf"),
        pytest.param(("Flax models",), marks=pytest.mark.backend("flax"), id="flax"),
    ],
)
def test_every_public_name_is_there_or_in_the_table_of_the_migration_page(groups):
    done = python(SCRIPT, "--check", *groups)
    assert done.returncode == 0, (
        f"Run python scripts/surface.py, and say what to use instead:\n{done.stdout}{done.stderr[-2000:]}"
    )


def test_a_row_too_many_and_a_row_too_few_are_found(tmp_path):
    lines = (SCRIPT.parents[1] / "docs" / "migrating.md").read_text("utf-8").splitlines(keepends=True)
    row = next(i for i, line in enumerate(lines) if line.startswith("| encodings |"))
    lines[row] = "| encodings | `no_such_name` | nothing |\n"
    (tmp_path / "docs").mkdir()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "docs" / "migrating.md").write_text("".join(lines), "utf-8")
    script = tmp_path / "scripts" / "surface.py"
    script.write_text(SCRIPT.read_text("utf-8"), "utf-8")
    done = python(script, "--check", "encodings")
    assert done.returncode == 1
    assert "encodings: `no_such_name` clipmb has by now" in done.stdout
    assert "has no row" in done.stdout


@pytest.mark.backend("pt")
def test_models_take_transformers_own_configs():
    theirs = transformers.CLIPConfig(
        text_config={"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 99},
        vision_config={
            "hidden_size": 24,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "image_size": 17,
            "patch_size": 4,
        },
        attn_implementation="eager",
    )
    ours = clipmb.CLIPModel(theirs).config
    assert isinstance(ours, clipmb.CLIPConfig)
    assert (ours.text_config.hidden_size, ours.vision_config.num_patches) == (16, 16)
    assert ours.text_config.attn_implementation == "eager"
    assert isinstance(clipmb.CLIPTextModel(theirs.text_config).config, clipmb.CLIPTextConfig)
