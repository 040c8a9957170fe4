"""Console lines, log.txt, timings and result.json of a run."""

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
    """Adds the seconds of the block, with the accelerator's work, to `seconds[name]`; parts within have their own."""
    start, others = time.perf_counter(), sum(seconds.values())
    try:
        yield
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        inner = sum(seconds.values()) - others
        seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start - inner, 3)


class Report:
    """Collects the lines and timings of a run; after `open`, lines also go to log.txt in the output folder.

    Of several processes, only the first (`is_first`) prints and writes.
    """

    def __init__(self, is_first: bool = True):
        self.is_first = is_first
        self.seconds: dict[str, float] = {}
        self._folder: Path | None = None
        self._lines: list[str] = []
        self._is_quiet = False

    @property
    def folder(self) -> Path:
        """The output folder; only after `open`."""
        assert self._folder is not None, "the report has no output folder before `open`"
        return self._folder

    def open(self, folder: Path, resume: bool = False) -> None:
        """Creates the output folder, deletes an earlier result there, and writes the lines so far to log.txt.

        With `resume`, appends to the existing log.
        """
        self._folder = folder
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
        """Sends lines to log.txt only, for the length of the block."""
        self._is_quiet = True
        try:
            yield
        finally:
            self._is_quiet = False

    def print(self, text: str = "") -> None:
        """Prints and logs a line; a closed stdout does not end the run."""
        if not self.is_first:
            return
        self._lines.append(text)
        if self._folder:
            with (self._folder / LOG).open("a", encoding="utf-8") as log:
                log.write(text + "\n")
        if self._is_quiet:
            return
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")

    def timed(self, name: str) -> AbstractContextManager:
        """Adds the seconds of the block to `seconds[name]`."""
        return timed(self.seconds, name)

    @contextmanager
    def progress(self, total: int, label: str) -> Iterator[Callable[[float], object]]:
        """Shows a progress bar if stderr is a terminal; yields the function that advances it."""
        with tqdm(total=total, desc=label, disable=None if self.is_first else True, leave=False) as bar:
            yield bar.update

    def result(self, content: dict) -> Path:
        """Writes result.json atomically and returns its path."""
        path = self.folder / RESULT
        if self.is_first:
            write_json(path, content)
        return path


def columns(cells: Sequence[str], per_row: int) -> list[str]:
    """Rows of text with `per_row` right-aligned cells of equal width."""
    width = max(map(len, cells), default=0)
    rows = [cells[start : start + per_row] for start in range(0, len(cells), per_row)]
    return ["  ".join(cell.rjust(width) for cell in row) for row in rows]
