"""`embed(engine="ray")` on this machine: the rows of one process, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import ray
import yaml
from embedding_cases import collection
from ray.autoscaler._private.util import prepare_config, validate_config

import clipmb
from clipmb import ClipmbError, MissingBackendError, Pairs, embed
from clipmb.embedding.cluster import Recipe, Replica, _share

OPTIONS = {"model": clipmb.small_model(), "backend": "onnx", "batch_size": 8, "shard_size": 24, "workers": 1}
RAY = {**OPTIONS, "engine": "ray", "replicas": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """146 items in 7 shards, of which some are broken."""
    return collection(tmp_path_factory.mktemp("data") / "pictures", 137)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=4)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def local(data, tmp_path_factory):
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("local") / "out"
    return folder, embed(data, folder, **OPTIONS)


def content(folder):
    """All files by name: rows to the bit, the manifest as it is read."""
    tables = {path.name: parquet.read_table(path).to_pylist() for path in sorted(folder.glob("*.parquet"))}
    return tables, json.loads((folder / "manifest.json").read_text("utf-8"))


class Killer(threading.Thread):
    """Kills replicas in the middle of a shard: Ray names their processes for what they do."""

    def __init__(self, most):
        super().__init__(daemon=True)
        self.most, self.killed, self.stopped = most, set(), threading.Event()

    def run(self):
        while len(self.killed) < self.most and not self.stopped.is_set():
            for path in Path("/proc").glob("[0-9]*"):
                try:
                    title = (path / "cmdline").read_bytes()
                    if title.startswith(b"ray::Replica.shard") and int(path.name) not in self.killed:
                        os.kill(int(path.name), signal.SIGKILL)
                        self.killed.add(int(path.name))
                        break
                except OSError:
                    continue
            time.sleep(0.002)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.join()


def test_rows_are_those_of_one_process(data, local, tmp_path):
    done = embed(data, tmp_path / "out", **RAY)
    folder, expected = local
    assert content(tmp_path / "out") == content(folder)
    counts = ("items", "images", "texts", "errors", "batch_size")
    assert {name: done[name] for name in counts} == {name: expected[name] for name in counts}
    assert done["seconds"].keys() == expected["seconds"].keys()
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".clipmb")] == []


def test_relative_paths_start_from_the_folder_of_this_process(data, tmp_path, monkeypatch):
    monkeypatch.chdir(data.parent)
    for engine in (OPTIONS, RAY):
        embed([f"{i:03d}.jpg" for i in range(30)], engine.get("engine", "local"), **engine)
    assert content(Path("ray")) == content(Path("local"))
    assert len(content(Path("ray"))[0]["images-00001.parquet"]) == 6


def test_a_replica_is_killed(data, local, tmp_path, caplog):
    with Killer(1) as killer:
        embed(data, tmp_path / "out", **RAY)
    assert len(killer.killed) == 1
    (said,) = [record.getMessage() for record in caplog.records if record.name == "clipmb" and "failed" in record.msg]
    assert "and is replaced" in said
    assert content(tmp_path / "out") == content(local[0])


def test_a_shard_that_fails_twice_stops_the_job_which_goes_on_here_or_there(data, local, tmp_path):
    with Killer(100), pytest.raises(ClipmbError, match=r"(?s)second attempt\. Received: shard \d+: .*--resume"):
        embed(data, tmp_path / "out", **RAY)
    with pytest.raises(ValueError, match="--resume"):
        embed(data, tmp_path / "out", **RAY)
    embed(data, tmp_path / "out", **RAY, resume=True)
    assert content(tmp_path / "out") == content(local[0])


def test_finished_shards_of_one_process_are_not_made_again(data, local, tmp_path):
    """Ray finishes what one process began; then there is nothing left to do."""
    out = tmp_path / "out"
    embed(data, out, **RAY)
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    (source,) = manifest["sources"]
    pending = {name: source[name] for name in ("name", "fingerprint", "items", "shards")}
    (out / "manifest.json").write_text(json.dumps({**manifest, "sources": [], "pending": pending}), "utf-8")
    (out / ".clipmb-embed").mkdir()
    rows = content(local[0])[0]
    kept = {"id": "kept", "path": None, "kind": "item", "reason": "not what it would be"}
    first = {"errors": [kept], **{kind: len(rows.get(f"{kind}-00000.parquet", ())) for kind in ("images", "texts")}}
    (out / ".clipmb-embed" / "00000.json").write_text(json.dumps(first), "utf-8")
    before = (out / "images-00000.parquet").stat().st_mtime_ns
    done = embed(data, out, **RAY, resume=True)
    assert (out / "images-00000.parquet").stat().st_mtime_ns == before
    assert (out / "images-00001.parquet").stat().st_mtime_ns > before
    assert done["images"] == local[1]["images"]
    found = content(out)[0]
    assert found.keys() == rows.keys()
    assert "kept" in [error["id"] for error in found["errors.parquet"]]


def test_each_replica_opens_the_source_itself(data, tmp_path, monkeypatch):
    """What it finds must be what the job was started with."""
    monkeypatch.setattr(Pairs, "fingerprint", "0" * 64)
    with pytest.raises(ValueError, match=r"Every machine must see the same source\. Received: another content of"):
        embed(data, tmp_path / "out", **RAY)
    assert not (tmp_path / "out").exists()


def test_a_machine_without_the_images_is_refused(data, tmp_path, caplog):
    """A table on shared storage may name images that only one machine has."""
    recipe = Recipe.of(
        data, {}, OPTIONS["model"], backend="onnx", dtype=None, device=None, workers=1, normalized=True,
        long_text="truncate",
    )  # fmt: skip
    fingerprint = Pairs.open(data, partial=True).fingerprint
    caplog.clear()
    _, dimension, _ = Replica(recipe, fingerprint, [str(data.parent / "000.jpg")], 1).open()
    assert dimension == clipmb.CLIPConfig.from_pretrained(OPTIONS["model"]).projection_dim
    assert not caplog.records  # what is left out is said once, where the job is started
    with pytest.raises(ValueError, match=r"see the same source\. Received: no .*gone\.jpg on "):
        Replica(recipe, fingerprint, [str(data.parent / "000.jpg"), str(data.parent / "gone.jpg")], 1).open()


def test_what_a_replica_lacks_is_said_as_on_one_machine(data, tmp_path):
    with pytest.raises(MissingBackendError, match=r'pip install "clipmb\[pt\]"'):
        embed(data, tmp_path / "out", **{**RAY, "backend": "pt"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"workers": 5}, {"gpus_per_replica": 0.5, "device": "cuda"}])
def test_a_replica_that_no_machine_has_room_for(data, tmp_path, options):
    with pytest.raises(
        ClipmbError, match=r"(?s)Some machine must have .*\. Received: \d CPU and .* with 4 CPU and 0 GPU"
    ):
        embed(data, tmp_path / "out", **{**RAY, **options})
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_is_not_there(data, tmp_path):
    """Ray would try to reach it for minutes."""
    with socket.socket() as taken:  # bound, and nothing listens
        taken.bind(("127.0.0.1", 0))
        for address in (f"127.0.0.1:{taken.getsockname()[1]}", "nonsense", "nonsense:port"):
            command = [sys.executable, "-m", "clipmb", "embed", data, "--out", tmp_path / "out", "--engine", "ray"]
            begun = {**os.environ, "RAY_ADDRESS": address}
            done = subprocess.run(command, env=begun, capture_output=True, text=True, check=False, timeout=100)
            assert done.returncode == 1
            assert done.stderr.splitlines()[-1].startswith(
                f"error: Ray must be reachable at RAY_ADDRESS. Received: {address}: "
            )
    assert not (tmp_path / "out").exists()


def test_ray_takes_the_description_of_a_cluster():
    example = Path(__file__).parents[3] / "examples" / "ray" / "cluster.yaml"
    config = prepare_config(yaml.safe_load(example.read_text("utf-8")))
    validate_config(config)
    assert config["available_node_types"]["gpu"]["resources"] == {"CPU": 16, "GPU": 1}


def test_processors_are_shared_out():
    assert _share([2], 2) == 1
    assert _share([8, 8], 3) == 4
    assert _share([64], 2) == 8
    assert _share([1], 3) == 1
