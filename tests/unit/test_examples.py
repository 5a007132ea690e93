"""The short programs of examples/ do what they say, with the small model; each has fewer than 30 lines."""

from __future__ import annotations

import csv
import json
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from processes import HANG, excerpt, output, start

import clipmb

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = sorted(EXAMPLES.glob("*.py"))
NAMES = ("rocket", "panda", "pizza")


@pytest.fixture
def pictures(tmp_path):
    """Three pictures that the model never saw, and a smaller copy of the first."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    images, labels = clipmb.held_out_pictures()
    for name in NAMES:
        images[labels.index(name)].save(folder / f"{name}.png")
    images[labels.index("rocket")].save(folder / "again.jpg", quality=90)
    return folder


@pytest.mark.parametrize("path", SHORT, ids=lambda path: path.stem)
def test_they_are_short(path):
    assert len(path.read_text("utf-8").splitlines()) < 30


def test_every_short_program_is_listed_and_has_a_test():
    listed = (EXAMPLES / "README.md").read_text("utf-8")
    tests = Path(__file__).read_text("utf-8")
    assert len(SHORT) >= 3
    for path in SHORT:
        assert f"({path.name})" in listed
        assert f'EXAMPLES / "{path.name}"' in tests


def test_photo_search(pictures, tmp_path):
    (pictures / "broken.png").write_bytes(b"no image")
    for _ in range(2):  # the second time nothing is embedded
        first, *found = output(
            EXAMPLES / "photo_search.py", pictures, tmp_path / "out", "an emoji of pizza"
        ).splitlines()
        assert first == "4 images, 1 errors"
        assert len(found) == 4
        assert found[0].split()[1] == "pizza.png"


def test_near_duplicates(pictures, tmp_path):
    groups = output(EXAMPLES / "near_duplicates.py", pictures, tmp_path / "out", "0.9").splitlines()
    same = sorted((pictures / name for name in ("rocket.png", "again.jpg")), key=lambda path: -path.stat().st_size)
    assert [line.split("\t") for line in groups] == [[str(path) for path in same]]
    assert len(list(pictures.iterdir())) == 4


def test_label_csv(pictures, tmp_path):
    table = pictures / "table.csv"
    table.write_text("image,price\n" + "".join(f"{name}.png,{i}\n" for i, name in enumerate(NAMES)), "utf-8")
    output(
        EXAMPLES / "label_csv.py", table, tmp_path / "out.csv", ",".join(NAMES), clipmb.small_model(), "an emoji of {}"
    )
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["price"], row["label"]) for row in rows] == [
        (f"{name}.png", str(i), name) for i, name in enumerate(NAMES)
    ]
    assert all(0.5 < float(row["probability"]) <= 1 for row in rows)


def test_load_balancer():
    """Two servers, of which one ends: every request is answered by another; without any, the answer is 503."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ("-m", "clipmb", "serve", "--port", "0", "--backend", "onnx", "--name", "emoji")
    servers = [start(*command) for _ in range(2)]
    urls = [server.stdout.readline().split()[-1] for server in servers]
    balancer = start(EXAMPLES / "load_balancer.py", port, *urls)

    def ask():
        body = json.dumps({"input": ["a rocket"]}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/embeddings?a=b", body)
        with urllib.request.urlopen(request, timeout=HANG) as response:
            return json.load(response)["data"][0]["embedding"]

    try:
        while b"Uvicorn running" not in (line := balancer.stderr.readline().encode()):
            assert line, excerpt(balancer.stderr.read())
        first = ask()
        assert len(first) == 128
        servers[0].terminate()
        servers[0].wait(HANG)
        assert [ask() for _ in range(4)] == [first] * 4
        servers[1].terminate()
        servers[1].wait(HANG)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            ask()
    finally:
        for process in (balancer, *servers):
            process.kill()
            process.communicate(timeout=HANG)
