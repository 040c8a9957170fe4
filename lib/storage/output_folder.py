"""Output folders: the names of a run's files, and the mark that says that they are ours. Imports no torch."""

import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from lib.errors import InputError
from lib.files import read_json
from lib.storage.atomic import check_writable, write_json

Kind = Literal["run", "grid"]
RESULT, PLAN, LOG, STATE = "result.json", "plan.json", "log.txt", "state"
RESULTS, TABLE, CSV = "results.jsonl", "table.md", "table.csv"
SAMPLES = "samples.md"
REMOVALS, SPARSITY, GRID_PLOT = "block_influence.png", "sparsity.png", "perplexity-{}.png"
MARK = "run.json"  # written before all others
PLOT_MARK = "pruning-run-plot"  # in the metadata of every plot
_FORMAT = "output/1"
_NAMES = (RESULT, PLAN, LOG, STATE, RESULTS, TABLE, CSV, SAMPLES, REMOVALS, SPARSITY)
_IN_WORDS = {"run": "a single run", "grid": "a grid of results"}


def check_output_folder(folder: Path, kind: Kind) -> None:
    """Raises `InputError` unless a run, or a grid, may write there.

    The files of our names must be ours, by the mark in the folder. Links are never written through.
    """
    check_writable(folder, "--output_dir")
    ours: list[Path] = [path for name in _NAMES if os.path.lexists(path := folder / name)]
    ours += folder.glob(GRID_PLOT.format("*"))
    for path in (*ours, folder / MARK):
        if problem := _what_is_odd(path):
            raise InputError(f"--output_dir {folder}: {path.name} {problem}; name another folder")
    marked = _read_mark(folder)
    if marked is None and ours:
        advice = f"it has no {MARK} of ours, so nothing there is replaced; name another folder"
        raise InputError(f"--output_dir {folder}: holds {ours[0].name}; {advice}")
    if marked not in (None, kind):
        raise InputError(f"--output_dir {folder}: holds {_IN_WORDS[marked]}; name another folder")


def _what_is_odd(path: Path) -> str | None:
    """Why a path of our names is not written to, or None."""
    if not os.path.lexists(path):
        return None
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        return "is a link, which is not written through"
    if path.name == STATE:
        return None if stat.S_ISDIR(found.st_mode) else "is no folder"
    if not stat.S_ISREG(found.st_mode):
        return "is no regular file"
    if found.st_nlink > 1 and path.name in (LOG, RESULTS):
        return "has another name too (a hard link), under which it would be written to"
    return None


def check_plot(path: Path, flag: str) -> None:
    """Raises `InputError` unless a plot may be written to the path: it is free, empty, or a plot of ours."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise InputError(f"{flag}: {path} is not a regular file, so it is not replaced; name another")
    if path.exists() and (head := path.read_bytes()[:4096]) and PLOT_MARK.encode() not in head:
        raise InputError(f"{flag}: {path} is no plot of ours, so it is not replaced; name another")


def find_plan(path: Path) -> tuple[Path, str | None]:
    """The file of a plan that is given by itself or by its output folder, which may hold an unfinished run.

    Of `TABLE#ROW` it is the results of the table, and the row. Raises `InputError` for a folder without a plan.
    """
    folder, mark, row = str(path).partition("#")
    if mark and not path.exists():
        if not (Path(folder) / RESULTS).is_file():
            raise InputError(f"--apply_plan {path}: {folder} is no output folder of a table of ppllms.py; name another")
        return Path(folder) / RESULTS, row
    return (_plan_in(path) if path.is_dir() else path), None


def _plan_in(path: Path) -> Path:
    # An unfinished run may be about to replace a finished one.
    names = (PLAN, RESULT) if (path / STATE).exists() else (RESULT, PLAN)
    if found := next((path / name for name in names if (path / name).exists()), None):
        return found
    if (path / RESULTS).exists():
        raise InputError(f"--apply_plan {path}: is of a table; give a row of it, as '{path}#sleb 0.2'")
    raise InputError(
        f"--apply_plan {path}: holds no {PLAN}, which a run writes once its search has ended; name another"
    )


def is_of_ours(path: Path, folder: Path) -> bool:
    """True for a path that is, or lies below, one of our names in an output folder."""
    inside = path.resolve().parts[len(folder.resolve().parts) :]
    return folder.resolve() in path.resolve().parents and inside[0] in (*_NAMES, MARK)


def claim(folder: Path, kind: Kind) -> None:
    """Makes the folder and its mark, before anything else is written there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MARK).exists():
        write_json(folder / MARK, {"format": _FORMAT, "holds": kind})


@contextmanager
def chosen(given: Path | None, stem: str) -> Iterator[Path]:
    """The given folder; without one a new folder `runs/<stem>-<time>`, which is removed if it stays empty."""
    if given:
        yield given
        return
    has_runs = Path("runs").is_dir()
    folder = _make_new(Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        yield folder
    finally:
        with suppress(OSError):  # it holds something
            folder.rmdir()
            if not has_runs:
                folder.parent.rmdir()


def _make_new(base: Path) -> Path:
    """Makes a folder of that name, with a number appended if it exists, and returns it."""
    base.parent.mkdir(exist_ok=True)
    for number in range(1, 1000):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise InputError(f"{base}: exists, as do its successors; give --output_dir")


def _read_mark(folder: Path) -> Kind | None:
    """What a folder is marked to hold; None without a mark."""
    path = folder / MARK
    try:
        content = read_json(path)
        if content["format"] != _FORMAT or content["holds"] not in _IN_WORDS:
            raise ValueError("another format")
        return content["holds"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"--output_dir {folder}: {MARK} there is not of this version ({error}); name another"
        ) from error
