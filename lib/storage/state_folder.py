"""The folder of a resume state: the mark that says that it is one, its lock, and what is deleted. Imports no torch.

The mark is the first line of `lock`.
"""

import fcntl
import os
import re
from contextlib import suppress
from pathlib import Path

from lib.errors import InputError
from lib.files import read_file

FILE = "state.json"
_LOCK = "lock"
_MARK = b"resume state of a pruning run\n"
_STAGES = ("pruned", "quantized", "compensated")  # folders of changed weights
_OWN = re.compile(r"\.?(state\.json|(gradient|own_text|training|layer-\d+)\.safetensors)(\.partial-\d+)?")  # and drafts


def check_state_folder(folder: Path, flag: str) -> None:
    """Raises `InputError` for a folder that is there and is no state, by its mark, or is a link."""
    if os.path.lexists(folder) and not _is_state(folder):
        raise InputError(f"{flag}: {folder} is there, and no state of a run, so it is not replaced; name another")


def discard(folder: Path) -> None:
    """Deletes a state. Raises `InputError` when a run holds it, or it is none."""
    if folder.is_dir():
        descriptor = locked(folder)
        delete(folder)
        os.close(descriptor)


def _is_state(folder: Path) -> bool:
    """True for a folder with our mark, or one that a run was killed in before it wrote the mark."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    if not names:
        return True
    try:
        content = read_file(folder / _LOCK) if not (folder / _LOCK).is_symlink() else None
    except (OSError, ValueError):
        return False
    return content == _MARK or (content == b"" and names == [_LOCK])


def delete(folder: Path) -> None:
    """Deletes the files of a state, the mark last, and the folder; anything else in it stays."""
    (folder / FILE).unlink(missing_ok=True)  # first: the other files mean nothing without it
    stages = [stage for name in _STAGES if (stage := folder / name).is_dir() and not stage.is_symlink()]
    for place in (*stages, folder):
        for path in place.iterdir():
            if _OWN.fullmatch(path.name) and not path.is_dir():
                path.unlink(missing_ok=True)
        with suppress(OSError):  # it holds something else
            if place == folder and [left.name for left in folder.iterdir()] == [_LOCK]:
                (folder / _LOCK).unlink()
            place.rmdir()


def locked(folder: Path) -> int:
    """Locks a state, and marks it, until the returned descriptor is closed or this process ends.

    Raises `InputError` when another run holds it, or the folder is no state.
    """
    check_state_folder(folder, "state")
    descriptor = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(f"{folder}: another run is at work on it; wait for it, or name another folder") from error
    except OSError as error:
        os.close(descriptor)
        raise InputError(f"{folder}: cannot be locked ({error.strerror}); name a folder on another disk") from error
    try:
        if os.fstat(descriptor).st_size == 0:
            os.write(descriptor, _MARK)
    except OSError:
        (folder / _LOCK).unlink()
        os.close(descriptor)
        folder.rmdir()
        raise
    return descriptor
