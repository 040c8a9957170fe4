"""One number per layer, from its weights and their inputs, by which OWL and DLP allocate sparsity."""

from collections.abc import Callable, Sequence

import torch

from lib.engine.activations import Activations
from lib.models.decoder import Decoder
from lib.models.matrices import InputGroup
from lib.runtime.batching import Batcher, Progress
from lib.sparsity.layerwise import observe
from lib.sparsity.pruners import Wanda, wanda_score

Summary = Callable[[torch.Tensor], float]


def outlier_share(multiple: float) -> Summary:
    """OWL's layerwise outlier distribution (arXiv:2310.05175, section 3): the share above `multiple` times the mean."""
    return lambda scores: (scores > multiple * scores.mean()).double().mean().item()


def median_share(medians: Sequence[float]) -> list[float]:
    """DLP's importance of each layer (arXiv:2505.23807): 1 - its share of the sum of medians."""
    total = sum(medians)
    return [1 - (median / total if total else 0.0) for median in medians]


def median(scores: torch.Tensor) -> float:
    """The median of a layer's scores; for an even count, the lower of the two middle ones."""
    return scores.median().item()


@torch.no_grad()
def layer_scores(
    decoder: Decoder,
    groups: Sequence[Sequence[InputGroup]],
    windows: torch.Tensor,
    batcher: Batcher,
    summary: Summary,
    progress: Progress | None = None,
) -> list[float]:
    """Summarizes each layer's Wanda scores (|W| times input norm), those of all its matrices in one vector.

    The model stays dense; `windows` (N, T) are the calibration set. Raises `RunError` if an input is not finite.
    """
    share = batcher.share(len(windows))
    activations, scores, wanda = Activations(decoder, windows[share], batcher, first=share.start), [], Wanda()
    for layer, layer_groups in enumerate(groups):
        with decoder.at(layer):
            statistics = observe(activations, layer_groups, wanda)
            parts = [
                wanda_score(matrix.weight, statistic.norms).flatten()
                for group, statistic in zip(layer_groups, statistics, strict=True)
                for matrix in group.matrices
            ]
            scores.append(summary(torch.cat([part.to(parts[0].device) for part in parts])))
            if layer < len(groups) - 1:
                activations.advance()
        if progress:
            progress(1)
    return scores
