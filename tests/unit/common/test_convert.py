"""Conversion among all formats: equal bits, nothing half done, and a record that tells what changed since."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cases import ALL_HEADS, CONFIGS, config_of, equal, random_arrays, write_checkpoint
from conftest import BACKENDS, TESTS
from format_cases import EVERYWHERE as CONFIG
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import output, python

import clipmb
from clipmb import CheckpointError, CLIPConfig, CLIPProcessor, convert
from clipmb.common import errors
from clipmb.common.checkpoint import fit, formats, write_safetensors
from clipmb.common.convert import RECORD_NAME, check_record
from clipmb.common.hub import Source
from clipmb.common.parameters import TABLE_VERSION, specs
from clipmb.common.saving import Transaction

FORMATS = tuple(formats.FORMATS)
WHOLE_ONLY = ("openai", "open_clip")  # which hold no other head


def weights_of(folder: Path, head: str, config: CLIPConfig = CONFIG) -> dict[str, np.ndarray]:
    loaded = formats.load(Source(str(folder)))
    return fit(loaded.tensors, specs(config_of(head, config), head), head)[0]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def holds(format: str, head: str) -> bool:
    return head == "CLIPModel" or format not in WHOLE_ONLY


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every head in every format that holds it, each converted from safetensors."""
    base, found = tmp_path_factory.mktemp("formats"), {}
    for head in ALL_HEADS:
        origin = write_checkpoint(base / head, CONFIG, head)
        for format in FORMATS:
            if holds(format, head):
                found[head, format] = base / f"{head}.{format}"
                convert(origin, found[head, format], format)
    return found


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "source", CONFIG)


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ALL_HEADS)
@pytest.mark.parametrize("start", FORMATS)
def test_every_pair_of_formats_keeps_every_bit(folders, tmp_path, head, start):
    if not holds(start, head):
        origin = folders[head, "safetensors"]
        with pytest.raises(CheckpointError, match=head):
            convert(origin, tmp_path / "refused", start)
        assert not (tmp_path / "refused").exists()
        return
    expected = random_arrays(config_of(head, CONFIG), head)
    assert equal(weights_of(folders[head, start], head), expected)
    for end in FORMATS:
        if holds(end, head):
            done = convert(folders[head, start], tmp_path / end, end)
            assert (done.source_format, done.target_format, done.head) == (start, end, head)
            assert done.record["verification"]["largest_difference"] == 0.0
            assert formats.load(Source(str(tmp_path / end))).format == end
            assert equal(weights_of(tmp_path / end, head), expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes_round_to_nearest(folders, tmp_path, format, dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    expected = {n: a.astype(kind) for n, a in random_arrays(CONFIG, "CLIPModel").items()}
    done = convert(folders["CLIPModel", format], tmp_path / "half", dtype=dtype)
    assert 0.0 < done.record["verification"]["largest_difference"] < 2.0 ** (-8 if dtype == "bfloat16" else -11)
    assert equal(weights_of(tmp_path / "half", "CLIPModel"), expected)
    assert CLIPConfig.from_pretrained(tmp_path / "half").to_dict()["dtype"] == dtype
    back = convert(tmp_path / "half", tmp_path / "whole", dtype="float32")  # which is exact
    assert back.record["verification"]["largest_difference"] == 0.0
    assert equal(
        weights_of(tmp_path / "whole", "CLIPModel"), {name: a.astype(np.float32) for name, a in expected.items()}
    )


def test_between_the_two_halves(folders, tmp_path):
    convert(folders["CLIPModel", "safetensors"], tmp_path / "a", dtype="float16")
    done = convert(tmp_path / "a", tmp_path / "b", dtype="bfloat16")
    assert 0.0 < done.record["verification"]["largest_difference"] < 2.0**-8
    kind = np.dtype(ml_dtypes.bfloat16)
    expected = {n: a.astype(np.float16).astype(kind) for n, a in random_arrays(CONFIG, "CLIPModel").items()}
    assert equal(weights_of(tmp_path / "b", "CLIPModel"), expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_format_holds_half_precision_or_its_values(folders, tmp_path, format, dtype):
    half = folders["CLIPModel", "safetensors"].parent / f"half {dtype}"
    if not half.exists():
        convert(folders["CLIPModel", "safetensors"], half, dtype=dtype)
    convert(half, tmp_path / format, format)
    found, expected = weights_of(tmp_path / format, "CLIPModel"), weights_of(half, "CLIPModel")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[n].astype(np.float64), expected[n].astype(np.float64)) for n in found)


def test_values_too_large_for_the_dtype_are_refused(tmp_path):
    arrays = random_arrays(CONFIG, "CLIPModel")
    arrays["text_model.final_layer_norm.bias"][3] = 7e4
    from clipmb.common.checkpoint import write_safetensors
    from clipmb.common.saving import Transaction

    with Transaction(tmp_path / "big") as save:
        save.write("config.json", CONFIG.to_json_string())
        write_safetensors(save, arrays)
    with pytest.raises(
        CheckpointError, match=r"final_layer_norm\.bias has values too large for float16, for example 7e\+04"
    ):
        convert(tmp_path / "big", tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()


towers = st.fixed_dictionaries(
    {"num_hidden_layers": st.integers(0, 2), "num_attention_heads": st.sampled_from([1, 2, 3])}
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    text=towers,
    vision=towers,
    sizes=st.tuples(st.integers(3, 40), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4)),
    head=st.sampled_from(ALL_HEADS),
    route=st.lists(st.sampled_from([format for format in FORMATS if format not in WHOLE_ONLY]), min_size=1, max_size=3),
    shard=st.sampled_from(["5GB", "3KB"]),
)
def test_random_configs_survive_any_route(text, vision, sizes, head, route, shard):
    vocabulary, context, grid, patch = sizes
    config = CLIPConfig(
        {
            "hidden_size": 12, "intermediate_size": 20, "vocab_size": vocabulary, "max_position_embeddings": context,
            **text,
        },
        {"hidden_size": 18, "intermediate_size": 28, "image_size": grid * patch, "patch_size": patch, **vision},
        projection_dim=10,
        num_labels=3,
    )  # fmt: skip
    for part in (config.text_config, config.vision_config):
        part.projection_dim = 10
    with tempfile.TemporaryDirectory() as base:
        folder = write_checkpoint(Path(base) / "start", config, head)
        for place, format in enumerate(route):
            convert(folder, Path(base) / str(place), format, max_shard_size=shard)
            folder = Path(base) / str(place)
        assert equal(weights_of(folder, head, config), random_arrays(config_of(head, config), head))
        saved = type(config_of(head, config)).from_pretrained(folder)
        assert saved.to_dict() == {**config_of(head, config).to_dict(), "architectures": [head], "dtype": "float32"}


def test_shards(source, tmp_path):
    done = convert(source, tmp_path / "shards", max_shard_size="100KB")
    files = done.record["result"]["weights"]
    assert len(files) > 3
    assert "model.safetensors.index.json" in files
    assert equal(weights_of(tmp_path / "shards", "CLIPModel"), random_arrays(CONFIG, "CLIPModel"))


def test_a_tower_out_of_the_whole(source, tmp_path):
    done = convert(source, tmp_path / "text", head="CLIPTextModelWithProjection")
    expected = random_arrays(CONFIG, "CLIPModel")
    found = weights_of(tmp_path / "text", "CLIPTextModelWithProjection")
    assert found.keys() == {spec.name for spec in specs(CONFIG.text_config, "CLIPTextModelWithProjection")}
    assert all((found[name] == expected[name]).all() for name in found)
    assert "visual_projection.weight" in done.decisions["left out"]
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == "clip_text_model"


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("to", ["flax-msgpack", "openai"])
def test_weights_that_are_not_finite_are_named_as_in_loading(source, tmp_path, caplog, dtype, to):
    arrays = random_arrays(CONFIG, "CLIPModel")
    arrays["text_projection.weight"][3, 2] = np.nan
    with Transaction(source) as save:
        write_safetensors(save, arrays)
    convert(source, tmp_path / "result", to=to, dtype=dtype)
    told = [record.getMessage() for record in caplog.records if "NaN" in record.getMessage()]
    assert told == [f"{source}: NaN or infinity in text_projection.weight. Repair or replace the checkpoint."]


# -- heads, configs, tokenizers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ALL_HEADS)
def test_the_head_is_inferred_when_nothing_declares_it(tmp_path, head):
    folder = write_checkpoint(tmp_path / "source", CONFIG, head)
    fields = json.loads((folder / "config.json").read_text())
    del fields["architectures"]
    (folder / "config.json").write_text(json.dumps(fields))
    done = convert(folder, tmp_path / "result")
    assert done.head == head
    assert done.decisions["head"].startswith(f"{head}: ")
    assert "there" in done.decisions["head"]


@pytest.mark.parametrize("name", ["TFCLIPTextModel", "FlaxCLIPTextModel", "CLIPTextModel"])
def test_declared_architectures_of_every_framework(tmp_path, name):
    folder = write_checkpoint(tmp_path / "source", CONFIG, "CLIPTextModel")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "architectures": [name]}))
    assert convert(folder, tmp_path / "result").decisions["head"] == "CLIPTextModel: config.json declares it"


