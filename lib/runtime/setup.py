"""Process-wide settings of every run."""

import logging
import sys

import datasets
import torch
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


def multiply_in_full_precision() -> None:
    """Makes products of fp32 on a GPU be of fp32, not of TF32, whatever the environment says: masks depend on them."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def set_up() -> None:
    """Prepares the process; every script calls it first."""
    multiply_in_full_precision()
    quiet_libraries()
    keep_freed_memory()
