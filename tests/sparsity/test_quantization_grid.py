"""A grid rounds rows of any finite weights to finite ones, by no more than a step."""

import pytest
import torch

from lib.config.quantization import Quantization
from lib.sparsity.pruners import Rounded
from lib.sparsity.quantization_grid import round_to_nearest
from lib.sparsity.sparsegpt import Hessian

TINY, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.bfloat16).max
ROWS = {
    "zeros": [0.0, 0.0, 0.0, 0.0],
    "denormals": [1e-45, -3e-42, 1e-39, 0.0],
    "one denormal": [0.0, 0.0, 1e-45, 0.0],
    "tiny": [2e-38, -1e-38, 1.5e-38, 0.0],
    "huge": [3e38, -3e38, 1e38, 0.0],
    "the largest": [LARGEST, -LARGEST, 0.0, 1.0],
    "huge and positive": [3.3e38, 3e38, 2e38, 1e38],
    "huge and negative": [-3.3e38, -1.0, -2e38, 0.0],
    "all at once": [3.3e38, 1e-45, -1.0, 1e-20],
    "ordinary": [0.5, -0.25, 0.125, 0.0],
}
every_grid = pytest.mark.parametrize(
    "quantization", [Quantization(bits, is_symmetric=sym) for bits in (2, 4, 8) for sym in (True, False)], ids=repr
)


def _slow(row: list[float], quantization: Quantization) -> list[float]:
    """The row rounded weight by weight in Python's floats, whose range is far wider."""
    levels = 2**quantization.bits - 1
    least, most = min(0.0, *row), max(0.0, *row)
    if quantization.is_symmetric:
        most = max(-least, most)
        least = -most
    step = (most - least) / levels or 1.0
    zero = (levels + 1) // 2 if quantization.is_symmetric else round(-least / step)
    return [min(((level - zero) * step for level in range(levels + 1)), key=lambda v: abs(v - w)) for w in row]


@every_grid
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_rows_are_finite_and_near_the_slow_version(name, quantization, dtype):
    weight = torch.tensor([ROWS[name]], dtype=dtype)
    row = weight[0].tolist()
    rounded = round_to_nearest(weight, quantization).to(dtype)
    assert rounded.isfinite().all()
    step = 2 * (max(row) - min(0.0, *row)) / (2**quantization.bits - 1)
    for new, old, slow in zip(rounded[0].tolist(), row, _slow(row, quantization), strict=True):
        assert abs(new - old) <= max(abs(slow - old) + step * 2**-quantization.bits, step, TINY)
        assert new == 0 or old != 0


@every_grid
def test_a_strange_row_does_not_change_the_others(quantization):
    ordinary = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    rounded = round_to_nearest(torch.cat([ordinary, torch.tensor(list(ROWS.values()))]), quantization)
    assert torch.equal(rounded[:3], round_to_nearest(ordinary, quantization))


@pytest.mark.parametrize("name", ["denormals", "tiny", "huge", "the largest"])
def test_rounding_with_compensation_stays_finite(name):
    weight, hessian = torch.tensor([ROWS[name]]), Hessian(4, torch.device("cpu"))
    hessian.update(torch.eye(4)[None])
    (new,) = Rounded(Quantization(4, is_compensated=True)).prune([weight], hessian, 0.0)
    assert new.isfinite().all()