def test_decisions_name_activation_and_pooling(tmp_path):
    folder = write_checkpoint(tmp_path / "source", CONFIGS["legacy eos"])
    decisions = convert(folder, tmp_path / "result").decisions
    assert decisions["activation"] == "text quick_gelu, vision quick_gelu: config.json"
    assert decisions["pooling"] == "at the largest id: eos_token_id is 2 in config.json"


def test_the_files_of_the_processor_are_copied(source, tmp_path):
    own = CLIPProcessor()
    own.save_pretrained(source)
    done = convert(source, tmp_path / "result")
    copied = {path.name for path in source.iterdir()} - {"config.json", "model.safetensors"}
    assert len(copied) >= 6
    for name in copied:
        assert (tmp_path / "result" / name).read_bytes() == (source / name).read_bytes()
        assert name in done.record["source"]["files"]
    assert CLIPProcessor.from_pretrained(tmp_path / "result").tokenizer("a cat") == own.tokenizer("a cat")


def test_a_source_without_processor_gets_clips_own(tmp_path):
    config = CLIPConfig(
        {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
        CONFIG.vision_config.to_dict(),
        projection_dim=24,
    )
    convert(write_checkpoint(tmp_path / "source", config), tmp_path / "result", "flax-msgpack")
    processor = CLIPProcessor.from_pretrained(tmp_path / "result")
    assert processor.tokenizer("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert processor.image_processor.crop_size == {"height": 20, "width": 20}


def test_a_foreign_vocabulary_gets_no_tokenizer(source, tmp_path):
    done = convert(source, tmp_path / "result")
    assert done.decisions["tokenizer"].startswith("none")
    assert not (tmp_path / "result" / "vocab.json").exists()


def test_openais_file_alone_is_enough(folders, tmp_path):
    """Config and head come from the shapes, since there is nothing else."""
    files = [path for path in folders["CLIPModel", "openai"].iterdir() if path.suffix == ".pt"]
    assert len(files) == 1
    done = convert(files[0], tmp_path / "result")
    assert done.source_format == "openai"
    assert equal(weights_of(tmp_path / "result", "CLIPModel"), random_arrays(CONFIG, "CLIPModel"))
    assert CLIPConfig.from_pretrained(tmp_path / "result").vision_config.num_attention_heads == 2
    assert done.decisions["activation"] == "quick_gelu, which all of OpenAI's models have; the file does not say"
    assert done.decisions["pooling"].startswith("eos_token_id 2, which means: pool at the largest id")
    assert "hidden_act" not in done.decisions


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_destination_that_is_not_empty_is_refused(source, tmp_path):
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt.*--overwrite"):
        convert(source, folder)
    assert content(folder) == {"notes.txt": b"mine"}


def test_overwriting_replaces_the_checkpoint_and_nothing_else(source, tmp_path):
    folder = tmp_path / "result"
    convert(source, folder, max_shard_size="100KB")
    mine = ("notes.txt", "training_args.bin", "optimizer.pt", "features.npz", "model_card.json", "report.index.html")
    for name in mine:
        (folder / name).write_text("mine")
    (folder / "ViT-B-32.pt").write_text("weights that a reader would look for")
    convert(source, folder, "flax-msgpack", overwrite=True)
    assert all((folder / name).read_text() == "mine" for name in mine)
    assert not (folder / "ViT-B-32.pt").exists()
    assert not list(folder.glob("*.safetensors*"))
    assert formats.load(Source(str(folder))).format == "flax-msgpack"
    assert check_record(folder) == []


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"to": "onnx"}, ValueError, "format must be one of"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of"),
        ({"head": "BLIP"}, ValueError, "head must be one of"),
        ({"max_shard_size": "much"}, ValueError, "size"),
        ({"colour": "red"}, TypeError, "colour"),
        ({"head": "CLIPForImageClassification"}, CheckpointError, "classifier"),
        ({"head": "CLIPTextModel", "check": lambda *_: {}}, ValueError, "needs a full CLIPModel"),
        ({"variant": "fp16"}, CheckpointError, "fp16"),
    ],
)
def test_impossible_wishes(source, tmp_path, options, kind, words):
    with pytest.raises(kind, match=words):
        convert(source, tmp_path / "result", **options)
    assert not (tmp_path / "result").exists()


