"""The loop that prunes a model: layer by layer, look at its inputs, prune its linears, move the windows on through it.

The only place where a pruner and the sparsities of layers meet. The statistics of a layer come from its weights as they
were, and from inputs that the layers before it made with their new weights.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from lib.batching import Batcher
from lib.errors import RunError
from lib.linears import InputGroup, inputs_seen
from lib.model import Decoder, StopForward
from lib.pruners import Pruner
from lib.stream import Activations

Timed = Callable[[str], AbstractContextManager]


def prune_layers(
    decoder: Decoder,
    groups: Sequence[Sequence[InputGroup]],
    pruner: Pruner,
    sparsities: Sequence[float],
    windows: torch.Tensor | None,
    batcher: Batcher,
    say: Callable[[str], object] = lambda remark: None,
    progress: Callable[[int], object] | None = None,
    timed: Timed = lambda name: nullcontext(),
) -> None:
    """Prunes every linear of every layer in place, layer i to `sparsities[i]`.

    `groups` are those of `input_groups`; `windows` (N, T) are the calibration tokens, None for a pruner that needs no
    inputs. `say` is given what a pruner has to remark, and `timed` the names of the parts of the work: `observe` (the
    pass that collects statistics), `select` (the pruner) and `advance` (the pass with the new weights). Raises
    `RunError` naming a layer whose numbers are not finite.
    """
    activations = None
    if pruner.needs_inputs:
        with timed("advance"):
            activations = Activations(decoder, windows, batcher)
    for layer, layer_groups in enumerate(groups):
        statistics = [None] * len(layer_groups)
        if activations:
            with timed("observe"):
                statistics = batcher.whole(lambda: observe(activations, layer_groups, pruner), len(windows))  # noqa: B023
        with timed("select"):
            _prune_layer(layer, layer_groups, statistics, pruner, sparsities[layer], say)
        if activations and layer < len(groups) - 1:
            with timed("advance"):
                activations.advance()
        if progress:
            progress(1)


def _prune_layer(
    layer: int,
    groups: Sequence[InputGroup],
    statistics: list,
    pruner: Pruner,
    sparsity: float,
    say: Callable[[str], object],
) -> None:
    """Prunes one layer's linears in place. Takes `statistics` off their list, so that none outlives its use."""
    for group in groups:
        statistic, names = statistics.pop(0), ", ".join(group.names)
        try:
            prune_group(group, statistic, pruner, sparsity)
        except RunError as error:
            raise RunError(f"layer {layer} {names}: {error}") from error
        if remark := pruner.remark(statistic):
            say(f"layer {layer} {names}: {remark}")


def observe(activations: Activations, groups: Sequence[InputGroup], pruner: Pruner) -> list:
    """The statistics of the inputs that the current layer's groups share, over all windows, in one pass.

    The layer's forward is left before its last group runs: what comes after gives no inputs.
    """
    statistics = [pruner.statistic(group.in_features, group.device) for group in groups]
    statistic_of = {group.names[0]: statistic for group, statistic in zip(groups, statistics, strict=True)}
    last, seqlen = groups[-1].names[0], activations.windows.shape[1]

    def update(name: str, inputs: torch.Tensor) -> None:
        statistic_of[name].update(inputs.detach().reshape(-1, seqlen, inputs.shape[-1]))
        if name == last:
            raise StopForward

    with inputs_seen({group.names[0]: group.linears[0] for group in groups}, update):
        activations.look()
    return statistics


@torch.no_grad()
def prune_group(group: InputGroup, statistic, pruner: Pruner, sparsity: float) -> None:
    """Prunes the weights of one group in place."""
    pruned = pruner.prune([linear.weight.detach() for linear in group.linears], statistic, sparsity)
    for linear, weight in zip(group.linears, pruned, strict=True):
        linear.weight.copy_(weight)


def count_zeros(groups: Sequence[Sequence[InputGroup]]) -> list[tuple[int, int]]:
    """For every layer the zeros among the weights of its linears, and the number of its weights."""
    counts = []
    for layer in groups:
        weights = [linear.weight for group in layer for linear in group.linears]
        counts.append((sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)))
    return counts
