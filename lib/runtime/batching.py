"""Runs a function over calibration windows in batches, halving the batch when memory runs out."""

from collections.abc import Callable
from typing import TypeVar

import torch

from lib.errors import is_out_of_memory
from lib.runtime.distributed import ALONE, Ranks
from lib.runtime.memory import free_cuda_memory, free_memory

Result = TypeVar("Result")
Progress = Callable[[float], object]  # is told how many windows were done


def automatic_batch_size(device: torch.device, seqlen: int, token_bytes: int) -> int:
    """Windows in a first batch: 1k tokens on a CPU, where more are no faster; on an accelerator 32k that fit.

    `token_bytes` is what a token takes of the memory while it passes a layer; half of what is free may be taken.
    """
    tokens = 1024 if device.type == "cpu" else 32768
    if device.type == "cuda":
        tokens = min(tokens, free_cuda_memory(device) // 2 // token_bytes)
    return max(1, tokens // seqlen)


class Batcher:
    """Maps functions over windows; remembers the batch size that fits, for all the passes of a run.

    It works on the windows of this process; `ranks` are all the processes that share a run's windows.
    """

    def __init__(self, size: int, ranks: Ranks = ALONE):
        self.size = size
        self.ranks = ranks
        self._first_size = size  # the same in all processes, whatever memory runs out where

    def share(self, count: int) -> slice:
        """The windows of this process, of `count`."""
        return self.ranks.share(count, self._first_size)

    def map(
        self, function: Callable[[slice], torch.Tensor], count: int, progress: Progress | None = None
    ) -> torch.Tensor:
        """The results of `function` over windows 0..count-1, concatenated on the CPU.

        `function` gets a slice of window indices and returns one row per window, so its results must not depend on
        how the windows are cut into batches. When it runs out of memory the batch is halved and the slice tried again;
        with a batch of one the error is raised. It may itself map over the windows of its slice: when that fails with
        one window, the slice is halved, and the batches within begin with its size.
        """
        results, start = [], 0
        while start < count:
            rows = slice(start, min(start + self.size, count))
            try:
                result = function(rows)
            except Exception as error:
                if rows.stop - rows.start == 1 or not is_out_of_memory(error):
                    raise
                result = None  # leave the handler first: the traceback holds the tensors of the failed attempt
            if result is None:
                self._halve(rows.stop - start)
                continue
            results.append(result.cpu())
            if progress:
                progress(rows.stop - start)
            start = rows.stop
        return torch.cat(results)

    def whole(self, function: Callable[[], Result], count: int) -> Result:
        """The result of a function that goes over all `count` windows by itself, `size` at a time, from the start.

        When it runs out of memory the batch is halved and it begins anew; with a batch of one the error is raised.
        """
        while True:
            try:
                return function()
            except Exception as error:
                if self.size == 1 or not is_out_of_memory(error):
                    raise
            self._halve(min(self.size, count))

    def _halve(self, tried: int) -> None:
        self.size = max(1, tried // 2)
        free_memory()
