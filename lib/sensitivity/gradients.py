"""Connection sensitivity of every weight of the decoder's linears, layer by layer, and its spread in each layer.

As in ALP, "Adaptive Layerwise Pruning in Large Language Models": the gradient of the loss for each of a few short
windows, squared and summed. The gradients of the whole model are never held: one pass keeps the input of each layer;
then, from the last layer down, a layer is run again, back-propagated, its sensitivities are reduced to a few numbers
and dropped. Memory beyond the weights is one layer's accumulators (and its fp32 weights where the model's are not fp32)
and the layers' inputs, whatever the number of layers.
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
from lib.models.linears import find_linears
from lib.runtime.batching import Batcher, Progress
from lib.runtime.distributed import ALONE, Ranks

_TOKENS_AT_ONCE = 512
_ON = Mode()


@dataclass(frozen=True)
class Spread:
    """How sensitivities G are spread: their number, mean, unbiased standard deviation, and sum of |G - mean| / std."""

    count: int
    mean: float
    std: float
    redundancy: float


@dataclass(frozen=True)
class LayerSensitivity:
    """The spread of all sensitivities of a layer, and of each of its linears by itself."""

    layer: Spread
    linears: dict[str, Spread]


class Unfinished(Protocol):
    """Where the work on the layers above one is kept, so that a run that was killed goes on below them."""

    def load(self) -> tuple[list[LayerSensitivity], torch.Tensor] | None:
        """What was saved last: sensitivities from the last layer down, and the gradient (N, T, D) below them."""

    def save(self, found: list[LayerSensitivity], gradient: torch.Tensor) -> None:
        """Keeps what is found in place of what was saved before."""


def connection_sensitivity(
    decoder: Decoder,
    windows: torch.Tensor,
    gradient_type: str = "l2",
    loss: str = "last",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    unfinished: Unfinished | None = None,
) -> list[LayerSensitivity]:
    """The sensitivities of every layer over windows (N, T) of token ids.

    `loss`: the cross-entropy of a window's `last` token, or the mean over `all` but the first. `gradient_type`: `l2`
    sums the squares of the windows' gradients, `l1` their sizes; `l2_hundred_total` adds the square of 100 times the
    last window's to `l2`, as the released code does. Several processes share the windows. Raises `RunError` naming the
    layer when they are not finite.
    """
    linears = find_linears(decoder)
    batcher = Batcher(max(1, _TOKENS_AT_ONCE // windows.shape[1]), ranks)
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
            one_layer = partial(_one_layer, below, gradient, linears[layer], gradient_type, weights)
            totals, gradient = batcher.whole(one_layer, len(below.windows))
            for total in totals.values():
                ranks.add(total)
        found.append(summarize(totals))
        del totals
        if not math.isfinite(found[-1].layer.redundancy):
            raise RunError(f"NaN or infinity in the gradients of layer {layer}; try --dtype float32 or bfloat16")
        if unfinished and layer:
            unfinished.save(found, ranks.gather(gradient.cpu()))
        if progress:
            progress(1)
    return found[::-1]


def summarize(sensitivities: dict[str, torch.Tensor]) -> LayerSensitivity:
    """The spreads of a layer's sensitivities {linear: (out, in)}, with sums in fp64."""
    linears = {name: spread([values]) for name, values in sensitivities.items()}
    return LayerSensitivity(spread(list(sensitivities.values())), linears)


def spread(parts: Sequence[torch.Tensor]) -> Spread:
    """The spread of all the elements of some tensors taken together. Redundancy 0 when they are all equal."""
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


# One pass up, one pass down -------------------------------------------------------------------------------------------


@torch.no_grad()
def _inputs_of_layers(decoder: Decoder, windows: torch.Tensor, batcher: Batcher) -> list[Activations]:
    """The windows before every layer and, last, after the last."""
    walk, found = Activations(decoder, windows, batcher), []
    for _ in range(decoder.num_layers):
        found.append(walk.fork())
        walk.step()
    return [*found, walk]


