"""Which weights of a matrix are pruned: magnitude, Wanda, RIA, SparseGPT, ADMM; and quantization of those that stay.

A pruner works on the weights (out, in) that share one input. `statistic` collects what it needs to know about the
input, once for all of them; `prune` returns the new weights. Nothing here knows about layers or models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lib.config.methods import UNSTRUCTURED, Pattern
from lib.config.quantization import Quantization
from lib.errors import RunError
from lib.models.weight_deltas import zeroed
from lib.sparsity.admm import admm_update, input_scale, penalized_inverse
from lib.sparsity.masks import smallest_of_groups, smallest_overall, smallest_per_row, smallest_share_of_row_sum
from lib.sparsity.quantization_grid import round_to_nearest
from lib.sparsity.sparsegpt import Choose, Hessian, Rounding, obs_update, sum_over

Weights = Sequence[torch.Tensor]


class InputNorms:
    """Norms of an input's features over the calibration set: sqrt(mean over windows of sum over tokens of x^2)."""

    def __init__(self, in_features: int, device: torch.device):
        self._squares = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._windows = 0
        self.tokens = 0

    def update(self, inputs: torch.Tensor) -> None:
        """Adds the inputs (B, T, in) of B windows; the sums do not depend on the batch size."""
        for window in inputs:
            self._squares += window.float().square().sum(dim=0)
        self._windows += len(inputs)
        self.tokens += inputs.shape[0] * inputs.shape[1]

    def combine(self, add: Callable[[torch.Tensor], None], windows: int) -> None:
        """Merges all processes' sums, over `windows` in total; `add` replaces a tensor by its sum over processes."""
        add(self._squares)
        self._windows, self.tokens = windows, sum_over(self.tokens, add)

    @property
    def nbytes(self) -> int:
        return self._squares.nbytes

    @property
    def norms(self) -> torch.Tensor:
        """(in,), fp32. Raises `RunError` if they are not finite."""
        norms = (self._squares / self._windows).sqrt().float()
        if not norms.isfinite().all():
            raise RunError("NaN or infinity in the layer's inputs; try --dtype float32 or bfloat16")
        return norms


class Pruner:
    """The base class of pruners; leaves every weight unchanged."""

    needs_inputs = False

    def statistic(self, in_features: int, device: torch.device) -> InputNorms | Hessian | None:
        """An empty statistic of the input that several weights share; None if the pruner needs no inputs."""
        return None

    def prune(self, weights: Weights, statistic, sparsity: float) -> list[torch.Tensor]:
        """Returns the pruned weights; `weights` (out, in) share the input that `statistic` describes."""
        return list(weights)

    def remark(self, statistic) -> str | None:
        """A message to the user about what `prune` did, if there is anything to tell."""
        return None

    def prune_unseen(self, weights: Weights, sparsity: float) -> list[torch.Tensor]:
        """`prune` for weights of whose inputs too little is known, such as those of an expert that got no tokens."""
        return self.prune(weights, None, sparsity)


# Score-based pruners --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Magnitude(Pruner):
    """Prunes the smallest |W| of the whole matrix."""

    pattern: Pattern = UNSTRUCTURED

    def prune(self, weights: Weights, statistic, sparsity: float) -> list[torch.Tensor]:
        select = selection(self.pattern, smallest_overall)
        return [zeroed(weight, select(weight.abs().float(), sparsity)) for weight in weights]


@dataclass(frozen=True)
class InputPruner(Pruner):
    """The base class of pruners that go by the inputs; where too little is known of these, by magnitude."""

    pattern: Pattern = UNSTRUCTURED
    needs_inputs = True

    def prune_unseen(self, weights: Weights, sparsity: float) -> list[torch.Tensor]:
        return Magnitude(self.pattern).prune(weights, None, sparsity)


