"""Optimal Brain Surgeon, column by column: SparseGPT (arXiv:2301.00774) and GPTQ (arXiv:2210.17323) in one pass."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch

from lib.config.methods import UNSTRUCTURED, Pattern
from lib.config.quantization import Quantization
from lib.errors import RunError, first_line, is_out_of_memory
from lib.models.weight_deltas import zeroed
from lib.sparsity.masks import smallest_of_groups
from lib.sparsity.quantization_grid import Grid

BLOCK = 128  # columns
_AT_ONCE = 16  # columns updated one by one; the columns after them are then updated together
_LARGEST_IN_KERNEL = 16  # m of a pattern n:m
_LARGEST_DAMPING = 1.0
_SOLVED = 512  # rows of a triangular matrix that is inverted by solving
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
        invert_lower_(lower)
        return lower.flip(0, 1)


def invert_lower_(lower: torch.Tensor) -> None:
    """Replaces a lower triangular matrix (n, n) by its inverse.

    By halves: of [[A, 0], [B, C]] it is [[A^-1, 0], [-C^-1 B A^-1, C^-1]]. These products are a third of the work of
    solving for n right-hand sides.
    """
    if len(lower) <= _SOLVED:
        ones = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, ones, upper=False))
        return
    half = len(lower) // 2
    above, below, left = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    invert_lower_(above)
    invert_lower_(below)
    left.copy_((below @ left @ above).neg_())


def _sums_in_float32(window: torch.Tensor) -> bool:
    """True if products in this dtype can be accumulated in fp32 without an fp32 copy of the inputs."""
    is_half = window.dtype in (torch.float16, torch.bfloat16)
    return not is_half or window.is_cuda and "dtype" in torch.ops.aten.mm.overloads()  # since torch 2.8


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total (m, n) += left^T right, for (T, m) and (T, n), multiplied and accumulated in fp32."""
    if left.dtype == torch.float32:
        total.addmm_(left.T, right)
    elif _adds_in_place(left.device, left.dtype):
        torch.ops.aten.addmm.dtype_out(total, left.T, right, torch.float32, out=total)
    else:
        total += torch.mm(left.T, right, out_dtype=torch.float32)