def test_the_source_is_no_destination(source):
    before = content(source)
    with pytest.raises(ValueError, match="must be different folders"):
        convert(source, source, "pytorch", overwrite=True)
    assert content(source) == before


def test_a_source_without_weights_lists_what_is_there(tmp_path):
    (tmp_path / "config.json").write_text(CONFIG.to_json_string())
    with pytest.raises(CheckpointError, match=r"no weights.*config\.json"):
        convert(tmp_path, tmp_path / "result")


def test_a_result_that_differs_is_not_kept(source, tmp_path, monkeypatch):
    """The comparison notices one wrong bit, whoever made it."""
    module = formats.format_of("flax-msgpack")
    write = module.write

    def wrong(save, arrays, *args, **options):
        copies = {name: array.copy() for name, array in arrays.items()}
        copies["text_model.final_layer_norm.bias"].view(np.uint32)[5] ^= 1
        return write(save, copies, *args, **options)

    monkeypatch.setattr(module, "write", wrong)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "result", "flax-msgpack")
    assert caught.value.problems == ["text_model.final_layer_norm.bias has other values than the source"]
    assert not (tmp_path / "result").exists()


def test_a_check_that_fails_leaves_everything(source, tmp_path):
    def check(source, result, dtype):
        assert result.find("model.safetensors")
        raise CheckpointError(f"not today, in {dtype}")

    with pytest.raises(CheckpointError, match="not today, in float16"):
        convert(source, tmp_path / "result", dtype="float16", check=check)
    assert not (tmp_path / "result").exists()


