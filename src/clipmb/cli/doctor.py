"""``clipmb doctor``: what is installed, and whether it computes CLIP correctly on this machine."""

from __future__ import annotations

import platform
from typing import Any

import typer

from clipmb.cli import common


def run(
    backend: common.Backends = None,
    as_json: common.Json = False,
) -> None:
    """Check that the installed backends compute CLIP correctly.

    Results are compared with recorded values of transformers 4.57.6. The exit code is 1 when something is wrong, or a
    backend that you name is not installed.
    """
    from clipmb import __version__
    from clipmb.doctor import examine

    with common.quiet():
        found = examine(backend or None)
    system = {"clipmb": __version__, "python": platform.python_version(), "system": platform.platform()}
    if as_json:
        common.print_json({**system, **found})
    else:
        typer.echo("  ".join(f"{key} {value}" for key, value in system.items()))
        rows = [
            ["shared", "", "tokens", "equal" if found["tokens"] else "DIFFERENT", ""],
            ["shared", f"resized by {found['resizing']}", "pixels", "equal" if found["pixels"] else "DIFFERENT", ""],
            ["shared", f"JPEG by {found['jpeg']}", "", "", ""],
        ]
        for name, entry in found["backends"].items():
            rows.append([name, _versions(entry), *_verdict(entry), entry.get("precision", "")])
        common.table("", ["part", "versions", "checked", "result", "float32 matrix products"], rows)
    if not found["ok"]:
        raise typer.Exit(1)


def _versions(entry: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in entry.get("versions", {}).items())


def _verdict(entry: dict[str, Any]) -> tuple[str, str]:
    if not entry["installed"]:
        return "", "not installed"
    if "error" in entry:
        return "", f"FAILED: {entry['error']}"
    verdict = "correct" if entry["correct"] else f"WRONG at {entry['first']}"
    return f"{entry['stages']} stages", f"{verdict}, largest difference {entry['difference']:.1e}"
