"""The weight matrices that are pruned, those of linears and of experts, grouped by their input."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter
from transformers.pytorch_utils import Conv1D

from lib.config.plan import Mode
from lib.errors import InputError
from lib.models.decoder import Decoder
from lib.models.experts import is_of_routing, stacks_of
from lib.runtime.memory import free_host_memory

_ON = Mode()
_TIME_STEPS = "dt_proj"  # small, and multiplied with in other ways than by its forward


@dataclass(frozen=True)
class Matrix:
    """A weight matrix (out, in) that is pruned: that of a linear, or one of the stack that an expert module keeps."""

    module: nn.Module
    parameter: str = "weight"  # of the module
    expert: int | None = None  # its place in the stack
    is_transposed: bool = False  # the parameter keeps it as (in, out)

    @property
    def whole(self) -> torch.Tensor:
        """The parameter."""
        return getattr(self.module, self.parameter)

    @property
    def stored(self) -> torch.Tensor:
        """The matrix as the parameter keeps it: the parameter, or a part of it that shares its memory."""
        return self.whole if self.expert is None else self.whole[self.expert]

    @property
    def weight(self) -> torch.Tensor:
        """The matrix (out, in); it shares the parameter's memory."""
        return self.part_of(self.whole)

    def part_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """What belongs to this matrix, (out, in), in a tensor of the parameter's shape."""
        part = tensor if self.expert is None else tensor[self.expert]
        return part.mT if self.is_transposed else part

    def path_in(self, name: str) -> str:
        """The path of what is stored within the layer, for a matrix of this name."""
        return f"{name}.weight" if self.expert is None else name


@dataclass(frozen=True)
class InputGroup:
    """Matrices of one layer with the same input tensor, such as q, k and v; `names` are relative to the layer."""

    names: tuple[str, ...]
    matrices: tuple[Matrix, ...]

    @property
    def in_features(self) -> int:
        return self.matrices[0].weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.matrices[0].weight.device

    @property
    def expert(self) -> int | None:
        """The number of the expert that it is of, which gets only the tokens that the router sends there."""
        return self.matrices[0].expert

    @property
    def is_routed(self) -> bool:
        return self.expert is not None


Matrices = dict[str, Matrix]  # of a layer, by the path of the parameter, without `.weight` and with an expert's number


def find_matrices(decoder: Decoder) -> list[Matrices]:
    """All matrices of each decoder layer that are pruned: of linears (also transposed ones, `Conv1D`) and of experts.

    Routers, gates of shared experts, depthwise convolutions, and projections of a state space's time steps are left as
    they are. Raises `InputError` if a layer
    has other weight matrices, because they would silently stay dense; those that are parameters of another module are
    found by `input_groups`. Works on the meta device too.
    """
    return [_matrices_of(decoder, index, layer) for index, layer in enumerate(decoder.layers)]


def _matrices_of(decoder: Decoder, index: int, layer: nn.Module) -> Matrices:
    stacks, found = stacks_of(layer), Matrices()
    for path, module in layer.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            whole = f"{path}.{name}".lstrip(".")
            if whole in stacks:
                is_transposed = _is_transposed(module, decoder.config.hidden_size)
                found |= {f"{whole}.{i}": Matrix(module, name, i, is_transposed) for i in range(len(parameter))}
            elif parameter.dim() < 2 or path.endswith(_TIME_STEPS) or is_of_routing(layer, path, parameter, stacks):
                continue
            elif name == "weight" and isinstance(module, nn.Linear | Conv1D) and parameter.is_floating_point():
                found[path] = Matrix(module, is_transposed=isinstance(module, Conv1D))
            elif isinstance(module, nn.Linear) or isinstance(module, nn.Conv1d) and module.groups == 1:
                kind = "quantized" if isinstance(module, nn.Linear) else f"of a {type(module).__name__}"
                raise _no_linear(decoder, index, f"{whole} ({kind})")
    if not found:
        raise InputError(f"{decoder.family} does not fit weight pruning: layer {index} has no linear")
    return found


