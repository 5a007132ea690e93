"""``clipmb doctor``: what is installed, and does it compute CLIP correctly on this machine?"""

from __future__ import annotations

import json
import platform
from typing import Annotated, Any

import typer

from clipmb.cli import common


def run(
    backend: Annotated[str | None, typer.Option("--backend", "-b", help="Only this one; it must be installed.")] = None,
    as_json: common.Json = False,
) -> None:
    """Check the installation against recorded values of transformers 4.57.6: exit code 1 when something is wrong."""
    from clipmb import __version__
    from clipmb.doctor import examine

    with common.quiet():
        found = examine(None if backend is None else [backend])
    system = {"clipmb": __version__, "python": platform.python_version(), "system": platform.platform()}
    if as_json:
        typer.echo(json.dumps({**system, **found}, indent=2))
    else:
        typer.echo("  ".join(f"{key} {value}" for key, value in system.items()))
        rows = [
            ["shared", "", "tokens", "equal" if found["tokens"] else "DIFFERENT", ""],
            ["shared", "", "pixels", "equal" if found["pixels"] else "DIFFERENT", ""],
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
    worst = f"largest difference {entry['difference']:.1e}"
    return f"{entry['stages']} stages", f"correct, {worst}" if entry[
        "correct"
    ] else f"WRONG at {entry['first']}, {worst}"
