"""Embedding on the machines of a Ray cluster: each replica of the model makes whole shards.

A replica is a Ray actor. It reads, computes and writes a shard with the code of one machine, `job.Local`, so that the
rows are the same to the bit, and says in the folder that the shard is complete. The folder alone tells what is left to
do, whatever became of the cluster. Ray Data has no such unit of work: its scheduler decides which rows make a block,
and its checkpoints read all input again and need unique ids (https://github.com/ray-project/ray/issues/65891).
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from clipmb.common.data.layouts import is_dataset
from clipmb.common.data.pairs import Pairs
from clipmb.common.errors import ClipmbError, MissingBackendError, bad_input, logger, whole_number
from clipmb.embedding.job import Clock, Local
from clipmb.embedding.passport import passport_of
from clipmb.embedding.store import Manifest
from clipmb.pipeline import loaded

_MOST = 8  # threads of a replica when nobody asks for more
_ATTEMPTS = 2  # at a shard, and at starting a replica
_WITNESSES = 16  # images of which a replica looks whether its machine has them
_SECONDS = 5.0  # for a connection to the cluster


@dataclass(frozen=True)
class Recipe:
    """What a replica needs in order to open the source and to load the model, on whichever machine it is.

    Attributes:
        source: Paths, as `Pairs.open` takes them.
        columns: The other arguments of `Pairs.open`.
        model: Folder or Hub id of a checkpoint.
        backend: As `CLIPPipeline.from_pretrained` takes it, and so are ``dtype`` and ``device``.
        dtype: What to compute in.
        device: Where to compute.
        workers: Threads that read, decode, resize and tokenize; None for a share of the cluster's processors.
        normalized: Whether embeddings are of unit length.
        long_text: As in `CLIPPipeline.encode_text`.
        folder: What relative paths start from.
    """

    source: str | os.PathLike[str] | list[str | os.PathLike[str]]
    columns: dict[str, Any]
    model: str
    backend: str | None
    dtype: Any
    device: Any
    workers: int | None
    normalized: bool
    long_text: str
    folder: str

    @classmethod
    def of(cls, source: Any, columns: Mapping[str, Any], model: Any, **options: Any) -> Recipe:
        """Checks what has to travel to other machines.

        Args:
            source: As `clipmb.embed` takes it.
            columns: As `clipmb.embed` takes them.
            model: As `clipmb.embed` takes it.
            **options: The other fields, without ``folder``.

        Raises:
            TypeError: The source or the model is an object of this process.
        """
        if not isinstance(model, str | os.PathLike):
            raise bad_input(
                "With Ray, model must be a folder or a Hub id, which every machine can load", model,
                "Save the model, and pass its folder", TypeError,
            )  # fmt: skip
        several = isinstance(source, Iterable) and not isinstance(source, str | Pairs) and not is_dataset(source)
        paths: list[Any] = list(source) if several else [source]
        if wrong := [path for path in paths if not isinstance(path, str | os.PathLike)]:
            raise bad_input(
                "With Ray, the source must be paths, which every machine can open", wrong[0],
                "Pass the paths of the files", TypeError,
            )  # fmt: skip
        return cls(paths if several else paths[0], dict(columns), os.fspath(model), folder=os.getcwd(), **options)


class Replica:
    """A replica of the model, in a process on some machine; Ray makes an actor of it.

    Args:
        recipe: What to open and to load.
        fingerprint: That of the source, as the machine sees it where the job was started.
        images: Paths of some images that are there.
        workers: Threads that read, decode, resize and tokenize.
    """

    def __init__(self, recipe: Recipe, fingerprint: str, images: list[str], workers: int) -> None:
        self.recipe, self.fingerprint, self.images, self.workers = recipe, fingerprint, images, workers

    def open(self) -> tuple[dict[str, Any], int, str]:
        """Opens the source and loads the model.

        Returns:
            The passport, how many numbers are in an embedding, and the name of the machine.

        Raises:
            ValueError: The source is not the one of the machine where the job was started.
        """
        recipe, host = self.recipe, socket.gethostname()
        with suppress(OSError):  # then all paths must be absolute
            os.chdir(recipe.folder)
        level = logger.level
        logger.setLevel(logging.ERROR)  # what is left out was said where the job was started
        try:
            pairs = Pairs.open(recipe.source, partial=True, **recipe.columns)
        finally:
            logger.setLevel(level)
        other = [f"another content of {pairs!r}"] if pairs.fingerprint != self.fingerprint else []
        if other := other or [f"no {path}" for path in self.images if not os.path.exists(path)]:
            raise bad_input(
                "Every machine must see the same source", f"{other[0]} on {host}",
                "Use storage that all machines share", shown=True,
            )  # fmt: skip
        self.local = Local(pairs, loaded(recipe.model, recipe.backend, recipe.dtype, recipe.device), self.workers)
        passport = passport_of(self.local.pipeline, normalized=recipe.normalized, long_text=recipe.long_text)
        return passport, self.local.dimension, host

    def fastest_batch(self) -> int:
        """Measures which number of images per step is best."""
        return self.local.fastest_batch()

    def shard(self, folder: str, number: int, span: range) -> tuple[dict[str, Any], dict[str, float]]:
        """Embeds and writes a shard.

        Args:
            folder: Where.
            number: Its number.
            span: Its items.

        Returns:
            What is known of it, and the seconds of the stages.

        Raises:
            ValueError: The folder is not the one of the machine where the job was started.
        """
        manifest = Manifest.read(Path(folder))
        if manifest is None or (manifest.pending or {}).get("fingerprint") != self.fingerprint:
            raise bad_input(
                "out must be on storage that all machines share",
                f"{folder}, without this job on {socket.gethostname()}",
                "Pass a folder there", shown=True,
            )  # fmt: skip
        self.local.clock = Clock()
        ((_, about),) = self.local.written(Path(folder), manifest, {number: span}, lambda *_: None)
        return about, dict(self.local.clock.seconds)


class Cluster:
    """The replicas of a job, and who does what; while the context lasts.

    A replica that fails is replaced by a new one, which loads the model again, and its shard is given out again, once.

    Args:
        recipe: What the replicas open and load.
        pairs: The source, as this machine sees it.
        replicas: How many there are.
        gpus: The share of a GPU that each reserves.

    Attributes:
        passport: That of all replicas.
        dimension: Numbers in an embedding.
        workers: Threads of each replica.
        clock: The seconds spent by all replicas.

    Raises:
        ValueError: A number is out of its range, or a GPU is reserved and not used.
        ImportError: Ray is not installed.
        ClipmbError: Entered: Ray cannot be started or reached, or its only machine is too small for a replica.
    """

    passport: dict[str, Any]
    dimension: int
    workers: int

    def __init__(self, recipe: Recipe, pairs: Pairs, replicas: int, gpus: float) -> None:
        self._replicas = whole_number("replicas", replicas)
        if isinstance(gpus, bool) or not isinstance(gpus, int | float) or not 0 <= gpus <= 1:
            raise bad_input("gpus_per_replica must be a number from 0 to 1", gpus, "Correct gpus_per_replica")
        if gpus and recipe.device is None:
            raise bad_input(
                "gpus_per_replica needs device, the GPU as the framework names it", None,
                'Pass it too, with PyTorch device="cuda" (--device cuda)',
            )  # fmt: skip
        self._ray = _ray()
        some = (pairs.path(index) for index in range(0, len(pairs), -(-len(pairs) // _WITNESSES)))
        self._source = pairs.fingerprint, [path for path in some if path is not None and os.path.exists(path)]
        self._recipe, self._gpus = recipe, gpus
        self._idle: deque[Any] = deque()
        self._running: dict[Any, tuple[Any, int | None]] = {}  # who does which shard; None while it opens and loads
        self._failures: Counter[int | None] = Counter()
        self.clock = Clock()

    def __enter__(self) -> Cluster:
        """Starts the replicas, and waits for the first."""
        self._own = not self._ray.is_initialized()
        if self._own:
            _connect(self._ray)
        try:
            nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            self.workers = self._recipe.workers or _share([node.get("CPU", 0) for node in nodes], self._replicas)
            self._require_room(nodes)
            self._actor = self._ray.remote(num_cpus=self.workers, num_gpus=self._gpus)(Replica)
            for _ in range(self._replicas):
                self._start()
            while not self._idle:
                self._next()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the replicas, and Ray where it was started here."""
        for actor in [*self._idle, *(actor for actor, _ in self._running.values())]:
            self._ray.kill(actor)
        self._idle.clear()
        self._running.clear()
        if self._own:
            self._ray.shutdown()

    def fastest_batch(self) -> int:
        """Measures which number of images per step is best, on one replica."""
        try:
            return self._ray.get(self._idle[0].fastest_batch.remote())
        except self._ray.exceptions.RayError as error:
            raise bad_input(
                'A replica must live to measure batch_size="auto"',
                _why(error),
                "Pass a number",
                ClipmbError,
                shown=True,
            ) from None

    def written(
        self, folder: Path, manifest: Manifest, spans: Mapping[int, range], advance: Callable[..., None]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Lets the replicas embed and write shards; otherwise as `clipmb.embedding.job.Local.written`.

        Raises:
            ClipmbError: A shard failed twice.
        """
        waiting, left, broken = deque(spans), len(spans), 0
        try:
            while left:
                while waiting and self._idle:
                    actor, number = self._idle.popleft(), waiting.popleft()
                    made = actor.shard.remote(os.path.abspath(folder), number, spans[number])
                    self._running[made] = actor, number
                number, made = self._next()
                if number is not None and made is None:
                    waiting.appendleft(number)
                elif number is not None:
                    about, seconds = made
                    for name, value in seconds.items():
                        self.clock.seconds[name] += value
                    broken += len(about["errors"])
                    advance(len(spans[number]), f"items, {broken:,} errors" if broken else "items")
                    left -= 1
                    yield number, about
        except BaseException:
            self.__exit__()  # before the folder is anybody else's
            raise

    def _require_room(self, nodes: list[dict[str, float]]) -> None:
        """Refuses, or says, that no machine has what a replica reserves, for which Ray waits without an end."""
        asked = {"CPU": self.workers, "GPU": self._gpus}
        if any(all(node.get(name, 0) >= amount for name, amount in asked.items()) for node in nodes):
            return
        rule = "Some machine must have the processors (--workers) and GPUs (--gpus-per-replica) of a replica"
        had = "; ".join(sorted({" and ".join(f"{node.get(name, 0):g} {name}" for name in asked) for node in nodes}))
        found = f"{self.workers} CPU and {self._gpus:g} GPU, on machines with {had or 'nothing yet'}"
        session = getattr(self._ray.get_runtime_context(), "get_session_name", str)()
        if session.endswith(f"_{os.getpid()}"):  # this process started Ray, and no other machine will come
            raise bad_input(rule, found, "Ask for less, or connect to a cluster that has it", ClipmbError, shown=True)
        logger.warning("%s. Received: %s. Waiting for one to come.", rule, found)

    def _start(self) -> None:
        actor = self._actor.remote(self._recipe, *self._source, self.workers)
        self._running[actor.open.remote()] = actor, None

    def _next(self) -> tuple[int | None, Any]:
        """Waits until one replica has done something.

        Returns:
            The number of its shard, and what it made; None and None if the replica is now ready, or could not be
            started; the number and None if it failed at the shard.
        """
        (done,), _ = self._ray.wait(list(self._running), num_returns=1)
        actor, number = self._running[done]
        try:
            made = self._ray.get(done)
        except self._ray.exceptions.RayError as error:
            self._replace(done, error)
            return number, None
        del self._running[done]
        self._idle.append(actor)
        if number is not None:
            return number, made
        self._failures[None] = 0
        passport, self.dimension, host = made
        known = vars(self).setdefault("passport", passport)
        if differ := [name for name in passport if passport[name] != known[name]]:
            raise bad_input(
                "Every replica must load the same model with the same packages",
                f"{', '.join(differ)} of another kind on {host}", "Install the same on every machine", shown=True,
            )  # fmt: skip
        return None, None

    def _replace(self, done: Any, error: Exception) -> None:
        """Starts a replica in the place of one that failed; raises when there is no point in trying again."""
        actor, number = self._running.pop(done)
        self._ray.kill(actor)
        cause = getattr(error, "cause", None)
        if number is None and isinstance(cause, Exception):  # what it opens and loads is wrong
            raise cause from None
        why = _why(error)
        self._failures[number] += 1
        if self._failures[number] >= _ATTEMPTS * (self._replicas if number is None else 1):
            raise bad_input(
                f"A {'replica must start' if number is None else 'shard must be made'} at the second attempt",
                why if number is None else f"shard {number}: {why}",
                "Correct that, and go on with resume=True (--resume)", ClipmbError, shown=True,
            )  # fmt: skip
        what = "A replica" if number is None else f"The replica that made shard {number}"
        logger.warning("%s failed, and is replaced: %s.", what, why)
        self._start()


def _why(error: Exception) -> str:
    """Returns what a replica failed of, as the first line of its error."""
    return str(getattr(error, "cause", None) or error).strip().partition("\n")[0].rstrip(".")


def _share(nodes: Iterable[float], replicas: int) -> int:
    """Returns how many processors each replica gets, so that all have room on machines with so many; at most 8."""
    counts = [int(count) for count in nodes]
    fit = [size for size in range(1, _MOST + 1) if sum(count // size for count in counts) >= replicas]
    return max(fit, default=1)


def _connect(ray: Any) -> None:
    """Connects to the cluster of ``RAY_ADDRESS`` or of this machine, else starts one.

    Raises:
        ClipmbError: That is not possible.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        target = urlsplit(address if "//" in address else f"//{address}")
        if target.hostname and target.port:  # Ray itself would try for minutes
            socket.create_connection((target.hostname, target.port), timeout=_SECONDS).close()
        ray.init(logging_level=logging.WARNING)
    except Exception as error:  # of Ray's, many kinds
        raise bad_input(
            f"Ray must {'be reachable at RAY_ADDRESS' if address else 'start'}",
            f"{address}: {_why(error)}".removeprefix(": "),
            "Correct RAY_ADDRESS or remove it, and install the version of Ray that the cluster has",
            ClipmbError, shown=True,
        ) from error  # fmt: skip


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise MissingBackendError("ray", "ray", cause=str(error)) from error
