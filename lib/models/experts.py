"""The experts of a layer: the tensors that have a part for each, and the layer with fewer of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

_PICKED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k")  # names in configs
_GROUPS = ("n_group", "num_expert_group")
_OTHER_COUNTS = re.compile("per_tok|shared|top_?k")  # in names of numbers that are not those of all routed experts


def stacks_of(layer: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The parameters of a layer that stack the matrices of experts, (experts, ., .): {path: (module, its name)}."""
    return {
        f"{path}.{name}": (module, name)
        for path, module in layer.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and parameter.is_floating_point() and not isinstance(module, nn.Conv1d)
    }


def within(layer: nn.Module, path: str) -> list[nn.Module]:
    """The modules of a layer on the way to a path, with that at its end."""
    names = path.split(".")
    return [layer.get_submodule(".".join(names[: depth + 1])) for depth in range(len(names))]


_ROUTER_CLASS, _ROUTER_NAME = re.compile("Router|Gating"), re.compile("router|gate|wg|.*_gate")


def is_of_routing(layer: nn.Module, path: str, parameter: torch.Tensor, stacks: dict) -> bool:
    """True for the weights of a module that route tokens to experts or weigh shared experts, and biases of a stack.

    A router has a row for each expert, and the gate of a shared expert has one; so may other matrices, and it takes the
    name too.
    """
    if not stacks:
        return False
    names, modules = path.split("."), within(layer, path)
    if any(_ROUTER_CLASS.search(type(module).__name__) for module in modules):
        return True
    beside = {len(getattr(module, name)) for whole, (module, name) in stacks.items() if whole.split(".")[0] == names[0]}
    if any(module is modules[-1] for module, _ in stacks.values()):
        return len(parameter) in beside  # a bias for each expert
    return bool(beside) and len(parameter) in {1, *beside} and bool(_ROUTER_NAME.fullmatch(names[-1]))


@dataclass
class Experts:
    """The routed experts of a layer.

    `tensors` are the parameters and buffers with a part for each expert, and the dimension of these parts: stacks of
    matrices, their biases, rows of the router. `counters` are the attributes of modules that hold their number.
    """

    count: int
    tensors: list[tuple[nn.Module, str, int]]
    counters: list[tuple[nn.Module, str]]
    _wholes: list[torch.Tensor] = field(init=False)
    _order: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._wholes = [getattr(module, name).data for module, name, _ in self.tensors]
        self._order = list(range(self.count))

    @property
    def parameters(self) -> int:
        """The parameters of one expert, with its row of the router."""
        pairs = zip(self.tensors, self._wholes, strict=True)
        return sum(whole.numel() // self.count for (module, name, _), whole in pairs if name in module._parameters)

    def remove(self, removed: Sequence[int]) -> None:
        """Leaves the layer without these experts, in the others' order; with none, the layer is as it was made.

        Those that are removed go to the end of each tensor, of which the module gets a view, so no memory is needed
        but for one tensor while it is sorted.
        """
        kept = [expert for expert in range(self.count) if expert not in removed]
        order = [*kept, *removed]
        places = [self._order.index(expert) for expert in order]
        for (module, name, dim), whole in zip(self.tensors, self._wholes, strict=True):
            if order != self._order:
                whole.copy_(whole.index_select(dim, torch.tensor(places, device=whole.device)))
            getattr(module, name).data = whole.narrow(dim, 0, len(kept))
        for module, name in self.counters:
            setattr(module, name, len(kept))
        self._order = order


def find_experts(layer: nn.Module, ffn: Sequence[str]) -> Experts | None:
    """The experts in the FFN of a layer, whose modules have these names; None for a dense one."""
    stacks = {path: found for path, found in stacks_of(layer).items() if path.split(".")[0] in ffn}
    counts = {len(getattr(module, name)) for module, name in stacks.values()}
    if len(counts) != 1:
        return None
    (count,) = counts
    tensors, counters = [], []
    for path, module in layer.named_modules():
        if path.split(".")[0] not in ffn:
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        of_each = {name: tensor for name, tensor in own if tensor.dim() and len(tensor) == count}
        is_routing = any(_ROUTER_CLASS.search(type(one).__name__) for one in within(layer, path))
        tensors += [(module, name, 1) for name, tensor in own if is_routing and tensor.shape == (1, count)]
        rows = [tensor for tensor in of_each.values() if tensor.dim() == 2]
        is_stack = any(module is one for one, _ in stacks.values())
        is_router = not is_stack and any(is_of_routing(layer, path, tensor, stacks) for tensor in rows)
        for name, tensor in of_each.items():
            is_bias = tensor.dim() == 1 and "bias" in name and _holds_stack(module, stacks)
            if is_stack or is_router or is_bias:
                tensors.append((module, name, 0))
        for name, value in vars(module).items():
            is_count = "expert" in name and not _OTHER_COUNTS.search(name) or is_router and name == "out_features"
            if is_count and type(value) is int and value == count:
                counters.append((module, name))
    return Experts(count, tensors, counters)


def _holds_stack(module: nn.Module, stacks: dict[str, tuple[nn.Module, str]]) -> bool:
    return any(child is one for child in module.children() for one, _ in stacks.values())


def picked_experts(config) -> int | None:
    """How many experts the router picks for a token, by the config."""
    return next((value for name in _PICKED if (value := getattr(config, name, None))), None)


def expert_groups(config) -> int:
    """In how many groups the experts are that the router chooses among first."""
    return next((value for name in _GROUPS if (value := getattr(config, name, None))), 1)


def count_names(config, count: int) -> list[str]:
    """The entries of a config that hold the number of routed experts."""
    return [
        name
        for name, value in config.to_dict().items()
        if "expert" in name and not _OTHER_COUNTS.search(name) and type(value) is int and value == count
    ]
