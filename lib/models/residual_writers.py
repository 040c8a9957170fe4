"""How a sublayer writes into the residual stream: the projection at its end, tested on the model itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lib.config.plan import Mode
from lib.models.decoder import Decoder
from lib.models.modeling_pruned import SKIP_ATTENTION, SKIP_FFN

OUTPUT_PROJECTIONS = {"o_proj", "out_proj", "dense", "c_proj", "down_proj", "dense_4h_to_h", "fc2"}
_ATTENTION, _FFN = Mode(ffn=False), Mode(attention=False)
_SAME = 0.02  # relative difference up to which a layer's output changes in proportion; bf16 has 8 bits


@dataclass(frozen=True)
class Writer:
    """The projection that ends a sublayer; the layer adds `scale` times its output to the residual stream."""

    layer: int
    name: str  # path within the layer
    module: nn.Linear | Conv1D
    scale: float

    @property
    def path(self) -> str:
        """The path of its weight within the layer."""
        return f"{self.name}.weight"

    @property
    def matrix(self) -> torch.Tensor:
        """The weight (in, out), as a view: the output is the input (..., in) times it, plus a bias."""
        weight = self.module.weight
        return weight.T if isinstance(self.module, nn.Linear) else weight


def output_projection(decoder: Decoder, index: int, kind: str) -> tuple[str, nn.Linear | Conv1D] | None:
    """The path within the layer and the module of the projection that ends a sublayer.

    None where there is not exactly one of a known name, as in a mixture of experts, or it is quantized.
    """
    found = [
        (path, module)
        for name, original in decoder.sublayer_modules(index, kind).items()
        for inner, module in original.named_modules()
        if (path := f"{name}.{inner}".rstrip(".")).rpartition(".")[2] in OUTPUT_PROJECTIONS
    ]
    if len(found) != 1 or not isinstance(found[0][1], nn.Linear | Conv1D):
        return None
    path, module = found[0]
    return (path, module) if module.weight.is_floating_point() else None


def output_projections(decoder: Decoder) -> list[nn.Linear | Conv1D]:
    """Those of all sublayers that the model has."""
    found = (output_projection(decoder, index, kind) for index, kind in _sublayers(decoder))
    return [projection for _, projection in filter(None, found)]


def has_writers(decoder: Decoder) -> bool:
    """True when some sublayer of the model writes linearly into the residual stream."""
    return any(find_writer(decoder, index, kind) for index, kind in _sublayers(decoder))


def _sublayers(decoder: Decoder) -> Iterator[tuple[int, str]]:
    return product(range(decoder.num_layers), (SKIP_ATTENTION, SKIP_FFN))


@torch.no_grad()
def find_writer(decoder: Decoder, index: int, kind: str) -> Writer | None:
    """The writer of a sublayer, or None where it does not write linearly.

    Where a norm stands between the projection and the residual stream (Gemma 2 and 3, OLMo 2), the layer's output does
    not change in proportion to the projection's. Runs the sublayer on two tokens.
    """
    if not (found := output_projection(decoder, index, kind)):
        return None
    name, module = found
    hidden_states, inputs = decoder.embed(torch.zeros(1, 2, dtype=torch.long))
    mode = _ATTENTION if kind == SKIP_ATTENTION else _FFN
    with decoder.at(index):
        before = decoder.stream(decoder.run_layer(index, hidden_states, inputs, mode)).float()
        signs = torch.ones(before.shape[-1], device=before.device)
        signs[::2] = -1
        change = signs * before.abs().max()
        with module.register_forward_hook(lambda module, args, output: output + change.to(output)):
            moved = decoder.stream(decoder.run_layer(index, hidden_states, inputs, mode)).float() - before
    scale = ((moved * change).mean() / change.square().mean()).item()
    if not scale or (moved - scale * change).abs().max() > _SAME * abs(scale) * change.abs().max():
        return None
    return Writer(index, name, module, scale)


@torch.no_grad()
def is_sequential(decoder: Decoder, index: int) -> bool:
    """True when a layer's FFN reads what its attention wrote; in a parallel layer both read the layer's input.

    Runs the layer on two tokens, whole and sublayer by sublayer.
    """
    hidden_states, inputs = decoder.embed(torch.zeros(1, 2, dtype=torch.long))
    with decoder.at(index):
        whole = decoder.run_layer(index, hidden_states, inputs, decoder.given_modes[index])
        middle = decoder.run_layer(index, hidden_states, inputs, _ATTENTION)
        return torch.equal(decoder.run_layer(index, middle, inputs, _FFN), whole)


def sublayer_of(mode: Mode) -> str:
    """The sublayer of a mode that writes last."""
    return SKIP_FFN if mode.ffn else SKIP_ATTENTION
