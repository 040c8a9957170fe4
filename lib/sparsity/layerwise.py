"""The loop that prunes a model layer by layer: observe a layer's inputs, prune its linears, advance the activations.

The only place where pruners and per-layer sparsities meet. A layer's statistics are collected before it is pruned, from
inputs that the pruned layers before it produced.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Monitor:
    """Callbacks of the loop: `print` gets the pruner's remarks, `progress` the number of layers just finished.

    `timed` gets the name of the part it times: `observe` (the pass that collects statistics), `select` (the pruner) or
    `advance` (the pass with the new weights).
    """

    print: Callable[[str], object] = lambda remark: None
    progress: Progress = lambda layers: None
    timed: Timed = lambda part: nullcontext()


def prune_layers(
    decoder: Decoder,
    groups: Sequence[Sequence[InputGroup]],
    pruner: Pruner,
    sparsities: Sequence[float],
    windows: torch.Tensor | None,
    batcher: Batcher,
    monitor: Monitor = Monitor(),  # noqa: B008  (frozen)
    changes: Changes | None = None,
) -> None:
    """Prunes every linear of every layer in place, layer i to `sparsities[i]`.

    `groups` come from `input_groups`. `windows` (N, T) are the calibration set, or None if the pruner needs no inputs.
    Each finished layer is written to `changes`; layers already there are restored. A model whose layers are read from
    disk needs `changes`. Multiple processes split the windows, and each layer's groups. Raises `RunError` naming the
    layer if its inputs are not finite, or its Hessian is not positive definite.
    """
    ranks, pending = batcher.ranks, [layer for layer in range(len(groups)) if changes is None or layer not in changes]
    activations = None
    if pruner.needs_inputs and pending:
        assert windows is not None, "this pruner needs calibration windows"
        share = batcher.share(len(windows))
        with monitor.timed("advance"):
            activations = Activations(decoder, windows[share], batcher, first=share.start)
    for layer, layer_groups in enumerate(groups):
        with decoder.at(layer):
            if layer in pending:
                statistics: list = [None] * len(layer_groups)
                if activations:
                    with monitor.timed("observe"):
                        statistics = observe(activations, layer_groups, pruner)
                with monitor.timed("select"):
                    differences, remarks = _prune_layer(
                        layer, layer_groups, statistics, pruner, sparsities[layer], ranks, keep=changes is not None
                    )
                    if changes is not None:
                        (changes.write if ranks.is_first else changes.add)(layer, differences)
                for remark in remarks:
                    monitor.print(remark)
            elif changes is not None and not decoder.is_on_disk:  # from disk, a layer is read with its changes
                _restore_layer(layer, layer_groups, changes)
            decoder.keep(layer)
            if activations and layer < pending[-1]:
                with monitor.timed("advance"):
                    activations.advance()
        monitor.progress(1)
    ranks.wait()  # until the first process has written everything


def _restore_layer(layer: int, groups: Sequence[InputGroup], changes: Changes) -> None:
    """Restores a layer's weights as an earlier, interrupted run computed them."""
    for group in groups:
        for name, linear in zip(group.names, group.linears, strict=True):
            linear.weight.copy_(changes.apply(layer, f"{name}.weight", linear.weight))


def _prune_layer(
    layer: int,
    groups: Sequence[InputGroup],
    statistics: list,
    pruner: Pruner,
    sparsity: float,
    ranks: Ranks,
    keep: bool,
) -> tuple[dict[str, Difference], list[str]]:
    """Prunes one layer's linears in place, each group in one of the processes.

    Returns how each weight changed (empty unless `keep`) and the pruner's remarks. Pops each of the `statistics` so
    that it is freed after use.
    """
    differences: dict[str, Difference] = {}
    remarks: list[str] = []
    for number, group in enumerate(groups):
        statistic, names, owner = statistics.pop(0), ", ".join(group.names), number % ranks.count
        remark, before = None, [linear.weight.clone() for linear in group.linears] if keep else []
        if ranks.rank == owner:
            try:
                prune_group(group, statistic, pruner, sparsity)
            except RunError as error:
                raise RunError(f"layer {layer} {names}: {error}") from error
            remark = pruner.remark(statistic)
        for linear in group.linears:
            ranks.send(linear.weight, owner)
        if remark := ranks.tell(remark, owner):
            remarks.append(f"layer {layer} {names}: {remark}")
        for name, linear, old in zip(group.names, group.linears, before, strict=False):
            differences[f"{name}.weight"] = difference(old, linear.weight)
    return differences, remarks


def observe(activations: Activations, groups: Sequence[InputGroup], pruner: Pruner) -> list:
    """Collects the input statistics of the current layer's groups, over the windows of all processes.

    Takes one pass, which starts over with smaller batches if memory runs out.
    """
    batcher, windows = activations.batcher, torch.tensor(len(activations.windows))
    statistics = batcher.retry_smaller(lambda: _observe_share(activations, groups, pruner), len(activations.windows))
    batcher.ranks.add(windows)
    for statistic in statistics:
        statistic.combine(batcher.ranks.add, int(windows))
    return statistics


def _observe_share(activations: Activations, groups: Sequence[InputGroup], pruner: Pruner) -> list:
    """Collects the statistics over this process's windows.

    Stops the layer's forward before its last group runs, since nothing after that is observed.
    """
    statistics = [pruner.statistic(group.in_features, group.device) for group in groups]
    statistic_of = {group.names[0]: statistic for group, statistic in zip(groups, statistics, strict=True)}
    last, seqlen = groups[-1].names[0], activations.windows.shape[1]

    def update(name: str, inputs: torch.Tensor) -> None:
        statistic = statistic_of[name]
        assert statistic is not None, "a pruner that needs inputs has a statistic"
        statistic.update(inputs.detach().reshape(-1, seqlen, inputs.shape[-1]))
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
    """Counts (zeros, weights) in the linears of every layer."""
    counts = []
    for index, layer in enumerate(groups):
        with decoder.at(index):
            weights = [linear.weight for group in layer for linear in group.linears]
            counts.append((sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)))
    return counts
