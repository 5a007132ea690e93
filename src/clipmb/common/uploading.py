"""``push_to_hub`` of everything that has a ``save_pretrained``, through huggingface_hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from clipmb.common.errors import bad_input
from clipmb.common.former import UploadOptions

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

_KINDS = ("Model", "Config", "Tokenizer", "Processor")  # what an object may be called in the message of its commit


class Uploadable:
    """A class whose objects can be pushed to the Hub: one with a ``save_pretrained``."""

    if TYPE_CHECKING:

        def save_pretrained(self, save_directory: Any, /, *args: Any, **options: Any) -> Any:
            """Writes the object's files, and uploads them with ``push_to_hub=True``."""

    def push_to_hub(
        self,
        repo_id: str,
        use_temp_dir: bool | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        max_shard_size: int | str = "5GB",
        create_pr: bool = False,
        safe_serialization: bool = True,
        revision: str | None = None,
        commit_description: str | None = None,
        tags: list[str] | None = None,
        **former: Any,
    ) -> CommitInfo:
        """Saves into a temporary folder, and uploads its files to a repository of the Hub in one commit.

        Args:
            repo_id: Name of the repository, ``"me/my-clip"``; made when it is missing.
            use_temp_dir: False saves into the folder of the repository's name instead, and leaves the files there.
            commit_message: "Upload model", "Upload config" … when None.
            private: Whether a new repository is private; the account's default when None.
            token: Access token; True or None for the stored one.
            max_shard_size: For models, as in `save_pretrained`.
            create_pr: Propose the files as a pull request instead.
            safe_serialization: True: weights are safetensors.
            revision: Branch to commit to, made when it is missing; "main" when None.
            commit_description: Second part of the commit's message.
            tags: Tags that the README gets in addition to those it has.
            **former: ``use_auth_token``, an older name of ``token``; others only as None or False.

        Returns:
            What huggingface_hub says of the commit: its ``commit_url``, its ``oid``, ``pr_url`` ….

        Raises:
            HfHubHTTPError: The Hub refuses, or cannot be reached; with requests' or httpx' own errors where it is not
                there at all.
            ValueError: ``safe_serialization=False`` was asked for.
            TypeError: An option is unknown.
        """
        token = former.pop("use_auth_token", None) if token is None else token
        if unknown := {name: value for name, value in former.items() if value is not None and value is not False}:
            raise bad_input("push_to_hub has no such argument", unknown, "Leave it out", TypeError)
        options: UploadOptions = {
            "repo_id": repo_id, "commit_message": commit_message, "private": private, "token": token,
            "create_pr": create_pr, "revision": revision, "commit_description": commit_description, "tags": tags,
        }  # fmt: skip
        with ExitStack() as stack:
            temporary = use_temp_dir is None or use_temp_dir
            folder = stack.enter_context(TemporaryDirectory()) if temporary else repo_id.split("/")[-1]
            with uploaded(self, folder, {"push_to_hub": True, **options}) as commits:
                self.save_pretrained(folder, max_shard_size=max_shard_size, safe_serialization=safe_serialization)
            return commits[0]


@contextmanager
def uploaded(
    thing: object, save_directory: str | os.PathLike[str], options: Mapping[str, Any]
) -> Iterator[list[CommitInfo]]:
    """Uploads the files that are written into a folder meanwhile, where ``push_to_hub=True`` is among the options.

    Args:
        thing: What is saved, for the commit's message.
        save_directory: The folder; its name is that of the repository unless ``repo_id`` is given.
        options: Those of `save_pretrained`: `UploadOptions` and others.

    Yields:
        A list that then holds the commit.
    """
    commits: list[CommitInfo] = []
    if not options.get("push_to_hub"):
        yield commits
        return
    import huggingface_hub

    token = options.get("token", options.get("use_auth_token"))
    api = huggingface_hub.HfApi(token=token)
    named = options.get("repo_id") or Path(save_directory).resolve().name
    repository = api.create_repo(named, private=options.get("private"), exist_ok=True).repo_id
    before = _versions(save_directory)
    yield commits
    files: dict[str, Any] = {
        name: os.path.join(save_directory, name)
        for name, version in _versions(save_directory).items()
        if before.get(name) != version
    }
    if tags := options.get("tags"):
        files["README.md"] = _tagged(repository, tags, token)
    revision, pull = options.get("revision"), bool(options.get("create_pr"))
    if revision is not None and not revision.startswith("refs/pr") and not pull:
        api.create_branch(repository, branch=revision, exist_ok=True)
    name = type(thing).__name__
    kind = next((kind.lower() for kind in _KINDS if kind in name), name)
    commits.append(
        api.create_commit(
            repository,
            [
                huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=file)
                for name, file in files.items()
            ],
            commit_message=options.get("commit_message") or f"Upload {kind}",
            commit_description=options.get("commit_description"),
            create_pr=pull,
            revision=revision,
        )
    )


def _versions(folder: str | os.PathLike[str]) -> dict[str, tuple[int, int, int]]:
    """Returns the files below a folder, without hidden ones: name to what changes when one is written."""
    found = {}
    for path in Path(folder).rglob("*"):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            about = path.stat()
            found[relative.as_posix()] = about.st_ino, about.st_size, about.st_mtime_ns
    return found


def _tagged(repository: str, tags: list[str], token: bool | str | None) -> bytes:
    """Returns the README of a repository with these tags; a repository without one gets one."""
    from huggingface_hub import ModelCard, errors, hf_hub_download

    try:
        card: Any = ModelCard(Path(hf_hub_download(repository, "README.md", token=token)).read_text("utf-8"))
    except errors.EntryNotFoundError:
        card = ModelCard("---\nlibrary_name: transformers\n---\n")
    present = card.data.tags or []
    card.data.tags = [*present, *(tag for tag in tags if tag not in present)]
    return str(card).encode()
