"""Writing files and folders whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.errors import InputError


def check_folder(folder: Path, overwrite: bool, flag: str) -> None:
    """Raises `InputError` unless a folder can be written: new or empty, or `overwrite`; under a writable parent."""
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(f"{flag} {folder}: exists and is not empty; name another folder or add --overwrite")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"{flag} {folder}: {existing} is not a folder; name another")
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise InputError(f"{flag} {folder}: {existing} cannot be written ({error.strerror}); name another") from error


@contextmanager
def whole_folder(folder: Path, overwrite: bool, flag: str) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well, and is deleted otherwise."""
    check_folder(folder, overwrite, flag)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        yield draft
        mask = _umask()
        draft.chmod(0o777 & ~mask)
        for file in draft.iterdir():  # some libraries write files that only their owner can read
            file.chmod(0o666 & ~mask)
        if folder.exists():
            replaced = draft.with_name(draft.name + "-replaced")
            folder.rename(replaced)
            draft.rename(folder)
            shutil.rmtree(replaced)
        else:
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file that is complete from the moment it has its name."""
    draft = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
