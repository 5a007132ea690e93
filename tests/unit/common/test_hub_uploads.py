"""push_to_hub, against a hub on the loopback: what is made there, what is committed, and what comes back of it."""

from __future__ import annotations

import json
import os
import sys

import pytest
from cases import CONFIGS, write_checkpoint
from conftest import BACKENDS
from hub_server import COMMIT, Hub
from processes import run

# The interpreter of transformers 5 brings another generation of huggingface_hub.
INTERPRETERS = [sys.executable]
if os.path.exists(other := os.environ.get("CLIPMB_TRANSFORMERS5_PYTHON", "")):
    INTERPRETERS.append(other)
MODELS = {"pt": "CLIPTextModel", "tf": "TFCLIPTextModel", "flax": "FlaxCLIPTextModel"}
PARTS = {
    "CLIPTextConfig": ("config", {"config.json"}),
    "CLIPTokenizer": ("tokenizer", {"vocab.json", "merges.txt", "tokenizer.json"}),
    "CLIPImageProcessor": ("processor", {"preprocessor_config.json"}),
    "CLIPProcessor": ("processor", {"processor_config.json", "preprocessor_config.json", "vocab.json"}),
}

PUSH = """
import json, sys
import clipmb
name, folder, options, how = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
thing = getattr(clipmb, name).from_pretrained(folder)
if how == "push":
    commit = thing.push_to_hub(**options)
    print(json.dumps([commit.oid, commit.pr_url]))
else:
    thing.save_pretrained(how, push_to_hub=True, **options)
"""

PUSH_NOTE = """
import json, sys
from pathlib import Path
from clipmb.common.uploading import Uploadable

class Note(Uploadable):
    def save_pretrained(self, folder, **options):
        Path(folder, "note.txt").write_text("mine")

Note().push_to_hub(**json.loads(sys.argv[3]))
"""


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    import clipmb

    folder = write_checkpoint(tmp_path / "given", CONFIGS["plain"], "CLIPTextModel")
    clipmb.CLIPProcessor().save_pretrained(folder)
    return folder


def push(hub, name, folder, how="push", interpreter=sys.executable, token="right", script=PUSH, **options):
    settings = {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path.endswith("src") or "clipmb" in path),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(folder.parent / "home"),
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "127.0.0.1",
    }
    return run([interpreter, "-c", script, name, folder, json.dumps(options), how], settings)


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_pushed(hub, folder, name):
    done = push(hub, name, folder, repo_id="me/new")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [COMMIT, None]
    kind, files = PARTS[name]
    assert [(repository, branch, header["summary"]) for repository, branch, header in hub.commits] == [
        ("me/new", "main", f"Upload {kind}")
    ]
    assert files <= set(hub.repositories["me/new"])
    assert "model.safetensors" not in hub.repositories["me/new"]


@pytest.mark.parametrize("interpreter", INTERPRETERS)
def test_repositories_are_private_on_request(hub, tmp_path, interpreter):
    for private in (None, True, False):
        options = {"repo_id": "me/new", "private": private}
        done = push(hub, "Note", tmp_path / "none", interpreter=interpreter, script=PUSH_NOTE, **options)
        assert done.returncode == 0, done.stderr
        made = hub.created[-1]
        assert made.get("private", {"private": True, "public": False}.get(made.get("visibility"))) is private
    assert hub.repositories["me/new"] == {"note.txt": b"mine"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_models_are_pushed(hub, folder, backend):
    options = {"revision": "next", "commit_message": "Mine", "commit_description": "All of it", "tags": ["tiny"]}
    done = push(hub, MODELS[backend], folder, repo_id="me/model", **options)
    assert done.returncode == 0, done.stderr
    pushed = hub.repositories["me/model"]
    assert pushed.keys() == {"config.json", "model.safetensors", "README.md"}
    assert pushed["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert b"- tiny" in pushed["README.md"]
    ((_, branch, header),) = hub.commits
    assert (branch, header["summary"], header["description"]) == ("next", "Mine", "All of it")
    assert ("POST", "/api/models/me/model/branch/next", "") in hub.requests


@pytest.mark.parametrize("backend", BACKENDS)
def test_saving_with_push_to_hub_uploads_what_it_wrote(hub, folder, backend, tmp_path):
    saved = tmp_path / "mine"
    saved.mkdir()
    (saved / "notes.txt").write_text("private")
    options = {"saved_model": True} if backend == "tf" else {}
    done = push(hub, MODELS[backend], folder, saved, **options)
    assert done.returncode == 0, done.stderr
    assert (saved / "model.safetensors").exists()
    pushed = set(hub.repositories["me/mine"])
    assert {"config.json", "model.safetensors"} <= pushed
    assert "notes.txt" not in pushed
    assert ("saved_model/1/saved_model.pb" in pushed) == (backend == "tf")


def test_tags_join_those_of_the_readme(hub, folder):
    hub.repositories["me/model"] = {"README.md": b"---\ntags:\n- old\n---\n# Mine\n"}
    done = push(hub, "CLIPTextConfig", folder, repo_id="me/model", tags=["new", "old"], create_pr=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[1] == f"{hub.endpoint}/me/model/discussions/1"
    assert hub.repositories["me/model"]["README.md"] == b"---\ntags:\n- old\n- new\n---\n# Mine\n"


def test_nothing_is_pushed_where_the_hub_or_an_option_is_refused(hub, folder):
    done = push(hub, "CLIPTextConfig", folder, repo_id="me/new", token="wrong")
    assert done.returncode
    assert "401" in done.stderr
    done = push(hub, "CLIPTextConfig", folder, repo_id="me/new", repo_url="there")
    assert "TypeError: push_to_hub has no such argument" in done.stderr
    done = push(hub, "CLIPTextConfig", folder, repo_id="me/new", safe_serialization=False)
    assert "Convert the saved folder" in done.stderr
    done = push(hub, "CLIPTextConfig", folder, folder.parent / "to", repo_id="me/new", is_main_process=False)
    assert done.returncode == 0, done.stderr
    assert not hub.commits
