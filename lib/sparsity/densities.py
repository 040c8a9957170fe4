"""Layer-wise allocation: allocators score the layers; the scores become densities whose mean is the target."""

from collections.abc import Sequence
from typing import Protocol

import torch

from lib.config.sparsity import SparsityPruning
from lib.sensitivity.gradients import LayerSensitivity, importance
from lib.sparsity.outlier_scores import Summary, median, median_share, outlier_share

SMALLEST_DENSITY = 0.01


# Allocators: one score per layer; a higher score keeps more weights ---------------------------------------------------


class LayerStatistics(Protocol):
    """What an allocator can get from a run; computed on demand."""

    settings: SparsityPruning

    @property
    def num_layers(self) -> int:
        """The number of layers of the model."""

    def sensitivities(self) -> list[LayerSensitivity]:
        """The connection sensitivity of every layer."""

    def summaries(self, summary: Summary) -> list[float]:
        """A summary of the Wanda scores of every layer."""


def alp(statistics: LayerStatistics) -> list[float]:
    """ALP: 1 - the layer's share of the total redundancy."""
    return importance(statistics.sensitivities())


def owl(statistics: LayerStatistics) -> list[float]:
    """OWL (arXiv:2310.05175): the fraction of a layer's scores above `owl_m` times their mean."""
    return statistics.summaries(outlier_share(statistics.settings.owl_m))


def dlp(statistics: LayerStatistics) -> list[float]:
    """DLP (arXiv:2505.23807): 1 - the layer's share of the sum of all medians."""
    return median_share(statistics.summaries(median))


def atp(statistics: LayerStatistics) -> list[float]:
    """ATP (arXiv:2502.14770): an arithmetic progression that falls with depth."""
    return [1 - layer / statistics.num_layers for layer in range(statistics.num_layers)]


# Densities ------------------------------------------------------------------------------------------------------------


def uniform_densities(layers: int, sparsity: float) -> list[float]:
    """The same density for every layer."""
    return [1 - sparsity] * layers


def spread_densities(scores: Sequence[float], sizes: Sequence[int], sparsity: float, alpha: float) -> list[float]:
    """Scales the layers' scores to densities that span at most `2 * alpha`, around the target density.

    ALP, OWL (arXiv:2310.05175, where alpha is lambda), DLP (arXiv:2505.23807) and ATP (arXiv:2502.14770, whose common
    difference is 2 alpha / (layers - 1)) all do this, each with its own scores.
    `sizes` are the layers' numbers of weights. If all scores are equal, the densities are uniform. The reference code
    clips only sparsities below 0, to 0.01, so its mean can miss the target and a sparsity can exceed 1; `fit_to_target`
    avoids both.
    """
    least, most = min(scores), max(scores)
    if most == least:
        return uniform_densities(len(scores), sparsity)
    return fit_to_target([(score - least) / (most - least) * 2 * alpha for score in scores], sizes, 1 - sparsity)


def fit_to_target(densities: Sequence[float], sizes: Sequence[int], target: float) -> list[float]:
    """Shifts all densities by one amount and clips them, so that their mean over all weights is `target`, in (0, 1].

    The range is [0.01, 1], or [target, 1] for a target below 0.01. The shift makes up for what is clipped. Bisection
    finds it to the last bits of fp64.
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
