"""Runs functions over windows in batches, and halves the batch size when memory runs out."""

from collections.abc import Callable
from typing import TypeVar

import torch

from lib.errors import is_out_of_memory
from lib.runtime.distributed import ALONE, Ranks
from lib.runtime.memory import free_cuda_memory, release_memory

Result = TypeVar("Result")
Progress = Callable[[float], object]  # called with the number of windows just done


def automatic_batch_size(device: torch.device, seqlen: int, token_bytes: int) -> int:
    """Windows in the first batch: 1k tokens on a CPU, where larger batches are no faster, or 32k on an accelerator.

    On CUDA a batch may take half of the free memory, at `token_bytes` per token.
    """
    tokens = 1024 if device.type == "cpu" else 32768
    if device.type == "cuda":
        tokens = min(tokens, free_cuda_memory(device) // 2 // token_bytes)
    return max(1, tokens // seqlen)


def retry_once(function: Callable[[], Result]) -> Result:
    """Result of a function that may be called again where it failed; when memory runs out, that is done once.

    Before, all that is cached is freed: of a GPU that is often enough.
    """
    try:
        return function()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    release_memory()
    return function()


class Batcher:
    """Maps functions over windows, and remembers the batch size that fits for all passes of a run.

    It handles the windows of this process; `ranks` are all processes that share a run's windows.
    """

    def __init__(self, size: int, ranks: Ranks = ALONE):
        self.size = size
        self.ranks = ranks
        self.first_size = size  # the same in all processes, even after one ran out of memory

    def share(self, count: int) -> slice:
        """This process's slice of `count` windows."""
        return self.ranks.share(count, self.first_size)

    def map(
        self, function: Callable[[slice], torch.Tensor], count: int, progress: Progress | None = None
    ) -> torch.Tensor:
        """Results of `function` over windows 0..count-1, concatenated on the CPU.

        `function` takes a slice of window indices and returns one row per window. Its results must not depend on how
        the windows are batched. When it runs out of memory, the batch size is halved and the slice retried; a batch of
        one window is tried once more, when what is cached is freed. `function` may itself map over the windows of its
        slice. When that fails with one window, the slice is halved, and the inner batches start at its size.
        """
        results, start = [], 0
        while start < count:
            rows = slice(start, min(start + self.size, count))
            try:
                result = function(rows)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                result = None  # leave the handler first: the traceback holds the tensors of the failed attempt
            if result is None and rows.stop - start > 1:
                self._halve(rows.stop - start)
                continue
            if result is None:
                release_memory()
                result = function(rows)
            results.append(result.cpu())
            if progress:
                progress(rows.stop - start)
            start = rows.stop
        return torch.cat(results)

    def retry_smaller(self, function: Callable[[], Result], count: int) -> Result:
        """Result of a function that goes over all `count` windows itself, `size` at a time.

        When it runs out of memory, the batch size is halved and it starts over; with a batch of one window only once
        more, when what is cached is freed.
        """
        while self.size > 1:
            try:
                return function()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            self._halve(min(self.size, count))
        return retry_once(function)

    def _halve(self, tried: int) -> None:
        self.size = max(1, tried // 2)
        release_memory()