def _no_linear(decoder: Decoder, index: int, what: str) -> InputError:
    return InputError(
        f"{decoder.family} does not fit weight pruning: layer {index} keeps weights in {what}, and only linears and "
        "experts can be pruned"
    )


def _is_transposed(module: nn.Module, hidden_size: int) -> bool:
    """True if the stacks of an expert module keep their matrices as (in, out), to be multiplied from the right.

    transformers marks its modules. Of others, the first of several stacks reads hidden states.
    """
    if isinstance(marked := getattr(module, "is_transposed", None), bool):
        return marked
    stacks = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    return len(stacks) > 1 and stacks[0].shape[1] == hidden_size != stacks[0].shape[2]


def check_columns(matrices: Sequence[Matrices], size: int, what: str) -> None:
    """Raises `InputError` unless every matrix's number of columns is a multiple of `size`."""
    for index, layer in enumerate(matrices):
        for name, matrix in layer.items():
            if (columns := matrix.weight.shape[1]) % size:
                found = f"{columns} columns, no multiple of {size}"
                raise InputError(f"{what} does not fit: layer {index} {name} has {found}")


def check_not_offloaded(decoder: Decoder, matrices: Sequence[Matrices]) -> None:
    """Raises `InputError` if a device map put weights where they cannot be changed."""
    if decoder.is_offloaded:
        return  # by --offload, which fetches them
    for index, layer in enumerate(matrices):
        if any(matrix.stored.is_meta for matrix in layer.values()):
            raise InputError(
                f"--device_map: layer {index} does not fit the devices and was offloaded by it, where it cannot be "
                "pruned; use --offload cpu or disk in place of --device_map"
            )


# Groups ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def input_groups(decoder: Decoder) -> list[list[InputGroup]]:
    """The matrices of each layer, grouped by input tensor, in the order in which the layer's forward uses them.

    Found by running two tokens. Each matrix of an expert is a group of its own, after all others. Raises `InputError`
    for a linear that the forward does not call exactly once, and for experts whose products are not seen.
    """
    hidden_states, inputs = decoder.embed(torch.zeros(1, 2, dtype=torch.long))
    groups = []
    for index, matrices in enumerate(find_matrices(decoder)):
        seen: list[tuple[torch.Tensor, list[str]]] = []

        def record(name: str, tensor: torch.Tensor, seen=seen) -> None:
            for other, names in seen:
                if _is_same(tensor, other):
                    names.append(name)
                    return
            seen.append((tensor, [name]))

        layer = decoder.layers[index]
        with decoder.at(index), inputs_seen(layer, matrices, record), _OtherProducts(layer, matrices) as others:
            hidden_states = decoder.run_layer(index, hidden_states, inputs, _ON)
        if others.found:
            raise _no_linear(decoder, index, min(others.found))
        experts = [name for name, matrix in matrices.items() if matrix.expert is not None]
        called = [name for _, names in seen for name in names]
        if unseen := {_stack_of(name) for name in experts} - set(map(_stack_of, called)):
            raise InputError(
                f"{decoder.family} does not fit weight pruning: the forward of layer {index} multiplies with "
                f"{min(unseen)} in a way that is not known"
            )
        once = [name for name in called if name not in experts]
        if sorted([*once, *experts]) != sorted(matrices):
            odd = sorted(set(matrices) - {*once, *experts}) or [name for name in once if once.count(name) > 1]
            raise InputError(
                f"{decoder.family} does not fit weight pruning: the forward of layer {index} does not call {odd[0]} "
                "once for all tokens"
            )
        shared = [[name for name in names if name not in experts] for _, names in seen]
        of_each = [*filter(None, shared), *([name] for name in experts)]
        groups.append([InputGroup(tuple(names), tuple(matrices[name] for name in names)) for names in of_each])
    return groups


