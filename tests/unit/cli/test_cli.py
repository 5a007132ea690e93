"""The command line, run as a user runs it: output, exit codes, errors without tracebacks."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from cases import CONFIGS, VISION, write_checkpoint
from conftest import BACKENDS
from PIL import Image
from processes import clipmb, invoke
from safetensors import safe_open

from clipmb import CLIPConfig, CLIPPipeline
from clipmb.cli.common import print_json
from clipmb.cli.info import describe
from clipmb.common.hub import Source
from clipmb.common.small_model import TEMPLATES, held_out_pictures, small_model
from clipmb.common.training.recipe import Recipe

CONFIG = CLIPConfig(
    {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4},
    VISION,
    projection_dim=24,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("small"), CONFIG)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(2)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (24, 30, 3), np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("backend", BACKENDS)
def test_classify(folder, photos, backend):
    options = ["--labels", "a cat, a dog", "--labels", "a cup", "--model", folder, "--backend", backend]
    done = clipmb("classify", *photos, *options, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["backend"] == backend
    expected = CLIPPipeline.from_pretrained(folder, backend=backend).classify(
        [str(p) for p in photos], ["a cat", "a dog", "a cup"]
    )
    for photo, entry, row in zip(photos, found["images"], expected, strict=True):
        assert entry["image"] == str(photo)
        values = {label["label"]: label["probability"] for label in entry["labels"]}
        assert [values["a cat"], values["a dog"], values["a cup"]] == pytest.approx(row.tolist(), abs=1e-6)
        assert list(values.values()) == sorted(values.values(), reverse=True)
    shown = clipmb("classify", photos[0], *options, "--top", "1", "--template", "{}")
    assert shown.returncode == 0
    assert backend in shown.stdout
    assert "\x1b" not in shown.stdout
    assert sum(label in shown.stdout for label in ("a cat", "a dog", "a cup")) == 1


def test_classify_without_a_model_uses_the_small_one_and_says_so(tmp_path):
    pictures, truth = held_out_pictures()
    pictures[truth.index("rocket")].save(tmp_path / "picture.png")
    done = clipmb("classify", tmp_path / "picture.png", "--labels", "rocket,panda,pizza", "--json", "-b", BACKENDS[0])
    assert done.returncode == 0
    assert "emoji-style images only" in done.stderr
    assert "--model openai/clip-vit-base-patch32" in done.stderr
    found = json.loads(done.stdout)
    assert found["model"] == str(small_model())
    best = found["images"][0]["labels"][0]
    clip = CLIPPipeline.from_pretrained(small_model(), backend=BACKENDS[0])
    expected = clip.classify(str(tmp_path / "picture.png"), ["rocket", "panda", "pizza"], TEMPLATES)[0]
    assert best == {"label": "rocket", "probability": pytest.approx(expected[0], abs=1e-6)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_encode(folder, photos, tmp_path, backend):
    (tmp_path / "texts.txt").write_text("a dog\n\na small cup\n", "utf-8")
    texts = ["--text", "a cat", "--texts", tmp_path / "texts.txt"]
    options = ["--model", folder, "--backend", backend]
    clip = CLIPPipeline.from_pretrained(folder, backend=backend)
    images = clip.encode_image([str(photo) for photo in photos])
    lines = ["a cat", "a dog", "a small cup"]
    words = clip.encode_text(lines)

    done = clipmb("encode", *photos, *texts, *options)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["backend"] == backend
    assert [row["name"] for row in found["images"]] == [str(photo) for photo in photos]
    assert [row["name"] for row in found["texts"]] == lines
    assert np.abs(np.array([row["embedding"] for row in found["images"]]) - images).max() < 1e-6
    assert np.abs(np.array([row["embedding"] for row in found["texts"]]) - words).max() < 1e-6
    if backend != BACKENDS[0]:
        return  # how files are written does not depend on the backend

    done = clipmb("encode", *photos, *texts, *options, "--out", tmp_path / "both.npz")
    assert done.returncode == 0
    assert "images 2 x 24, texts 3 x 24 float32" in done.stdout
    with np.load(tmp_path / "both.npz") as arrays:
        assert np.abs(arrays["images"] - images).max() < 1e-6
        assert np.abs(arrays["texts"] - words).max() < 1e-6
        assert arrays["texts_names"].tolist() == lines
    assert clipmb("encode", *photos, *options, "--no-normalize", "--out", tmp_path / "images.npy").returncode == 0
    raw = np.load(tmp_path / "images.npy")
    assert np.abs(raw - clip.encode_image([str(photo) for photo in photos], normalize=False)).max() < 1e-6
    assert clipmb("encode", *texts, *options, "--out", tmp_path / "texts.safetensors").returncode == 0
    with safe_open(tmp_path / "texts.safetensors", "np") as file:
        assert list(file.keys()) == ["texts"]
        assert np.abs(file.get_tensor("texts") - words).max() < 1e-6
        assert json.loads(file.metadata()["texts_names"]) == lines
    assert not list(tmp_path.glob("*.part"))


def test_demo(tmp_path):
    done = clipmb("demo", "--backend", BACKENDS[0], "--out", tmp_path / "new" / "demo.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert "emoji-style images only" in done.stdout.replace("\n", " ")
    right = re.search(r"(\d+) of 16 correct", done.stdout)
    assert int(right[1]) >= 12
    for label in ("rocket", "Statue of Liberty", "fruit"):
        assert label in done.stdout
    with Image.open(tmp_path / "new" / "demo.png") as sheet:
        assert sheet.width == 1200
        assert len(sheet.convert("RGB").getcolors(10**6)) > 1000
    assert str(tmp_path / "new" / "demo.png") in done.stdout


def test_a_label_longer_than_the_context(tmp_path):
    pictures, _ = held_out_pictures()
    pictures[0].save(tmp_path / "image.png")
    call = ["classify", tmp_path / "image.png", "--labels", "rocket," + "panda " * 80, "-b", BACKENDS[0], "--json"]
    done = clipmb(*call)
    assert done.returncode == 1
    assert "error: A text may have at most 30 tokens" in done.stderr
    assert "--long-text" in done.stderr
    done = clipmb(*call, "--long-text", "truncate")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["images"][0]["labels"]) == 2


def test_info(folder):
    done = clipmb("info", folder, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["head"] == "CLIPModel"
    assert found["config"]["text.hidden_size"] == 32
    assert found["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert found["parameters"] == sum(part["parameters"] for part in found["parts"].values())
    assert found["dtypes"] == ["float32"]
    shown = clipmb("info", folder)
    assert shown.returncode == 0
    assert "model.safetensors" in shown.stdout
    assert f"{found['parameters']:,}" in shown.stdout


def test_info_of_a_save_whose_files_are_not_in_place_yet(tmp_path):
    """What a writer leaves that is killed after its commit: the new config, and old weights that it removes."""
    folder = write_checkpoint(tmp_path / "model", CONFIG)
    committed = folder / ".clipmb-save"
    committed.mkdir()
    write_checkpoint(tmp_path / "new", CONFIGS["plain"])
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "new" / name).rename(committed / name)
    (folder / "old.bin").write_bytes(b"old")
    plan = {"written": ["config.json", "model.safetensors"], "removed": ["old.bin"]}
    (committed / "clipmb-save.json").write_text(json.dumps(plan))
    found = describe(Source(str(folder)))
    assert found["config"]["text.hidden_size"] == CONFIGS["plain"].text_config.hidden_size
    assert found["files"].keys() == {"config.json", "model.safetensors"}


def test_json_has_no_nan(capsys):
    print_json({"a": [np.float32("nan"), float("-inf"), 1.5]})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 1.5]}


def test_info_of_a_tower(tmp_path):
    write_checkpoint(tmp_path / "a" / "text", CONFIGS["plain"], "CLIPTextModel")
    found = json.loads(clipmb("info", tmp_path / "a", "--subfolder", "text", "--json").stdout)
    assert found["head"] == "CLIPTextModel"
    assert list(found["parts"]) == ["text_model"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["classify"], 2, "IMAGE"),
        (["classify", "PHOTO"], 2, "--labels"),
        (["classify", "PHOTO", "--labels", "a", "--batch-size", "0"], 2, "batch-size"),
        (["encode", "--model", "FOLDER"], 1, "an image or a text"),
        (["encode", "PHOTO", "--out", "rows.csv", "--model", "FOLDER"], 1, ".safetensors"),
        (["encode", "PHOTO", "--text", "a", "--out", "rows.npy", "--model", "FOLDER"], 1, ".npz"),
        (["encode", "PHOTO", "--out", "/no/such/rows.npy", "--model", "FOLDER"], 1, "folder that exists"),
        (["encode", "--texts", "/no/such/file", "--model", "FOLDER"], 1, "/no/such/file"),
        (["demo", "--backend", "mxnet"], 2, "pt, tf, flax, onnx"),
        (["classify", "PHOTO", "--labels", "a", "--model", "FOLDER", "--dtype", "int4"], 2, "bfloat16"),
        (["encode", "PHOTO", "--model", "FOLDER", "--long-text", "cut"], 2, "error, truncate, mean"),
        (["encode", "PHOTO", "--model", "FOLDER", "--long-text", "mean"], 2, "--long-text has no effect"),
        (["info", "FOLDER", "--revision", "main"], 2, "--revision has no effect"),
        (["verify", "FOLDER", "--record", "--dtype", "float64"], 2, "--dtype has no effect"),
        (["verify", "FOLDER", "--record", "--against", "FOLDER", "-b", "pt"], 2, "--backend, --against"),
        (["train", "FOLDER", "--out", "FOLDER", "--eval-every", "5"], 2, "--eval-every has no effect"),
        (["train", "FOLDER", "--out", "FOLDER", "--freeze", "all"], 2, "text, vision"),
        (["nonsense"], 2, "nonsense"),
        (["info"], 2, "MODEL"),
        (["classify", "nowhere.png", "--labels", "a,b", "--model", "FOLDER"], 1, "nowhere.png"),
        (["classify", "PHOTO", "--labels", " , ", "--model", "FOLDER"], 1, "labels"),
        (["classify", "PHOTO", "--labels", "a", "--model", "FOLDER", "--backend", "mxnet"], 2, "pt, tf, flax"),
        (["classify", "PHOTO", "--labels", "a", "--model", "FOLDER", "--template", "x"], 1, "template"),
        (["classify", "PHOTO", "--labels", "a", "--model", "/no/such/folder"], 1, "does not exist"),
        (["info", "/no/such/folder"], 1, "does not exist"),
        (["info", "x" * 5000], 1, "does not exist"),
        (["convert", "x" * 5000, "FOLDER"], 1, "must be new or empty"),
        (["evaluate", "x" * 5000, "--model", "FOLDER"], 1, "must match at least one file"),
        (
            ["evaluate", "PHOTO", "--labels", ",".join(f"panda {i}" for i in range(60)), "--model", "FOLDER"],
            1,
            "Expected a",
        ),
    ],
)
def test_errors(folder, photos, arguments, code, words):
    names = {"PHOTO": photos[0], "FOLDER": folder}
    done = clipmb(*(names.get(argument, argument) for argument in arguments))
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_debug_shows_the_traceback():
    done = clipmb("--debug", "info", "/no/such/folder")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_model_that_is_not_cached_is_named_without_the_network(tmp_path):
    done = clipmb("info", "someone/some-clip", HF_HOME=str(tmp_path))
    assert done.returncode == 1
    assert "someone/some-clip" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_version():
    assert clipmb("--version").stdout.startswith("clipmb 0.")
    assert "Usage: clipmb" in clipmb("--help").stdout


def test_train_passes_on_columns_and_the_recipe_that_is_given_only(monkeypatch):
    """A resumed run keeps its own recipe, so that defaults must not be passed on."""
    passed = []
    monkeypatch.setattr("clipmb.training.train", lambda *given, **options: passed.append(options) or {"out": "out"})
    arguments = ["train", "data", "--out", "out", "--backend", BACKENDS[0], "--json", "--eval", "held-out"]
    recipe = {field.name for field in dataclasses.fields(Recipe)} - {"steps"}
    assert invoke(*arguments).exit_code == 0
    assert not recipe & passed[0].keys()
    more = ["--label-column", "kind", "--image-column", "file", "--lr", "1e-3", "--beta2", "0.9", "--freeze", "text"]
    assert invoke(*arguments, *more, "--local-loss", "-t", "photo").exit_code == 0
    assert {name: passed[1][name] for name in recipe & passed[1].keys()} == {
        "learning_rate": 1e-3,
        "betas": (Recipe.betas[0], 0.9),
        "freeze": ("text",),
        "local_loss": True,
    }
    assert passed[1]["columns"] == {
        "image_column": "file", "caption_column": None, "label_column": "kind", "separator": None, "image_root": None
    }  # fmt: skip
    assert passed[1]["templates"] == "photo"


def test_tables_show_names_as_they_are(tmp_path):
    folder = write_checkpoint(tmp_path / "my[red]clip :cat:", CONFIG)
    assert "my[red]clip :cat:" in clipmb("info", folder).stdout