def _tail_gradient(last: Activations, loss: str) -> torch.Tensor:
    """d loss / d last hidden states (N, T, D) in fp32, of each window's own loss."""
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
    return last.batcher.map(of_batch, count) if count else torch.zeros(0, seqlen, decoder.config.hidden_size)


def _one_layer(
    below: Activations,
    gradient: torch.Tensor,
    linears: dict[str, nn.Linear],
    gradient_type: str,
    weights: Sequence[float],
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """G of a layer's linears over some windows, and the gradient (N, T, D) below the layer for that above it.

    `weights` says how much each window's squared gradient counts.
    """
    decoder, layer = below.decoder, below.layer
    totals = {
        name: torch.zeros_like(linear.weight, dtype=torch.float32, memory_format=torch.contiguous_format)
        for name, linear in linears.items()
    }
    gradients_below = torch.empty_like(gradient)
    for start in range(0, len(below.windows), below.batcher.size):
        rows = slice(start, min(start + below.batcher.size, len(below.windows)))
        back, factors = _backward(
            decoder, layer, below.states(rows), below.inputs.of(rows), gradient[rows].to(decoder.device), linears
        )
        gradients_below[rows] = back
        for name, x, y in factors:
            for window, weight in enumerate(weights[rows]):
                _add(totals[name], y[window].T @ x[window], gradient_type, weight)
    return totals, gradients_below


def _backward(
    decoder: Decoder,
    layer: int,
    hidden_states: torch.Tensor,
    inputs: LayerInputs,
    gradient: torch.Tensor,
    linears: dict[str, nn.Linear],
) -> tuple[torch.Tensor, list[tuple[str, torch.Tensor, torch.Tensor]]]:
    """Takes the gradient of a layer's output (B, T, D) to that of its input, in fp32.

    Also gives (linear, its input (B, T, in), the gradient of its output (B, T, out)), whose product is a window's
    gradient of the weight: autograd itself makes none, and so no sum over windows.
    """
    calls: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    hooks = [
        linear.register_forward_hook(lambda module, args, output, name=name: calls.append((name, args[0], output)))
        for name, linear in linears.items()
    ]
    try:
        with torch.enable_grad():
            hidden_states = hidden_states.float().requires_grad_()
            output = decoder.run_layer(layer, hidden_states, _to_float32(inputs, layer), _ON)
            outputs = [hidden_states, *(result for _, _, result in calls)]
            back, *of_outputs = torch.autograd.grad(output, outputs, gradient.to(output.device))
    finally:
        for hook in hooks:
            hook.remove()
    rows = len(hidden_states)
    factors = [
        (name, given.detach().reshape(rows, -1, given.shape[-1]), of_output.reshape(rows, -1, of_output.shape[-1]))
        for (name, given, _), of_output in zip(calls, of_outputs, strict=True)
    ]
    return back, factors


def window_weights(gradient_type: str, count: int) -> list[float]:
    """What the squared gradient of each window counts: 1, and for the last of all perhaps more."""
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
    """A layer's arguments with floating point tensors in fp32, at that layer's place."""
    args: list[tuple] = [()] * layer
    kwargs: list[dict] = [{}] * layer
    return LayerInputs([*args, _float(inputs.args[layer])], [*kwargs, _float(inputs.kwargs[layer])])


def _float(value):
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _float(inner) for key, inner in value.items()}
    return type(value)(_float(inner) for inner in value) if type(value) in (list, tuple) else value


def importance(sensitivities: Sequence[LayerSensitivity]) -> list[float]:
    """ALP's importance of each layer: 1 - its share of the redundancy of all layers."""
    total = sum(sensitivity.layer.redundancy for sensitivity in sensitivities)
    return [1 - (sensitivity.layer.redundancy / total if total else 0.0) for sensitivity in sensitivities]
