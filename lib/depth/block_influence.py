"""Block Influence: how much a decoder layer changes the hidden states (ShortGPT, arXiv:2403.03853, equation 1)."""

import torch

from lib.config.plan import Plan
from lib.engine.activations import Activations
from lib.engine.finite import check_finite
from lib.engine.map_windows import Tick, map_windows, waiting_bytes
from lib.models.decoder import Decoder
from lib.runtime.batching import Batcher, Progress


def token_cosines(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Cosine between a layer's input and output for each token, in fp32: (B, T, D) twice -> (B, T)."""
    return torch.nn.functional.cosine_similarity(inputs.float(), outputs.to(inputs.device).float(), dim=-1)


def block_influence(
    decoder: Decoder, windows: torch.Tensor, batcher: Batcher, progress: Progress | None = None
) -> list[float]:
    """BI of every layer, `1 - mean over tokens of cos(input, output)`, over all tokens of windows (N, T).

    One pass through the layers. Raises `RunError` naming the first layer whose output is not finite.
    """

    def mean_cosine(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:  # (B,)
        return token_cosines(inputs, outputs).mean(dim=1)

    def mean_cosines(rows: slice, tick: Tick) -> torch.Tensor:  # (N, L)
        states, of_layers = Activations(decoder, windows[rows], batcher), []
        for _ in range(decoder.num_layers):
            of_layers.append(states.step(see=mean_cosine))
            tick()
        cosines = torch.stack(of_layers, dim=1)
        check_finite(decoder, cosines, windows[rows], Plan(decoder.num_layers).modes)
        return cosines

    size = waiting_bytes(decoder, windows.shape[1], 1)
    cosines = map_windows(decoder, len(windows), batcher, mean_cosines, size, progress)
    return (1 - cosines.double().mean(dim=0)).tolist()
