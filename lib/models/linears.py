"""The linear layers whose weights are pruned, grouped by their input."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lib.config.plan import Mode
from lib.errors import InputError
from lib.models.decoder import Decoder
from lib.runtime.memory import free_host_memory

_ON = Mode()


@dataclass(frozen=True)
class InputGroup:
    """Linears of one layer with the same input tensor, such as q, k and v; `names` are relative to the layer."""

    names: tuple[str, ...]
    linears: tuple[nn.Linear, ...]

    @property
    def in_features(self) -> int:
        return self.linears[0].in_features

    @property
    def device(self) -> torch.device:
        return self.linears[0].weight.device


def find_linears(decoder: Decoder) -> list[dict[str, nn.Linear]]:
    """{name: linear} of each decoder layer, covering all its weight matrices.

    Raises `InputError` if a layer has weight matrices outside a floating-point `nn.Linear`, because they would silently
    stay dense. Works on the meta device too.
    """
    return [_linears_of(decoder, index, layer) for index, layer in enumerate(decoder.layers)]


def _linears_of(decoder: Decoder, index: int, layer: nn.Module) -> dict[str, nn.Linear]:
    linears = {}
    for name, module in layer.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.Linear) and own["weight"].is_floating_point():
            linears[name] = module
            continue
        for parameter_name, parameter in own.items():
            if parameter.dim() > 1:
                kind = "quantized" if isinstance(module, nn.Linear) else f"of a {type(module).__name__}"
                raise InputError(
                    f"{decoder.family} does not fit weight pruning: layer {index} keeps weights in "
                    f"{f'{name}.{parameter_name}'.lstrip('.')} ({kind}), and only nn.Linear can be pruned"
                )
    if not linears:
        raise InputError(f"{decoder.family} does not fit weight pruning: layer {index} has no nn.Linear")
    return linears


def check_columns(linears: Sequence[dict[str, nn.Linear]], size: int, what: str) -> None:
    """Raises `InputError` unless every linear's number of columns is a multiple of `size`."""
    for index, layer in enumerate(linears):
        for name, linear in layer.items():
            if linear.in_features % size:
                found = f"{linear.in_features} columns, no multiple of {size}"
                raise InputError(f"{what} does not fit: layer {index} {name} has {found}")


def check_not_offloaded(decoder: Decoder, linears: Sequence[dict[str, nn.Linear]]) -> None:
    """Raises `InputError` if a device map put weights where they cannot be changed."""
    if decoder.is_offloaded:
        return  # by --offload, which fetches them
    for index, layer in enumerate(linears):
        if any(linear.weight.is_meta for linear in layer.values()):
            raise InputError(
                f"--device_map: layer {index} does not fit the devices and was offloaded by it, where it cannot be "
                "pruned; use --offload cpu or disk in place of --device_map"
            )


@torch.no_grad()
def input_groups(decoder: Decoder) -> list[list[InputGroup]]:
    """The linears of each layer, grouped by input tensor, in the order in which the layer's forward calls them.

    Found by running two tokens. Raises `InputError` for a linear that the forward does not call exactly once, such as
    those of experts that get only some tokens.
    """
    hidden_states, inputs = decoder.embed(torch.zeros(1, 2, dtype=torch.long))
    groups = []
    for index, linears in enumerate(find_linears(decoder)):
        seen: list[tuple[torch.Tensor, list[str]]] = []

        def record(name: str, tensor: torch.Tensor, seen=seen) -> None:
            for other, names in seen:
                if _is_same(tensor, other):
                    names.append(name)
                    return
            seen.append((tensor, [name]))

        with decoder.at(index), inputs_seen(linears, record):
            hidden_states = decoder.run_layer(index, hidden_states, inputs, _ON)
        called = [name for _, names in seen for name in names]
        if sorted(called) != sorted(linears):
            odd = sorted(set(linears) - set(called)) or [name for name in called if called.count(name) > 1]
            raise InputError(
                f"{decoder.family} does not fit weight pruning: the forward of layer {index} does not call {odd[0]} "
                "once for all tokens"
            )
        groups.append([InputGroup(tuple(names), tuple(linears[name] for name in names)) for _, names in seen])
    return groups


def dense_copies(modules: Sequence[nn.Module], cause: str) -> list[torch.Tensor]:
    """Copies of the modules' weights in host memory, from which each cell of a table begins.

    Raises `InputError`, which begins with `cause`, if there is no room for them.
    """
    weights = [weight for module in modules if isinstance(weight := module.weight, torch.Tensor)]
    if sum(weight.nbytes for weight in weights) > free_host_memory():
        raise InputError(f"{cause}; use --offload disk")
    return [weight.detach().to("cpu", copy=True) for weight in weights]


@contextmanager
def inputs_seen(linears: dict[str, nn.Linear], function: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Inside the block, `function(name, input)` is called before each linear runs."""
    hooks = [
        linear.register_forward_pre_hook(lambda module, args, name=name: function(name, args[0]))
        for name, linear in linears.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True for two views of the same memory. Both must be alive: freed memory is reused."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