# -- dry run and record -----------------------------------------------------------------------------------------------


def test_a_dry_run_maps_and_writes_nothing(source, tmp_path):
    done = convert(source, tmp_path / "result", "openai", dtype="float16", dry_run=True)
    assert not (tmp_path / "result").exists()
    assert done.record == {}
    table = {spec.name: spec.shape for spec in specs(CONFIG, "CLIPModel")}
    assert {entry.canonical: entry.shape for entry in done.mapping} == table
    assert {entry.dtype for entry in done.mapping} == {"float16"}
    targets = {entry.canonical: entry.target for entry in done.mapping}
    for part in ("q", "k", "v"):
        stem = f"text_model.encoder.layers.1.self_attn.{part}_proj"
        assert targets[f"{stem}.weight"] == "transformer.resblocks.1.attn.in_proj_weight"
    assert targets["visual_projection.weight"] == "visual.proj"


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("safetensors", "text_model.encoder.layers.1.self_attn.q_proj.weight"),
        ("pytorch", "text_model.encoder.layers.1.self_attn.q_proj.weight"),
        ("tf-h5", "clip/text_model/encoder/layers_._1/self_attn/q_proj/kernel:0"),
        ("flax-msgpack", "text_model/encoder/layers/1/self_attn/q_proj/kernel"),
        ("openai", "transformer.resblocks.1.attn.in_proj_weight"),
        ("open_clip", "transformer.resblocks.1.attn.in_proj_weight"),
        (
            "keras-weights",
            "layers/tfclip_text_transformer/encoder/layers/tfclip_encoder_layer_1/self_attn/q_proj/vars/0",
        ),
    ],
)
def test_names_of_every_format_are_shown(folders, source, tmp_path, format, name):
    canonical = "text_model.encoder.layers.1.self_attn.q_proj.weight"
    there = convert(source, tmp_path / "result", format, dry_run=True)
    assert {entry.canonical: entry.target for entry in there.mapping}[canonical] == name
    back = convert(folders["CLIPModel", format], tmp_path / "result", dry_run=True)
    assert {entry.canonical: entry.source for entry in back.mapping}[canonical] == name


