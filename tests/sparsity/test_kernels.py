"""The kernels of accelerators against the plain versions; without an accelerator in Triton's interpreter."""

import pytest
import torch

from lib.config.methods import Pattern
from lib.config.quantization import Quantization
from lib.sparsity import sparsegpt
from lib.sparsity.masks import smallest_of_groups
from lib.sparsity.pruners import SparseGpt
from lib.sparsity.quantization_grid import Grid
from tests.sparsity.test_sparsegpt import hessian_of, problem

IS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if IS_CUDA else "cpu"  # where conftest.py turns the interpreter on
pytest.importorskip("triton", reason="needs triton, which comes with PyTorch for CUDA")


def block(columns: int, outs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights (k, out), a part of a factor (k, k) that is not contiguous, and a mask (k, out) that is not either."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(200, 200, generator=generator).triu() + 8 * torch.eye(200)
    weights, mask = torch.randn(columns, outs, generator=generator), torch.rand(outs, columns, generator=generator)
    return weights, factor[20 : 20 + columns, 20 : 20 + columns], mask.T < 0.5


def by_the_kernel(weights: torch.Tensor, triangle: torch.Tensor, mask: torch.Tensor | None, pattern: Pattern, grid):
    """The weights and errors that the kernel gives, on the CPU."""
    from lib.sparsity import sparsegpt_triton

    whole = torch.zeros(200, 200)
    whole[20 : 20 + len(triangle), 20 : 20 + len(triangle)] = triangle
    triangle = whole.to(DEVICE)[20 : 20 + len(triangle), 20 : 20 + len(triangle)]
    found, errors = weights.clone().to(DEVICE), torch.empty_like(weights, device=DEVICE)
    mask, grid = None if mask is None else mask.to(DEVICE), grid and Grid(*(p.to(DEVICE) for p in grid[:2]), 15)
    sparsegpt_triton.update_columns(found, triangle, errors, mask, pattern, grid)
    return found.cpu(), errors.cpu()


def grids(weights: torch.Tensor, of: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Scales and zero points: of no grid, one for each row, or one for each row and column."""
    if of == "no grid":
        return None
    columns = 1 if of == "row" else len(weights)
    generator = torch.Generator().manual_seed(1)
    scale = 0.1 + torch.rand(weights.shape[1], columns, generator=generator)
    return scale, torch.randint(0, 16, scale.shape, generator=generator).float()


def updated(weights: torch.Tensor, triangle: torch.Tensor, mask: torch.Tensor, grid) -> tuple:
    """The weights and errors by the plain version."""
    expected, errors = weights.clone(), torch.empty_like(weights)
    sparsegpt.update_columns(expected, triangle, errors, mask, grid and Grid(*grid, 15))
    return expected, errors


@pytest.mark.parametrize("of", ["no grid", "row", "row and column"])
@pytest.mark.parametrize("columns, outs", [(128, 16), (64, 33), (4, 33), (100, 5), (1, 1)])
def test_the_kernel_zeroes_rounds_and_compensates_as_the_plain_version(columns, outs, of):
    weights, triangle, mask = block(columns, outs)
    grid = grids(weights, of)
    expected, expected_errors = updated(weights, triangle, mask, grid)
    found, errors = by_the_kernel(weights, triangle, mask, Pattern(), grid)
    if grid is None:
        assert torch.equal(found == 0, mask)
    assert not found[mask].any()
    same = torch.isclose(found, expected, atol=1e-5)  # a rounding error can lead to the next level
    assert same.float().mean() > 0.98
    rows = same.all(dim=0)
    assert torch.allclose(errors[:, rows], expected_errors[:, rows], atol=1e-4) and rows.float().mean() > 0.9


@pytest.mark.parametrize("of", ["no grid", "row"])
@pytest.mark.parametrize("n, m", [(2, 4), (4, 8), (1, 2), (3, 5)])
def test_the_kernel_chooses_n_of_m_as_the_plain_version(n, m, of):
    weights, triangle, _ = block(40, 20)
    weights[:m] = 0.0  # ties
    grid, mask = grids(weights, of), torch.zeros(40, 20, dtype=torch.bool)
    expected, errors, now = weights.clone(), torch.empty_like(weights), weights
    for first in range(0, 40, m):
        part = slice(first, first + m)
        now = weights[part] - triangle[:first, part].T @ errors[:first]
        scores = (now / triangle.diagonal()[part, None]).square()
        mask[part] = smallest_of_groups(scores.T, n, m).T
        of_part = grid and tuple(one[:, part] if one.shape[1] > 1 else one for one in grid)
        expected[part], errors[part] = updated(now, triangle[part, part], mask[part], of_part)
    found, found_errors = by_the_kernel(weights, triangle, None, Pattern(n, m), grid)
    rows = torch.isclose(found, expected, atol=1e-4).all(dim=0)
    assert rows.float().mean() > 0.9 and torch.allclose(found_errors[:, rows], errors[:, rows], atol=1e-4)
    if grid is None:
        assert (found == 0).view(-1, m, 20).sum(dim=1)[1:].eq(n).all()


QUANTIZATIONS = {
    "none": None,
    "rows": Quantization(4, is_compensated=True),
    "groups": Quantization(4, is_compensated=True, group_size=32),
    "groups across blocks": Quantization(3, is_compensated=True, is_symmetric=True, group_size=48),
    "groups that 4 does not divide": Quantization(4, is_compensated=True, group_size=34),
    "act-order": Quantization(4, is_compensated=True, group_size=64, by_activation=True, static_groups=True),
}


FEW = ("none", "groups", "groups that 4 does not divide")


@pytest.mark.parametrize(
    "quantization",
    [
        pytest.param(quantization, id=name, marks=[] if name in FEW or IS_CUDA else pytest.mark.slow)
        for name, quantization in QUANTIZATIONS.items()
    ],
)
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(2, 4)], ids=str)
def test_sparsegpt_by_the_kernel_is_sparsegpt(pattern, quantization, monkeypatch):
    """On the CPU without the kernel, and as on a GPU: with it."""
    from lib.sparsity import sparsegpt_triton

    weight, inputs = problem(rows=16, columns=192, tokens=400)
    pruner = SparseGpt(pattern, quantization=quantization)
    (expected,) = pruner.prune([weight], hessian_of(inputs), 0.6)
    launches = []

    def count(*args, **kwargs):
        launches.append(args)
        return sparsegpt_triton.update_columns(*args, **kwargs)

    with monkeypatch.context() as patches:
        patches.setattr(sparsegpt, "find_kernel", lambda device: (count, ""))
        patches.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
        (found,) = pruner.prune([weight.to(DEVICE)], hessian_of(inputs.to(DEVICE)), 0.6)
    assert launches
    rows = torch.isclose(found.cpu(), expected, rtol=1e-3, atol=1e-4).float().mean(dim=1)
    assert rows.mean() > 0.97
    if quantization is None:
        assert ((found.cpu() == 0) == (expected == 0)).float().mean() > 0.999
    if pattern == Pattern(2, 4) and quantization in (None, QUANTIZATIONS["rows"]):
        assert len(launches) == 2, "one for each block of 128 columns"


def test_a_device_without_a_kernel_has_the_plain_version(monkeypatch):
    assert sparsegpt.find_kernel(torch.device(DEVICE))[0] is not None
    sparsegpt.find_kernel.cache_clear()
    monkeypatch.setattr("lib.sparsity.sparsegpt_triton.update_columns", lambda *args: 1 / 0)
    assert sparsegpt.find_kernel(torch.device("cpu")) == (None, "division by zero")
    sparsegpt.find_kernel.cache_clear()


@pytest.mark.skipif(not IS_CUDA, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_hessian_of_half_precision_inputs_is_summed_in_fp32(dtype):
    inputs = torch.randn(3, 500, 96, device="cuda").to(dtype)
    hessian = sparsegpt.Hessian(96, inputs.device)
    hessian.update(inputs)
    expected = sum(x.double().T @ x.double() for x in inputs)
    assert torch.allclose(hessian.total.double(), expected, rtol=1e-5, atol=1e-3)