@dataclass(frozen=True)
class Wanda(InputPruner):
    """Prunes the smallest |W| times input-feature norm of every row (arXiv:2306.11695, equation 1)."""

    use_variant: bool = False

    def statistic(self, in_features: int, device: torch.device) -> InputNorms:
        return InputNorms(in_features, device)

    def prune(self, weights: Weights, statistic: InputNorms, sparsity: float) -> list[torch.Tensor]:
        norms = statistic.norms
        select = selection(self.pattern, smallest_share_of_row_sum if self.use_variant else smallest_per_row)
        return [zeroed(weight, select(wanda_score(weight, norms), sparsity)) for weight in weights]


def wanda_score(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """|W| times the norm of the input feature, in fp32: (out, in) and (in,) -> (out, in)."""
    return weight.abs().float() * norms


@dataclass(frozen=True)
class Ria(InputPruner):
    """Prunes by relative importance and activations, RIA (ICLR 2024, OpenReview Tr0PEHxcM8).

    The smallest (|W| / column sum + |W| / row sum) * norm^power of every row are pruned.
    """

    power: float = 0.5

    def statistic(self, in_features: int, device: torch.device) -> InputNorms:
        return InputNorms(in_features, device)

    def prune(self, weights: Weights, statistic: InputNorms, sparsity: float) -> list[torch.Tensor]:
        scale = statistic.norms**self.power
        select = selection(self.pattern, smallest_per_row)
        return [zeroed(weight, select(relative_importance(weight) * scale, sparsity)) for weight in weights]


def relative_importance(weight: torch.Tensor) -> torch.Tensor:
    """|W| / sum of its column + |W| / sum of its row, for (out, in); a term whose sum is 0 counts as 0."""
    size = weight.abs().float()
    tiny = torch.finfo(torch.float32).tiny
    return size / size.sum(dim=0).clamp(min=tiny) + size / size.sum(dim=1, keepdim=True).clamp(min=tiny)


def selection(pattern: Pattern, unstructured: Callable) -> Callable[[torch.Tensor, float], torch.Tensor]:
    """The function (scores (out, in), sparsity) -> mask; an n:m pattern fixes the sparsity itself."""
    if not pattern.is_structured:
        return unstructured
    return lambda scores, sparsity: smallest_of_groups(scores, pattern.n, pattern.m)


# Reconstruction-based pruners -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseGpt(InputPruner):
    """SparseGPT: prunes column by column and updates the remaining weights to compensate for those removed.

    Weights that share an input are stacked into one matrix, but each keeps its own threshold. With `quantization`, the
    same pass also rounds them.
    """

    damping: float = 0.01
    quantization: Quantization | None = None

    def statistic(self, in_features: int, device: torch.device) -> Hessian:
        return Hessian(in_features, device)

    def prune_unseen(self, weights: Weights, sparsity: float) -> list[torch.Tensor]:
        pruned = super().prune_unseen(weights, sparsity)
        return Rounded(self.quantization).prune_unseen(pruned, sparsity) if self.quantization else pruned

    def prune(self, weights: Weights, statistic: Hessian, sparsity: float) -> list[torch.Tensor]:
        rows = [len(weight) for weight in weights]
        stacked = torch.cat([weight.float() for weight in weights])
        stacked[:, statistic.diagonal == 0] = 0.0

        def choose(scores: torch.Tensor, column: int) -> torch.Tensor:
            return torch.cat([smallest_overall(part, sparsity) for part in scores.split(rows)])

        how = self.pattern if self.pattern.is_structured else choose
        new = compensated(stacked, statistic, how, self.damping, self.quantization)
        return [part.to(weight.dtype) for part, weight in zip(new.split(rows), weights, strict=True)]

    def remark(self, statistic: Hessian | None) -> str | None:
        return describe_damping(statistic, self.damping)


@dataclass(frozen=True)
class Admm(InputPruner):
    """ADMM (arXiv:2401.02938): prunes the smallest |W| times input norm of the matrix, in steps, and refits the others.

    Weights that share an input are stacked into one matrix, but each keeps its own threshold.
    """

    def statistic(self, in_features: int, device: torch.device) -> Hessian:
        return Hessian(in_features, device)

    def prune(self, weights: Weights, statistic: Hessian, sparsity: float) -> list[torch.Tensor]:
        rows, is_dead, hessian = [len(weight) for weight in weights], statistic.diagonal == 0, statistic.total
        scale = input_scale(hessian)
        stacked = torch.cat([weight.float() for weight in weights]).mul_(scale).masked_fill_(is_dead, 0.0)
        select = growing_selection(self.pattern, sparsity)

        def choose(scores: torch.Tensor, share: float) -> torch.Tensor:
            return torch.cat([select(part, share) for part in scores.split(rows)])

        new = admm_update(stacked, penalized_inverse(hessian, scale), choose).div_(scale)
        return [part.to(weight.dtype) for part, weight in zip(new.split(rows), weights, strict=True)]


def growing_selection(pattern: Pattern, sparsity: float) -> Callable[[torch.Tensor, float], torch.Tensor]:
    """The function (scores (out, in), share) -> mask, which prunes a share of `sparsity`, or of what n:m prunes."""
    if not pattern.is_structured:
        return lambda scores, share: smallest_overall(scores, sparsity * share)

    def smallest_allowed(scores: torch.Tensor, share: float) -> torch.Tensor:
        allowed = smallest_of_groups(scores, pattern.n, pattern.m)
        others_last = scores.masked_fill(~allowed, torch.inf)
        return allowed & smallest_overall(others_last, pattern.n / pattern.m * share)

    return smallest_allowed


@dataclass(frozen=True)
class Rounded(Pruner):
    """Quantizes weights and keeps their zeros: with GPTQ if `quantization` compensates, else by rounding to nearest."""

    quantization: Quantization
    damping: float = 0.01

    def __post_init__(self) -> None:
        # Depends on the instance here, on the class elsewhere. A frozen dataclass forbids plain assignment.
        object.__setattr__(self, "needs_inputs", self.quantization.is_compensated)

    def statistic(self, in_features: int, device: torch.device) -> Hessian | None:
        return Hessian(in_features, device) if self.needs_inputs else None

    def prune_unseen(self, weights: Weights, sparsity: float) -> list[torch.Tensor]:
        return [round_to_nearest(weight, self.quantization).to(weight.dtype) for weight in weights]

    def prune(self, weights: Weights, statistic: Hessian | None, sparsity: float) -> list[torch.Tensor]:
        if not self.needs_inputs:
            return self.prune_unseen(weights, sparsity)
        assert statistic is not None, "GPTQ needs the Hessian of the inputs"
        rows = [len(weight) for weight in weights]
        stacked = torch.cat([weight.float() for weight in weights])
        _, order = statistic.inverse_factor(self.damping, self.quantization.by_activation)
        held = stacked == 0 if order is None else stacked[:, order] == 0

        def choose(scores: torch.Tensor, column: int) -> torch.Tensor:
            return held[:, column : column + scores.shape[1]]

        new = compensated(stacked, statistic, choose, self.damping, self.quantization)
        return [part.to(weight.dtype) for part, weight in zip(new.split(rows), weights, strict=True)]

    def remark(self, statistic: Hessian | None) -> str | None:
        return describe_damping(statistic, self.damping)


def describe_damping(hessian: Hessian | None, damping: float) -> str | None:
    """The remark for a Hessian that needed more damping than requested."""
    if hessian is None or hessian.damping in (None, damping):
        return None
    return f"the Hessian was not positive definite; damped by {hessian.damping:g} in place of {damping:g}"


def compensated(
    weight: torch.Tensor,
    hessian: Hessian,
    choose: Choose | Pattern,
    damping: float,
    quantization: Quantization | None,
) -> torch.Tensor:
    """Runs `obs_update` on a weight (out, in) in fp32, in the column order that the quantization requires."""
    by_activation = quantization is not None and quantization.by_activation
    factor, order = hessian.inverse_factor(damping, by_activation)
    rounding = Rounding.prepare(weight, quantization, order) if quantization else None
    if order is None:
        return obs_update(weight, factor, choose, rounding)
    new = obs_update(weight[:, order], factor, choose, rounding)
    return new[:, order.argsort()]
