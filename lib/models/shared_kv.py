"""Keys and values that layers read from layers before them (Gemma 4 E2B and E4B), carried beside the hidden states.

In the model's own forward they wait in a dictionary until the pass ends. Here each layer runs over all windows before
the next one does, so they travel with the hidden states of their windows: (B, T, D) becomes (B, T, D + W), where W
numbers are the keys and values of one token of every layer that others read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

_STORED = "shared_kv_states"  # the argument of layers that holds what is shared


@dataclass(frozen=True)
class _Place:
    """Where the keys and values of a layer lie among the numbers that are carried: each has `heads * size`."""

    begin: int
    heads: int
    size: int

    @property
    def end(self) -> int:
        return self.begin + 2 * self.heads * self.size


def writing_layers(config: Any) -> list[int]:
    """The layers whose keys and values others read; none in models that share nothing."""
    modes = getattr(config, "kv_sharing_modes", ())
    return [index for index, mode in enumerate(modes) if mode == "store" and "reuse" in modes]


class SharedKV:
    """What is carried for a model, none in most; `width` is D."""

    def __init__(self, config: Any, layers: nn.ModuleList):
        self.width = config.hidden_size
        self._writers: dict[int, str] = {index: config.layer_types[index] for index in writing_layers(config)}
        self._places: dict[str, _Place] = {}
        begin = self.width
        for index, kind in self._writers.items():
            attention: Any = layers[index].self_attn
            size = attention.head_dim
            self._places[kind] = _Place(begin, attention.k_proj.out_features // size, size)
            begin = self._places[kind].end
        self.state_width = begin  # D + W

    def start(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The first layer's input (B, T, D) with room for what will be carried."""
        return pad(hidden_states, (0, self.state_width - self.width)) if self._places else hidden_states

    def stream(self, states: torch.Tensor) -> torch.Tensor:
        """The hidden states (B, T, D) in what `run` takes and returns."""
        return states[..., : self.width] if self._places else states

    def run(self, index: int, layer: Callable, states: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        """Runs a layer on (B, T, D + W), with what layers before it left there, and takes in what it leaves."""
        if not self._places:
            output = layer(states, *args, **kwargs)
            return output[0] if isinstance(output, tuple) else output
        shared = {kind: self._unpack(states, place) for kind, place in self._places.items()}
        before = dict(shared)
        output = layer(self.stream(states), *args, **{**kwargs, _STORED: shared})
        output = output[0] if isinstance(output, tuple) else output
        kind = self._writers.get(index)
        if kind is None or shared[kind] is before[kind]:  # it writes nothing, or its attention is off
            return torch.cat([output, states[..., self.width :].to(output.device)], dim=-1)
        place = self._places[kind]
        written = [one.transpose(1, 2).flatten(2) for one in shared[kind]]
        parts = [output, states[..., self.width : place.begin], *written, states[..., place.end :]]
        return torch.cat([part.to(output.device) for part in parts], dim=-1)

    def _unpack(self, states: torch.Tensor, place: _Place) -> tuple[torch.Tensor, ...]:
        """Keys and values (B, heads, T, size)."""
        both = states[..., place.begin : place.end].unflatten(-1, (2, place.heads, place.size))
        return tuple(one.transpose(1, 2) for one in both.unbind(2))
