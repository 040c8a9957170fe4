"""How weights are quantized. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Quantization:
    """How weights are rounded: bits, symmetry, columns that share a scale, and the order of columns.

    `is_compensated`: GPTQ, which adds the rounding error of a column to the columns after it; else round to nearest.
    `group_size` None: one scale for a row. `static_groups`: the scales of all groups are set before any rounding.
    """

    bits: int
    is_compensated: bool = False
    is_symmetric: bool = False
    group_size: int | None = None
    by_activation: bool = False
    static_groups: bool = False

    def __str__(self) -> str:
        kind = "GPTQ" if self.is_compensated else "round to nearest"
        group = f"groups of {self.group_size}" if self.group_size else "a scale for each row"
        parts = [f"{self.bits} bits", "symmetric" if self.is_symmetric else "asymmetric", group, kind]
        parts += ["act-order"] * self.by_activation + ["static groups"] * self.static_groups
        return ", ".join(parts)
