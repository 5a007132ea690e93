"""`clipmb.export`: files for other runtimes, and that nothing stays of those that compute something else."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cases import CONFIGS, image_inputs, random_arrays, relative, text_inputs, write_checkpoint
from processes import clipmb as command

import clipmb
from clipmb import CheckpointError, CLIPImageProcessor, CLIPPipeline, CLIPTokenizerFast, backends, exporting
from clipmb.onnx import export as writer
from clipmb.onnx.graph import clip

pytestmark = pytest.mark.backend("onnx")
FILES = {"both": "model", "text": "text_model", "image": "vision_model"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint for each config, written once."""
    return {name: write_checkpoint(tmp_path_factory.mktemp("checkpoint"), config) for name, config in CONFIGS.items()}


def run(path, inputs):
    """Runs a file with those of the inputs that it takes; returns name to array, in order."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_outputs()]
    values = session.run(names, {entry.name: inputs[entry.name] for entry in session.get_inputs()})
    return dict(zip(names, values, strict=True))


def inputs_of(config, batch=5):
    return text_inputs(config, batch) | image_inputs(config, batch)


def left(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("case", CONFIGS)
def test_every_tower_computes_what_the_checkpoint_does(folder, tmp_path, case):
    config = CONFIGS[case]
    record = clipmb.export(folder[case], tmp_path / "out")
    assert json.loads((tmp_path / "out/export.json").read_text()) == record
    assert sorted(record["files"]) == [f"onnx/{name}.onnx" for name in sorted(FILES.values())]
    engine = backends.engine(None).load(folder[case])
    inputs = inputs_of(config)
    expected = {
        "text_embeds": engine.text_features(inputs["input_ids"], inputs["attention_mask"]),
        "image_embeds": engine.image_features(inputs["pixel_values"]),
    }
    for tower, name in FILES.items():
        path = tmp_path / "out/onnx" / f"{name}.onnx"
        entry = record["files"][f"onnx/{path.name}"]
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert entry["bytes"] == path.stat().st_size
        onnx.checker.check_model(onnx.load(path), full_check=True)
        found = run(path, inputs)
        assert found.keys() == entry["outputs"].keys()
        if tower == "both":
            unit = {key: value / np.linalg.norm(value, axis=1, keepdims=True) for key, value in expected.items()}
            logits = unit["image_embeds"] @ unit["text_embeds"].T * engine.logit_scale
            wanted = {"logits_per_image": logits, "logits_per_text": logits.T, **unit}
        else:
            wanted = {f"{tower}_embeds": expected[f"{tower}_embeds"]}
        assert list(found) == list(wanted)
        for key, value in wanted.items():
            assert relative(found[key], value) <= 1e-5, (tower, key)
            assert entry["outputs"][key]["difference"] <= 1e-5
            assert entry["outputs"][key]["cosine"] == pytest.approx(1, abs=1e-6)


def test_the_folder_has_what_programs_load_beside(tmp_path):
    model = clipmb.small_model()
    clipmb.export(model, tmp_path / "out", tower="both")
    assert CLIPTokenizerFast.from_pretrained(tmp_path / "out")("a cat") == CLIPTokenizerFast.from_pretrained(model)(
        "a cat"
    )
    mine = CLIPImageProcessor.from_pretrained(tmp_path / "out").to_dict()
    assert mine == CLIPImageProcessor.from_pretrained(model).to_dict()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("clip", ["CLIPModel"])
    clipmb.export(model, tmp_path / "image", tower="image")
    assert not (tmp_path / "image/tokenizer.json").exists()
    clipmb.export(model, tmp_path / "text", tower="text")
    assert not (tmp_path / "text/preprocessor_config.json").exists()


@pytest.mark.parametrize(("dtype", "suffix", "least"), [("float16", "_fp16", 0.99999), ("int8", "_int8", 0.99)])
def test_smaller_files(tmp_path, dtype, suffix, least):
    model = clipmb.small_model()
    record = clipmb.export(model, tmp_path / "out", dtype=dtype, normalize=True)
    sizes = {name: entry["bytes"] for name, entry in record["files"].items()}
    assert sorted(sizes) == [f"onnx/{name}{suffix}.onnx" for name in sorted(FILES.values())]
    cosines = [found["cosine"] for entry in record["files"].values() for found in entry["outputs"].values()]
    assert min(cosines) >= least
    pictures, _labels = clipmb.held_out_pictures()
    pixels = CLIPImageProcessor.from_pretrained(model)(pictures[:16], return_tensors="np")["pixel_values"]
    found = run(tmp_path / f"out/onnx/vision_model{suffix}.onnx", {"pixel_values": pixels})["image_embeds"]
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
    pipeline = CLIPPipeline.from_pretrained(model, backend="onnx")
    assert (found * pipeline.encode_image(pictures[:16])).sum(1).min() >= least


def test_weights_that_are_kept(folder, tmp_path):
    names = [f"text_model.encoder.layers.{i}.mlp.fc1.weight" for i in range(2)]
    all_of_it = clipmb.export(folder["plain"], tmp_path / "a", tower="text", dtype="int8", min_cosine=0)
    record = clipmb.export(folder["plain"], tmp_path / "b", tower="text", dtype="int8", keep=names, min_cosine=0)
    assert record["keep"] == names
    graph = onnx.load(tmp_path / "b/onnx/text_model_int8.onnx").graph
    constants = {constant.name for constant in graph.initializer}
    assert set(names) <= constants
    assert {f"{name}.int8" for name in names}.isdisjoint(constants)
    assert (
        record["files"]["onnx/text_model_int8.onnx"]["bytes"] > all_of_it["files"]["onnx/text_model_int8.onnx"]["bytes"]
    )


def test_int32_ids_of_one_length(folder, tmp_path):
    config = CONFIGS["plain"]
    clipmb.export(folder["plain"], tmp_path / "out", tower="text", ids="int32", length=7)
    session = ort.InferenceSession(tmp_path / "out/onnx/text_model.onnx", providers=["CPUExecutionProvider"])
    assert [(entry.name, entry.type, entry.shape[1]) for entry in session.get_inputs()] == [
        ("input_ids", "tensor(int32)", 7), ("attention_mask", "tensor(int32)", 7)
    ]  # fmt: skip
    inputs = {name: array[:, :7].astype(np.int32) for name, array in text_inputs(config, 3, 11).items()}
    engine = backends.engine("onnx").load(folder["plain"])
    expected = engine.text_features(inputs["input_ids"], inputs["attention_mask"])
    assert relative(run(tmp_path / "out/onnx/text_model.onnx", inputs)["text_embeds"], expected) <= 1e-5


def test_large_weights_lie_in_a_second_file(tmp_path):
    config = CONFIGS["plain"]
    graph = clip(config, random_arrays(config, "CLIPModel"), "both")
    inputs = inputs_of(config)
    one, two = tmp_path / "one/model.onnx", tmp_path / "two/model.onnx"
    for path in (one, two):
        path.parent.mkdir()
    assert graph.save(one) == [one]
    assert graph.save(two, largest=1000) == [two, two.with_name("model.onnx_data")]
    assert two.stat().st_size < one.stat().st_size / 2
    onnx.checker.check_model(str(two), full_check=True)
    for name, array in run(one, inputs).items():
        np.testing.assert_array_equal(run(two, inputs)[name], array)


class TestNothingStays:
    """Of an export that fails: not the folder, and nothing beside it."""

    @pytest.mark.parametrize("tower", FILES)
    def test_of_a_file_that_computes_something_else(self, folder, tmp_path, monkeypatch, tower):
        def spoilt(model, part, path, **form):
            name = "text_projection.weight" if tower == "text" else "visual_projection.weight"
            array = model.arrays[name]
            model.arrays[name] = array + np.float32(1e-4) * np.abs(array).max() * (np.arange(array.size) == 3).reshape(
                array.shape
            )
            try:
                return written(model, part, path, **form)
            finally:
                model.arrays[name] = array

        written = writer.write
        monkeypatch.setattr(writer, "write", spoilt)
        with pytest.raises(CheckpointError, match=r"differ by at most 1e-05.*Received: a difference of .*Nothing was"):
            clipmb.export(folder["plain"], tmp_path / "out", tower=tower)
        assert left(tmp_path) == []

    def test_of_one_that_cannot_be_run(self, folder, tmp_path, monkeypatch):
        def cut(*args, **form):
            paths = written(*args, **form)
            paths[0].write_bytes(paths[0].read_bytes()[:1000])
            return paths

        written = writer.write
        monkeypatch.setattr(writer, "write", cut)
        with pytest.raises(CheckpointError, match=r"model.onnx cannot be run, so nothing was written: .*Protobuf"):
            clipmb.export(folder["plain"], tmp_path / "out")
        assert left(tmp_path) == []

    @pytest.mark.parametrize("dtype", ["int8", "float16"])
    def test_below_the_least_cosine(self, folder, tmp_path, dtype):
        with pytest.raises(
            CheckpointError, match=r"have a cosine of at least 1 .*Pass another dtype, keep= or a lower"
        ):
            clipmb.export(folder["plain"], tmp_path / "out", dtype=dtype, min_cosine=1)
        assert left(tmp_path) == []

    def test_where_no_room_is_left(self, folder, tmp_path, monkeypatch):
        def full(*args, **form):
            raise OSError(28, "No space left on device", "onnx/model.onnx")

        monkeypatch.setattr(writer, "write", full)
        with pytest.raises(OSError, match=r"could not be written: No space left") as error:
            clipmb.export(folder["plain"], tmp_path / "out")
        assert error.value.filename == str(tmp_path / "out")
        assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"to": "coreml"}, r"to must be .*onnx.*Received: 'coreml'"),
        ({"tower": "vision"}, r"tower must be .*image.*Received: 'vision'"),
        ({"dtype": "bfloat16"}, r"dtype of onnx must be .*Received: 'bfloat16'"),
        ({"ids": "int16"}, r"ids must be .*Received: 'int16'"),
        ({"length": 0}, r"length must be a whole number.*Received: 0"),
        ({"length": 1000}, r"length must be at most the model's context, 13"),
        ({"keep": ["logit_scale"]}, r"keep= needs something .*float32"),
        ({"keep": ["no.weight"], "dtype": "int8"}, r"keep= must hold names of weights.*no.weight"),
        ({"min_cosine": 2}, r"min_cosine must be from 0 to 1.*Received: 2"),
    ],
)
def test_arguments(folder, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        clipmb.export(folder["plain"], tmp_path / "out", **given)
    assert left(tmp_path) == []


def test_folders_and_options(folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    (tmp_path / "file").touch()
    for name in ("full", "file"):
        with pytest.raises(ValueError, match="out must be a new or empty folder"):
            clipmb.export(folder["plain"], tmp_path / name)
    with pytest.raises(TypeError, match="export has no such options"):
        clipmb.export(folder["plain"], tmp_path / "out", opset=17)
    with pytest.raises(ValueError, match="other than the working directory"):
        clipmb.export(folder["plain"], "")
    (tmp_path / "empty").mkdir()
    clipmb.export(folder["plain"], tmp_path / "empty", tower="image")
    assert left(tmp_path) == ["empty", "file", "full"]


def test_files_run_where_no_framework_can_be_imported(tmp_path):
    """A stand-in for onnxruntime tries to import each."""
    names = ["torch", "tensorflow", "keras", "jax", "flax", "clipmb"]
    (tmp_path / "onnxruntime.py").write_text(
        f"import importlib\nfor name in {names}:\n    try:\n        importlib.import_module(name)\n"
        "    except ImportError:\n        continue\n    raise SystemExit(f'{name} was imported')\nraise SystemExit(7)\n"
    )
    script = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['run', 'a', 'b', 'c']\n"
    script += f"runpy.run_path({str(writer.RUN)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr


def test_command(folder, tmp_path):
    done = command("export", folder["plain"], "--out", tmp_path / "out", "--tower", "image", "--normalize", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["tower"], record["normalize"], list(record["files"])) == ("image", True, ["onnx/vision_model.onnx"])
    again = command("export", folder["plain"], "--out", tmp_path / "out")
    assert again.returncode == 1
    assert again.stderr.startswith("error: out must be a new or empty folder")
    bad = command("export", folder["plain"], "--out", tmp_path / "b", "--dtype", "int8", "--min-cosine", "1")
    assert bad.returncode == 1
    assert "Nothing was written" in bad.stderr
    assert left(tmp_path) == ["out"]


def test_every_target_is_described():
    for name, target in exporting.TARGETS.items():
        assert target.backend in backends.BACKENDS, name
        assert "float32" in target.dtypes, name
