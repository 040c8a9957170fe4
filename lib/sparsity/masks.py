"""Masks from scores (out, in): True marks a weight to prune; the lowest scores are pruned first."""

import numpy as np
import torch

_RANKED = 16  # m of the largest groups whose scores are compared in pairs


def truncated(count: float) -> int:
    """Truncates a count to an integer, but tolerates a rounding error such as that of 1 - (1 - 0.2)."""
    return int(count + 1e-6)


def smallest_overall(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Prunes all scores up to the one at index `int(count * sparsity)` in ascending order, including ties.

    The score at the index is pruned too, as in SparseGPT and in the Wanda repository's magnitude pruning. Index 0
    prunes nothing, so that sparsity 0 keeps every weight.
    """
    place = truncated(scores.numel() * sparsity)
    if place == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    return scores <= _in_order(scores.flatten(), place)


def smallest_per_row(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Prunes the `int(in * sparsity)` smallest scores of every row; among ties, those of lower index."""
    return _smallest(scores, truncated(scores.shape[1] * sparsity))


def _smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Prunes the `count` smallest scores of every row; among ties, those of lower index."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    mask = scores <= _in_order(scores, count - 1)
    has_ties = (mask.sum(dim=1) > count).nonzero().flatten()
    if len(has_ties):
        places = scores[has_ties].sort(dim=1, stable=True).indices[:, :count]
        mask[has_ties] = torch.zeros_like(mask[has_ties]).scatter_(1, places, True)
    return mask


def _in_order(scores: torch.Tensor, place: int) -> torch.Tensor:
    """The score (..., 1) at index `place` of each row (..., n) in ascending order."""
    if scores.device.type == "cpu":  # NumPy's partition is 4 to 14 times as fast as kthvalue and topk
        return torch.from_numpy(np.partition(scores.numpy(), place)[..., place : place + 1])
    if scores.dim() == 1:  # on an accelerator, kthvalue uses a single block per row
        return scores.sort().values[place : place + 1]
    return scores.kthvalue(place + 1, dim=-1, keepdim=True).values


def smallest_of_groups(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Prunes the n smallest of every m consecutive scores in a row; among ties, those of lower index.

    Raises `ValueError` unless m divides the number of columns.
    """
    rows, columns = scores.shape
    if columns % m:
        raise ValueError(f"{columns} columns cannot be cut into groups of {m}")
    groups = scores.view(-1, m)
    mask = _lowest_ranks(groups.T.contiguous(), n).T if m <= _RANKED else _smallest(groups, n)
    return mask.reshape(rows, columns)


def _lowest_ranks(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Prunes the `count` smallest scores of every column (m, groups); among ties, the first ones.

    Compares all pairs, which for a few rows takes a fraction of a sort.
    """
    last = torch.arange(len(scores) - 1, -1, -1, dtype=torch.uint8, device=scores.device)
    ranks = last[:, None].repeat(1, scores.shape[1])  # if all after a score were before it
    for apart in range(1, len(scores)):
        is_before = (scores[:-apart] <= scores[apart:]).view(torch.uint8)
        ranks[apart:].add_(is_before)
        ranks[:-apart].sub_(is_before)
    return ranks < count


def smallest_share_of_row_sum(scores: torch.Tensor, sparsity: float, tolerance: float = 0.001) -> torch.Tensor:
    """Prunes the smallest scores of every row, as many as add up to a share `alpha` of the row's sum.

    This is `use_variant` of the Wanda repository. Bisection (starting at 0.4 in [0, 0.8]) finds one `alpha` for all
    rows that prunes `sparsity` of all scores. If 0.8 is not enough, it searches [0.8, 1].
    """
    if sparsity == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    ascending, order = scores.double().sort(dim=1, stable=True)
    cumulative = ascending.cumsum(dim=1)
    total = cumulative[:, -1:]

    def pruned(alpha: float) -> torch.Tensor:  # in ascending order
        return cumulative <= total * alpha

    low, high = (0.0, 0.8) if pruned(0.8).double().mean() >= sparsity else (0.8, 1.0)
    while True:
        alpha = (low + high) / 2
        share = pruned(alpha).double().mean().item()
        if abs(share - sparsity) <= tolerance or high - low < 1e-9:
            break
        low, high = (low, alpha) if share > sparsity else (alpha, high)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, pruned(alpha))
