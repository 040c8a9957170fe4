"""Pruning by alternating directions (ADMM): the weights that stay are fitted again while the mask grows.

"Fast and Effective Weight Update for Pruned Large Language Models" (arXiv:2401.02938). The number of iterations and rho
are those of the authors' code. There the mask grows for 15 iterations, and the damping is 0.1.
"""

from collections.abc import Callable

import torch

from lib.models.weight_deltas import zeroed

ITERATIONS = 20
GROWTH = 18  # the first iterations, in which the mask grows
DAMPING = 0.03  # of a Hessian of unit diagonal
PENALTY = 1.0  # rho, for a Hessian of unit diagonal

Choose = Callable[[torch.Tensor, float], torch.Tensor]


def input_scale(hessian: torch.Tensor) -> torch.Tensor:
    """sqrt(diag H), (in,): a weight times it goes with a Hessian of unit diagonal. 1 where an input was always zero."""
    diagonal = hessian.diagonal()
    return diagonal.sqrt().masked_fill(diagonal == 0, 1.0)


def penalized_inverse(hessian: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(D^-1 H D^-1 + (DAMPING + PENALTY) I)^-1, (in, in), where the diagonal matrix D has `scale` (in,)."""
    unit = (hessian / scale[:, None]).div_(scale)
    unit.diagonal().add_(DAMPING + PENALTY)
    lower = torch.linalg.cholesky(unit)
    del unit  # of wide layers each of these matrices is large
    return torch.cholesky_inverse(lower)


def growing_share(iteration: int) -> float:
    """The share of the final sparsity that the mask has in an iteration, counted from 0: cubic, 1 in the last one."""
    return 1 - (1 - (iteration + 1) / GROWTH) ** 3


def admm_update(
    weight: torch.Tensor, inverse: torch.Tensor, choose: Choose, iterations: int = ITERATIONS
) -> torch.Tensor:
    """Prunes a weight W0 (out, in), which is fp32 and times `input_scale`; returns the new weight.

    It approaches the W of least tr((W - W0) (H + DAMPING I) (W - W0)^T) that is zero where pruned. H has a unit
    diagonal and is given by `inverse` (in, in), which is that of `penalized_inverse`. While the mask grows,
    `choose(scores, share)` gets the sizes (out, in) of the updated weights and a share of the final sparsity, and
    returns the mask of those to prune.

    Each iteration splits W + U into what stays, Z, and what is pruned, the new U. Then W is the ridge solution
    (H + (DAMPING + PENALTY) I)^-1 ((H + DAMPING I) W0 + PENALTY (Z - U)), written as W0 plus a single product.
    """
    updated = weight  # W + U
    for iteration in range(iterations):
        if iteration < GROWTH:
            mask = choose(updated.abs(), growing_share(iteration))
        dual = updated * mask
        target = (updated - dual).sub_(dual).sub_(weight)
        updated = torch.addmm(dual.add_(weight), target, inverse, alpha=PENALTY)
    return zeroed(updated, mask)
