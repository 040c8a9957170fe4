"""The inner loop of SparseGPT as one accelerator kernel. Needs Triton, which comes with PyTorch for CUDA."""

import torch
import triton
import triton.language as tl

from lib.config.methods import UNSTRUCTURED, Pattern
from lib.sparsity.quantization_grid import Grid

_OUTS = 16  # per program of 4 warps; on sm_90, 128 columns take 128 registers per thread without spilling


def update_columns(
    now: torch.Tensor,
    triangle: torch.Tensor,
    errors: torch.Tensor,
    mask: torch.Tensor | None,
    pattern: Pattern = UNSTRUCTURED,
    grid: Grid | None = None,
) -> None:
    """`lib.sparsity.sparsegpt.update_columns` in one launch; shapes (k, out), (k, k), (k, out), (k, out).

    Without a mask, the kernel chooses n of every m columns itself. The `grid` has a scale and a zero point for each
    row and column, (out, k) or (out, 1).
    """
    columns, outs = now.shape
    assert now.stride(1) == triangle.stride(1) == errors.stride(1) == 1
    assert (mask is None) == pattern.is_structured and columns % max(pattern.m, 1) == 0
    marks = now if mask is None else mask.view(torch.uint8)  # without a mask: not read
    scale, zero = (now, now) if grid is None else (part.expand(outs, columns) for part in (grid.scale, grid.zero))
    with torch.cuda.device_of(now):
        _update_columns[(triton.cdiv(outs, _OUTS),)](
            now,
            triangle,
            marks,
            errors,
            scale,
            zero,
            columns,
            outs,
            now.stride(0),
            triangle.stride(0),
            *marks.stride(),
            errors.stride(0),
            *scale.stride(),
            *zero.stride(),
            MAX_LEVEL=0 if grid is None else grid.max_level,
            N=pattern.n,
            M=pattern.m,
            GROUP=triton.next_power_of_2(max(pattern.m, 1)),
            COLUMNS=triton.next_power_of_2(columns),
            OUTS=_OUTS,
        )


@triton.jit
def _update_columns(
    now,
    triangle,
    mask,
    errors,
    scale,
    zero,
    columns,
    outs,
    now_stride,
    triangle_stride,
    mask_stride,
    mask_out_stride,
    errors_stride,
    scale_out_stride,
    scale_stride,
    zero_out_stride,
    zero_stride,
    MAX_LEVEL: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTS: tl.constexpr,
):
    """Handles `OUTS` rows of the weight over all columns of the block; they stay in registers throughout."""
    out = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    places, members = tl.arange(0, COLUMNS), tl.arange(0, GROUP)
    is_out, is_inside = out < outs, (places < columns)[:, None] & (out < outs)[None, :]
    weights = tl.load(now + places[:, None] * now_stride + out[None, :], is_inside, other=0.0)
    chosen = tl.zeros((GROUP, OUTS), tl.int32)  # which of the current m columns go
    for column in range(columns):
        before = tl.sum(tl.where(places[:, None] == column, weights, 0.0), axis=0)
        if M > 0:
            if column % M == 0:
                chosen = _lowest(weights, triangle, triangle_stride, column, N, M, GROUP, COLUMNS, OUTS)
            goes = tl.sum(tl.where(members[:, None] == column % M, chosen, 0), axis=0) != 0
        else:
            goes = tl.load(mask + column * mask_stride + out * mask_out_stride, is_out, other=0) != 0
        after = tl.where(goes, 0.0, before)
        if MAX_LEVEL > 0:
            step = tl.load(scale + column * scale_stride + out * scale_out_stride, is_out, other=1.0)
            origin = tl.load(zero + column * zero_stride + out * zero_out_stride, is_out, other=0.0)
            after = _rounded(after, step, origin, MAX_LEVEL)
        lost = (before - after) / tl.load(triangle + column * (triangle_stride + 1))
        is_later = (places > column) & (places < columns)
        factors = tl.load(triangle + column * triangle_stride + places, is_later, other=0.0)
        weights = tl.where(places[:, None] == column, after[None, :], weights - factors[:, None] * lost[None, :])
        tl.store(errors + column * errors_stride + out, lost, is_out)
    tl.store(now + places[:, None] * now_stride + out[None, :], weights, is_inside)


@triton.jit
def _lowest(
    weights,
    triangle,
    triangle_stride,
    column,
    N: tl.constexpr,
    M: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTS: tl.constexpr,
):
    """Which n of the m columns from `column` on have the lowest scores, (GROUP, OUTS); among ties, the first ones."""
    places, members = tl.arange(0, COLUMNS), tl.arange(0, GROUP)
    scores = tl.full((GROUP, OUTS), float("inf"), tl.float32)
    for member in tl.static_range(M):
        value = tl.sum(tl.where(places[:, None] == column + member, weights, 0.0), axis=0)
        value = value / tl.load(triangle + (column + member) * (triangle_stride + 1))
        scores = tl.where(members[:, None] == member, (value * value)[None, :], scores)
    rank = tl.zeros((GROUP, OUTS), tl.int32)  # in ascending order
    for member in tl.static_range(M):
        score = tl.sum(tl.where(members[:, None] == member, scores, 0.0), axis=0)[None, :]
        is_tied = (score == scores) & (member < members)[:, None]
        rank += ((score < scores) | is_tied).to(tl.int32)
    return (rank < N).to(tl.int32)


@triton.jit
def _rounded(weights, step, origin, MAX_LEVEL: tl.constexpr):
    """`Grid.round`, with the grid's scale and zero point as `step` and `origin`; all of shape (OUTS,)."""
    level = tl.minimum(tl.maximum(tl.div_rn(weights, step), -origin - 1), MAX_LEVEL - origin + 1)
    level = (level + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds half to even
    return step * (tl.minimum(tl.maximum(level + origin, 0.0), MAX_LEVEL) - origin)
