"""What every run sets in its process before it starts."""

import logging
import sys

from lib.runtime.memory import keep_freed_memory


def quiet_libraries() -> None:
    """Keeps the libraries' own progress bars and hints out of what a run prints, but for bars on a terminal."""
    import datasets
    import transformers

    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # offloaded weights are ours to mind
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()


def set_up() -> None:
    """What every run of a script begins with."""
    quiet_libraries()
    keep_freed_memory()
