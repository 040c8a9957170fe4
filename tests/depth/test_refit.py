"""The fit of a projection is a ridge regression, chosen by tokens that it has not seen."""

import pytest
import torch

import lib.depth.refit
from lib.depth.refit import FULL, MAP, Moments, fit, ridge


def moments_of(inputs: torch.Tensor, missing: torch.Tensor) -> Moments:
    found = Moments(inputs.shape[1], missing.shape[1], inputs.device)
    found.update(inputs, missing)
    return found


@pytest.fixture
def regression():
    """Inputs (tokens, in), a linear part of what is missing and noise, for 400 tokens to fit to and 100 to check on."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 12, generator=generator)
    missing = inputs @ torch.randn(12, 6, generator=generator)
    missing += torch.randn(500, 6, generator=generator)
    return inputs, missing, torch.randn(12, 6, generator=generator)


@pytest.mark.parametrize("strength", lib.depth.refit.STRENGTHS)
def test_a_ridge_solves_its_normal_equations(regression, strength):
    inputs, missing, _ = regression
    found = ridge(inputs.T @ inputs, inputs.T @ missing, strength)
    penalty = strength * (inputs.T @ inputs).diagonal().mean()
    # The same, as least squares with a row for each unknown.
    system = torch.cat([inputs, penalty.sqrt() * torch.eye(12)])
    expected = torch.linalg.lstsq(system.double(), torch.cat([missing, torch.zeros(12, 6)]).double()).solution
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_an_input_that_is_always_zero_gets_no_weight(regression):
    inputs, missing, _ = regression
    inputs[:, 3] = 0
    assert not ridge(inputs.T @ inputs, inputs.T @ missing, 0.01)[3].any()
    assert not ridge(torch.zeros(12, 12), torch.zeros(12, 6), 0.01).any()


def test_the_error_of_a_change_is_that_of_its_tokens(regression):
    inputs, missing, change = regression
    expected = (missing - inputs @ change).square().sum().item()
    assert moments_of(inputs, missing).error(change) == pytest.approx(expected, rel=1e-5)


def test_the_change_with_the_lowest_error_on_held_out_tokens_is_taken(regression):
    inputs, missing, weight = regression
    to_fit, to_check = moments_of(inputs[:400], missing[:400]), moments_of(inputs[400:], missing[400:])
    found = fit(to_fit, to_check, weight)
    errors = {}
    for strength in lib.depth.refit.STRENGTHS:
        errors[FULL, strength] = ridge(to_fit.gram, to_fit.cross, strength)
        written = inputs[:400] @ weight
        errors[MAP, strength] = weight @ ridge(written.T @ written, written.T @ missing[:400], strength)
    errors = {key: to_check.error(change) / to_check.error(0 * change) for key, change in errors.items()}
    best = min(errors, key=errors.get)
    assert (found.form, found.strength) == best and found.held_out_error == pytest.approx(errors[best], rel=1e-4)
    assert found.held_out_error < 0.5


def test_a_change_that_raises_the_error_on_held_out_tokens_is_not_made(regression):
    inputs, missing, weight = regression
    found = fit(moments_of(inputs[:400], missing[:400]), moments_of(inputs[400:], -missing[400:]), weight)
    assert found == lib.depth.refit.Fit(None, None, None, 1.0)