def test_the_record(source, tmp_path):
    import hashlib

    done = convert(source, tmp_path / "result", "tf-h5", dtype="float16")
    record = json.loads((tmp_path / "result" / RECORD_NAME).read_text())
    assert record == done.record
    assert record["table_version"] == TABLE_VERSION
    assert record["source"]["format"] == "safetensors"
    assert record["source"]["files"].keys() == {"config.json", "model.safetensors"}
    assert record["result"]["format"] == "tf-h5"
    assert record["result"]["files"].keys() == {p.name for p in (tmp_path / "result").iterdir()} - {RECORD_NAME}
    for folder, part in ((source, "source"), (tmp_path / "result", "result")):
        for name, entry in record[part]["files"].items():
            assert entry["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
            assert entry["bytes"] == (folder / name).stat().st_size
    assert record["tensors"] == len(done.mapping)
    assert {"activation", "pooling", "head"} <= record["decisions"].keys()
    assert record["packages"].keys() == {"python", "numpy", "ml_dtypes", "safetensors", "h5py"}
    assert 0 < record["verification"]["largest_difference"] < 5e-4


@pytest.mark.parametrize(
    ("format", "package"),
    [
        ("safetensors", "safetensors"), ("pytorch", "torch"), ("tf-h5", "h5py"), ("flax-msgpack", None),
        ("openai", "torch"), ("open_clip", "safetensors"), ("keras-weights", "h5py"),
    ],
)  # fmt: skip
def test_the_same_conversion_gives_the_same_bytes(source, tmp_path, format, package):
    """Also in a process that imported something else before: the record has the packages that took part, no others."""
    done = convert(source, tmp_path / "a", format)
    assert done.record["packages"].keys() == {"python", "numpy", "ml_dtypes", "safetensors", *filter(None, [package])}
    script = "import sys, h5py, msgpack, PIL.Image; from clipmb import convert; convert(*sys.argv[1:])"
    output("-c", script, source, tmp_path / "b", format)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_the_record_tells_what_changed(source, tmp_path):
    folder = tmp_path / "result"
    convert(source, folder)
    assert check_record(folder) == []
    (folder / "README.md").write_text("mine")  # which is part of no checkpoint
    assert check_record(folder) == []
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x17")
    (folder / "preprocessor_config.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert check_record(folder) == [
        "model.safetensors has changed",
        "preprocessor_config.json is missing",
        "pytorch_model.bin is not in the record",
    ]


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"result": 1}', '{"result": {"files": []}}'])
def test_damaged_records(tmp_path, record):
    (tmp_path / RECORD_NAME).write_text(record)
    with pytest.raises(CheckpointError, match="conversion"):
        check_record(tmp_path)


def test_a_record_cannot_point_outside(tmp_path):
    (tmp_path / "secret").write_text("x")
    (tmp_path / "folder").mkdir()
    files = {"../secret": {"sha256": "0" * 64}}
    (tmp_path / "folder" / RECORD_NAME).write_text(json.dumps({"result": {"files": files}}))
    assert check_record(tmp_path / "folder") == ["../secret is missing"]


# -- all or nothing ---------------------------------------------------------------------------------------------------

KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from cases import CONFIGS, write_checkpoint
from kills import at_every_operation
from clipmb import convert

