"""Which version of these scripts runs, and from which commit. Imports no torch."""

import os
import subprocess
import tomllib
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

import lib

_NAME = "ppllms-alp"  # of this package, in pyproject.toml


@cache
def code_version() -> dict[str, str | None]:
    """Version and commit of these scripts, when first asked for: to be asked for early, as files may change."""
    root = Path(lib.__path__[0]).parent
    return {"version": version(root), "commit": commit(root)}


def version(root: Path) -> str | None:
    """The version of these scripts in a checkout, or else of the installed package."""
    with suppress(OSError, ValueError, LookupError):
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if project["name"] == _NAME:
            return project["version"]
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(_NAME)
    return None


def commit(root: Path) -> str | None:
    """The commit of a checkout, with `+changes` if tracked files differ from it; None outside one, or without git."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    with suppress(OSError, subprocess.SubprocessError):
        options = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        return subprocess.run(
            command, env=options, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    return None


def describe() -> str:
    """Version and commit in words, as `--version` prints them."""
    found = code_version()
    return f"{found['version'] or 'unknown'}" + (f", commit {found['commit']}" if found["commit"] else "")
