"""What a run tells: lines on the console and in log.txt, times, environment, result.json."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from lib.reporting.plots import REMOVALS, SPARSITY
from lib.storage.atomic import RESULT, clear_drafts, write_json

LOG = "log.txt"


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds that the block takes, an accelerator's work included, to `seconds[name]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 3)


class Report:
    """Collects a run's lines and times; from `open` on they are also kept in the output folder.

    Of several processes only the first, `is_first`, prints and writes.
    """

    def __init__(self, is_first: bool = True):
        self.is_first = is_first
        self.seconds: dict[str, float] = {}
        self.folder: Path | None = None
        self._lines: list[str] = []
        self._is_quiet = False

    def open(self, folder: Path, resume: bool = False) -> None:
        """Creates the output folder, without an earlier result in it, and writes what was said so far to log.txt.

        When it `goes_on`, it leaves the log of before, and adds to it.
        """
        self.folder = folder
        if not self.is_first:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name in (RESULT, REMOVALS, SPARSITY):
            (folder / name).unlink(missing_ok=True)
            clear_drafts(folder / name)
        with (folder / LOG).open("a" if resume else "w", encoding="utf-8") as log:
            log.write("".join(line + "\n" for line in self._lines))

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Inside, what is said stands in log.txt only."""
        self._is_quiet = True
        try:
            yield
        finally:
            self._is_quiet = False

    def print(self, text: str = "") -> None:
        """Keeps a line, and prints it; a reader of stdout that has gone away does not end the run."""
        if not self.is_first:
            return
        self._lines.append(text)
        if self.folder:
            with (self.folder / LOG).open("a", encoding="utf-8") as log:
                log.write(text + "\n")
        if self._is_quiet:
            return
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")

    def timed(self, name: str) -> AbstractContextManager:
        """Adds the seconds that a block takes to `seconds[name]`."""
        return timed(self.seconds, name)

    @contextmanager
    def progress(self, total: int, label: str) -> Iterator[Callable[[float], object]]:
        """A progress bar on stderr, when that is a terminal; gives the function that moves it on."""
        with tqdm(total=total, desc=label, disable=None if self.is_first else True, leave=False) as bar:
            yield bar.update

    def result(self, content: dict) -> Path:
        """Writes result.json, whole, and returns its path."""
        path = self.folder / RESULT
        if self.is_first:
            write_json(path, content)
        return path


def columns(cells: Sequence[str], per_row: int) -> list[str]:
    """Cells of equal width as rows of text."""
    width = max(map(len, cells), default=0)
    rows = [cells[start : start + per_row] for start in range(0, len(cells), per_row)]
    return ["  ".join(cell.rjust(width) for cell in row) for row in rows]
