"""ADMM: the steps of the paper, the problem that they solve, the mask that grows."""

import pytest
import torch

from lib.config.methods import Pattern
from lib.errors import RunError
from lib.sparsity.admm import (
    DAMPING,
    GROWTH,
    ITERATIONS,
    PENALTY,
    admm_update,
    growing_share,
    input_scale,
    penalized_inverse,
)
from lib.sparsity.pruners import Admm, SparseGpt, growing_selection
from tests import reference
from tests.sparsity.test_sparsegpt import error, hessian_of, problem


@pytest.mark.parametrize("pattern", [None, (2, 4), (3, 8), (1, 5), (7, 20)])
@pytest.mark.parametrize("columns", [40, 320])
def test_the_steps_are_those_of_the_paper(pattern, columns):
    weight, inputs = problem(columns=columns, tokens=2 * columns)
    (new,) = Admm(Pattern(*pattern) if pattern else Pattern()).prune([weight], hessian_of(inputs), 0.6)
    expected = reference.admm(weight, inputs, 0.6, pattern)
    same = (new == 0) == (expected == 0)
    assert same.float().mean() > 0.999 and torch.allclose(new[same], expected[same], rtol=1e-3, atol=1e-4)


def test_the_reference_takes_as_many_steps_by_default():
    assert reference.admm.__defaults__ == (None, ITERATIONS, GROWTH, DAMPING, PENALTY)


def test_with_a_fixed_mask_the_weights_that_stay_satisfy_the_normal_equations():
    weight, inputs = problem(rows=6, columns=30, tokens=60)
    total = hessian_of(inputs).total
    scale = input_scale(total)
    hessian = total / scale[:, None] / scale + DAMPING * torch.eye(30)
    scaled = weight * scale
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    new = admm_update(scaled, penalized_inverse(total, scale), lambda scores, share: mask, iterations=500)
    assert (new[mask] == 0).all() and (new[~mask] != 0).all()
    for row, target, is_pruned in zip(new.double(), scaled.double(), mask, strict=True):
        kept = ~is_pruned
        best = torch.linalg.solve(hessian.double()[kept][:, kept], hessian.double()[kept] @ target)
        assert torch.allclose(row[kept], best, rtol=1e-3, atol=1e-3 * best.abs().max().item())


def test_the_mask_grows_to_its_full_share_and_n_of_m_never_takes_more_of_a_group():
    shares = [growing_share(step) for step in range(GROWTH)]
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] == 1
    scores = problem(rows=8, columns=32)[0].abs()
    for share in (0.0, *shares):
        assert growing_selection(Pattern(), 0.5)(scores, share).float().mean() == pytest.approx(share / 2, abs=0.01)
        taken = growing_selection(Pattern(2, 4), 0.9)(scores, share)
        assert taken.view(-1, 4).sum(dim=1).max() <= 2 and taken.float().mean() == pytest.approx(share / 2, abs=0.01)


def test_weights_that_share_an_input_are_pruned_as_each_alone():
    weight, inputs = problem(rows=24)
    parts = list(weight.split([4, 12, 8]))
    for part, new in zip(parts, Admm().prune(parts, hessian_of(inputs), 0.5), strict=True):
        (alone,) = Admm().prune([part], hessian_of(inputs), 0.5)
        assert torch.equal(new == 0, alone == 0) and torch.allclose(new, alone, atol=1e-5)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_it_loses_less_than_sparsegpt(sparsity):
    weight, inputs = problem(columns=320, tokens=640)
    losses = [error(weight, p.prune([weight], hessian_of(inputs), sparsity)[0], inputs) for p in (Admm(), SparseGpt())]
    assert losses[0] < 0.95 * losses[1]


def test_sparsity_0_changes_nothing_but_dead_columns():
    weight, inputs = problem()
    (new,) = Admm().prune([weight], hessian_of(inputs), 0.0)
    weight[:, 5] = 0
    assert (new[:, 5] == 0).all() and torch.allclose(new, weight, atol=1e-5)


def test_inputs_that_are_not_finite_are_an_error():
    weight, inputs = problem()
    inputs[0, 0, 0] = torch.inf
    with pytest.raises(RunError, match="NaN or infinity in the layer's inputs"):
        Admm().prune([weight], hessian_of(inputs), 0.5)
