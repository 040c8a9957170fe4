"""Connection sensitivity of every weight that can be pruned, layer by layer, and its spread in each layer.

As in "ALP: Adaptive Layerwise Pruning in Large Language Models", a weight's sensitivity is the gradient of the loss on
each of a few short windows, squared and summed. The gradients of the whole model are never in memory at once. A forward
pass keeps the input of each layer. Then, from the last layer down, each layer is run again and back-propagated, and its
sensitivities are reduced to a few numbers. Besides the weights, memory holds all layers' inputs and, whatever the
number of layers, one layer's accumulators (and its fp32 weights if the model is not in fp32).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import nn

from lib.config.plan import Mode
from lib.engine.activations import Activations
from lib.engine.tail import token_losses
from lib.errors import RunError
from lib.models.decoder import Decoder, LayerInputs
from lib.models.matrices import Matrices, find_matrices, one_by_one
from lib.runtime.batching import Batcher, Progress, retry_once
from lib.runtime.distributed import ALONE, Ranks

_TOKENS_AT_ONCE = 512
_ON = Mode()


@dataclass(frozen=True)
class Spread:
    """Statistics of sensitivities G: their count, mean, unbiased standard deviation, and sum of |G - mean| / std."""

    count: int
    mean: float
    std: float
    redundancy: float


@dataclass(frozen=True)
class LayerSensitivity:
    """The spread of all sensitivities of a layer, and of those of each matrix."""

    layer: Spread
    linears: dict[str, Spread]


class Unfinished(Protocol):
    """Storage for the layers finished so far, so that a killed run can resume below them."""

    def load(self) -> tuple[list[LayerSensitivity], torch.Tensor] | None:
        """The last save: sensitivities from the last layer down, and the gradient (N, T, D) below them."""

    def save(self, found: list[LayerSensitivity], gradient: torch.Tensor) -> None:
        """Replaces the previous save."""


def connection_sensitivity(
    decoder: Decoder,
    windows: torch.Tensor,
    gradient_type: str = "l2",
    loss: str = "last",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    unfinished: Unfinished | None = None,
) -> list[LayerSensitivity]:
    """Computes the sensitivities of every layer over windows (N, T) of token ids.

    `loss` is the cross-entropy of a window's `last` token, or the mean over `all` but the first. `gradient_type` `l2`
    sums the squares of the windows' gradients, `l1` their absolute values; `l2_hundred_total` adds to `l2` the square
    of 100 times the last window's gradient, as the released code does. Multiple processes split the windows. Raises
    `RunError` naming the layer if the gradients are not finite.
    """
    matrices = find_matrices(decoder)
    has_experts = any(matrix.expert is not None for layer in matrices for matrix in layer.values())
    batcher = Batcher(1 if has_experts else max(1, _TOKENS_AT_ONCE // windows.shape[1]), ranks)
    share = batcher.share(len(windows))
    weights = window_weights(gradient_type, len(windows))[share]
    inputs = _inputs_of_layers(decoder, windows[share], batcher)
    found, saved = (unfinished.load() if unfinished else None) or ([], None)
    gradient = _tail_gradient(inputs.pop(), loss) if saved is None else saved[share]
    del saved, inputs[decoder.num_layers - len(found) :]
    if progress:
        progress(len(found))
    for layer in reversed(range(decoder.num_layers - len(found))):
        below = inputs.pop()
        with decoder.at(layer), _in_float32(decoder.layers[layer]):
            one_layer = partial(_one_layer, below, gradient, matrices[layer], gradient_type, weights)
            totals, gradient = batcher.retry_smaller(one_layer, len(below.windows))
            for total in totals.values():
                ranks.add(total)
        found.append(retry_once(partial(summarize, totals)))
        del totals
        if not math.isfinite(found[-1].layer.redundancy):
            raise RunError(f"NaN or infinity in the gradients of layer {layer}; try --dtype float32 or bfloat16")
        if unfinished and layer:
            unfinished.save(found, ranks.gather(gradient.cpu()))
        if progress:
            progress(1)
    return found[::-1]


def summarize(sensitivities: dict[str, torch.Tensor]) -> LayerSensitivity:
    """Computes the spreads of a layer's sensitivities {matrix: (out, in)}, with sums in fp64."""
    linears = {name: spread([values]) for name, values in sensitivities.items()}
    return LayerSensitivity(spread(list(sensitivities.values())), linears)