@cache
def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """True if a product in half precision can be added to an fp32 sum without a copy of that sum's size."""
    try:
        ones, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
        torch.ops.aten.addmm.dtype_out(total, ones.T, ones, torch.float32, out=total)
        return bool(total.eq(17).all())
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        return False


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

    def pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Columns `start` to `stop` of the pass, cut where a new grid must be computed."""
        size = None if self.grids else self.quantization.group_size
        cuts = [column for column in range(start + 1, stop) if size and column % size == 0]
        return list(pairwise([start, *cuts, stop]))

    def grid(self, start: int, stop: int) -> Grid:
        """The grid of some columns of the pass, computed beforehand: one for each row, or for each row and column."""
        if self.group_of is None:
            return self.grids[0]
        of_columns = [self.grids[group] for group in self.group_of[start:stop]]
        scale, zero = (torch.cat([getattr(grid, name) for grid in of_columns], dim=1) for name in ("scale", "zero"))
        return Grid(scale, zero, of_columns[0].max_level)


def obs_update(
    weight: torch.Tensor,
    factor: torch.Tensor,
    choose: Choose | Pattern,
    rounding: Rounding | None = None,
    block: int = BLOCK,
) -> torch.Tensor:
    """Prunes and optionally quantizes a weight column by column; later columns compensate for each column's error.

    `weight` (out, in) is fp32, with columns in the order of `factor` (in, in), the R of `Hessian.inverse_factor`. For
    every block of columns, `choose(scores, column)` gets the scores `w^2 / R_jj^2` (out, block) of the updated weights
    and returns the mask of those to prune; a pattern n:m chooses among every m columns. Returns the new weight.
    """
    if isinstance(choose, Pattern):
        block = max(choose.m, block // choose.m * choose.m)
    columns, steps = weight.shape[1], _Pass(weight, factor, choose, rounding)
    for first, last in pairwise([*range(0, columns, block), columns]):
        steps.update_block(first, last)
    return steps.new.T.contiguous()


class _Pass:
    """A pass of `obs_update` over the columns of a weight."""

    def __init__(self, weight: torch.Tensor, factor: torch.Tensor, choose: Choose | Pattern, rounding: Rounding | None):
        self.new = weight.T.contiguous()  # (in, out), so that each column of the weight is contiguous
        self.factor, self.choose, self.rounding = factor, choose, rounding
        self.diagonal = factor.diagonal()[:, None]
        self.grid: Grid | None = None  # of the group that the pass has reached
        self.pattern = choose if isinstance(choose, Pattern) else UNSTRUCTURED
        self.kernel = find_kernel(weight.device)[0] if weight.is_cuda else None
        size, m = rounding.quantization.group_size if rounding else None, self.pattern.m
        self.chooses_in_kernel = self.kernel is not None and 0 < m <= _LARGEST_IN_KERNEL and (size or m) % m == 0

    def update_block(self, first: int, last: int) -> None:
        """Prunes columns `first` to `last`, and updates all after them."""
        new, inner = self.new, self.factor[first:last, first:last].contiguous()
        errors = torch.empty_like(new[first:last])

        def current(start: int, stop: int) -> torch.Tensor:
            """Columns `start` to `stop`, in the block, updated for the errors of its columns before."""
            done = start - first
            return torch.addmm(new[start:stop], inner[:done, done : stop - first].T, errors[:done], alpha=-1)

        step = self.pattern.m if self.pattern.is_structured and not self.chooses_in_kernel else last - first
        for start, stop in pairwise([*range(first, last, step), last]):
            now = current(start, stop)
            mask = None if self.chooses_in_kernel else self._mask(now, start)
            for begin, end in self.rounding.pieces(start, stop) if self.rounding else [(start, stop)]:
                now = (now if begin == start else current(begin, end))[: end - begin]
                grid = self._grid(begin, end, last, current)
                inside = slice(begin - first, end - first)
                goes = None if mask is None else mask[begin - start : end - start]
                self._update(now, inner[inside, inside], errors[inside], goes, grid)
                new[begin:end] = now
        new[last:].addmm_(self.factor[first:last, last:].T, errors, alpha=-1)

    def _mask(self, now: torch.Tensor, start: int) -> torch.Tensor:
        """Which weights of the columns from `start` on go, (columns, out) as they are `now`."""
        scores = (now / self.diagonal[start : start + len(now)]).square().T
        if isinstance(self.choose, Pattern):
            return smallest_of_groups(scores, self.pattern.n, self.pattern.m).T
        return self.choose(scores, start).T

    def _grid(self, begin: int, end: int, last: int, current: Callable[[int, int], torch.Tensor]) -> Grid | None:
        """The grid of columns `begin` to `end` in a block that ends at `last`."""
        if self.rounding is None:
            return None
        if self.rounding.grids:
            return self.rounding.grid(begin, end)
        size = self.rounding.quantization.group_size
        assert size is not None, "only groups have their grids computed during the pass"
        if begin % size == 0:
            group = torch.cat([current(begin, min(begin + size, last)), self.new[last : begin + size]])
            self.grid = Grid.of(group.T, self.rounding.quantization)
        return self.grid

    def _update(
        self,
        now: torch.Tensor,
        triangle: torch.Tensor,
        errors: torch.Tensor,
        mask: torch.Tensor | None,
        grid: Grid | None,
    ) -> None:
        """`update_columns`, by the kernel if there is one; without a mask this chooses by the pattern."""
        if self.kernel:
            self.kernel(now, triangle, errors, mask, UNSTRUCTURED if mask is not None else self.pattern, grid)
        else:
            assert mask is not None, "only the kernel chooses"
            update_columns(now, triangle, errors, mask, grid)


def update_columns(
    now: torch.Tensor,
    triangle: torch.Tensor,
    errors: torch.Tensor,
    mask: torch.Tensor,
    grid: Grid | None = None,
) -> None:
    """Zeroes the masked weights of k columns in place, one column at a time, and updates the columns that follow.

    `now` (k, out) has one row per column, `triangle` (k, k) is the factor's part for these columns, and `mask` (k, out)
    marks the weights to zero. Those that stay are rounded to the `grid`, if any, with parts (out, k) or (out, 1).
    Writes to `errors` (k, out) what each weight lost, divided by the factor's diagonal.
    """
    lost = mask / triangle.diagonal()[:, None]
    for first, last in pairwise([*range(0, len(now), _AT_ONCE), len(now)]):
        for column in range(first, last):
            now[column].addmv_(errors[first:column].T, triangle[first:column, column], alpha=-1)
            if grid is None:
                torch.mul(now[column], lost[column], out=errors[column])
                continue
            kept = now[column].masked_fill(mask[column], 0.0)
            rounded = grid.of_column(column).round(kept[:, None])[:, 0]
            torch.sub(now[column], rounded, out=errors[column]).div_(triangle[column, column])
            now[column] = rounded
        now[last:].addmm_(triangle[first:last, last:].T, errors[first:last], alpha=-1)
    if grid is None:
        now.copy_(zeroed(now, mask))


@cache
def find_kernel(device: torch.device) -> tuple[Callable | None, str]:
    """`update_columns` in one launch; or None, and why: without Triton, a C compiler, or a device that it supports.

    Raises the error when memory runs out, which says nothing of the kernel.
    """
    try:
        from lib.sparsity import sparsegpt_triton

        triangle = torch.tensor([[1.0, 0.5], [0.0, 2.0]], device=device)
        grid = Grid(torch.full((2, 1), 0.75, device=device), torch.zeros(2, 1, device=device), 3)
        found = []
        for pattern, kept in ((UNSTRUCTURED, None), (Pattern(1, 2), None), (UNSTRUCTURED, grid)):
            now, errors = (torch.ones(2, 2, device=device) for _ in range(2))
            mask = None if pattern.is_structured else now < 0 if kept else now > 0
            sparsegpt_triton.update_columns(now, triangle, errors, mask, pattern, kept)
            found.append([now[:, 0].tolist(), errors[:, 0].tolist()])
        is_right = found == [[[0, 0], [1, 0.25]], [[1, 0], [0, 0.5]], [[0.75, 0.75], [0.25, 0.0625]]]
        return (sparsegpt_triton.update_columns, "") if is_right else (None, "it gives wrong results here")
    except Exception as error:  # Triton and its tools can raise anything, and the kernel is optional
        if is_out_of_memory(error):
            raise
        return None, first_line(error)
