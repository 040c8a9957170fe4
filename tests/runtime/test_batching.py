"""How many windows at once, and the memory of tensors that are gone."""

import mmap
import os
import platform
import subprocess
import sys

import pytest
import torch

from lib.models.decoder import Decoder
from lib.runtime.batching import Batcher, automatic_batch_size, retry_once
from tests.command import ROOT
from tests.families import tiny_model

FAULTS = """
import resource, torch
from lib.runtime.memory import keep_freed_memory
if {keeps}:
    keep_freed_memory()
x = torch.ones(2**21)  # 8 MiB
def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        (x + 1, x + 2, x + 3, x + 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(5)
print(min(faults(10) for _ in range(4)))  # the heap may still grow once in one of them
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_that_is_kept_is_not_faulted_in_again():
    """Beside a process in which each tensor has pages of its own; what glibc does by itself differs from run to run."""

    def faults(keeps: bool) -> int:
        command, own_pages = [sys.executable, "-c", FAULTS.format(keeps=keeps)], {"MALLOC_MMAP_THRESHOLD_": "131072"}
        environment = os.environ | own_pages
        return int(
            subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True, text=True).stdout
        )

    pages = 2**23 // mmap.PAGESIZE  # of a tensor; 40 are made
    assert faults(True) < pages / 5 and faults(False) > 20 * pages


@pytest.mark.parametrize("free, windows", [(2**40, 16), (2 * 4096 * 1000, 2), (2 * 5000 * 1000, 2), (10, 1)])
def test_a_batch_fits_the_free_memory_of_an_accelerator(free, windows, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**50))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    assert automatic_batch_size(torch.device("cuda"), 2048, 1000) == windows
    assert automatic_batch_size(torch.device("cpu"), 512, 1000) == 2


def test_a_token_takes_a_few_of_a_layers_widest_tensors():
    decoder = Decoder(tiny_model("Llama"))
    hidden, ffn = decoder.config.hidden_size, decoder.config.intermediate_size
    assert decoder.token_bytes == 4 * (8 * hidden + 4 * max(hidden, ffn))


def test_what_runs_out_of_memory_is_tried_once_more_and_other_errors_are_not_hidden():
    for error, calls_expected in ((torch.OutOfMemoryError("out of memory"), 2), (ValueError("wrong"), 1)):
        calls = []

        def fails(error=error, calls=calls):
            calls.append(error)
            raise error

        with pytest.raises(type(error)):
            retry_once(fails)
        assert len(calls) == calls_expected
    assert retry_once(lambda: 3) == 3


@pytest.mark.parametrize("size, expected", [(4, [4, 2, 1, 1, 1, 1]), (1, [1, 1, 1, 1, 1])])
def test_a_single_window_is_tried_again_when_what_is_cached_is_freed(size, expected):
    """Memory is full for more than one window, and once for one."""
    tried = []

    def function(rows):
        tried.append(rows.stop - rows.start)
        if tried[-1] > 1 or tried.count(1) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return torch.arange(rows.start, rows.stop)

    assert Batcher(size).map(function, 4).tolist() == [0, 1, 2, 3] and tried[: len(expected)] == expected


def test_products_of_fp32_are_of_fp32_whatever_the_environment_says():
    code = "import torch; from lib.runtime.setup import set_up; set_up(); print(torch.get_float32_matmul_precision())"
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == "highest"
