"""Atomic writes: a file or folder appears complete under its name, or not at all."""

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.errors import FULL_DISK, InputError, RunError

RESULT = "result.json"
_DRAFT, _REPLACED = ".{}.partial-", "-replaced"


def check_writable(folder: Path, flag: str) -> None:
    """Raises `InputError` unless the folder can be created or, where it exists, written to."""
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise InputError(f"{flag} {folder}: {existing} is not a folder; name another")
        tempfile.TemporaryFile(dir=existing).close()
        longest = os.pathconf(existing, "PC_NAME_MAX") - len(_DRAFT.format("") + 8 * "x" + _REPLACED)
        if len(os.fsencode(folder.name)) > longest:
            raise InputError(f"{flag} {folder}: the name is too long; at most {longest} bytes")
    except OSError as error:
        raise InputError(f"{flag} {folder}: cannot be written ({error.strerror}); name another") from error


def check_model_folder(folder: Path, overwrite: bool, flag: str) -> None:
    """Raises `InputError` unless a model may be saved there: the folder is empty, or `overwrite` and holds a model."""
    check_writable(folder, flag)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{flag} {folder}: exists and is not empty; name another folder or add --overwrite")
    if not (folder / "config.json").is_file():
        raise InputError(f"{flag} {folder}: holds no model, so --overwrite does not replace it; name another folder")


@contextmanager
def atomic_folder(folder: Path, overwrite: bool, flag: str) -> Iterator[Path]:
    """Yields a temporary folder that replaces `folder` when the block succeeds, and is deleted when it fails.

    Raises `InputError` as `check_model_folder` does, and `RunError` when the disk is full.
    """
    check_model_folder(folder, overwrite, flag)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=_DRAFT.format(folder.name), dir=folder.parent))
    try:
        with _disk_full_named(folder):
            yield draft
            mask = _umask()
            for path in (draft, *draft.rglob("*")):  # some libraries make files readable by their owner only
                path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
                _sync(path)
        if folder.exists():
            replaced = draft.with_name(draft.name + _REPLACED)
            folder.rename(replaced)
            draft.rename(folder)
            shutil.rmtree(replaced)
        else:
            draft.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path; a file written there replaces `path` when the block succeeds, and is deleted otherwise.

    Raises `RunError` when the disk is full.
    """
    draft = path.with_name(_DRAFT.format(path.name) + str(os.getpid()))
    try:
        with _disk_full_named(path):
            yield draft
            _sync(draft)
        draft.replace(path)
        _sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def clear_drafts(path: Path) -> None:
    """Deletes the temporary files of killed processes that were writing `path`; no other process may be writing it."""
    for draft in path.parent.glob(_DRAFT.format(glob.escape(path.name)) + "*"):
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file atomically. Raises `RunError` when the disk is full."""
    with atomic_file(path) as draft, draft.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, allow_nan=False)
        file.write("\n")


@contextmanager
def _disk_full_named(path: Path) -> Iterator[None]:
    """Turns the errors that libraries raise for a full disk into a `RunError`."""
    try:
        yield
    except Exception as error:
        is_full = isinstance(error, OSError) and error.errno in FULL_DISK or "No space left on device" in str(error)
        if not is_full:
            raise
        raise RunError(f"no space left to write {path}; free some, or name a folder on another disk") from error


def _sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk, so that a power failure does not lose it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
