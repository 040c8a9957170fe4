"""SparseGPT and GPTQ: the Hessian, the pass over the columns, the grids."""

import sys
from types import SimpleNamespace

import pytest
import torch

import lib.sparsity
from lib.config.methods import Pattern
from lib.config.quantization import Quantization
from lib.errors import RunError
from lib.sparsity.pruners import Rounded, SparseGpt
from lib.sparsity.quantization_grid import Grid, round_to_nearest
from lib.sparsity.sparsegpt import Hessian, find_kernel, invert_lower_
from tests import reference


def problem(rows=12, columns=40, windows=6, tokens=30, seed=0):
    """A weight (rows, columns) and correlated inputs (windows, tokens, columns), one of them always zero."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / 4 + torch.eye(columns)
    inputs = torch.randn(windows, tokens, columns, generator=generator) @ mixing
    inputs[:, :, 5] = 0
    return torch.randn(rows, columns, generator=generator), inputs


def hessian_of(inputs) -> Hessian:
    hessian = Hessian(inputs.shape[-1], inputs.device)
    for batch in inputs.split(2):
        hessian.update(batch)
    return hessian


def error(weight, new, inputs) -> float:
    """Mean squared difference of the outputs."""
    return ((inputs @ (new - weight).T) ** 2).mean().item()


def test_the_hessian_is_the_mean_over_windows_whatever_the_batch():
    _, inputs = problem()
    expected = 2 / 6 * sum(x.double().T @ x.double() for x in inputs)
    whole = Hessian(40, inputs.device)
    whole.update(inputs)
    assert torch.equal(whole.total, hessian_of(inputs).total)
    assert torch.allclose((whole.total * 2 / 6).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("by_activation", [False, True])
def test_the_factor_squares_to_the_damped_inverse(by_activation):
    _, inputs = problem()
    hessian = hessian_of(inputs)
    factor, order = hessian.inverse_factor(0.01, by_activation)
    expected = hessian.total.double() * 2 / 6
    expected[5, 5] = 1
    expected += 0.01 * expected.diagonal().mean() * torch.eye(40)
    if by_activation:
        assert (expected.diagonal()[order].diff() <= 1e-6).all()
        expected = expected[order][:, order]
    assert torch.equal(factor, factor.triu())
    assert torch.allclose((factor.T @ factor).double(), expected.inverse(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [1, 7, 512, 513, 1500])
def test_a_triangular_matrix_is_inverted_as_exactly_as_by_solving(size):
    inputs = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(0))
    inputs[:, 0] *= 1000  # as some features of a language model are
    hessian = inputs.T @ inputs
    lower = torch.linalg.cholesky(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(size))
    expected, solved = lower.double().inverse(), torch.linalg.solve_triangular(lower, torch.eye(size), upper=False)
    invert_lower_(lower)
    assert torch.equal(lower, lower.tril())
    assert (lower - expected).norm() <= 2 * (solved - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("pattern", [None, (2, 4), (3, 8), (1, 5), (7, 20)])
@pytest.mark.parametrize("columns", [40, 320])
def test_the_pass_is_that_of_spreading_each_loss_at_once(pattern, columns):
    weight, inputs = problem(columns=columns, tokens=2 * columns)
    chosen = SparseGpt(Pattern(*pattern) if pattern else Pattern())
    (new,) = chosen.prune([weight], hessian_of(inputs), 0.6)
    expected = reference.sparsegpt(weight, inputs, 0.6, pattern=pattern)
    assert ((new == 0) == (expected == 0)).float().mean() > 0.999
    same = (new == 0) == (expected == 0)
    assert torch.allclose(new[same], expected[same], rtol=1e-3, atol=1e-4)


def test_weights_that_share_an_input_are_pruned_as_each_alone():
    weight, inputs = problem(rows=24)
    parts = list(weight.split([4, 12, 8]))
    together = SparseGpt().prune(parts, hessian_of(inputs), 0.5)
    for part, new in zip(parts, together, strict=True):
        (alone,) = SparseGpt().prune([part], hessian_of(inputs), 0.5)
        assert torch.equal(new == 0, alone == 0) and torch.allclose(new, alone, atol=1e-6)


def test_compensation_loses_less_than_zeroing_the_same_weights():
    weight, inputs = problem()
    (new,) = SparseGpt().prune([weight], hessian_of(inputs), 0.5)
    assert error(weight, new, inputs) < 0.7 * error(weight, weight * (new != 0), inputs)


def test_sparsity_0_changes_nothing_but_dead_columns():
    weight, inputs = problem()
    (new,) = SparseGpt().prune([weight], hessian_of(inputs), 0.0)
    weight[:, 5] = 0
    assert torch.equal(new, weight)


def test_a_matrix_that_is_not_positive_definite_is_damped_more_and_that_is_said():
    _, inputs = problem(windows=1, tokens=3)
    hessian = hessian_of(inputs)
    hessian.total.diagonal().sub_(0.02 * hessian.total.diagonal().mean())  # as rounding can make it
    pruner = SparseGpt()
    (new,) = pruner.prune([torch.randn(4, 40)], hessian, 0.5)
    assert new.isfinite().all() and hessian.damping == pytest.approx(0.1)
    assert pruner.remark(hessian) == "the Hessian was not positive definite; damped by 0.1 in place of 0.01"
    fine = hessian_of(problem()[1])
    pruner.prune([torch.randn(4, 40)], fine, 0.5)
    assert pruner.remark(fine) is None


def test_without_triton_there_is_no_kernel_and_no_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "lib.sparsity.sparsegpt_triton", None)
    monkeypatch.delattr(lib.sparsity, "sparsegpt_triton", raising=False)  # if another test imported it
    find_kernel.cache_clear()
    kernel, reason = find_kernel(torch.device("cpu"))
    assert kernel is None and "sparsegpt_triton" in reason
    find_kernel.cache_clear()


def test_a_kernel_that_was_not_found_for_want_of_memory_is_looked_for_again(monkeypatch):
    calls = []

    def fails_once(*sizes, **kwargs):
        calls.append(sizes)
        raise torch.OutOfMemoryError("out of memory")

    find_kernel.cache_clear()
    with monkeypatch.context() as patches:
        patches.setitem(sys.modules, "lib.sparsity.sparsegpt_triton", SimpleNamespace())
        patches.setattr(torch, "ones", fails_once)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                find_kernel(torch.device("cpu"))
    assert len(calls) == 2
    find_kernel.cache_clear()


def test_a_hessian_that_cannot_be_factored_is_an_error():
    hessian = hessian_of(problem()[1])
    hessian.total.fill_(float("nan"))
    with pytest.raises(RunError, match="NaN or infinity"):
        hessian.inverse_factor(0.01)
    hessian = hessian_of(problem()[1])
    hessian.total.neg_()
    with pytest.raises(RunError, match="not positive definite, even with damping"):
        hessian.inverse_factor(0.01)


# Quantization ---------------------------------------------------------------------------------------------------------

FOUR = Quantization(4, is_compensated=True)


def on_grid(values: torch.Tensor, levels: int) -> bool:
    """True when the values of every row are among `levels` evenly spaced ones."""
    for row in values:
        places = row.unique() - row.min()
        steps = [places[1:].min() / parts for parts in range(1, levels)] if len(places) > 1 else []
        counts = [places / step for step in steps]
        if steps and not any(torch.allclose(c, c.round(), atol=1e-2) and c.max() < levels - 0.5 for c in counts):
            return False
    return True


def test_on_grid_can_say_no():
    assert on_grid(torch.tensor([[0.0, 2.0, 5.0, 7.0]]), 8)
    assert not on_grid(torch.tensor([[0.0, 2.0, 5.0, 8.0]]), 8)
    assert not on_grid(torch.randn(1, 8), 16)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("is_symmetric", [False, True])
def test_a_grid_spans_the_row_and_holds_zero(bits, is_symmetric):
    weight = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    weight[0], weight[1] = weight[0].abs() + 1, 0
    weight[2, ::2] = 0
    grid = Grid.of(weight, Quantization(bits, is_symmetric=is_symmetric))
    rounded = grid.round(weight)
    assert on_grid(rounded, 2**bits) and (rounded[weight == 0] == 0).all()
    edges = grid.scale * (0 - grid.zero), grid.scale * (grid.max_level - grid.zero)
    inside = (weight >= edges[0]) & (weight <= edges[1])
    assert ((rounded - weight).abs() <= grid.scale / 2 * 1.001)[inside].all()
    assert ((rounded - weight).abs() <= grid.scale * 1.001).all()
    if is_symmetric:
        assert torch.allclose(grid.scale[3:, 0], 2 * weight[3:].abs().amax(dim=1) / (2**bits - 1))
    else:
        spans = weight.amax(dim=1).clamp(min=0) - weight.amin(dim=1).clamp(max=0)
        assert torch.allclose(grid.scale[2:, 0], spans[2:] / (2**bits - 1))


@pytest.mark.parametrize(
    "options",
    [{}, {"is_symmetric": True}, {"group_size": 8}, {"group_size": 200}, {"group_size": 8, "static_groups": True}],
)
@pytest.mark.parametrize("by_activation", [False, True])
def test_with_a_diagonal_hessian_the_pass_is_direct_rounding(options, by_activation):
    """Nothing is to be compensated then, so each weight goes to the nearest value of its grid."""
    weight = torch.randn(6, 400, generator=torch.Generator().manual_seed(3))
    weight[:, ::3] = 0
    sizes = torch.linspace(1, 9, 400)[torch.randperm(400, generator=torch.Generator().manual_seed(4))]
    hessian = Hessian(400, weight.device)
    hessian.update(torch.diag(sizes)[None])
    quantization = Quantization(3, is_compensated=True, by_activation=by_activation, **options)
    (new,) = Rounded(quantization).prune([weight], hessian, 0.0)
    assert (new[weight == 0] == 0).all()
    order = hessian.inverse_factor(0.01, by_activation)[1]
    if by_activation and options.get("group_size") and not options.get("static_groups"):
        expected = round_to_nearest(weight[:, order], quantization)[:, order.argsort()]  # groups of the new order
    else:
        expected = round_to_nearest(weight, quantization)
    assert torch.allclose(new, expected, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"by_activation": True}, {"group_size": 8}, {"group_size": 8, "static_groups": True}]
)
def test_gptq_holds_zeros_stays_on_the_grid_and_beats_rounding(options):
    weight, inputs = problem(columns=320, tokens=640)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5] = 0
    quantization = Quantization(3, is_compensated=True, **options)
    (new,) = Rounded(quantization).prune([weight], hessian_of(inputs), 0.0)
    assert (new[weight == 0] == 0).all()
    if "group_size" not in options:
        assert on_grid(new, 8)
    elif "by_activation" not in options:
        assert all(on_grid(group, 8) for group in new.split(8, dim=1))
    assert error(weight, new, inputs) < error(weight, round_to_nearest(weight, quantization), inputs)


@pytest.mark.parametrize("size", [8, 64, 160, 320])
def test_grids_are_taken_from_the_weights_as_they_are_when_the_pass_reaches_them(size):
    weight, inputs = problem(columns=320, tokens=640)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.3] = 0
    (new,) = Rounded(Quantization(4, is_compensated=True, group_size=size)).prune([weight], hessian_of(inputs), 0.0)
    if size > 128:  # a grid for what lies beyond the block of columns sees it before the block's last losses
        assert error(weight, new, inputs) < 1.1 * error(weight, reference.gptq(weight, inputs, 4, size), inputs)
    else:
        assert torch.isclose(new, reference.gptq(weight, inputs, 4, size), atol=1e-3).float().mean() > 0.99


def test_pruning_and_rounding_in_one_pass_beats_one_after_the_other():
    weight, inputs = problem(columns=320, tokens=640)
    (joint,) = SparseGpt(quantization=FOUR).prune([weight], hessian_of(inputs), 0.5)
    (pruned,) = SparseGpt().prune([weight], hessian_of(inputs), 0.5)
    after = round_to_nearest(pruned, FOUR)
    assert on_grid(joint, 16) and (joint == 0).float().mean() >= 0.5
    assert error(weight, joint, inputs) < error(weight, after, inputs)


def test_rounding_without_compensation_looks_at_no_inputs():
    weight = torch.randn(4, 16)
    rounded = Rounded(Quantization(4))
    assert not rounded.needs_inputs and rounded.statistic(16, weight.device) is None
    (new,) = rounded.prune([weight], None, 0.0)
    assert torch.equal(new, round_to_nearest(weight, Quantization(4)))
