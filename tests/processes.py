"""Runs Python and the command line in processes of their own, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys


def python(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the interpreter of the tests, offline; ``env`` adds to its environment."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "3", **env},
        check=False,
    )


def clipmb(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line."""
    return python("-m", "clipmb", *arguments, **env)
