"""Downloads, against a hub on the loopback: what is asked for, what is said when it fails, what works offline."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from subprocess import CompletedProcess

import pytest
from cases import CONFIGS, write_checkpoint
from hub_server import COMMIT, Hub
from processes import run

CONFIG = CONFIGS["plain"]
# The interpreter of transformers 5 brings another generation of huggingface_hub, on another HTTP library.
INTERPRETERS = [sys.executable]
if os.path.exists(other := os.environ.get("CLIPMB_TRANSFORMERS5_PYTHON", "")):
    INTERPRETERS.append(other)

FIND = """
import hashlib, json, sys, time
time.sleep = lambda _: None  # huggingface_hub tries again after 1, 2, 4, 8 and 8 seconds
from clipmb.common.hub import Source
options = json.loads(sys.argv[2])
names = options.pop("names")
source = Source.of(sys.argv[1], options)
found = {}
for name in names:
    try:
        path = source.find(name)
        content = None if path is None else path.read_bytes()
        if content and len(content) > 2**20:
            content = hashlib.sha1(content).hexdigest().encode()
        found[name] = content and content.decode("latin-1")
    except Exception as error:
        found[name] = [type(error).__name__, str(error)]
if source._snapshot():
    found["names"], found["commit"] = source.names(), source.commit()
print(json.dumps(found))
"""


@pytest.fixture
def hub(tmp_path):
    server = Hub()
    folder = write_checkpoint(tmp_path / "whole", CONFIG)
    server.repositories["me/clip"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def python(hub, tmp_path, monkeypatch):
    for name in os.environ:
        if name.startswith(("HF_", "HUGGING")):
            monkeypatch.delenv(name)

    def work(script: str, *arguments: str, interpreter: str = sys.executable, **env: str) -> CompletedProcess[str]:
        return run(
            [interpreter, *(("-c", script) if script else ()), *arguments],
            {
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path.endswith("src") or "clipmb" in path),
                "HF_ENDPOINT": hub.endpoint,
                "HF_HOME": str(tmp_path / "cache"),
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_DISABLE_XET": "1",
                "no_proxy": "127.0.0.1",
                **env,
            },
        )

    return work


@pytest.fixture(params=INTERPRETERS, ids=lambda path: "other" if path != sys.executable else "own")
def find(request, python):
    def work(repository: str, *names: str, env: dict | None = None, **options: object) -> dict:
        wishes = json.dumps({"names": names, **options})
        done = python(FIND, repository, wishes, interpreter=request.param, **(env or {}))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return work


def test_only_what_is_needed_is_asked_for(hub, find):
    found = find("me/clip", "config.json", "model.safetensors")
    assert (
        found["config.json"] == CONFIG.from_dict({**CONFIG.to_dict(), "architectures": ["CLIPModel"]}).to_json_string()
    )
    assert found["commit"] == COMMIT
    prefix = "/me/clip/resolve/main"
    assert hub.paths("HEAD") == [f"{prefix}/config.json", f"{prefix}/model.safetensors"]
    fetched = [path.rsplit("/", 1)[-1] for path in hub.paths("GET") if "/resolve/" in path]
    assert fetched == ["config.json", "model.safetensors"]


def test_the_first_missing_file_costs_one_listing_and_the_others_nothing(hub, find):
    names = [f"{name}.bin" for name in "abcdef"]
    found = find("me/clip", "config.json", *names)
    assert all(found[name] is None for name in names)
    assert found["names"] == ["config.json", "model.safetensors"]
    assert len([path for path in hub.paths("HEAD") if path.endswith(".bin")]) == 1
    assert len([path for path in hub.paths("GET") if "/tree/" in path]) == 1


def test_subfolder_and_revision(hub, find):
    hub.repositories["me/clip"]["text/config.json"] = b"{}"
    found = find("me/clip", "config.json", "model.safetensors", "b", subfolder="text", revision="v1")
    assert found["config.json"] == "{}"
    assert found["model.safetensors"] is None
    assert found["names"] == ["config.json"]
    assert "/me/clip/resolve/v1/text/config.json" in hub.paths("HEAD")


@pytest.mark.parametrize(
    ("repository", "options", "words"),
    [
        ("me/nothing", {}, "neither a local folder nor a Hub repository"),
        ("me/secret", {}, "neither a local folder nor a Hub repository"),
        ("me/clip", {"revision": "v9"}, "no revision 'v9'"),
        ("me/clip", {"token": "wrong"}, "refuses the access token"),
        ("me/gated", {}, "gated"),
        ("me/clip", {"local_files_only": True}, "not in the local cache"),
        ("a/b/c", {}, "does not exist"),
        ("me/cl ip", {}, "valid Hub id"),
    ],
)
def test_what_is_said_when_there_is_nothing_to_be_had(hub, find, repository, options, words):
    hub.repositories["me/secret"] = hub.repositories["me/gated"] = hub.repositories["me/clip"]
    hub.private.add("me/secret")
    hub.gated.add("me/gated")
    kind, message = find(repository, "config.json", **options)["config.json"]
    assert kind == "CheckpointError"
    assert words in message


AT_ONCE = """
import sys, time
slept = []
time.sleep = slept.append
from clipmb.common.hub import Source
from clipmb.common.errors import CheckpointError
try:
    Source(sys.argv[1]).find("config.json")
except CheckpointError as error:
    print(len(slept), error)