# A conversion replaces the result of another one.
folder = Path(sys.argv[1])
sources = [write_checkpoint(folder / name, CONFIGS[name], seed=seed) for seed, name in enumerate(("plain", "stress"))]
at_every_operation(
    folder,
    lambda target: convert(sources[0], target, max_shard_size="100KB"),
    lambda target: convert(sources[1], target, "flax-msgpack", overwrite=True),
)
"""


def test_a_kill_at_any_file_operation_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    moments = int(output("-c", KILLED, tmp_path, TESTS))
    versions = [("safetensors", CONFIGS["plain"], 0), ("flax-msgpack", CONFIGS["stress"], 1)]
    seen = []
    for k in range(1, moments + 1):
        loaded = formats.load(Source(str(tmp_path / str(k))))
        place = [format for format, _, _ in versions].index(loaded.format)
        _, config, seed = versions[place]
        assert equal(weights_of(tmp_path / str(k), "CLIPModel", config), random_arrays(config, "CLIPModel", seed))
        assert check_record(tmp_path / str(k)) == []
        assert CLIPConfig.from_pretrained(tmp_path / str(k)).text_config.hidden_act == config.text_config.hidden_act
        seen.append(place)
    assert seen == sorted(seen)
    assert seen.count(0) > 10
    assert seen.count(1) > 3  # some kills came after the commit and before every file was in place


FULL = """
import resource, signal, sys
from clipmb import CheckpointError, convert
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    convert(sys.argv[1], sys.argv[2], sys.argv[3], overwrite=True)
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_what_was_there(source, tmp_path, format):
    """Simulated by a limit on the size of files, at which writing fails as it does on a full disk."""
    folder = tmp_path / "result"
    convert(write_checkpoint(tmp_path / "old", CONFIG, seed=1), folder, "pytorch")
    before = content(folder)
    done = python("-c", FULL, source, folder, format)
    assert done.returncode == 0, done.stderr
    assert "could not be written and was left unchanged" in done.stdout, done.stderr
    assert "There is no room for the save" in done.stdout
    assert content(folder) == before


@pytest.mark.parametrize("format", FORMATS)
def test_a_disk_that_is_too_small_is_found_out_before_anything_is_written(source, tmp_path, format, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(CheckpointError, match=r"The save needs [\d,]{7,} bytes, and the disk has 100,000 left"):
        convert(source, tmp_path / "result", format)
    assert not (tmp_path / "result").exists()


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_reads_every_format_directly(folders, backend, format, caplog):
    folder = folders["CLIPModel", format]
    name = {"pt": "CLIPModel", "tf": "TFCLIPModel", "flax": "FlaxCLIPModel"}[backend]
    errors._said.clear()
    for _ in range(2):
        model = getattr(clipmb, name).from_pretrained(folder)
        found = {name: np.asarray(array) for name, array in model.to_arrays().items()}
        assert equal(found, random_arrays(CONFIG, "CLIPModel"))
    told = [record for record in caplog.records if "clipmb convert" in record.getMessage()]
    assert len(told) == (format != "safetensors")


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_reads_openais_file_without_a_config(folders, backend):
    (file,) = (path for path in folders["CLIPModel", "openai"].iterdir() if path.suffix == ".pt")
    name = {"pt": "CLIPModel", "tf": "TFCLIPModel", "flax": "FlaxCLIPModel"}[backend]
    model = getattr(clipmb, name).from_pretrained(file)
    assert model.config.vision_config.num_attention_heads == 2
    tower = name.replace("CLIPModel", "CLIPVisionModelWithProjection")
    vision = getattr(clipmb, tower).from_pretrained(file)
    assert type(vision.config).__name__ == "CLIPVisionConfig"
    expected = random_arrays(CONFIG, "CLIPModel")
    assert all((np.asarray(array) == expected[name]).all() for name, array in vision.to_arrays().items())


def test_weights_without_any_config_say_what_is_missing(folders, tmp_path):
    from clipmb.common.pretrained import PretrainedMixin

    class Model(PretrainedMixin):
        config_class, head = CLIPConfig, "CLIPModel"

    weights = folders["CLIPModel", "flax-msgpack"] / "flax_model.msgpack"
    (tmp_path / "flax_model.msgpack").write_bytes(weights.read_bytes())
    with pytest.raises(CheckpointError, match=r"config\.json.*flax_model\.msgpack"):
        Model.from_pretrained(tmp_path)


# -- imports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", FORMATS)
def test_no_framework_is_imported_but_torch_for_pickled_files(folders, tmp_path, start):
    script = """
import sys
from clipmb import convert
convert(sys.argv[1], sys.argv[2], sys.argv[3])
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""
    end = "safetensors" if start != "safetensors" else "tf-h5"
    imported = set(output("-c", script, folders["CLIPModel", start], tmp_path / "result", end).split())
    allowed = {"torch"} if start in ("pytorch", "openai", "open_clip") else set()
    frameworks = {"torch", "tensorflow", "keras", "jax", "flax", "transformers"}
    assert imported & frameworks <= allowed
    assert "huggingface_hub" not in imported