def _stack_of(name: str) -> str:
    """The path of the stack that an expert's matrix of this name is in."""
    return name.rpartition(".")[0]


def dense_copies(weights: Sequence[torch.Tensor], cause: str) -> list[torch.Tensor]:
    """Copies of weights in host memory, from which each cell of a table begins.

    Raises `InputError`, which begins with `cause`, if there is no room for them.
    """
    if sum(weight.nbytes for weight in weights) > free_host_memory():
        raise InputError(f"{cause}; use --offload disk")
    return [weight.detach().to("cpu", copy=True) for weight in weights]


# Inputs ---------------------------------------------------------------------------------------------------------------


@contextmanager
def inputs_seen(layer: nn.Module, matrices: Matrices, function: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Inside the block, `function(name, input)` gets the input of each matrix when the layer's forward runs.

    A linear's, (..., in), before the linear runs. An expert's, (tokens, in) of the tokens that are routed to it, when
    the layer has run; if the forward weighs the expert's output for each token, the inputs are weighed in the same way.
    """
    experts = {name: matrix for name, matrix in matrices.items() if matrix.expert is not None}
    hooks = [
        matrix.module.register_forward_pre_hook(lambda module, args, name=name: function(name, args[0]))
        for name, matrix in matrices.items()
        if name not in experts
    ]
    try:
        if not experts:
            yield
            return
        with one_by_one(experts.values()), _Calls(experts) as calls:
            hooks.append(layer.register_forward_hook(lambda *_: calls.hand_over(function)))
            yield
    finally:
        for hook in hooks:
            hook.remove()


See = Callable[[int, torch.Tensor, torch.Tensor], None]


@contextmanager
def outputs_seen(layer: nn.Module, matrices: Matrices, function: See) -> Iterator[None]:
    """Inside the block, `function(expert, outputs, weights)` gets what each expert of a layer gives when it runs.

    That is (tokens, D) for the tokens that are routed to it, and the router's weight (tokens, 1) of each.
    """
    experts = {name: matrix for name, matrix in matrices.items() if matrix.expert is not None}
    with one_by_one(experts.values()), _Calls(experts, function) as calls:
        hook = layer.register_forward_hook(lambda *_: calls.hand_over(lambda name, inputs: None))  # frees what it kept
        try:
            yield
        finally:
            hook.remove()


@contextmanager
def one_by_one(experts: Iterable[Matrix]) -> Iterator[None]:
    """Inside the block, expert modules of transformers run their experts one after the other, not in fused kernels."""
    configs = {id(config): config for one in experts if (config := getattr(one.module, "config", None)) is not None}
    before = {key: getattr(config, "_experts_implementation", None) for key, config in configs.items()}
    try:
        for key, config in configs.items():
            if before[key] is not None:
                config._experts_implementation = "eager"
        yield
    finally:
        for key, config in configs.items():
            if before[key] is not None:
                config._experts_implementation = before[key]


_Expert = tuple[int, int]  # the id of its module, and its number there


class _Call(NamedTuple):
    """A product of an expert's inputs (tokens, in) and one of its matrices."""

    name: str
    expert: _Expert
    inputs: torch.Tensor


_PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "bmm", "baddbmm")
_BATCHED = {"bmm": 1, "baddbmm": 2}  # which argument is the stack; the one before are the inputs of all its matrices
_SUMS, _SCALINGS = ("add", "__add__"), ("mul", "__mul__", "mul_", "__imul__")


