"""The argument names of the former library, wherever something is loaded or saved."""

from __future__ import annotations

import cases
import pytest
from conftest import BACKENDS

import clipmb
from clipmb.common.former import ABSENT, UNNEEDED, drop_unneeded
from clipmb.common.hub import Source

MODELS = {"pt": "CLIPTextModel", "tf": "TFCLIPTextModel", "flax": "FlaxCLIPTextModel"}
NAMES = ["CLIPTextConfig", "CLIPTokenizer", "CLIPTokenizerFast", "CLIPImageProcessor", "CLIPProcessor"]
NAMES += [MODELS[backend] for backend in BACKENDS]


@pytest.mark.parametrize("name", NAMES)
def test_former_arguments(name, tmp_path):
    folder, saved = tmp_path / "a", tmp_path / "b"
    cases.write_checkpoint(folder, cases.CONFIGS["plain"], "CLIPTextModel")
    if name in ("CLIPProcessor", "CLIPImageProcessor", "CLIPTokenizer", "CLIPTokenizerFast"):
        clipmb.CLIPProcessor(clipmb.CLIPImageProcessor(), clipmb.CLIPTokenizerFast()).save_pretrained(folder)
    thing = getattr(clipmb, name).from_pretrained(pretrained_model_name_or_path=folder)
    thing.save_pretrained(
        save_directory=saved, push_to_hub=False, safe_serialization=True, is_main_process=True, token=None
    )
    assert type(getattr(clipmb, name).from_pretrained(saved)) is type(thing)
    with pytest.raises(ValueError, match="save_config=False"):
        thing.save_pretrained(tmp_path / "c", save_config=False)
    thing.save_pretrained(tmp_path / "c", is_main_process=False, save_function=print)
    with pytest.raises(ValueError, match="safe_serialization=False"):
        thing.save_pretrained(tmp_path / "c", safe_serialization=False)
    thing.save_pretrained(saved, repo_id="me/it", commit_message="mine", create_pr=False, save_jinja_files=False)
    with pytest.raises(TypeError, match="save_jinja_files"):
        thing.save_pretrained(tmp_path / "c", save_jinja_files=True)
    with pytest.raises(TypeError, match="push_to_hubb"):
        thing.save_pretrained(tmp_path / "c", push_to_hubb=False)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [None, False, {}, []])
def test_what_is_not_done_here_may_be_left_at_its_neutral_value(backend, value, tmp_path):
    cases.write_checkpoint(tmp_path, cases.CONFIGS["plain"], "CLIPTextModel")
    model = getattr(clipmb, MODELS[backend])
    placing = ("device_map", "max_memory", "offload_folder", "offload_buffers") if value in (None, False) else ()
    model.from_pretrained(tmp_path, **dict.fromkeys((*ABSENT, *placing), value))
    for name, instead in ABSENT.items():
        with pytest.raises(TypeError, match=f"{name} only as None or False.*{instead[:20]}"):
            model.from_pretrained(tmp_path, **{name: "auto"})


def test_the_first_gpu_is_no_neutral_value():
    options = {"device_map": 0, "tp_plan": None, "adapter_name": "default"}
    drop_unneeded(options)
    assert options == {"device_map": 0}


@pytest.mark.parametrize("name", NAMES)
def test_what_chose_among_files_and_loaders_leaves_no_trace(name, tmp_path, caplog):
    cases.write_checkpoint(tmp_path / "a", cases.CONFIGS["plain"], "CLIPTextModel")
    clipmb.CLIPProcessor(clipmb.CLIPImageProcessor(), clipmb.CLIPTokenizerFast()).save_pretrained(tmp_path / "a")
    kind = getattr(clipmb, name)
    for folder, options in (("plain", {}), ("former", dict.fromkeys(UNNEEDED, "main"))):
        kind.from_pretrained(tmp_path / "a", **options).save_pretrained(tmp_path / folder)
    assert not caplog.records
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "former" / path.name).read_bytes() == path.read_bytes()


def test_a_config_returns_the_arguments_that_are_not_its_own(tmp_path):
    cases.write_checkpoint(tmp_path, cases.CONFIGS["plain"])
    config, rest = clipmb.CLIPConfig.from_pretrained(
        tmp_path, return_unused_kwargs=True, trust_remote_code=True, _attn_implementation="eager"
    )
    assert (config.attn_implementation, rest) == ("eager", {"trust_remote_code": True})


@pytest.mark.parametrize("name", NAMES)
def test_the_former_name_of_the_token_counts(name, monkeypatch):
    """Under its old name a token reaches the hub as under its new one."""
    seen = []

    def find(source, file):
        seen.append(source.token)
        raise clipmb.CheckpointError("no network here")

    monkeypatch.setattr(Source, "find", find)
    monkeypatch.setattr(Source, "names", lambda source: find(source, ""))
    with pytest.raises(clipmb.CheckpointError, match="no network here"):
        getattr(clipmb, name).from_pretrained("me/secret", use_auth_token="mine")
    assert set(seen) == {"mine"}
