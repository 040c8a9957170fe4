"""The loop that prunes a model layer by layer: observe a layer's inputs, prune its matrices, advance the activations.

The only place where pruners and per-layer sparsities meet. A layer's statistics are collected before it is pruned, from
inputs that the pruned layers before it produced.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from lib.engine.activations import Activations
from lib.errors import RunError
from lib.models.decoder import Decoder, StopForward
from lib.models.matrices import InputGroup, inputs_seen
from lib.models.weight_deltas import Changes, Difference, are_masked, difference, zeroed, zeros_of
from lib.runtime.batching import Batcher, Progress, retry_once
from lib.runtime.distributed import Ranks
from lib.runtime.memory import free_bytes
from lib.sparsity.pruners import Pruner
from lib.sparsity.sparsegpt import Hessian

Timed = Callable[[str], AbstractContextManager]
_ROOM = 0.25  # share of the free memory, for the statistics of a layer's experts
_FEW_TOKENS = 16  # an expert that saw fewer is pruned without looking at them
_UNSEEN = "too few for a statistic, so only the weights themselves are looked at"


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
    """Prunes every matrix of every layer in place, layer i to `sparsities[i]`.

    `groups` come from `input_groups`. `windows` (N, T) are the calibration set, or None if the pruner needs no inputs.
    Each finished layer is written to `changes`, while the windows pass through it and the next one, which is pruned
    only then; layers already there are restored. A model whose layers are read from disk needs `changes`. Multiple
    processes split the windows, and each layer's groups. Raises `RunError` naming the layer if its inputs are not
    finite, or its Hessian is not positive definite.
    """
    ranks, pending = batcher.ranks, [layer for layer in range(len(groups)) if changes is None or layer not in changes]
    keep = changes is not None or ranks.are_several
    activations = None
    if pruner.needs_inputs and pending:
        assert windows is not None, "this pruner needs calibration windows"
        share = batcher.share(len(windows))
        with monitor.timed("advance"):
            activations = Activations(decoder, windows[share], batcher, first=share.start)
    with changes if changes is not None else nullcontext():
        for layer, layer_groups in enumerate(groups):
            with decoder.at(layer):
                if layer in pending:
                    differences: dict[str, Difference] = {}
                    for part in parts_of(layer_groups, pruner, ranks):
                        statistics: list = [None] * len(part)
                        if activations:
                            with monitor.timed("observe"):
                                statistics = observe(activations, part, pruner)
                        with monitor.timed("select"):
                            if changes is not None:
                                changes.finish()
                            found, remarks = _prune_part(
                                layer, part, statistics, pruner, sparsities[layer], ranks, keep
                            )
                        differences |= found
                        for remark in remarks:
                            monitor.print(remark)
                    if changes is not None:
                        with monitor.timed("select"):
                            (changes.write if ranks.is_first else changes.add)(layer, differences)
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
        for name, matrix in zip(group.names, group.matrices, strict=True):
            matrix.stored.copy_(changes.apply(layer, matrix.path_in(name), matrix.stored))


def parts_of(groups: Sequence[InputGroup], pruner: Pruner, ranks: Ranks) -> list[list[InputGroup]]:
    """The groups of a layer in parts, whose statistics fit the memory together: each is observed, and then pruned.

    Whole experts come first, as many at a time as fit; the other groups, with the last of them. No expert changes the
    inputs of another, or of what is beside or before them, so the results are those of a single part.
    """
    experts: dict[int | None, list[InputGroup]] = {}
    for group in groups:
        experts.setdefault(group.expert, []).append(group)
    shared = experts.pop(None, [])
    if not experts:
        return [shared]
    room = ranks.agree(lambda: int(_ROOM * free_bytes(groups[0].device))) - _statistic_bytes(shared, pruner)
    parts: list[list[InputGroup]] = [[]]
    taken = 0
    for of_expert in experts.values():
        size = _statistic_bytes(of_expert, pruner)
        if parts[-1] and taken + size > room:
            parts.append([])
            taken = 0
        parts[-1] += of_expert
        taken += size
    return [*parts[:-1], [*shared, *parts[-1]]]


def _statistic_bytes(groups: Sequence[InputGroup], pruner: Pruner) -> int:
    """What the statistics of some groups take."""
    empty = (pruner.statistic(group.in_features, torch.device("meta")) for group in groups)
    return sum(statistic.nbytes for statistic in empty if statistic)


def _prune_part(
    layer: int,
    groups: Sequence[InputGroup],
    statistics: list,
    pruner: Pruner,
    sparsity: float,
    ranks: Ranks,
    keep: bool,
) -> tuple[dict[str, Difference], list[str]]:
    """Prunes some of a layer's matrices in place, each group in one of the processes, at the same time.

    Returns how each weight changed (empty unless `keep`, which several processes need) and the pruner's remarks. Pops
    each of the `statistics` so that it is freed after use.
    """
    owners = share_out(list(map(_work, groups, statistics)), ranks.count)
    places = [f"layer {layer} {', '.join(group.names)}" for group in groups]
    pruned: dict[int, _Pruned] = {}
    for number, group in enumerate(groups):
        statistic = statistics.pop(0)
        if owners[number] != ranks.rank:
            continue
        is_unseen = group.is_routed and statistic is not None and statistic.tokens < _FEW_TOKENS
        seen = None if is_unseen else statistic
        differences: dict[str, Difference] = {}
        with _differences(group, differences, keep):
            try:
                retry_once(partial(prune_group, group, seen, pruner, sparsity))  # which changes weights at its end
            except RunError as error:
                raise RunError(f"{places[number]}: {error}") from error
        remark = f"{statistic.tokens} tokens came to it: {_UNSEEN}" if is_unseen else pruner.remark(statistic)
        pruned[number] = _Pruned(differences, remark)
    if ranks.are_several:  # only now, because a process waits here until another has pruned its groups
        _exchange(groups, owners, pruned, ranks)
    in_order = [pruned[number] for number in range(len(groups))]
    remarks = [f"{place}: {one.remark}" for place, one in zip(places, in_order, strict=True) if one.remark]
    return {path: change for one in in_order for path, change in one.differences.items()}, remarks


class _Pruned(NamedTuple):
    """How a group's weights changed, by path in the layer, and the pruner's remark."""

    differences: dict[str, Difference]
    remark: str | None


def _exchange(groups: Sequence[InputGroup], owners: Sequence[int], pruned: dict[int, _Pruned], ranks: Ranks) -> None:
    """Sends what this process `pruned`, by number of the group, and adds what the others did."""
    told = [(one.remark, are_masked(one.differences.values())) for one in pruned.values()]
    for owner in range(ranks.count):
        numbers = [number for number, of_group in enumerate(owners) if of_group == owner]
        for number, (remark, kinds) in zip(numbers, ranks.tell(told, owner), strict=True):
            group = groups[number]
            differences = pruned[number].differences if ranks.rank == owner else {}
            for name, matrix, is_masked in zip(group.names, group.matrices, kinds, strict=True):
                path = matrix.path_in(name)
                if ranks.rank == owner:
                    ranks.send(differences[path].zeros if is_masked else matrix.stored, owner)
                else:
                    differences[path] = _received(matrix.stored, is_masked, owner, ranks)
            pruned[number] = _Pruned(differences, remark)


def _received(weight: torch.Tensor, is_masked: bool, owner: int, ranks: Ranks) -> Difference:
    """Changes a weight in place as the process `owner` did, which sends only the zeros if they are the change."""
    if is_masked:
        zeros = retry_once(partial(torch.empty_like, weight, dtype=torch.bool))
        ranks.send(zeros, owner)
        weight.copy_(retry_once(partial(zeroed, weight, zeros)))
    else:
        ranks.send(weight, owner)
        zeros = retry_once(partial(zeros_of, weight))
    return Difference(weight.detach(), zeros, torch.tensor(is_masked, device=weight.device))


def share_out(work: Sequence[int], count: int) -> list[int]:
    """Which of `count` processes does each piece of work: the largest piece first, by the one with the least so far."""
    loads, owners = [0] * count, [0] * len(work)
    for piece in sorted(range(len(work)), key=lambda piece: -work[piece]):
        owners[piece] = loads.index(min(loads))
        loads[owners[piece]] += work[piece]
    return owners


def _work(group: InputGroup, statistic) -> int:
    """How long pruning a group takes, in proportion: a Hessian is factored, and then each row goes through it."""
    columns, rows = group.in_features, sum(matrix.weight.shape[0] for matrix in group.matrices)
    return columns**2 * (columns + rows) if isinstance(statistic, Hessian) else columns * rows


@contextmanager
def _differences(group: InputGroup, found: dict[str, Difference], keep: bool) -> Iterator[None]:
    """Notes in `found` how the block changes the weights of a group, if they are kept."""
    before = [retry_once(matrix.stored.clone) for matrix in group.matrices] if keep else []
    yield
    for name, matrix, old in zip(group.names, group.matrices, before, strict=False):
        found[matrix.path_in(name)] = retry_once(partial(difference, old, matrix.stored))


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

    Stops the layer's forward before its last group runs, since nothing after that is observed; not with experts.
    """
    statistics = [pruner.statistic(group.in_features, group.device) for group in groups]
    of_name = {group.names[0]: (group, statistic) for group, statistic in zip(groups, statistics, strict=True)}
    seqlen = activations.windows.shape[1]

    def update(name: str, inputs: torch.Tensor) -> None:
        group, statistic = of_name[name]
        assert statistic is not None, "a pruner that needs inputs has a statistic"
        by_window = (1, -1) if group.is_routed else (-1, seqlen)
        statistic.update(inputs.detach().reshape(*by_window, inputs.shape[-1]))
        if group is groups[-1] and not group.is_routed:
            raise StopForward

    layer = activations.decoder.layers[activations.layer]
    with inputs_seen(layer, {group.names[0]: group.matrices[0] for group in groups}, update):
        activations.look()
    return statistics


@torch.no_grad()
def prune_group(group: InputGroup, statistic, pruner: Pruner, sparsity: float) -> None:
    """Prunes the weights of one group in place, by its inputs, or without a statistic of them."""
    weights = [matrix.weight.detach() for matrix in group.matrices]
    pruned = pruner.prune(weights, statistic, sparsity) if statistic else pruner.prune_unseen(weights, sparsity)
    for matrix, weight in zip(group.matrices, pruned, strict=True):
        matrix.weight.copy_(weight)


def count_zeros(decoder: Decoder, groups: Sequence[Sequence[InputGroup]]) -> list[tuple[int, int]]:
    """Counts (zeros, weights) in the matrices of every layer."""
    counts = []
    for index, layer in enumerate(groups):
        with decoder.at(index):
            weights = [matrix.stored for group in layer for matrix in group.matrices]
            counts.append(retry_once(partial(_count_zeros, weights)))
    return counts


def _count_zeros(weights: Sequence[torch.Tensor]) -> tuple[int, int]:
    total = sum(weight.numel() for weight in weights)
    return total - int(sum(torch.count_nonzero(weight) for weight in weights)), total  # one wait for all
