"""Low-rank adapters (LoRA, arXiv:2106.09685): what is trained of a pruned model, and how it joins its weights.

An adapter adds `SCALE` * B A x to the output W x of a linear, with A (rank, in) and B (out, rank), which is zero before
training. In a sparse model it adds `SCALE` * (B A * (W != 0)) x, so that W keeps its zeros (arXiv:2312.15230).
"""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lib.errors import InputError
from lib.models.decoder import Decoder

SCALE = 2.0
SOME = 0.01  # share of zeros that is worth a note
SPARSE = 0.25  # from this share of zeros on, a model is taken for a sparse one; 4-bit weights have up to 20%


class Adapter(nn.Module):
    """What is added to the output of one linear; see the module."""

    def __init__(self, linear: nn.Linear | Conv1D, rank: int, keeps_zeros: bool, generator: torch.Generator):
        super().__init__()
        out_features, in_features = matrix_of(linear).shape
        device, bound = linear.weight.device, 1 / math.sqrt(in_features)
        initial = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(initial.to(device))  # A, in fp32 whatever the model has
        self.up = nn.Parameter(torch.zeros(out_features, rank, device=device))  # B
        self.is_kept = matrix_of(linear) != 0 if keeps_zeros else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out), in the dtype of the inputs."""
        if self.is_kept is not None:
            return inputs @ self.change().to(inputs.dtype).T
        return SCALE * (inputs @ self.down.to(inputs.dtype).T) @ self.up.to(inputs.dtype).T

    def change(self) -> torch.Tensor:
        """The change of the weight (out, in), in fp32."""
        change = SCALE * self.up @ self.down
        return change if self.is_kept is None else change * self.is_kept


def matrix_of(linear: nn.Linear | Conv1D) -> torch.Tensor:
    """The weight as (out, in), which shares its memory."""
    return linear.weight if isinstance(linear, nn.Linear) else linear.weight.T


def find_linears(decoder: Decoder) -> dict[tuple[int, str], nn.Linear | Conv1D]:
    """The linears in the layers, by layer and path within it. The stacks of experts are none, and stay as they are.

    Raises `InputError` for a model without any.
    """
    found: dict[tuple[int, str], nn.Linear | Conv1D] = {}
    for index, layer in enumerate(decoder.layers):
        for path, module in layer.named_modules():
            is_trained = isinstance(module, nn.Linear | Conv1D) and module.weight.is_floating_point()
            if is_trained and module not in found.values():  # some families use a module in several layers
                found[index, path] = module
    if not found:
        raise InputError(f"{decoder.family}: has no linears in its layers that could be trained")
    return found


def share_of_zeros(linears: Mapping[tuple[int, str], nn.Linear | Conv1D]) -> float:
    """The share of the weights of some linears that are zero."""
    zeros = sum(int((linear.weight == 0).sum()) for linear in linears.values())
    return zeros / sum(linear.weight.numel() for linear in linears.values())


class Adapters(nn.ModuleList):
    """The adapters of all linears of a model, in use until they are merged."""

    def __init__(self, linears: Mapping[tuple[int, str], nn.Linear | Conv1D], rank: int, keeps_zeros: bool, seed: int):
        generator = torch.Generator().manual_seed(seed)
        adapters = [Adapter(linear, rank, keeps_zeros, generator) for linear in linears.values()]
        super().__init__(adapters)
        self._pairs = list(zip(linears.values(), adapters, strict=True))
        self._hooks = [linear.register_forward_hook(partial(_add, adapter)) for linear, adapter in self._pairs]

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the changes to the weights; from then on the linears alone do what they did with the adapters."""
        for hook in self._hooks:
            hook.remove()
        for linear, adapter in self._pairs:
            weight = matrix_of(linear)
            weight.copy_(weight.float() + adapter.change())


def _add(adapter: Adapter, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output + adapter(args[0])
