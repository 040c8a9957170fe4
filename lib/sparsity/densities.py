"""How many weights of each layer stay: one density per layer, whose mean over all weights is the target."""

from collections.abc import Sequence

import torch

SMALLEST_DENSITY = 0.01


def uniform_densities(layers: int, sparsity: float) -> list[float]:
    """The same density for every layer."""
    return [1 - sparsity] * layers


def spread_densities(scores: Sequence[float], sizes: Sequence[int], sparsity: float, alpha: float) -> list[float]:
    """Densities from the layers' importance, `2 alpha` apart at most, about the target density.

    As ALP, OWL (arXiv:2310.05175, there lambda) and DLP (arXiv:2505.23807) do, each with an importance of its own.
    `sizes` are the layers' numbers of weights. The reference clips only a sparsity below 0, to 0.01, so its mean can
    miss the target and a sparsity exceed 1; see `fit_to_target`. All scores equal: uniform.
    """
    least, most = min(scores), max(scores)
    if most == least:
        return uniform_densities(len(scores), sparsity)
    return fit_to_target([(score - least) / (most - least) * 2 * alpha for score in scores], sizes, 1 - sparsity)


def fit_to_target(densities: Sequence[float], sizes: Sequence[int], target: float) -> list[float]:
    """Shifts all densities alike, and clips them, so that their mean over all weights is `target`, in (0, 1].

    Clipped to [0.01, 1] (from the target, where that is lower): what the clip takes from some layers goes to the
    others in equal measure. The shift is found by bisection, to the last bits of fp64.
    """
    values = torch.tensor(densities, dtype=torch.float64)
    share = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    lowest = min(SMALLEST_DENSITY, target)

    def shifted(by: float) -> torch.Tensor:
        return (values + by).clamp(lowest, 1.0)

    low, high = lowest - values.max().item(), 1.0 - values.min().item()
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if (shifted(middle) * share).sum() < target else (low, middle)
    return shifted(high).tolist()
