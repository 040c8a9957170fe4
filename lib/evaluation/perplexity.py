"""Perplexity from a function that returns the loss of each window of tokens."""

import math
import sys
from typing import NamedTuple

import torch

from lib.engine.window_losses import WindowLosses
from lib.errors import RunError


class Perplexity(NamedTuple):
    """A perplexity and its standard error over the evaluated windows."""

    value: float
    standard_error: float | None  # None for one window

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" ± {self.standard_error:.3f}" if self.standard_error is not None else "")


def perplexity(window_losses: WindowLosses, windows: torch.Tensor, stride: int | None = None) -> Perplexity:
    """exp of the mean cross-entropy over windows (N, T), each predicted from its own start.

    As in the Wanda and GPTQ evaluations: the mean over the T-1 predicted tokens of each window, then over windows. With
    a `stride`, windows start that many tokens apart. Each but the first is scored only on the tokens that the previous
    window does not contain, so these have at least T-stride tokens of context. Raises `RunError` if the perplexity is
    not finite.
    """
    seqlen = windows.shape[1]
    parts = [(windows, seqlen - 1)]
    if stride is not None and stride < seqlen - 1:
        parts = [(windows[:1], seqlen - 1), (windows[1:], stride)]
    found, counts = [], []
    for part, tokens in parts:
        if len(part):
            found.append(window_losses(part, tokens))
            counts += [tokens] * len(part)
    losses, scored = torch.cat(found).double(), torch.tensor(counts, dtype=torch.float64)
    mean = (losses * scored).sum().item() / scored.sum().item()
    if not math.isfinite(mean):
        raise RunError(f"the loss is {mean} on window {int((~losses.isfinite()).nonzero()[0])} of the evaluation text")
    if mean > math.log(sys.float_info.max):
        raise RunError(f"the perplexity is too large for a number: the mean loss is {mean:g}")
    return Perplexity(math.exp(mean), _standard_error(losses, scored, mean))


def as_fields(found: dict[str, dict[str, Perplexity]]) -> dict[str, dict]:
    """Fields of result.json for {text: {stage: perplexity}}."""
    return {
        name: {text: {stage: getattr(one, part) for stage, one in stages.items()} for text, stages in found.items()}
        for name, part in (("perplexity", "value"), ("perplexity_standard_error", "standard_error"))
    }


def _standard_error(losses: torch.Tensor, scored: torch.Tensor, mean: float) -> float | None:
    """Standard error of exp(mean), for independent windows; None for one window, or if not finite.

    `losses` (N,) are the windows' means over `scored` (N,) tokens. The error is that of a ratio of sums, propagated
    through exp to first order (delta method).
    """
    count = len(losses)
    if count == 1:
        return None
    variance = count / (count - 1) * ((scored * (losses - mean)) ** 2).sum().item() / scored.sum().item() ** 2
    error = math.exp(mean) * math.sqrt(variance)
    return error if math.isfinite(error) else None
