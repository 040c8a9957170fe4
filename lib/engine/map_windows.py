"""A function over all windows of all processes, as many at once as memory allows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lib.models.decoder import Decoder
from lib.runtime.batching import Batcher, Progress
from lib.runtime.memory import free_host_memory

_HOST_SHARE = 0.4  # of the free host memory, for hidden states that wait
Tick = Callable[[], object]  # to be called after every layer


def map_windows(
    decoder: Decoder,
    count: int,
    batcher: Batcher,
    function: Callable[[slice, Tick], torch.Tensor],
    bytes_per_window: int,
    progress: Progress | None = None,
) -> torch.Tensor:
    """The results of `function` over windows 0..count-1, one row a window, in their order; on the CPU.

    Each process does its share. `function` gets as many windows at once as it should walk up the layers together: a
    batch, or, where layers come and go, all for whose hidden states (`bytes_per_window`) there is memory, so that every
    layer comes once; it has to work in batches itself.
    """
    share = batcher.share(count)
    together = batcher
    if decoder.is_offloaded:
        fitting = int(free_host_memory() * _HOST_SHARE / bytes_per_window)
        together = Batcher(max(1, fitting // batcher.size) * batcher.size)
    found = share if share.start < share.stop else slice(0, 1)  # of no windows the shape of the result is known too

    def of_rows(rows: slice) -> torch.Tensor:
        with _ticking(progress, rows.stop - rows.start, decoder.num_layers) as tick:
            return function(slice(found.start + rows.start, found.start + rows.stop), tick)

    result = together.map(of_rows, found.stop - found.start)
    return batcher.ranks.gather(result[: share.stop - share.start])


@contextmanager
def _ticking(progress: Progress | None, windows: int, layers: int) -> Iterator[Tick]:
    """A function that moves `progress` on by one layer of some windows; after the block all are done, or none."""
    told = 0.0

    def tick() -> None:
        nonlocal told
        if progress and told < windows:
            told += windows / layers
            progress(windows / layers)

    try:
        yield tick
    except BaseException:
        windows = 0  # the same windows are tried again
        raise
    finally:
        if progress:
            progress(windows - told)


def waiting_bytes(decoder: Decoder, seqlen: int, streams: int) -> int:
    """Memory of the hidden states of one window, for so many walks at once and one batch's copy."""
    return seqlen * decoder.config.hidden_size * next(decoder.model.parameters()).element_size() * (streams + 1)
