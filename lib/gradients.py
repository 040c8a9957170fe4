"""Connection sensitivity of every weight of the decoder's linears, layer by layer, and its spread in each layer.

As in ALP, "Adaptive Layerwise Pruning in Large Language Models": the gradient of the loss for each of a few short
windows, squared and summed. The gradients of the whole model are never held: one pass keeps the input of each layer;
then, from the last layer down, a layer is run again, back-propagated, its sensitivities are reduced to a few numbers
and dropped. Memory beyond the weights is one layer's accumulators (and its fp32 weights where the model's are not fp32)
and the layers' inputs, whatever the number of layers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lib.errors import RunError
from lib.evaluate import token_losses
from lib.linears import find_linears
from lib.model import Decoder, LayerInputs
from lib.plan import Mode, Plan
from lib.stream import layer_steps

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


def connection_sensitivity(
    decoder: Decoder,
    windows: torch.Tensor,
    gradient_type: str = "l2",
    loss: str = "last",
    progress: Callable[[int], object] | None = None,
) -> list[LayerSensitivity]:
    """The sensitivities of every layer over windows (N, T) of token ids.

    `loss`: the cross-entropy of a window's `last` token, or the mean over `all` but the first. `gradient_type`: `l2`
    sums the squares of the windows' gradients, `l1` their sizes; `l2_hundred_total` adds the square of 100 times the
    last window's to `l2`, as the released code does. Raises `RunError` naming the layer when they are not finite.
    """
    linears = find_linears(decoder)
    inputs, layer_inputs = _inputs_of_layers(decoder, windows)
    batches = _batches(windows)
    gradients = [_tail_gradient(decoder, inputs[-1][rows], windows[rows], loss) for rows in batches]
    found: list[LayerSensitivity] = []
    for layer in reversed(range(decoder.num_layers)):
        totals = {
            name: torch.zeros_like(linear.weight, dtype=torch.float32, memory_format=torch.contiguous_format)
            for name, linear in linears[layer].items()
        }
        with _in_float32(decoder.layers[layer]):
            for number, rows in enumerate(batches):
                hidden_states, arguments = inputs[layer][rows], layer_inputs[number]
                gradients[number], factors = _backward(
                    decoder, layer, hidden_states, arguments, gradients[number], linears[layer]
                )
                for name, x, y in factors:
                    for window, weight in enumerate(_window_weights(gradient_type, rows, len(windows))):
                        _add(totals[name], y[window].T @ x[window], gradient_type, weight)
        found.append(summarize(totals))
        if not math.isfinite(found[-1].layer.redundancy):
            raise RunError(f"NaN or infinity in the gradients of layer {layer}; try --dtype float32 or bfloat16")
        inputs.pop()
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


def _batches(windows: torch.Tensor) -> list[slice]:
    size = max(1, _TOKENS_AT_ONCE // windows.shape[1])
    return [slice(start, min(start + size, len(windows))) for start in range(0, len(windows), size)]


@torch.no_grad()
def _inputs_of_layers(decoder: Decoder, windows: torch.Tensor) -> tuple[list[torch.Tensor], list[LayerInputs]]:
    """The input (N, T, D) of every layer and, last, the output of the last; what layers get besides, by batch."""
    parts: list[list[torch.Tensor]] = [[] for _ in range(decoder.num_layers + 1)]
    layer_inputs = []
    for rows in _batches(windows):
        layer_inputs.append(decoder.embed(windows[rows])[1])
        for layer, hidden_states, output in layer_steps(decoder, windows[rows], Plan(decoder.num_layers).modes):
            parts[layer].append(hidden_states)
            if layer == decoder.num_layers - 1:
                parts[layer + 1].append(output)
    return [torch.cat(batches) for batches in parts], layer_inputs


def _tail_gradient(decoder: Decoder, hidden_states: torch.Tensor, input_ids: torch.Tensor, loss: str) -> torch.Tensor:
    """d loss / d last hidden states (B, T, D) in fp32, of each window's own loss."""
    with torch.enable_grad():
        predicting = slice(-2, -1) if loss == "last" else slice(0, -1)
        states = hidden_states[:, predicting].clone().requires_grad_()
        logits = decoder.logits(states)
        labels = input_ids[:, 1:][:, -logits.shape[1] :].to(logits.device)
        total = token_losses(logits, labels).mean(dim=1).sum()
        (gradient,) = torch.autograd.grad(total, states)
    whole = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    whole[:, predicting] = gradient.float()
    return whole


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


def _window_weights(gradient_type: str, rows: slice, count: int) -> list[float]:
    """What the squared gradient of each window of a batch counts: 1, and for the last of all perhaps more."""
    last = 1 + 100**2 if gradient_type == "l2_hundred_total" else 1
    return [float(last if window == count - 1 else 1) for window in range(rows.start, rows.stop)]


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
    args, kwargs = [()] * layer, [{}] * layer
    return LayerInputs([*args, _float(inputs.args[layer])], [*kwargs, _float(inputs.kwargs[layer])])


def _float(value):
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _float(inner) for key, inner in value.items()}
    return type(value)(_float(inner) for inner in value) if type(value) in (list, tuple) else value
