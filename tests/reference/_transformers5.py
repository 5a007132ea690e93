"""Runs a script with transformers 5, which cannot be installed beside version 4: in an interpreter of its own.

CLIPMB_TRANSFORMERS5_PYTHON names that interpreter. Without it, tests that need it are skipped, or fail where
CLIPMB_REQUIRE_REFERENCE=1 says that the reference must be there.
"""

from __future__ import annotations

import os

import pytest
from processes import excerpt
from processes import run as start


def run(script: str, *args: object) -> str:
    """Runs a Python script with transformers 5 and returns what it prints."""
    python = os.environ.get("CLIPMB_TRANSFORMERS5_PYTHON")
    if not python:
        reason = "CLIPMB_TRANSFORMERS5_PYTHON does not name an interpreter with transformers 5"
        if os.environ.get("CLIPMB_REQUIRE_REFERENCE") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    done = start([python, "-c", script, *args], {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, excerpt(done.stderr)
    return done.stdout
