"""Text that a model makes itself: windows of tokens sampled from it at temperature 1.

What ends a text does not end a window: the model goes on with whatever it has after that, as a rule the next text. So
each token is drawn from the model's whole distribution, and nothing is forbidden.
"""

import inspect

import torch
from torch import nn

from lib.config.plan import Plan
from lib.engine.finite import describe_nonfinite
from lib.errors import InputError, RunError
from lib.models.decoder import Decoder
from lib.models.offload import fetched_by_forward
from lib.runtime.batching import Batcher, Progress
from lib.runtime.distributed import ALONE, Ranks
from lib.runtime.memory import free_bytes

_AT_ONCE = 32  # windows; --batch_size has no part in it, since rounding differs by it, and with that the text
_SHARE = 0.5  # of the free memory that their keys and values may take


def check_not_on_disk(decoder: Decoder) -> None:
    """Raises `InputError` for a model that is read from disk."""
    if decoder.is_on_disk:
        advice = "name a text, or give --offload cpu where host memory has room"
        raise InputError(f"calibration text self: each token would read the whole model from disk; {advice}")


def sample_windows(
    decoder: Decoder,
    first: torch.Tensor,
    seqlen: int,
    seed: int,
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Windows (N, seqlen) that begin with the given tokens (N,), continued by the dense model; on the CPU.

    A window depends on its row and the seed, and on nothing else but rounding. Several processes share the windows.
    Raises `InputError` for a model that keeps no keys and values, and `RunError` for NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(first), seqlen - 1, generator=generator, dtype=torch.float64)
    batcher = Batcher(ranks.agree(lambda: _batch_size(decoder, seqlen)), ranks)
    share = batcher.share(len(first))
    decoder.apply(Plan(decoder.num_layers))

    def of_batch(rows: slice) -> torch.Tensor:
        return _continue(decoder, first[share][rows], draws[share][rows])

    count = share.stop - share.start
    found = batcher.map(of_batch, count, progress) if count else torch.zeros(0, seqlen, dtype=torch.long)
    return ranks.gather(found)


def _batch_size(decoder: Decoder, seqlen: int) -> int:
    """Windows whose keys and values fit into memory, if each attention head has its own."""
    of_token = 2 * decoder.config.hidden_size * decoder.num_layers * decoder.model.dtype.itemsize
    free = free_bytes(decoder.device)
    return max(1, min(_AT_ONCE, int(_SHARE * free) // (of_token * seqlen))) if free else _AT_ONCE


def cache_name(model: nn.Module) -> str:
    """What the model calls the keys and values that it takes and returns: `cache` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.no_grad()
def _continue(decoder: Decoder, first: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Windows (B, T) of first tokens (B,) and tokens drawn by numbers (B, T-1) from 0 to 1: each is the first token
    up to which the model's probabilities add up to more than that.
    """
    tokens, cache = [first[:, None].to(decoder.device)], None
    name = cache_name(decoder.model)
    with fetched_by_forward(decoder.layers):
        for draw in draws.split(1, dim=1):
            output = decoder.model(input_ids=tokens[-1], use_cache=True, **{name: cache})
            cache = getattr(output, name, None)
            if cache is None:
                raise InputError(f"calibration text self: {decoder.family} keeps no keys and values; name a text")
            sums = output.logits[:, -1].double().softmax(dim=-1).cumsum(dim=-1)
            if not sums[:, -1].isfinite().all():
                raise RunError(describe_nonfinite(decoder, torch.cat(tokens, dim=1), Plan(decoder.num_layers).modes))
            drawn = torch.searchsorted(sums, draw.to(sums.device) * sums[:, -1:], right=True)
            tokens.append(drawn.clamp(max=sums.shape[1] - 1).to(decoder.device))
    return torch.cat(tokens, dim=1).cpu()
