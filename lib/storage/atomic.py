"""Atomic writes: a file or folder appears complete under its name, or not at all."""

import ctypes
import fcntl
import glob
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lib.errors import InputError, RunError, describe_disk

_DRAFT, _FOLDER, _ASIDE = ".{}.partial-", "-draft", "-aside"
_OF_A_FILE, _OF_A_FOLDER = re.compile(r"\d+"), re.compile(rf"\w{{8}}{_FOLDER}({_ASIDE})?")  # ends of names
_EXCHANGE, _AT_CWD = 2, -100  # of renameat2 in Linux


def check_writable(folder: Path, flag: str) -> None:
    """Raises `InputError` unless the folder can be created or, where it exists, written to."""
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if not existing.exists():
            raise InputError(f"{flag} {folder}: {existing} is a link that leads nowhere; name another")
        if not existing.is_dir():
            raise InputError(f"{flag} {folder}: {existing} is not a folder; name another")
        tempfile.TemporaryFile(dir=existing).close()
        longest = os.pathconf(existing, "PC_NAME_MAX") - len(_DRAFT.format("") + 8 * "x" + _FOLDER + _ASIDE)
        if len(os.fsencode(folder.name)) > longest:
            raise InputError(f"{flag} {folder}: the name is too long; at most {longest} bytes")
    except OSError as error:
        raise InputError(f"{flag} {folder}: cannot be written ({error.strerror}); name another") from error


@contextmanager
def atomic_folder(folder: Path, on_complete: Callable[[Path], object] = lambda draft: None) -> Iterator[Path]:
    """Yields a temporary folder that replaces `folder` when the block succeeds, and is deleted when it fails.

    `on_complete` gets the finished folder just before. A complete folder is there at all times: the two change places
    in one step where the system can, else the old one is put back when the second step fails. Raises `RunError` when
    the disk is full.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    _put_back(folder)
    clear_drafts(folder)
    prefix = _DRAFT.format(folder.name)
    draft, lock = _make(lambda: Path(tempfile.mkdtemp(prefix=prefix, suffix=_FOLDER, dir=folder.parent)))
    try:
        with _disk_errors_told(folder):
            yield draft
            mask = _umask()
            for path in (draft, *draft.rglob("*")):  # some libraries make files readable by their owner only
                path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
                _sync(path)
        on_complete(draft)
        if folder.exists():
            _exchange(draft, folder)
        else:
            draft.rename(folder)
        _sync(folder.parent)
    finally:
        _unlock(lock)
        shutil.rmtree(draft, ignore_errors=True)


def _exchange(draft: Path, folder: Path) -> None:
    """Swaps two folders, so that `draft` is the old one afterwards."""
    with suppress(OSError, AttributeError):  # file systems, systems and C libraries that lack it
        swap = ctypes.CDLL(None, use_errno=True).renameat2
        if swap(_AT_CWD, os.fsencode(draft), _AT_CWD, os.fsencode(folder), _EXCHANGE) == 0:
            return
    aside = draft.with_name(draft.name + _ASIDE)
    folder.rename(aside)
    try:
        draft.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    aside.rename(draft)


def _put_back(folder: Path) -> None:
    """Gives an old folder its name back that a process left aside when it was killed between two steps."""
    if not folder.exists():
        for aside in _drafts(folder):
            if aside.name.endswith(_ASIDE):
                aside.rename(folder)
                return


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path; a file written there replaces `path` when the block succeeds, and is deleted otherwise.

    Raises `RunError` when the disk is full.
    """
    clear_drafts(path)
    name = path.with_name(_DRAFT.format(path.name) + str(os.getpid()))

    def create() -> Path:
        name.touch()
        return name

    with _disk_errors_told(path):
        draft, lock = _make(create)
        try:
            yield draft
            _sync(draft)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
            _unlock(lock)
        _sync(path.parent)


def clear_drafts(path: Path) -> None:
    """Deletes what killed processes left of writing `path`; a draft that another process is writing is locked."""
    for draft in _drafts(path):
        lock = _lock(draft, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is None:
            continue
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)
        _unlock(lock)


def _drafts(path: Path) -> list[Path]:
    """The drafts of a path: files and folders with just the names that they get here."""
    start = _DRAFT.format(path.name)
    found = []
    for draft in path.parent.glob(glob.escape(start) + "*"):
        end = draft.name.removeprefix(start)
        with suppress(FileNotFoundError):  # another process has finished it
            mode = draft.lstat().st_mode
            is_file, is_folder = stat.S_ISREG(mode), stat.S_ISDIR(mode)
            if (is_file and _OF_A_FILE.fullmatch(end)) or (is_folder and _OF_A_FOLDER.fullmatch(end)):
                found.append(draft)
    return found


def _make(create: Callable[[], Path]) -> tuple[Path, int | None]:
    """A new draft, locked before another process can take it for one that a killed process left."""
    while True:
        draft = create()
        lock = _lock(draft, fcntl.LOCK_EX)
        if draft.exists():
            return draft, lock
        _unlock(lock)


def _lock(draft: Path, operation: int) -> int | None:
    """Locks a draft until the returned descriptor is closed or this process ends.

    None when another process holds it, when it is gone meanwhile, or where the file system locks nothing.
    """
    try:
        descriptor = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, operation)
        if os.path.samestat(os.fstat(descriptor), draft.lstat()):  # and not renamed, and its name in use again
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file atomically. Raises `RunError` when the disk is full."""
    with atomic_file(path) as draft, draft.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, allow_nan=False)
        file.write("\n")


@contextmanager
def _disk_errors_told(path: Path) -> Iterator[None]:
    """Turns what a disk refuses, to Python or inside a library, into a `RunError` that names the path."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RunError) or not (told := describe_disk(error, path)):
            raise
        raise RunError(told) from error


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
