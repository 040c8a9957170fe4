"""The inner loop of SparseGPT as one accelerator kernel. Needs Triton, which comes with PyTorch for CUDA."""

import torch
import triton
import triton.language as tl

_OUTS = 16  # per program of 4 warps; on sm_90, 128 columns take 128 registers per thread without spilling


def zero_columns(now: torch.Tensor, triangle: torch.Tensor, mask: torch.Tensor, errors: torch.Tensor) -> None:
    """`lib.sparsity.sparsegpt.zero_columns` in one launch; shapes (k, out), (k, k), (k, out), (k, out)."""
    columns, outs = now.shape
    assert now.stride(1) == triangle.stride(1) == errors.stride(1) == 1
    with torch.cuda.device_of(now):
        _zero_columns[(triton.cdiv(outs, _OUTS),)](
            now,
            triangle,
            mask.view(torch.uint8),
            errors,
            columns,
            outs,
            now.stride(0),
            triangle.stride(0),
            *mask.stride(),
            errors.stride(0),
            COLUMNS=triton.next_power_of_2(columns),
            OUTS=_OUTS,
        )


@triton.jit
def _zero_columns(
    now,
    triangle,
    mask,
    errors,
    columns,
    outs,
    now_stride,
    triangle_stride,
    mask_stride,
    mask_out_stride,
    errors_stride,
    COLUMNS: tl.constexpr,
    OUTS: tl.constexpr,
):
    """Handles `OUTS` rows of the weight over all columns of the block; they stay in registers throughout."""
    out = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    places = tl.arange(0, COLUMNS)
    is_out, is_inside = out < outs, (places < columns)[:, None] & (out < outs)[None, :]
    weights = tl.load(now + places[:, None] * now_stride + out[None, :], is_inside, other=0.0)
    goes = tl.load(mask + places[:, None] * mask_stride + out[None, :] * mask_out_stride, is_inside, other=0)
    for column in range(columns):
        before = tl.sum(tl.where(places[:, None] == column, weights, 0.0), axis=0)
        this_goes = tl.load(mask + column * mask_stride + out * mask_out_stride, is_out, other=0)
        lost = tl.where(this_goes != 0, before / tl.load(triangle + column * (triangle_stride + 1)), 0.0)
        is_later = (places > column) & (places < columns)
        factors = tl.load(triangle + column * triangle_stride + places, is_later, other=0.0)
        weights -= factors[:, None] * lost[None, :]
        tl.store(errors + column * errors_stride + out, lost, is_out)
    tl.store(now + places[:, None] * now_stride + out[None, :], tl.where(goes != 0, 0.0, weights), is_inside)
