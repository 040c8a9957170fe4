"""The loop that prunes a model: layer by layer, look at its inputs, prune its linears, move the windows on through it.

The only place where a pruner and the sparsities of layers meet. The statistics of a layer come from its weights as they
were, and from inputs that the layers before it made with their new weights.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from lib.engine.activations import Activations
from lib.errors import RunError
from lib.models.decoder import Decoder, StopForward
from lib.models.linears import InputGroup, inputs_seen
from lib.models.weight_deltas import Changes, Difference, difference
from lib.runtime.batching import Batcher, Progress
from lib.runtime.distributed import Ranks
from lib.sparsity.pruners import Pruner

Timed = Callable[[str], AbstractContextManager]


def prune_layers(
    decoder: Decoder,
    groups: Sequence[Sequence[InputGroup]],
    pruner: Pruner,
    sparsities: Sequence[float],
    windows: torch.Tensor | None,
    batcher: Batcher,
    say: Callable[[str], object] = lambda remark: None,
    progress: Progress | None = None,
    timed: Timed = lambda name: nullcontext(),
    changes: Changes | None = None,
) -> None:
    """Prunes every linear of every layer in place, layer i to `sparsities[i]`.

    `groups` are those of `input_groups`; `windows` (N, T) are the calibration tokens, None for a pruner that needs no
    inputs. `say` is given what a pruner has to remark, and `timed` the names of the parts of the work: `observe` (the
    pass that collects statistics), `select` (the pruner) and `advance` (the pass with the new weights). Each finished
    layer is written to `changes`, and the first layers that are there already are taken from it; a model whose layers
    are read from disk needs them. Several processes share the windows, and a layer's groups. Raises `RunError` naming a
    layer whose numbers are not finite.
    """
    pending = [layer for layer in range(len(groups)) if not changes or layer not in changes]
    activations = None
    if pruner.needs_inputs and pending:
        share = batcher.share(len(windows))
        with timed("advance"):
            activations = Activations(decoder, windows[share], batcher, first=share.start)
    for layer, layer_groups in enumerate(groups):
        with decoder.at(layer):
            if layer in pending:
                statistics = [None] * len(layer_groups)
                if activations:
                    with timed("observe"):
                        statistics = observe(activations, layer_groups, pruner)
                with timed("select"):
                    found = _prune_layer(
                        layer, layer_groups, statistics, pruner, sparsities[layer], say, batcher.ranks, changes
                    )
                    if changes:
                        (changes.write if batcher.ranks.is_first else changes.add)(layer, found)
            elif not decoder.is_on_disk:  # from where it comes with its new weights
                _take_over(layer, layer_groups, changes)
            decoder.keep(layer)
            if activations and layer < pending[-1]:
                with timed("advance"):
                    activations.advance()
        if progress:
            progress(1)
    batcher.ranks.wait()  # until all that is written can be read


def _take_over(layer: int, groups: Sequence[InputGroup], changes: Changes) -> None:
    """Gives a layer the weights that an earlier run has made."""
    for group in groups:
        for name, linear in zip(group.names, group.linears, strict=True):
            linear.weight.copy_(changes.apply(layer, f"{name}.weight", linear.weight))


def _prune_layer(
    layer: int,
    groups: Sequence[InputGroup],
    statistics: list,
    pruner: Pruner,
    sparsity: float,
    say: Callable[[str], object],
    ranks: Ranks,
    changes: Changes | None,
) -> dict[str, Difference]:
    """Prunes one layer's linears in place, each group in one of the processes.

    Gives what became of each weight, when somebody wants to keep it. Takes `statistics` off their list, so that none
    outlives its use.
    """
    found: dict[str, Difference] = {}
    for number, group in enumerate(groups):
        statistic, names, owner = statistics.pop(0), ", ".join(group.names), number % ranks.count
        remark, before = None, [linear.weight.clone() for linear in group.linears] if changes is not None else []
        if ranks.rank == owner:
            try:
                prune_group(group, statistic, pruner, sparsity)
            except RunError as error:
                raise RunError(f"layer {layer} {names}: {error}") from error
            remark = pruner.remark(statistic)
        for linear in group.linears:
            ranks.send(linear.weight, owner)
        if remark := ranks.tell(remark, owner):
            say(f"layer {layer} {names}: {remark}")
        for name, linear, old in zip(group.names, group.linears, before, strict=False):
            found[f"{name}.weight"] = difference(old, linear.weight)
    return found


def observe(activations: Activations, groups: Sequence[InputGroup], pruner: Pruner) -> list:
    """The statistics of the inputs that the current layer's groups share, over the windows of all processes.

    In one pass, which begins anew with smaller batches when memory runs out.
    """
    batcher, windows = activations.batcher, torch.tensor(len(activations.windows))
    statistics = batcher.whole(lambda: _look(activations, groups, pruner), len(activations.windows))
    batcher.ranks.add(windows)
    for statistic in statistics:
        statistic.combine(batcher.ranks.add, int(windows))
    return statistics


def _look(activations: Activations, groups: Sequence[InputGroup], pruner: Pruner) -> list:
    """The statistics over the windows of this process.

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


def count_zeros(decoder: Decoder, groups: Sequence[Sequence[InputGroup]]) -> list[tuple[int, int]]:
    """For every layer the zeros among the weights of its linears, and the number of its weights."""
    counts = []
    for index, layer in enumerate(groups):
        with decoder.at(index):
            weights = [linear.weight for group in layer for linear in group.linears]
            counts.append((sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)))
    return counts
