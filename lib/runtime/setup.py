"""Process-wide settings of every run."""

import logging
import sys

import datasets
import transformers

from lib.runtime.memory import keep_freed_memory


def quiet_libraries() -> None:
    """Silences the libraries' hints and progress bars, except transformers' bars on a terminal."""
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # we manage offloaded weights ourselves
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()


def set_up() -> None:
    """Prepares the process; every script calls it first."""
    quiet_libraries()
    keep_freed_memory()
