"""The kernels of accelerators against the plain versions; without an accelerator in Triton's interpreter."""

import pytest
import torch

from lib.config.methods import Pattern
from lib.sparsity import sparsegpt
from lib.sparsity.pruners import SparseGpt
from tests.sparsity.test_sparsegpt import hessian_of, problem

IS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if IS_CUDA else "cpu"  # where conftest.py turns the interpreter on
pytest.importorskip("triton", reason="needs triton, which comes with PyTorch for CUDA")


@pytest.mark.parametrize("columns, outs", [(128, 70), (128, 16), (4, 33), (100, 5), (1, 1)])
def test_the_kernel_zeroes_and_compensates_as_the_plain_version(columns, outs):
    from lib.sparsity import sparsegpt_triton

    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(200, 200, generator=generator).triu() + 8 * torch.eye(200)
    triangle = factor[20 : 20 + columns, 20 : 20 + columns]
    now, mask = torch.randn(columns, outs, generator=generator), torch.rand(outs, columns, generator=generator).T < 0.5
    expected, expected_errors = now.clone(), torch.empty_like(now)
    sparsegpt.zero_columns(expected, triangle, mask, expected_errors)
    found, errors = now.to(DEVICE), torch.empty_like(now, device=DEVICE)
    sparsegpt_triton.zero_columns(
        found, factor.to(DEVICE)[20 : 20 + columns, 20 : 20 + columns], mask.to(DEVICE), errors
    )
    assert torch.equal(found.cpu() == 0, mask)
    assert torch.allclose(found.cpu(), expected, atol=1e-5)
    assert torch.allclose(errors.cpu(), expected_errors, atol=1e-5)


def test_sparsegpt_by_the_kernel_is_sparsegpt(monkeypatch):
    from lib.sparsity import sparsegpt_triton

    weight, inputs = problem(rows=40, columns=320, tokens=640)
    for pattern in (Pattern(), Pattern(2, 4)):
        (expected,) = SparseGpt(pattern).prune([weight], hessian_of(inputs), 0.6)
        with monkeypatch.context() as patches:
            patches.setattr(sparsegpt, "zero_columns", sparsegpt_triton.zero_columns)
            (found,) = SparseGpt(pattern).prune([weight.to(DEVICE)], hessian_of(inputs.to(DEVICE)), 0.6)
        same = (found.cpu() == 0) == (expected == 0)
        assert same.float().mean() > 0.999
        assert torch.allclose(found.cpu()[same], expected[same], rtol=1e-3, atol=1e-4)


def test_a_device_without_a_kernel_has_the_plain_version(monkeypatch):
    assert sparsegpt.find_kernel(torch.device(DEVICE))[0] is not None
    sparsegpt.find_kernel.cache_clear()
    monkeypatch.setattr("lib.sparsity.sparsegpt_triton.zero_columns", lambda *args: 1 / 0)
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
