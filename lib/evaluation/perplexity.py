"""Perplexity from a function that returns the loss of each window of tokens."""

import math
import sys
from typing import NamedTuple

import torch

from lib.engine.window_scores import WindowLosses
from lib.errors import RunError


class Estimate(NamedTuple):
    """A measured value and its standard error over the evaluated windows."""

    value: float
    standard_error: float | None  # None for one window

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" ± {self.standard_error:.3f}" if self.standard_error is not None else "")


class Span(NamedTuple):
    """Windows that are evaluated together, and how many of the last tokens of each are scored."""

    rows: slice
    scored: int


def spans_of(count: int, seqlen: int, stride: int | None = None, at_once: int | None = None) -> list[Span]:
    """Spans of `count` windows of `seqlen` tokens, of at most `at_once` windows; see `perplexity` for the `stride`."""
    parts = [Span(slice(0, count), seqlen - 1)]
    if stride is not None and stride < seqlen - 1:
        parts = [Span(slice(0, 1), seqlen - 1), Span(slice(1, count), stride)]
    step = at_once or count
    return [
        Span(slice(start, min(start + step, rows.stop)), scored)
        for rows, scored in parts
        for start in range(rows.start, rows.stop, step)
    ]


def perplexity(window_losses: WindowLosses, windows: torch.Tensor, stride: int | None = None) -> Estimate:
    """exp of the mean cross-entropy over windows (N, T), each predicted from its own start.

    As in the Wanda and GPTQ evaluations: the mean over the T-1 predicted tokens of each window, then over windows. With
    a `stride`, windows start that many tokens apart. Each but the first is scored only on the tokens that the previous
    window does not contain, so these have at least T-stride tokens of context. Raises `RunError` if the perplexity is
    not finite.
    """
    spans = spans_of(len(windows), windows.shape[1], stride)
    losses = [window_losses(windows[span.rows], span.scored) for span in spans]
    return perplexity_of_losses(torch.cat(losses), scored_tokens(spans))


def scored_tokens(spans: list[Span]) -> torch.Tensor:
    """How many tokens of each window are scored, fp64 (N,)."""
    counts = torch.tensor([span.rows.stop - span.rows.start for span in spans])
    return torch.tensor([span.scored for span in spans], dtype=torch.float64).repeat_interleave(counts)


def perplexity_of_losses(losses: torch.Tensor, scored: torch.Tensor) -> Estimate:
    """Perplexity from the mean losses (N,) of windows over `scored` (N,) tokens. Raises as `perplexity` does."""
    mean = mean_over_windows(losses, scored)
    if not math.isfinite(mean.value):
        where = int((~losses.isfinite()).nonzero()[0])
        raise RunError(f"the loss is {mean.value} on window {where} of the evaluation text")
    if mean.value > math.log(sys.float_info.max):
        raise RunError(f"the perplexity is too large for a number: the mean loss is {mean.value:g}")
    value = math.exp(mean.value)
    error = None if mean.standard_error is None else value * mean.standard_error  # to first order: the delta method
    return Estimate(value, error if error is not None and math.isfinite(error) else None)


def mean_over_windows(values: torch.Tensor, weights: torch.Tensor) -> Estimate:
    """The mean of the windows' values (N,) with weights (N,), and its standard error for independent windows.

    The error is that of a ratio of sums; None for one window.
    """
    values, count = values.double(), len(values)
    mean = (values * weights).sum().item() / weights.sum().item()
    if count == 1:
        return Estimate(mean, None)
    variance = count / (count - 1) * ((weights * (values - mean)) ** 2).sum().item() / weights.sum().item() ** 2
    return Estimate(mean, math.sqrt(variance))
