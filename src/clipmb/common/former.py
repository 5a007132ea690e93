"""Arguments of transformers 4 that are accepted where what they ask for is what happens anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict, get_type_hints

from clipmb.common.errors import bad_input

# Arguments of from_pretrained that chose among files, loaders or servers; there is one loader here, which needs none.
UNNEEDED = (
    "from_pt", "from_tf", "from_flax", "use_safetensors", "weights_only", "low_cpu_mem_usage", "trust_remote_code",
    "code_revision", "use_fast", "from_slow", "resume_download", "proxies", "use_auth_token", "_fast_init",
    "_from_auto", "_from_pipeline", "_commit_hash",
)  # fmt: skip


# Arguments of from_pretrained that ask for what is not done here, and what to do instead.
_QUANTISE = "Quantise the loaded model, for instance with quantize_ of torchao"
_SPLIT = "Use the framework's own tensor parallelism on the loaded model"
ABSENT = {
    "adapter_kwargs": "Call load_adapter on the loaded model",
    "adapter_name": "Call load_adapter on the loaded model",
    "device_mesh": _SPLIT,
    "distributed_config": _SPLIT,
    "generation_config": "Leave it out: CLIP generates no text",
    "gguf_file": "Convert the file first",
    "load_in_4bit": _QUANTISE,
    "load_in_8bit": _QUANTISE,
    "load_weight_prefix": "Pass key_mapping=",
    "mirror": "Set the environment variable HF_ENDPOINT",
    "offload_state_dict": "Leave it out: weights are mapped from their file",
    "quantization_config": _QUANTISE,
    "return_unused_kwargs": "Read the config with it: CLIPConfig.from_pretrained",
    "tf_to_pt_weight_rename": "Pass key_mapping=",
    "tp_plan": _SPLIT,
    "tp_size": _SPLIT,
    "use_kernels": "Leave it out: the kernels of the framework are used",
}
# Those that PyTorch alone has a use for.
_PLACING = ("device_map", "max_memory", "offload_folder", "offload_buffers")

# Arguments of save_pretrained that have no use here, and may be None or False.
_NEUTRAL = ("save_jinja_files", "repo_url", "organization")


class UploadOptions(TypedDict, total=False):
    """The arguments of ``save_pretrained`` that count for an upload; `clipmb.common.uploading` says what they do."""

    repo_id: str | None
    commit_message: str | None
    commit_description: str | None
    private: bool | None
    token: str | bool | None
    use_auth_token: str | bool | None
    create_pr: bool
    revision: str | None
    tags: list[str] | None


class SavingOptions(UploadOptions, total=False):
    """The arguments of transformers 4's ``save_pretrained`` that `check_saving` knows."""

    push_to_hub: bool
    safe_serialization: bool
    is_main_process: bool
    save_function: Any
    save_config: bool
    save_peft_format: bool


def drop_unneeded(options: dict[str, Any]) -> None:
    """Takes the arguments of transformers 4's ``from_pretrained`` that have no effect here out of ``options``.

    Raises:
        TypeError: One asks for what is not done here: it is not None, False or empty.
    """
    for name in UNNEEDED:
        options.pop(name, None)
    for name in (*ABSENT, *_PLACING):
        value = options.get(name, name)
        neutral = (name in ABSENT and value in ({}, [])) or (name, value) == ("adapter_name", "default")
        if value is None or value is False or neutral:  # not 0, which is a device
            del options[name]
    for name in ABSENT.keys() & options.keys():
        rule = f"from_pretrained takes {name} only as None or False"
        raise bad_input(rule, options[name], ABSENT[name], TypeError)


def check_saving(options: Mapping[str, Any]) -> bool:
    """Accepts the arguments of transformers 4's ``save_pretrained`` that ask for what is done anyway.

    ``safe_serialization=True`` and ``save_config=True``; ``push_to_hub`` and what belongs to it, which count where
    it is true; ``save_peft_format`` (of adapters only), ``save_function`` (clipmb writes its files itself) and
    ``max_shard_size`` (of models only) without effect; those about files that CLIP has none of, as None or False.

    Returns:
        Whether this process writes: ``is_main_process``, True by default.

    Raises:
        ValueError: A file is not wanted.
        TypeError: An argument is unknown.
    """
    fixes = {
        "safe_serialization": "Convert the saved folder",
        "save_config": "Remove config.json, if it has to be missing",
    }
    for name, value in options.items():
        if name in fixes and not value:
            rule = "Saving writes config.json, and weights as safetensors"
            raise bad_input(rule, f"{name}={value!r}", fixes[name], shown=True)
        neutral = name in _NEUTRAL and (value is None or value is False)
        if name not in (*get_type_hints(SavingOptions), "max_shard_size") and not neutral:
            raise bad_input("save_pretrained has no such argument", name, "Leave it out", TypeError)
    return bool(options.get("is_main_process", True))
