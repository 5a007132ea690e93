"""A folder or a Hub id, and the local files behind it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from clipmb.common import saving
from clipmb.common.errors import CheckpointError, bad_input
from clipmb.common.hub_answers import Answer, is_plain, reachable, watched

_REFUSALS: dict[int | None, str] = {
    401: "the Hub refuses the access token (401). Pass another token=, or False for none.",
    403: "the Hub forbids it (403). Ask its owner for access, or pass the token= of somebody who has it.",
    404: "there is no such page (404), and not the answer of a Hub. Check HF_ENDPOINT.",
}
_LONGEST = 96  # characters of each half of a Hub id
_ATTEMPTS = 4  # of a download whose connection breaks
_OR_OFFLINE = " (or local_files_only or HF_HUB_OFFLINE is set). Connect once, or pass a local folder."


@dataclass
class _Found:
    """What a source learned about its repository, so that it asks once.

    Attributes:
        names: Its files; None until they were listed.
        offline: The Hub could not be reached; do not try again for each further file.
        reached: It could be.
    """

    names: list[str] | None = None
    offline: bool = False
    reached: bool = False


@dataclass(frozen=True)
class Source:
    """Where a checkpoint, config, tokenizer or processor comes from.

    Attributes:
        name_or_path: A local folder, a local file of weights (``ViT-B-32.pt``), or a Hub id
            (``openai/clip-vit-base-patch32``). A file is a source that holds nothing but itself.
        subfolder: A folder inside it.
        revision: Branch, tag or commit on the Hub.
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
    _found: _Found = field(default_factory=_Found, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, name_or_path: str | os.PathLike[str] | Source, options: dict[str, Any]) -> Source:
        """Builds a source from the arguments of a ``from_pretrained``.

        Args:
            name_or_path: A folder, a file of weights, a Hub id, or a source, which the options then change.
            options: Keyword arguments. The source's own, and transformers 4's ``resume_download``, ``proxies`` and
                ``use_auth_token``, are taken out of it; the others stay.

        Raises:
            TypeError: ``name_or_path`` is something else.
        """
        own = [option.name for option in fields(cls)[1:] if option.init]
        given = {name: options.pop(name) for name in own if name in options}
        for forgotten in ("resume_download", "proxies", "use_auth_token"):
            value = options.pop(forgotten, None)
            if forgotten == "use_auth_token" and value is not None:
                given.setdefault("token", value)
        if isinstance(name_or_path, Source):
            return replace(name_or_path, **given)
        if not isinstance(name_or_path, str | os.PathLike):
            raise bad_input("Expected a folder path or a Hub id", name_or_path, "Pass a string or a path", TypeError)
        given["subfolder"] = os.fspath(given.get("subfolder") or "")
        return cls(os.fspath(name_or_path), **given)

    def __str__(self) -> str:
        return os.path.join(self.name_or_path, self.subfolder) if self.subfolder else self.name_or_path

    @property
    def file(self) -> Path | None:
        """The local file, when the source is a single file instead of a folder; else None."""
        path = Path(self.name_or_path)
        return path if not self.subfolder and os.path.isfile(path) else None

    @property
    def folder(self) -> Path | None:
        """The local folder, the folder of a single file, or None when the source is on the Hub."""
        path = Path(self.name_or_path)
        if os.path.isdir(path):
            return path / self.subfolder
        return path.parent if self.file else None

    def find(self, name: str) -> Path | None:
        """Returns the local path of one file, downloading it when needed; None when the source has no such file.

        Args:
            name: The file's name, or its path below the source's folder.

        Raises:
            CheckpointError: The source itself cannot be reached: no such folder, no such repository, no network.
        """
        folder = self.folder
        if folder is not None:
            return saving.current(folder, name) if self.file is None or name == self.file.name else None
        self._require_hub_id()
        if "/" not in name and self._found.names is not None and name not in self._found.names:
            return None
        path = self._download(name)
        if path is None:  # one listing instead of one request for each further file that may not be there
            with contextlib.suppress(CheckpointError):
                self.names()
        return path

    def names(self) -> list[str]:
        """Lists the files of the folder, those of its subfolders not included.

        On the hub this is one request, made once; without the network it is what the cache holds.

        Raises:
            CheckpointError: The source itself cannot be reached.
        """
        if self.file is not None:
            return [self.file.name]
        folder = self.folder
        if folder is not None:
            return saving.names(folder) if folder.is_dir() else []
        self._require_hub_id()
        if self._found.names is None:
            self._found.names = self._listed()
        return self._found.names

    def commit(self) -> str | None:
        """Returns the commit on the Hub that the cached files are of; None for a local folder."""
        snapshot = None if self.folder is not None else self._snapshot()
        return None if snapshot is None else snapshot.name

    def require(self, *names: str) -> Path:
        """Returns the local path of the first of these files that exists.

        Raises:
            CheckpointError: None of them does.
        """
        for name in names:
            if (path := self.find(name)) is not None:
                return path
        raise CheckpointError(f"{self} has none of the files {', '.join(names)}.{self.listing()}")

    def listing(self) -> str:
        """Returns what the source holds, as a sentence for error messages."""
        folder = self.folder
        if folder is None:
            names = ", ".join((self._found.names or [])[:20])
            offline = " in the cache, and the Hub cannot be reached" if self._found.offline else ""
            return f" Its files{offline}: {names}." if names else ""
        if self.file is not None:
            return " You passed a single file; the missing file may be next to it, so try the folder instead."
        if not folder.is_dir():
            return f" The folder has no subfolder {self.subfolder!r}."
        return f" Its files: {', '.join(sorted(path.name for path in folder.iterdir())[:20]) or 'none'}."

    def _require_hub_id(self) -> None:
        name = self.name_or_path
        parts = name.split("/")
        plausible = len(parts) <= 2 and all(0 < len(part) <= _LONGEST for part in parts)
        plausible = plausible and not name.startswith((".", "~", "/")) and "\\" not in name
        if os.path.isfile(name) or not plausible:
            exists = "is a file" if os.path.isfile(name) else "is neither a folder nor a file of data"
            what = exists if os.path.exists(name) else "does not exist"
            shown = name if len(name) < 500 else f"{name[:500]}…"
            raise CheckpointError(
                f"{shown} {what}. Pass an existing folder, or a Hub id like 'openai/clip-vit-base-patch32'."
            )

    def _download(self, name: str) -> Path | None:
        import huggingface_hub
        from huggingface_hub import errors

        self._try_to_reach()
        for attempt in range(_ATTEMPTS):
            try:
                with self._explained(f"{name} of {self}"):
                    path = huggingface_hub.hf_hub_download(
                        self.name_or_path,
                        name,
                        subfolder=self.subfolder or None,
                        revision=self.revision,
                        cache_dir=self.cache_dir,
                        token=self.token,
                        local_files_only=self.local_files_only or self._found.offline,
                        force_download=self.force_download and not attempt,
                    )
                    return Path(path)
            except errors.LocalEntryNotFoundError as error:
                return self._not_cached(name, error)
            except errors.EntryNotFoundError:
                return None
            except CheckpointError as error:
                if _is_down(error.__cause__) and not self._found.offline and self._snapshot() is not None:
                    self._found.offline = True  # and the next attempt looks into the cache
                elif not _was_cut(error.__cause__) or attempt == _ATTEMPTS - 1:
                    raise  # otherwise the next attempt goes on where this one was cut
        return None

    def _listed(self) -> list[str]:
        """Asks the Hub which files there are, or the cache when the Hub cannot be reached."""
        import huggingface_hub
        from huggingface_hub import constants, errors

        self._try_to_reach()
        if not (self.local_files_only or constants.HF_HUB_OFFLINE or self._found.offline):
            try:
                with self._explained(f"The list of files of {self}"):
                    tree = huggingface_hub.HfApi().list_repo_tree(
                        self.name_or_path, self.subfolder or None, revision=self.revision, token=self.token
                    )
                    files = [entry.path for entry in tree if isinstance(entry, huggingface_hub.hf_api.RepoFile)]
                    names = sorted(name.rsplit("/", 1)[-1] for name in files)
                    if strange := [name for name in names if not is_plain(name)]:
                        raise Answer(200, hostile=f"a file called {strange[0][:100]!r}")
                    return names
            except errors.EntryNotFoundError:
                return []  # there is no such subfolder
            except CheckpointError as error:
                if self._snapshot() is None or not (_was_cut(error.__cause__) or _is_down(error.__cause__)):
                    raise
        snapshot = self._snapshot()
        if snapshot is None:
            raise CheckpointError(f"{self} is not in the local cache, and the Hub cannot be reached{_OR_OFFLINE}")
        self._found.offline = True
        folder = snapshot / self.subfolder
        return sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []

    def _try_to_reach(self) -> None:
        """Finds out whether there is a Hub, once, before huggingface_hub tries it for half a minute."""
        from huggingface_hub import constants

        if not (self.local_files_only or constants.HF_HUB_OFFLINE or self._found.offline or self._found.reached):
            self._found.reached = reachable()
            self._found.offline = not self._found.reached

    def _not_cached(self, name: str, error: Exception) -> None:
        """Without the network: None when the cache holds this repository without this file, else the error."""
        self._found.offline = True
        if self._snapshot() is None:
            if (refusal := _REFUSALS.get(_status(error.__cause__))) is not None:
                raise CheckpointError(f"{name} of {self}: {refusal}") from error
            raise CheckpointError(
                f"{name} of {self} is not in the local cache, and the Hub cannot be reached{_OR_OFFLINE}"
            ) from error

    def _snapshot(self) -> Path | None:
        """The folder of the cache that holds this revision; None when nothing of it is cached."""
        import huggingface_hub

        try:
            return Path(
                huggingface_hub.snapshot_download(
                    self.name_or_path, revision=self.revision, cache_dir=self.cache_dir, local_files_only=True
                )
            )
        except (OSError, ValueError):  # LocalEntryNotFoundError among them
            return None

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turns the errors of huggingface_hub into a `CheckpointError`, except those about a single file."""
        from huggingface_hub import errors

        try:
            with watched():
                yield
        except Answer as error:
            raise CheckpointError(f"{what} {_described(error)}") from error
        except (errors.LocalEntryNotFoundError, errors.EntryNotFoundError):
            raise
        except errors.GatedRepoError as error:
            raise CheckpointError(
                f"{self} is gated. Ask for access on its page, then pass token= or run `hf auth login`."
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{self} is neither a local folder nor a Hub repository you have access to. "
                "Check the spelling; for a private repository pass token=."
            ) from error
        except errors.RevisionNotFoundError as error:
            raise CheckpointError(f"{self} has no revision {self.revision!r}.") from error
        except errors.HFValidationError as error:
            raise CheckpointError(f"{self} is neither a local folder nor a valid Hub id.") from error
        except Exception as error:
            if (refusal := _REFUSALS.get(_status(error))) is not None:
                raise CheckpointError(f"{what}: {refusal}") from error
            raise CheckpointError(f"{what} cannot be downloaded: {type(error).__name__}: {error}") from error


def _described(answer: Answer) -> str:
    """Returns what an answer means, after the name of what was asked for."""
    if answer.hostile:
        return (
            f"is refused, and nothing was written: the server that HF_ENDPOINT names answers with {answer.hostile}, "
            "which is no plain name. Set HF_ENDPOINT to a server that you trust, or remove it."
        )
    if answer.status == 429:
        wait = f"in {answer.wait} seconds" if answer.wait.isdecimal() else "later"
        return f"cannot be had now: the Hub has too many requests from here (429). Try again {wait}, or pass token=."
    return f"cannot be had now: the Hub is out of order ({answer.status}). Try again later, or pass a local folder."


def _status(error: BaseException | None) -> int | None:
    """Returns the HTTP status that an error is about, if it is about one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_down(error: BaseException | None) -> bool:
    """Whether the Hub is there, and cannot answer now."""
    return isinstance(error, Answer) and not error.hostile


def _was_cut(error: BaseException | None) -> bool:
    """Whether a connection broke, which a further attempt may survive; an answer of the Hub is not one of these."""
    answered = getattr(error, "response", None) is not None
    of_http = any(
        cls.__module__.startswith(("requests", "urllib3", "httpx", "httpcore")) for cls in type(error).__mro__
    )
    return not answered and (isinstance(error, ConnectionError) or of_http)
