"""The pruner and the quantizer that a run's settings select."""

from lib.config.methods import ALLOCATORS, PRUNERS
from lib.config.sparsity import SparsityPruning
from lib.sparsity.pruners import Pruner, Rounded, SparseGpt


def make_pruner(settings: SparsityPruning) -> Pruner:
    """The pruner, without quantization."""
    entry = settings.method.pruning
    if not entry.prunes:
        return Pruner()
    parameters = {argument: getattr(settings, flag) for argument, flag in entry.parameters.items()}
    return entry.load()(pattern=settings.pattern, **parameters)


def make_quantizer(settings: SparsityPruning) -> Pruner | None:
    """The quantizer; None without quantization.

    SparseGPT prunes and rounds the dense weights in one pass. Other quantizers round the pruned weights.
    """
    if not settings.quantization:
        return None
    if settings.rounds_while_pruning:
        return SparseGpt(settings.pattern, settings.percdamp, settings.quantization)
    return Rounded(settings.quantization, settings.percdamp)


# Fail at import, not in the middle of a run, if a registered method lacks its implementation or states wrong needs.
for _pruner in PRUNERS.values():
    if _pruner.load().needs_inputs != _pruner.needs_inputs:
        raise TypeError(f"pruner {_pruner.name}: its entry and {_pruner.implementation} disagree on needs_inputs")
for _allocator in ALLOCATORS.values():
    _allocator.load()
