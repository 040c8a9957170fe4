"""Uniform quantization grids as in GPTQ (arXiv:2210.17323): a scale and zero point per row, or per group in a row."""

from dataclasses import dataclass

import torch

from lib.config.quantization import Quantization

_LARGEST = torch.finfo(torch.bfloat16).max


@dataclass(frozen=True)
class Grid:
    """The values `scale * (level - zero)` for integer levels 0..max_level; 0 is on the grid of every row."""

    scale: torch.Tensor  # (rows, 1), or (rows, columns)
    zero: torch.Tensor  # the same, integral
    max_level: int

    @classmethod
    def of(cls, weight: torch.Tensor, quantization: Quantization) -> "Grid":
        """The grid that spans each row of a weight (rows, columns), fp32: from min to max, or symmetric about zero.

        Its values are finite in bf16 too, and its steps normal numbers, so that rows of huge or denormal weights are
        rounded by no more than a step.
        """
        max_level = 2**quantization.bits - 1
        least = weight.amin(dim=1, keepdim=True).clamp(max=0)
        most = weight.amax(dim=1, keepdim=True).clamp(min=0)
        if quantization.is_symmetric:
            most = torch.maximum(least.abs(), most)
            least = -most
        is_empty = most == least
        least, most = least.masked_fill(is_empty, -1.0), most.masked_fill(is_empty, 1.0)
        span = most - least
        scale = torch.where(span.isfinite(), span / max_level, most / max_level - least / max_level)
        scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)
        if quantization.is_symmetric:
            zero = torch.full_like(scale, (max_level + 1) // 2)
        else:
            zero = (-least / scale).round()
        scale = torch.minimum(scale, _LARGEST / torch.maximum(zero, max_level - zero))
        return cls(scale, zero, max_level)

    def of_column(self, column: int) -> "Grid":
        """The grid of one column, (rows, 1)."""
        if self.scale.shape[1] == 1:
            return self
        return Grid(self.scale[:, column : column + 1], self.zero[:, column : column + 1], self.max_level)

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """Rounds (rows, columns) to the nearest grid values; exact zeros stay zero."""
        levels = ((weight / self.scale).round() + self.zero).clamp(0, self.max_level)
        return self.scale * (levels - self.zero)


def round_to_nearest(weight: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """Rounds a weight (out, in) to nearest, in fp32, on one grid per row or per group of columns in a row."""
    size = quantization.group_size or weight.shape[1]
    groups = weight.float().split(size, dim=1)
    return torch.cat([Grid.of(group, quantization).round(group) for group in groups], dim=1)
