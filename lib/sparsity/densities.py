"""Layer-wise allocation: a score for each layer by the allocators, and densities whose mean is the target."""

from collections.abc import Sequence
from typing import Protocol

import torch

from lib.config.sparsity import SparsityPruning
from lib.sensitivity.gradients import LayerSensitivity, importance
from lib.sparsity.outlier_scores import Summary, median, median_share, outlier_share

SMALLEST_DENSITY = 0.01


# Allocators: a score for each layer, higher keeps more ----------------------------------------------------------------


class LayerStatistics(Protocol):
    """What an allocator may ask of a run; computed when asked for."""

    settings: SparsityPruning

    def sensitivities(self) -> list[LayerSensitivity]:
        """The connection sensitivity of every layer."""

    def summaries(self, summary: Summary) -> list[float]:
        """A summary of Wanda's scores of every layer."""


def alp(statistics: LayerStatistics) -> list[float]:
    """ALP: 1 - the layer's share of the redundancy of all sensitivities."""
    return importance(statistics.sensitivities())


def owl(statistics: LayerStatistics) -> list[float]:
    """OWL (arXiv:2310.05175): the share of scores above `owl_m` times the layer's mean."""
    return statistics.summaries(outlier_share(statistics.settings.owl_m))


def dlp(statistics: LayerStatistics) -> list[float]:
    """DLP (arXiv:2505.23807): 1 - the layer's share of the medians of all layers."""
    return median_share(statistics.summaries(median))


# Densities ------------------------------------------------------------------------------------------------------------


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
