"""The closed form of compensation: a ridge regression of what is missing on the inputs of a projection.

The projection W (in, out) of a kept sublayer adds z W to the residual stream of the pruned model. For the tokens of the
calibration set, let z be its inputs (tokens, in) and r what is missing from the dense model's hidden states after z W
is added (tokens, out). The change of W is

    dW = argmin ||r - z dW||^2 + strength * mean(diag(z^T z)) * ||dW||^2,

either over all dW (in, out), or over those of the form W M, a map M (out, out) of what the sublayer writes, which has
fewer unknowns. The form and the strength are those of the lowest error on windows that were held out of the fit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from lib.errors import RunError

STRENGTHS = (0.001, 0.01, 0.1, 1.0)
FULL, MAP = "full", "map"


class Moments:
    """Sums over tokens of z^T z (in, in), z^T r (in, out) and |r|^2, in fp32; see the module."""

    def __init__(self, in_features: int, out_features: int, device: torch.device):
        self.gram = torch.zeros(in_features, in_features, device=device)
        self.cross = torch.zeros(in_features, out_features, device=device)
        self.missing = torch.zeros((), device=device)

    def update(self, inputs: torch.Tensor, missing: torch.Tensor) -> None:
        """Adds z (tokens, in) and r (tokens, out) of one window."""
        inputs, missing = inputs.float(), missing.float()
        self.gram.addmm_(inputs.T, inputs)
        self.cross.addmm_(inputs.T, missing)
        self.missing += missing.square().sum()

    def combine(self, add: Callable[[torch.Tensor], None]) -> None:
        """Merges the sums of all processes; `add` replaces a tensor by its sum over processes."""
        for tensor in (self.gram, self.cross, self.missing):
            add(tensor)

    def error(self, change: torch.Tensor) -> float:
        """The sum over tokens of |r - z change|^2, for a change (in, out) of the projection."""
        explained = 2 * (change * self.cross).sum() - (change * (self.gram @ change)).sum()
        return (self.missing - explained).item()


@dataclass(frozen=True)
class Fit:
    """A change (in, out) of a projection, how it was found, and its error relative to that without a change.

    `change` is None where none lowers the error on the held-out windows.
    """

    change: torch.Tensor | None
    form: str | None
    strength: float | None
    held_out_error: float


def fit(moments: Moments, held_out: Moments, weight: torch.Tensor) -> Fit:
    """The best change of the projection `weight` (in, out) by its error on held-out tokens.

    Raises `RunError` if the moments are not finite.
    """
    if not (moments.gram.isfinite().all() and moments.cross.isfinite().all() and held_out.missing.isfinite()):
        raise RunError("NaN or infinity in the hidden states; try --dtype float32 or bfloat16")
    before, best = held_out.missing.item(), Fit(None, None, None, 1.0)
    if before > 0:
        for form, strength, change in _candidates(moments, weight.float()):
            error = held_out.error(change) / before
            if error < best.held_out_error:
                best = Fit(change, form, strength, error)
    return best


def _candidates(moments: Moments, weight: torch.Tensor) -> Iterator[tuple[str, float, torch.Tensor]]:
    """Changes (in, out) of every form and strength."""
    written = weight.T @ moments.gram @ weight, weight.T @ moments.cross  # moments of z W
    for strength in STRENGTHS:
        yield FULL, strength, ridge(moments.gram, moments.cross, strength)
        yield MAP, strength, weight @ ridge(*written, strength)


def ridge(gram: torch.Tensor, cross: torch.Tensor, strength: float) -> torch.Tensor:
    """Solves (gram + strength * mean(diag(gram)) * I) x = cross in fp64: (n, n) and (n, m) -> fp32 (n, m).

    Features that are always zero get a zero row.
    """
    system, mean = gram.double(), gram.diagonal().double().mean()
    system.diagonal().add_(strength * mean if mean > 0 else 1.0)
    return torch.cholesky_solve(cross.double(), torch.linalg.cholesky(system)).float()
