"""Console lines, log.txt, timings and result.json of a run."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from lib.errors import printable
from lib.storage.atomic import write_json
from lib.storage.output_folder import LOG

_WHOLE = 1e-6  # parts of a unit add up to it but for rounding
_EVERY = 60  # seconds between the lines of a log


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds of the block, with the accelerator's work, to `seconds[name]`; parts within have their own."""
    start, others = time.perf_counter(), sum(seconds.values())
    try:
        yield
    finally:
        for device in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
            if torch.cuda.memory_allocated(device):  # the others do no work
                torch.cuda.synchronize(device)
        inner = sum(seconds.values()) - others
        seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start - inner, 3)


class _MinuteLines:
    """Progress for a log: on stderr a line each minute of what takes longer."""

    def __init__(self, total: int, label: str):
        self.total, self.label, self.begin, self.shown = total, label, time.monotonic(), 0

    def show(self, done: float) -> None:
        seconds = time.monotonic() - self.begin
        if int(seconds // _EVERY) > self.shown and 0 < done < self.total and sys.stderr is not None:
            self.shown = int(seconds // _EVERY)
            left = seconds * (self.total - done) / done
            told = f"{self.label}: {done / self.total:.0%} after {_minutes(seconds)}, about {_minutes(left)} to go"
            print(told, file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    hours, minutes = divmod(max(1, round(seconds / 60)), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


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

    def open(self, folder: Path) -> None:
        """Writes the lines so far to log.txt in the output folder; an earlier log there is continued."""
        self._folder = folder
        if self.is_first:
            self._write_log(*self._lines)

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Sends lines to log.txt only, for the length of the block."""
        self._is_quiet = True
        try:
            yield
        finally:
            self._is_quiet = False

    def print(self, text: str = "") -> None:
        """Prints and logs a line. A closed stdout, one that lacks a character, or a log that is full ends no run."""
        if not self.is_first:
            return
        text = printable(text)
        self._lines.append(text)
        if self._folder:
            self._write_log(text)
        if self._is_quiet or sys.stdout is None:  # it was closed before the start
            return
        try:
            encoding = sys.stdout.encoding or "utf-8"
            tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding))
            sys.stdout.flush()
        except (OSError, ValueError):
            sys.stdout = open(os.devnull, "w")

    def _write_log(self, *lines: str) -> None:
        with suppress(OSError), (self.folder / LOG).open("a", encoding="utf-8") as log:
            log.write("".join(line + "\n" for line in lines))

    def timed(self, name: str) -> AbstractContextManager:
        """Adds the seconds of the block to `seconds[name]`."""
        return timed(self.seconds, name)

    @contextmanager
    def progress(self, total: int, label: str) -> Iterator[Callable[[float], object]]:
        """Shows a progress bar in whole numbers if stderr is a terminal, else a line each minute.

        Yields the function that advances it, by parts of a unit too, or back where work is done again.
        """
        with tqdm(total=total, desc=label, disable=None if self.is_first else True, leave=False) as bar:
            done, lines = 0.0, _MinuteLines(total, label) if bar.disable and self.is_first else None

            def advance(count: float) -> None:
                nonlocal done
                done += count
                with suppress(OSError, ValueError):  # the terminal is gone
                    if lines:
                        lines.show(done)
                    else:
                        bar.update(min(total, int(done + _WHOLE)) - bar.n)

            yield advance

    def write(self, name: str, content: dict) -> Path:
        """Writes a JSON file atomically, in place of an earlier one; returns its path."""
        path = self.folder / name
        if self.is_first:
            write_json(path, content)
        return path

    def discard(self, *names: str) -> None:
        """Deletes files of an earlier result."""
        for name in names if self.is_first else ():
            (self.folder / name).unlink(missing_ok=True)


def columns(cells: Sequence[str], per_row: int) -> list[str]:
    """Rows of text with `per_row` right-aligned cells of equal width."""
    width = max(map(len, cells), default=0)
    rows = [cells[start : start + per_row] for start in range(0, len(cells), per_row)]
    return ["  ".join(cell.rjust(width) for cell in row) for row in rows]
