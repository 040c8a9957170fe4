"""Perplexity of anything that gives a loss for a window of tokens."""

import math
import sys
from collections.abc import Callable

import torch

from lib.batching import Batcher
from lib.errors import RunError

WindowLosses = Callable[[torch.Tensor], torch.Tensor]


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token in nats: logits (..., V) of any dtype, labels (...) -> fp32 (...)."""
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none")
    return losses.view(labels.shape)


def perplexity(
    window_losses: WindowLosses,
    windows: torch.Tensor,
    batcher: Batcher,
    progress: Callable[[int], object] | None = None,
) -> float:
    """exp of the mean cross-entropy over windows (N, T), each predicted from its own start.

    As in the Wanda and GPTQ evaluations: the mean over the T-1 predicted tokens of a window, weighted by T, then over
    windows. Raises `RunError` when it is not finite.
    """
    losses = batcher.map(lambda rows: window_losses(windows[rows]), len(windows), progress)
    mean = losses.double().mean().item()
    if not math.isfinite(mean):
        raise RunError(f"the loss is {mean} on window {int((~losses.isfinite()).nonzero()[0])} of the evaluation text")
    if mean > math.log(sys.float_info.max):
        raise RunError(f"the perplexity is too large for a number: the mean loss is {mean:g}")
    return math.exp(mean)
