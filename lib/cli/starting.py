"""Imported first by the scripts: while they import all else, Ctrl-C ends the process at once, with one line.

An exception would end in the middle of an import, with a traceback. In other programs this module does nothing.
"""

import os
import signal
import sys
from typing import NoReturn

INTERRUPTED = 128 + signal.SIGINT  # as shells have it: 130
_SCRIPTS = ("ppllms", "alp_prune", "save_gradient")


def end_at_once(*_) -> NoReturn:
    """A handler of signals."""
    try:
        os.write(2, f"{os.path.basename(sys.argv[0])}: stopped\n".encode())
    finally:  # stderr may be closed
        os._exit(INTERRUPTED)


def is_ignored() -> bool:
    """True for a process in the background, which Ctrl-C does not concern."""
    return signal.getsignal(signal.SIGINT) == signal.SIG_IGN


if os.path.basename(sys.argv[0]).removesuffix(".py").replace("-", "_") in _SCRIPTS and not is_ignored():
    signal.signal(signal.SIGINT, end_at_once)