"""


@pytest.mark.parametrize("interpreter", INTERPRETERS, ids=lambda path: "other" if path != sys.executable else "own")
@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("no server", "is not in the local cache, and the Hub cannot be reached"),
        ("no name", "is not in the local cache, and the Hub cannot be reached"),
        (401, "refuses the access token (401)"),
        (403, "forbids it (403)"),
        (404, "no such page (404)"),
        (429, "too many requests from here (429). Try again in 7 seconds"),
        (500, "out of order (500)"),
        (503, "out of order (503)"),
    ],
)
def test_trouble_is_reported_at_once_and_once(hub, python, interpreter, status, words):
    """Without a wait, and without the lines that huggingface_hub logs for each of its own attempts."""
    endpoints = {"no server": "http://127.0.0.1:9", "no name": "http://hub.invalid"}
    hub.status = status if isinstance(status, int) else None
    env = {"HF_ENDPOINT": endpoints[status]} if status in endpoints else {}
    done = python(AT_ONCE, "me/clip", interpreter=interpreter, **env)
    assert done.stderr == ""
    slept, message = done.stdout.rstrip("\n").split(" ", 1)
    assert slept == "0"
    assert words in message
    assert "\n" not in message
    assert len(message) < 250


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_out_of_order_does_not_keep_from_the_cache(hub, find, status):
    first = find("me/clip", "config.json", "model.safetensors")
    hub.status = status
    assert find("me/clip", "config.json", "model.safetensors", "vocab.json") == {**first, "vocab.json": None}


@pytest.mark.parametrize(
    "names",
    [
        {"ETag": '"../../../../escaped"'},
        {"ETag": '"/tmp/escaped"'},
        {"X-Linked-Etag": '"..\\escaped"'},
        {"X-Linked-Etag": 'W/"a/b"'},
        {"X-Repo-Commit": "../../../escaped"},
        {"X-Repo-Commit": ".."},
    ],
)
def test_a_hostile_hub_makes_no_file(hub, find, tmp_path, names):
    hub.names = names
    (tmp_path / "cache").mkdir()
    kind, message = find("me/clip", "config.json")["config.json"]
    assert kind == "CheckpointError"
    assert "is refused, and nothing was written" in message
    assert "no plain name" in message
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not list(tmp_path.rglob("*escaped*"))


def test_the_right_token_opens_a_private_repository(hub, find):
    hub.private.add("me/clip")
    assert find("me/clip", "config.json", token="right")["config.json"]


def test_a_cut_download_is_continued_where_it_broke(hub, find):
    content = bytes(range(256)) * 100_000  # more than the 10 MB in which huggingface_hub writes
    hub.repositories["me/clip"]["big"] = content
    hub.cut = 2
    assert find("me/clip", "big")["big"] == hashlib.sha1(content).hexdigest()
    assert hub.cut == 0
    assert any(path.endswith("/big") and part and part != "bytes=0-" for _, path, part in hub.requests)


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "local_files_only", "no server"])
def test_the_cache_is_enough_without_the_network(hub, find, how):
    first = find("me/clip", "config.json", "model.safetensors")
    hub.requests.clear()
    options = {"local_files_only": True} if how == "local_files_only" else {}
    env = {"HF_HUB_OFFLINE": "1"} if how == "HF_HUB_OFFLINE" else {}
    if how == "no server":
        env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    again = find("me/clip", "config.json", "model.safetensors", "vocab.json", env=env, **options)
    assert again == {**first, "vocab.json": None}
    assert not [path for _, path, _ in hub.requests if "me/clip" in path]


def test_another_cache(hub, find, tmp_path):
    assert find("me/clip", "config.json", cache_dir=str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "models--me--clip").is_dir()
    assert not (tmp_path / "cache" / "hub" / "models--me--clip").exists()


# -- models and conversions -------------------------------------------------------------------------------------------

LOAD = """
import sys, logging
logging.basicConfig(format="%(message)s")
from clipmb.common.hub import Source
from clipmb.common.pretrained import read_weights
for _ in range(2):
    print(len(read_weights(Source(sys.argv[1]))))
"""


def test_a_repository_with_legacy_files_is_read_and_remarked_on_once(hub, python, tmp_path):
    from clipmb import convert

    convert(tmp_path / "whole", tmp_path / "flax", "flax-msgpack")
    hub.repositories["me/flax"] = {path.name: path.read_bytes() for path in (tmp_path / "flax").iterdir()}
    done = python(LOAD, "me/flax")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["94", "94"]
    assert done.stderr.count("clipmb convert me/flax") == 1
    heads = [path.rsplit("/", 1)[-1] for path in hub.paths("HEAD")]
    assert len(heads) <= 6, heads  # one missing file and the weights, for each of two sources


def test_a_conversion_from_the_hub(hub, python, tmp_path):
    done = python(
        "", "-m", "clipmb", "convert", "me/clip", str(tmp_path / "result"), "--to", "tf-h5", "--revision", "v1"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "result" / "conversion.json").read_text())
    assert record["source"]["name"] == "me/clip"
    assert record["source"]["commit"] == COMMIT
    assert len([path for path in hub.paths("GET") if "/tree/" in path]) == 1
    done = python("", "-m", "clipmb", "convert", "me/nothing", str(tmp_path / "other"))
    assert done.returncode == 1
    assert "me/nothing" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "other").exists()
