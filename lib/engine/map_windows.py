"""Applies a function to the windows of all processes, as many at once as memory allows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lib.models.decoder import Decoder
from lib.runtime.batching import Batcher, Progress
from lib.runtime.memory import free_host_memory

_HOST_SHARE = 0.4  # of the free host memory, for hidden states between layers
Tick = Callable[[], object]  # called after every layer


def map_windows(
    decoder: Decoder,
    count: int,
    batcher: Batcher,
    function: Callable[[slice, Tick], torch.Tensor],
    bytes_per_window: int,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Results of `function` over windows 0..count-1, one row per window, in order, on the CPU.

    Each process handles its share. `function` gets the windows that should move up the layers together, and splits them
    into batches itself. These are one batch, or, if the model is offloaded, all windows whose hidden states
    (`bytes_per_window`) fit in host memory, so that each layer is fetched only once for them.
    """
    share = batcher.share(count)
    together = batcher
    if decoder.is_offloaded:
        fitting = int(free_host_memory() * _HOST_SHARE / bytes_per_window)
        together = Batcher(max(1, fitting // batcher.size) * batcher.size)
    found = share if share.start < share.stop else slice(0, 1)  # an empty share runs one window for the result's shape

    def of_rows(rows: slice) -> torch.Tensor:
        with _ticking(progress, rows.stop - rows.start, decoder.num_layers) as tick:
            return function(slice(found.start + rows.start, found.start + rows.stop), tick)

    result = together.map(of_rows, found.stop - found.start)
    return batcher.ranks.gather(result[: share.stop - share.start])


@contextmanager
def _ticking(progress: Progress | None, windows: int, layers: int) -> Iterator[Tick]:
    """Yields a function that advances `progress` by one layer of `windows` windows.

    After the block all of them count as done, or none if it failed.
    """
    reported = 0.0

    def tick() -> None:
        nonlocal reported
        if progress and reported < windows:
            reported += windows / layers
            progress(windows / layers)

    try:
        yield tick
    except BaseException:
        windows = 0  # takes back what was reported: the same windows are retried
        raise
    finally:
        if progress:
            progress(windows - reported)


def waiting_bytes(decoder: Decoder, seqlen: int, streams: int) -> int:
    """Bytes of one window's hidden states, for `streams` simultaneous walks and one batch's copy."""
    return seqlen * decoder.state_width * next(decoder.model.parameters()).element_size() * (streams + 1)
