"""Block Influence: how much a decoder layer turns the hidden states (ShortGPT, arXiv:2403.03853, equation 1)."""

from collections.abc import Callable

import torch

from lib.batching import Batcher
from lib.errors import RunError
from lib.model import Decoder
from lib.plan import Plan
from lib.stream import describe_nonfinite, layer_steps


def token_cosines(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Cosine between a layer's input and output for each token, in fp32: (B, T, D) twice -> (B, T)."""
    return torch.nn.functional.cosine_similarity(inputs.float(), outputs.to(inputs.device).float(), dim=-1)


def block_influence(
    decoder: Decoder, windows: torch.Tensor, batcher: Batcher, progress: Callable[[int], object] | None = None
) -> list[float]:
    """BI of every layer, `1 - mean over tokens of cos(input, output)`, over all tokens of windows (N, T).

    One pass through the layers. Raises `RunError` naming the first layer whose output is not finite.
    """
    modes = Plan(decoder.num_layers).modes

    def mean_cosines(rows: slice) -> torch.Tensor:  # (B, L)
        steps = layer_steps(decoder, windows[rows], modes)
        cosines = torch.stack([token_cosines(x, y).mean(dim=1).cpu() for _, x, y in steps], dim=1)
        if not cosines.isfinite().all():
            raise RunError(describe_nonfinite(decoder, windows[rows], modes))
        return cosines

    return (1 - batcher.map(mean_cosines, len(windows), progress).double().mean(dim=0)).tolist()