class _Calls(TorchFunctionMode):
    """Watches products with the experts' matrices, which are parts of a parameter, in the model's own forward."""

    def __init__(self, experts: Matrices, see: "See | None" = None):
        super().__init__()
        self._see = see
        self._names = {(id(one.whole), one.expert): name for name, one in experts.items()}
        modules = {id(one.module): one.module for one in experts.values()}.values()
        self._stacks = {id(stack): id(module) for module in modules for stack in module.parameters(recurse=False)}
        self._transposed = {id(one.whole) for one in experts.values() if one.is_transposed}
        self._calls: list[_Call] = []
        self._scales: dict[_Expert, torch.Tensor] = {}  # of an expert's outputs in the layer's output
        self._parts: dict[int, tuple[int, int]] = {}  # stack and number, by the id of the tensor
        self._outputs: dict[int, _Expert] = {}  # the expert of a product, by the id of the tensor
        self._alive: list[torch.Tensor] = []  # so that no id is reused

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        kind = getattr(func, "__name__", "")
        if kind == "__getitem__" and id(args[0]) in self._stacks and not isinstance(args[1], tuple | slice):
            self._remember(self._parts, result, (id(args[0]), int(args[1])))
        elif kind in _PRODUCTS and len(args) > 1:
            if part := self._parts.get(id(args[1])):
                self._add(*part, kind, args[0], result)
            elif kind in _BATCHED and id(args[_BATCHED[kind]]) in self._stacks:
                at = _BATCHED[kind]
                for number, inputs in enumerate(args[at - 1]):
                    self._add(id(args[at]), number, kind, inputs[inputs.any(dim=-1)], None)
        elif kind in _SUMS and id(args[0]) in self._outputs:
            self._remember(self._outputs, result, self._outputs[id(args[0])])
        elif kind in _SCALINGS and (expert := self._outputs.get(id(args[0]))) is not None:
            scale = args[1]
            if isinstance(scale, torch.Tensor) and scale.shape[-1:] == (1,) and scale.dim() == args[0].dim():
                self._scales[expert] = scale
                if self._see:
                    self._see(expert[1], args[0], scale)
        return result

    def _remember(self, where: dict, tensor: torch.Tensor, value) -> None:
        where[id(tensor)] = value
        self._alive.append(tensor)

    def _add(self, stack: int, number: int, kind: str, inputs: torch.Tensor, output: torch.Tensor | None) -> None:
        expert = self._stacks[stack], number
        if name := self._names.get((stack, number)):
            if (kind == "linear") == (stack in self._transposed):
                raise InputError(
                    f"{name} does not fit weight pruning: it is multiplied from the other side than expected"
                )
            self._calls.append(_Call(name, expert, inputs))
        if output is not None:
            self._remember(self._outputs, output, expert)

    def hand_over(self, function: Callable[[str, torch.Tensor], None]) -> None:
        """Calls `function` for all calls of a forward, and forgets them."""
        calls, scales = self._calls, self._scales
        self._calls, self._scales, self._parts, self._outputs, self._alive = [], {}, {}, {}, []
        for name, expert, inputs in calls:
            scale = scales.get(expert)
            function(name, inputs if scale is None else inputs * scale.abs().to(inputs.dtype))


class _OtherProducts(TorchFunctionMode):
    """Finds the parameters of a layer that its forward multiplies with as matrices, though none is to be pruned."""

    def __init__(self, layer: nn.Module, matrices: Matrices):
        super().__init__()
        stacks, pruned = stacks_of(layer), {id(matrix.whole) for matrix in matrices.values()}
        self._names = {
            parameter.untyped_storage().data_ptr(): name
            for name, parameter in layer.named_parameters()
            if parameter.dim() > 1
            and id(parameter) not in pruned
            and not name.endswith(f"{_TIME_STEPS}.weight")
            and not is_of_routing(layer, name.rpartition(".")[0], parameter, stacks)
        }
        self.found: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in (*_PRODUCTS, "einsum", "addmm"):
            tensors = (one for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor))
            self.found |= {
                self._names[at] for one in tensors if (at := one.untyped_storage().data_ptr()) in self._names
            }
        return func(*args, **(kwargs or {}))


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True for two views of the same memory. Both must be alive: freed memory is reused."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
