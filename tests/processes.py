"""Runs Python, the command line and other programs in processes of their own, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

from typer.testing import CliRunner

# Seconds. It serves only against a hang: at least ten times what the slowest child takes on an idle machine.
HANG = 1800

# What JAX compiled for one child serves the next ones: training is killed and started again a hundred times.
_COMPILED = tempfile.TemporaryDirectory(prefix="clipmb-compiled-")
_JAX = {
    "JAX_COMPILATION_CACHE_DIR": _COMPILED.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def _environment(added: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONFAULTHANDLER": "1", **_JAX, **added}


def excerpt(text: str) -> str:
    """Both ends of what a program printed: of several processes, the first to fail speaks at the top."""
    return text if len(text) <= 8000 else f"{text[:4000]}\n…\n{text[-4000:]}"


def run(command: Iterable[object], env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a program; ``env`` adds to its environment."""
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=_environment(env or {}),
        timeout=HANG,
        check=False,
    )


def python(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the interpreter of the tests, offline; ``env`` adds to its environment."""
    return run([sys.executable, *arguments], {"HF_HUB_OFFLINE": "1", **env})


def start(*arguments: object, **env: str) -> subprocess.Popen[str]:
    """Starts the interpreter of the tests, offline, and returns at once; ``env`` adds to its environment."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=_environment({"HF_HUB_OFFLINE": "1", **env}),
    )


def output(*arguments: object, **env: str) -> str:
    """Runs the interpreter of the tests, which must succeed, and returns what it printed."""
    done = python(*arguments, **env)
    assert done.returncode == 0, excerpt(done.stderr)
    return done.stdout


def invoke(*arguments: object) -> Any:
    """Runs the command line in this process, so that what a test has patched or registered counts."""
    from clipmb.cli import app

    return CliRunner().invoke(app, [str(part) for part in arguments])


def clipmb(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line."""
    return python("-m", "clipmb", *arguments, **env)
