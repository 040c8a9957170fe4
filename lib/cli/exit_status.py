"""What surrounds a script: exit statuses, and one line on stderr for an error. Imports no torch."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from lib.cli.starting import INTERRUPTED, end_at_once, is_ignored
from lib.errors import InputError, describe_failure, is_interrupt
from lib.runtime.launcher import launched


@contextmanager
def importing() -> Iterator[None]:
    """Around imports that take seconds, before anything is written: Ctrl-C ends the process at once, with one line.

    An exception would end in the middle of a C extension, which prints a traceback or aborts. On a terminal a line
    stands there meanwhile.
    """
    with _told("Loading torch, transformers and datasets ..."), _ended_by_interrupt():
        yield


@contextmanager
def _told(line: str) -> Iterator[None]:
    """On a terminal, a line that stands there during the block."""
    is_shown = sys.stderr is not None and sys.stderr.isatty() and launched().is_first
    if is_shown:
        print(line, end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if is_shown:
            print(" " * len(line), end="\r", file=sys.stderr, flush=True)


@contextmanager
def _ended_by_interrupt() -> Iterator[None]:
    """Inside the block, Ctrl-C ends the process at once."""
    if threading.current_thread() is not threading.main_thread() or is_ignored():
        yield
        return
    before = signal.signal(signal.SIGINT, end_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_script(program: str, main: Callable[[], None]) -> int:
    """Runs the main function of a script; returns its exit status: 0 done, 1 failed, 2 bad input, 130 Ctrl-C."""
    rank = 0
    try:
        rank = launched().rank
        main()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message = describe_failure(error)
        if message is None:
            raise
        status, kind = 1, "failed: "
        if isinstance(error, InputError):
            status, kind = 2, "error: "
        elif is_interrupt(error):
            status, kind = INTERRUPTED, ""
    if rank:
        message = f"process {rank}: {message}"
    print(f"{program}: {kind}{message}", file=sys.stderr)
    return status


def end_script(program: str, main: Callable[[], None]) -> NoReturn:
    """Runs the main function of a script and ends the process; Ctrl-C while it ends does so at once."""
    if not is_ignored():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # all that handles it is imported
    status = run_script(program, main)
    if not is_ignored():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)
