"""A folder or a hub id, and the local files behind it."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from clipmb.common.errors import CheckpointError, bad_input
from clipmb.common.saving import finish


@dataclass(frozen=True)
class Source:
    """Where a checkpoint, config, tokenizer or processor comes from.

    Attributes:
        name_or_path: A local folder, a local file of weights such as ``ViT-B-32.pt``, or a hub id such as
            ``openai/clip-vit-base-patch32``. A file is a source that holds nothing but itself.
        subfolder: A folder inside it.
        revision: Branch, tag or commit on the hub.
        cache_dir: Where downloads are kept; huggingface_hub's default when None.
        token: Access token; True or None for the stored one, False for none.
        local_files_only: Never touch the network; only what is cached.
        force_download: Download again even when cached.
    """

    name_or_path: str
    subfolder: str = ""
    revision: str | None = None
    cache_dir: str | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False

    @classmethod
    def of(cls, name_or_path: str | os.PathLike[str] | Source, options: dict[str, Any]) -> Source:
        """Builds a source, taking its options out of the keyword arguments of a ``from_pretrained``."""
        given = {field.name: options.pop(field.name) for field in fields(cls)[1:] if field.name in options}
        for forgotten in ("resume_download", "proxies", "use_auth_token"):  # accepted by the former library
            value = options.pop(forgotten, None)
            if forgotten == "use_auth_token" and value is not None:
                given.setdefault("token", value)
        if isinstance(name_or_path, Source):
            return name_or_path
        if not isinstance(name_or_path, str | os.PathLike):
            raise bad_input(
                "A checkpoint is named by a folder or a hub id", name_or_path, "Pass a string or a path", TypeError
            )
        given["subfolder"] = os.fspath(given.get("subfolder") or "")
        return cls(os.fspath(name_or_path), **given)

    def __str__(self) -> str:
        return os.path.join(self.name_or_path, self.subfolder) if self.subfolder else self.name_or_path

    @property
    def file(self) -> Path | None:
        """The local file, when the source is a single file instead of a folder; else None."""
        path = Path(self.name_or_path)
        return path if not self.subfolder and path.is_file() else None

    @property
    def folder(self) -> Path | None:
        """The local folder, the folder of a single file, or None when the source is on the hub."""
        path = Path(self.name_or_path)
        if path.is_dir():
            return path / self.subfolder
        return path.parent if self.file else None

    def find(self, name: str) -> Path | None:
        """Returns the local path of one file, downloading it when needed; None when the source has no such file.

        Raises:
            CheckpointError: The source itself cannot be had: no such folder, no such repository, no network.
        """
        folder = self.folder
        if folder is not None:
            if folder.is_dir():
                finish(folder)
            path = folder / name
            return path if path.is_file() and (self.file is None or name == self.file.name) else None
        self._require_hub_id()
        return self._download(name)

    def require(self, *names: str) -> Path:
        """Returns the first of these files that exists.

        Raises:
            CheckpointError: None of them does.
        """
        for name in names:
            if (path := self.find(name)) is not None:
                return path
        raise CheckpointError(f"{self} has none of the files {', '.join(names)}.{self.listing()}")

    def listing(self) -> str:
        """Says what a local folder holds, as a sentence for error messages."""
        folder = self.folder
        if folder is None:
            return ""
        if self.file is not None:
            return " It is a single file; its folder may hold what is missing, so try that."
        if not folder.is_dir():
            return f" The folder has no subfolder {self.subfolder!r}."
        return f" Its files: {', '.join(sorted(path.name for path in folder.iterdir())[:20]) or 'none'}."

    def _require_hub_id(self) -> None:
        name = self.name_or_path
        parts = name.split("/")
        plausible = len(parts) <= 2 and all(parts) and not name.startswith((".", "~", "/")) and "\\" not in name
        if Path(name).is_file() or not plausible:
            what = "is a file" if Path(name).is_file() else "does not exist"
            raise CheckpointError(
                f"{name} {what}. Pass an existing folder, or a hub id such as 'openai/clip-vit-base-patch32'."
            )

    def _download(self, name: str) -> Path | None:
        import huggingface_hub
        from huggingface_hub import errors

        try:
            path = huggingface_hub.hf_hub_download(
                self.name_or_path,
                name,
                subfolder=self.subfolder or None,
                revision=self.revision,
                cache_dir=self.cache_dir,
                token=self.token,
                local_files_only=self.local_files_only,
                force_download=self.force_download,
            )
        except errors.LocalEntryNotFoundError as error:
            return self._cached_elsewhere(name, error)
        except errors.EntryNotFoundError:
            return None
        except errors.GatedRepoError as error:
            raise CheckpointError(
                f"{self} is gated. Ask for access on its page, then pass token= or run `hf auth login`."
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{self} is neither a local folder nor a repository that the hub shows to you. "
                "Check the spelling; for a private repository pass token=."
            ) from error
        except errors.RevisionNotFoundError as error:
            raise CheckpointError(f"{self} has no revision {self.revision!r}.") from error
        except errors.HFValidationError as error:
            raise CheckpointError(f"{self} is neither a local folder nor a valid hub id.") from error
        except Exception as error:
            raise CheckpointError(f"{name} of {self} cannot be downloaded: {type(error).__name__}: {error}") from error
        return Path(path)

    def _cached_elsewhere(self, name: str, error: Exception) -> None:
        """Without the network: None when the cache holds this repository without this file, else the error."""
        import huggingface_hub

        known = huggingface_hub.try_to_load_from_cache(
            self.name_or_path, "config.json", cache_dir=self.cache_dir, revision=self.revision
        )
        inside = huggingface_hub.try_to_load_from_cache(
            self.name_or_path,
            f"{self.subfolder}/config.json" if self.subfolder else "config.json",
            cache_dir=self.cache_dir,
            revision=self.revision,
        )
        if name != "config.json" and (isinstance(known, str) or isinstance(inside, str)):
            return
        raise CheckpointError(
            f"{name} of {self} is not in the local cache, and the hub cannot be reached "
            "(or local_files_only is set). Connect once, or pass a local folder."
        ) from error