def spread(parts: Sequence[torch.Tensor]) -> Spread:
    """Computes the spread of all elements of some matrices together. If all are equal, redundancy is 0."""
    count = sum(part.numel() for part in parts)
    mean = sum(part.sum(dtype=torch.float64).item() for part in parts) / count
    deviations, squares = 0.0, 0.0
    for part in parts:
        for rows in part.split(max(1, 2**24 // part.shape[1])):  # pieces of 64 MiB
            distance = (rows - mean).abs_()
            deviations += distance.sum(dtype=torch.float64).item()
            squares += distance.square_().sum(dtype=torch.float64).item()
    std = math.sqrt(squares / max(1, count - 1))
    return Spread(count, mean, std, deviations / std if std else 0.0)


def importance(sensitivities: Sequence[LayerSensitivity]) -> list[float]:
    """ALP's importance of each layer: 1 - its share of the total redundancy."""
    total = sum(sensitivity.layer.redundancy for sensitivity in sensitivities)
    return [1 - (sensitivity.layer.redundancy / total if total else 0.0) for sensitivity in sensitivities]


# Forward and backward pass --------------------------------------------------------------------------------------------


@torch.no_grad()
def _inputs_of_layers(decoder: Decoder, windows: torch.Tensor, batcher: Batcher) -> list[Activations]:
    """The windows' activations before every layer, and after the last one."""
    walk, found = Activations(decoder, windows, batcher), []
    for _ in range(decoder.num_layers):
        found.append(walk.fork())
        walk.step()
    return [*found, walk]


def _tail_gradient(last: Activations, loss: str) -> torch.Tensor:
    """The gradient of each window's own loss with respect to the last hidden states, (N, T, D) in fp32."""
    decoder, predicting = last.decoder, slice(-2, -1) if loss == "last" else slice(0, -1)

    def of_batch(rows: slice) -> torch.Tensor:
        with torch.enable_grad():
            hidden_states = last.states(rows)
            states = hidden_states[:, predicting].clone().requires_grad_()
            logits = decoder.logits(states)
            labels = last.windows[rows][:, 1:][:, -logits.shape[1] :].to(logits.device)
            total = token_losses(logits, labels).mean(dim=1).sum()
            (gradient,) = torch.autograd.grad(total, states)
        whole = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        whole[:, predicting] = gradient.float()
        return whole

    count, seqlen = last.windows.shape
    return last.batcher.map(of_batch, count) if count else torch.zeros(0, seqlen, decoder.state_width)


def _one_layer(
    below: Activations,
    gradient: torch.Tensor,
    matrices: Matrices,
    gradient_type: str,
    weights: Sequence[float],
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Computes the sensitivities of a layer's matrices, and the gradient (N, T, D) below the layer from that above it.

    `weights` has one factor per window, for its squared gradient.
    """
    decoder, layer = below.decoder, below.layer
    totals = {
        name: torch.zeros_like(matrix.weight, dtype=torch.float32, memory_format=torch.contiguous_format)
        for name, matrix in matrices.items()
    }
    gradients_below = torch.empty_like(gradient)
    for start in range(0, len(below.windows), below.batcher.size):
        rows = slice(start, min(start + below.batcher.size, len(below.windows)))
        back, factors, of_experts = _backward(
            decoder, layer, below.states(rows), below.inputs.of(rows), gradient[rows].to(decoder.device), matrices
        )
        gradients_below[rows] = back
        for name, x, y in factors:
            for window, weight in enumerate(weights[rows]):
                _add(totals[name], y[window].T @ x[window], gradient_type, weight)
        for name, of_expert in of_experts.items():
            _add(totals[name], of_expert, gradient_type, weights[start])  # of the one window
    return totals, gradients_below


def _backward(
    decoder: Decoder,
    layer: int,
    hidden_states: torch.Tensor,
    inputs: LayerInputs,
    gradient: torch.Tensor,
    matrices: Matrices,
) -> tuple[torch.Tensor, list[tuple[str, torch.Tensor, torch.Tensor]], dict[str, torch.Tensor]]:
    """Back-propagates the gradient of a layer's output (B, T, D) to its input, in fp32.

    Also returns (name, its input (B, T, in), the gradient of its output (B, T, out)) of each linear. Their product is
    the weight's gradient for each window; autograd would only give the sum over windows. Of the matrices of experts it
    gives that sum, (out, in) by name.
    """
    experts = {name: matrix for name, matrix in matrices.items() if matrix.expert is not None}
    stacks = {id(one.whole): one.whole for one in experts.values()}
    calls: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def record(module, args, output, name: str) -> None:
        # What only chooses, such as the tokens that an attention looks at, runs without gradients: they are zero.
        output = output if output.requires_grad else torch.zeros_like(output, requires_grad=True)
        calls.append((name, args[0], output))

    hooks = [
        matrix.module.register_forward_hook(partial(record, name=name))
        for name, matrix in matrices.items()
        if name not in experts
    ]
    try:
        with torch.enable_grad(), one_by_one(experts.values()):
            for stack in stacks.values():
                stack.requires_grad_()
            hidden_states = hidden_states.float().requires_grad_()
            output = decoder.run_layer(layer, hidden_states, _to_float32(inputs, layer), _ON)
            outputs = [hidden_states, *(result for _, _, result in calls)]
            wanted = [*outputs, *stacks.values()]
            back, *found = torch.autograd.grad(output, wanted, gradient.to(output.device), materialize_grads=True)
    finally:
        for hook in hooks:
            hook.remove()
        for stack in stacks.values():
            stack.requires_grad_(False)
    rows, of_stacks = len(hidden_states), dict(zip(stacks, found[len(calls) :], strict=True))
    factors = [
        (name, given.detach().reshape(rows, -1, given.shape[-1]), of_output.reshape(rows, -1, of_output.shape[-1]))
        for (name, given, _), of_output in zip(calls, found, strict=False)
    ]
    of_experts = {name: one.part_of(of_stacks[id(one.whole)]) for name, one in experts.items()}
    return back, factors, of_experts


def window_weights(gradient_type: str, count: int) -> list[float]:
    """The factor of each window's squared gradient: 1, except for the last with `l2_hundred_total`."""
    last = 1 + 100**2 if gradient_type == "l2_hundred_total" else 1
    return [1.0] * (count - 1) + [float(last)]


def _add(total: torch.Tensor, gradient: torch.Tensor, gradient_type: str, weight: float) -> None:
    if gradient_type == "l1":
        total.add_(gradient.abs_())
    else:
        total.addcmul_(gradient, gradient, value=weight)


# fp32 -----------------------------------------------------------------------------------------------------------------


@contextmanager
def _in_float32(layer: nn.Module) -> Iterator[None]:
    """Inside, the layer's parameters are in fp32, so that no gradient of a half-precision model underflows."""
    kept = [(parameter, parameter.data) for parameter in layer.parameters() if parameter.dtype != torch.float32]
    try:
        for parameter, data in kept:
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def _to_float32(inputs: LayerInputs, layer: int) -> LayerInputs:
    """One layer's arguments, at its index, with floating-point tensors converted to fp32."""
    args: list[tuple] = [()] * layer
    kwargs: list[dict] = [{}] * layer
    return LayerInputs([*args, _float(inputs.args[layer])], [*kwargs, _float(inputs.kwargs[layer])])


def _float(value):
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _float(inner) for key, inner in value.items()}
    return type(value)(_float(inner) for inner in value) if type(value) in (list, tuple) else value
