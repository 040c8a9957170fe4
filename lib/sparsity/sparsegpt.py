"""Optimal Brain Surgeon, column by column: SparseGPT (arXiv:2301.00774) and GPTQ (arXiv:2210.17323) in one pass."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch

from lib.config.quantization import Quantization
from lib.errors import RunError, first_line, is_out_of_memory
from lib.sparsity.quantization_grid import Grid

BLOCK = 128  # columns
_AT_ONCE = 16  # columns updated one by one; the columns after them are then updated together
_LARGEST_DAMPING = 1.0
_PARTS = 4  # row blocks of the Hessian, each computed only up to the diagonal: 10 of 16 blocks

Choose = Callable[[torch.Tensor, int], torch.Tensor]


def sum_over(count: int, add: Callable[[torch.Tensor], None]) -> int:
    """The sum of a count over all processes; `add` replaces a tensor by that sum."""
    tensor = torch.tensor(count)
    add(tensor)
    return int(tensor)


class Hessian:
    """H = (2/n) * sum of X^T X over the n windows seen, (in, in) in fp32; X is (T, in)."""

    def __init__(self, in_features: int, device: torch.device):
        # The sum of X^T X over windows. Only `total` fills in what is to the right of the diagonal blocks.
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._edges = [in_features * part // _PARTS for part in range(_PARTS + 1)]
        self.windows = self.tokens = 0
        self.damping: float | None = None  # used by the last factorization, relative to the mean diagonal
        self._factors: dict[bool, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._is_checked = False  # to be finite

    def update(self, inputs: torch.Tensor) -> None:
        """Adds the inputs (B, T, in) of B windows, one by one so that the sum does not depend on the batch size."""
        self._factors.clear()
        self._is_checked = False
        for window in inputs:
            window = window if _sums_in_float32(window) else window.float()
            for first, last in pairwise(self._edges):
                _add_product(self._sum[first:last, :last], window[:, first:last], window[:, :last])
        self.windows += len(inputs)
        self.tokens += inputs.shape[0] * inputs.shape[1]

    def combine(self, add: Callable[[torch.Tensor], None], windows: int) -> None:
        """Merges all processes' sums, over `windows` in total; `add` replaces a tensor by its sum over processes."""
        self._factors.clear()
        self._is_checked = False
        add(self._sum)
        self.windows, self.tokens = windows, sum_over(self.tokens, add)

    @property
    def nbytes(self) -> int:
        return self._sum.nbytes

    @property
    def total(self) -> torch.Tensor:
        """The sum of X^T X over windows, (in, in)."""
        for first, last in pairwise(self._edges):
            self._sum[:first, first:last] = self._sum[first:last, :first].T
        return self._sum

    @property
    def diagonal(self) -> torch.Tensor:
        """The diagonal of H, (in,). Raises `RunError` if it is not finite."""
        diagonal = self._sum.diagonal() * (2 / self.windows)
        if not self._is_checked and not diagonal.isfinite().all():
            raise RunError("NaN or infinity in the layer's inputs; try --dtype float32 or bfloat16")
        self._is_checked = True  # a GPU would be waited for each time
        return diagonal

    def inverse_factor(self, damping: float, by_activation: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The upper triangular R (in, in) with R^T R = (H + damping * mean(diag H) * I)^-1, and the column order.

        The order is None, or that of descending diagonal if `by_activation`. A zero on the diagonal (an input that was
        always zero) is replaced by 1. If the matrix is not positive definite, the damping is multiplied by 10 until it
        is, up to a damping of 1. Cached for all weights that share the inputs. Raises `RunError` if H is not finite, or
        not positive definite even with damping 1.
        """
        if by_activation not in self._factors:
            order = self.diagonal.argsort(descending=True, stable=True) if by_activation else None
            self._factors[by_activation] = (self._factorize(damping, order), order)
        return self._factors[by_activation]

    def _factorize(self, damping: float, order: torch.Tensor | None) -> torch.Tensor:
        # Let J reverse the rows. J H J = L L^T gives H^-1 = R^T R, where R = J L^-1 J is upper triangular.
        reverse = torch.arange(len(self._sum) - 1, -1, -1, device=self._sum.device)
        places = reverse if order is None else order[reverse]
        hessian = self.total[places[:, None], places].mul_(2 / self.windows)
        diagonal = self.diagonal[places]
        diagonal[diagonal == 0] = 1.0
        mean = diagonal.mean()
        while True:
            hessian.diagonal().copy_(diagonal + damping * mean)
            lower, failed = torch.linalg.cholesky_ex(hessian)
            if not failed:
                break
            if damping >= _LARGEST_DAMPING:
                raise RunError(f"the Hessian is not positive definite, even with damping {damping:g}; see --percdamp")
            damping = min(max(damping, 1e-3) * 10, _LARGEST_DAMPING)
        self.damping = damping
        del hessian  # of wide layers each of these matrices is large
        inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device).mT  # column-major: solved in place
        torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
        del lower
        return inverse.flip(0, 1)


def _sums_in_float32(window: torch.Tensor) -> bool:
    """True if products in this dtype can be accumulated in fp32 without an fp32 copy of the inputs."""
    is_half = window.dtype in (torch.float16, torch.bfloat16)
    return not is_half or window.is_cuda and "dtype" in torch.ops.aten.mm.overloads()  # since torch 2.8


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total (m, n) += left^T right, for (T, m) and (T, n), multiplied and accumulated in fp32."""
    if left.dtype == torch.float32:
        total.addmm_(left.T, right)
    else:
        total += torch.mm(left.T, right, out_dtype=torch.float32)


@dataclass(frozen=True)
class Rounding:
    """Quantization inside the pass; grids are computed beforehand, or when the pass reaches a group of columns."""

    quantization: Quantization
    grids: tuple[Grid, ...]  # one per group of original columns, or one for whole rows; () if computed during the pass
    group_of: tuple[int, ...] | None  # the group of each column, in the order of the pass

    @classmethod
    def prepare(cls, weight: torch.Tensor, quantization: Quantization, order: torch.Tensor | None) -> "Rounding":
        """For a weight (out, in) with its original column order; `order` is that of the pass."""
        size = quantization.group_size
        if size is None:
            return cls(quantization, (Grid.of(weight, quantization),), None)
        if not quantization.static_groups:
            return cls(quantization, (), None)
        grids = tuple(Grid.of(group, quantization) for group in weight.split(size, dim=1))
        columns = range(weight.shape[1]) if order is None else order.tolist()
        return cls(quantization, grids, tuple(column // size for column in columns))

    def starts_group(self, column: int) -> bool:
        """True if a new grid must be computed at this column of the pass."""
        size = self.quantization.group_size
        return not self.grids and size is not None and column % size == 0

    def grid(self, column: int) -> Grid:
        """The grid of a column of the pass, if it was computed beforehand."""
        return self.grids[0 if self.group_of is None else self.group_of[column]]


def obs_update(
    weight: torch.Tensor,
    factor: torch.Tensor,
    choose: Choose,
    step: int | None = None,
    rounding: Rounding | None = None,
    block: int = BLOCK,
) -> torch.Tensor:
    """Prunes and optionally quantizes a weight column by column; later columns compensate for each column's error.

    `weight` (out, in) is fp32, with columns in the order of `factor` (in, in), the R of `Hessian.inverse_factor`. Every
    `step` columns (default: a block), `choose(scores, column)` gets the scores `w^2 / R_jj^2` (out, step) of the
    updated weights and returns the mask of those to prune. Returns the new weight.
    """
    columns = weight.shape[1]
    step = step or block
    block = max(step, block // step * step)
    diagonal = factor.diagonal()[:, None]
    new = weight.T.contiguous()  # (in, out), so that each column of the weight is contiguous
    grid: Grid | None = None
    for first, last in pairwise([*range(0, columns, block), columns]):
        inner = factor[first:last, first:last].contiguous()
        errors = torch.empty_like(new[first:last])

        def current(start: int, stop: int, inner=inner, errors=errors, first=first) -> torch.Tensor:
            """Columns `start` to `stop` of the block, updated for the errors of the columns before them."""
            return new[first + start : first + stop] - inner[:start, start:stop].T @ errors[:start]

        for start, stop in pairwise([*range(0, last - first, step), last - first]):
            columns_now = slice(first + start, first + stop)
            now = current(start, stop)
            mask = choose((now / diagonal[columns_now]).square().T, first + start).T
            if rounding is None:
                zero_columns(now, inner[start:stop, start:stop], mask, errors[start:stop])
                new[columns_now] = now
                continue
            for i in range(start, stop):
                column = first + i
                if rounding.grids:
                    grid = rounding.grid(column)
                elif rounding.starts_group(column):
                    size = rounding.quantization.group_size
                    assert size is not None, "only groups start at a column"
                    ahead = min(i + size, last - first)
                    later = new[last : column + size]
                    grid = Grid.of(torch.cat([current(i, ahead), later]).T, rounding.quantization)
                assert grid is not None, "column 0 starts the first group"
                before = current(i, i + 1)[0]
                kept = before.masked_fill(mask[i - start], 0.0)
                new[column] = grid.round(kept[:, None])[:, 0]
                errors[i] = (before - new[column]) / diagonal[column]
        new[last:] -= factor[first:last, last:].T @ errors
    return new.T.contiguous()


def zero_columns(now: torch.Tensor, triangle: torch.Tensor, mask: torch.Tensor, errors: torch.Tensor) -> None:
    """Zeroes the masked weights of k columns in place, one column at a time, and updates the columns that follow.

    `now` (k, out) has one row per column, `triangle` (k, k) is the factor's part for these columns, and `mask` (k, out)
    marks the weights to zero. Writes to `errors` (k, out) what each weight lost, divided by the factor's diagonal.
    """
    if now.is_cuda and (kernel := find_kernel(now.device)[0]):
        return kernel(now, triangle, mask, errors)
    lost = mask / triangle.diagonal()[:, None]
    for first, last in pairwise([*range(0, len(now), _AT_ONCE), len(now)]):
        for column in range(first, last):
            now[column].addmv_(errors[first:column].T, triangle[first:column, column], alpha=-1)
            torch.mul(now[column], lost[column], out=errors[column])
        now[last:] -= triangle[first:last, last:].T @ errors[first:last]
    now.masked_fill_(mask, 0.0)


@cache
def find_kernel(device: torch.device) -> tuple[Callable | None, str]:
    """`zero_columns` in one launch; or None, and why: without Triton, a C compiler, or a device that Triton supports.

    Raises the error when memory runs out, which says nothing of the kernel.
    """
    try:
        from lib.sparsity import sparsegpt_triton

        now, errors = (torch.ones(2, 1, device=device) for _ in range(2))
        sparsegpt_triton.zero_columns(now, torch.tensor([[1.0, 0.5], [0.0, 2.0]], device=device), now > 0, errors)
        is_right = [*now, *errors] == [0, 0, 1, 0.25]
        return (sparsegpt_triton.zero_columns, "") if is_right else (None, "it gives wrong results here")
    except Exception as error:  # Triton and its tools can raise anything, and the kernel is optional
        if is_out_of_memory(error):
            raise
        return None, first_line(error)
