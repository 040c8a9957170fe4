"""REAP: removal of whole experts (arXiv:2510.13999), of those that add least to the layer's output."""

from collections.abc import Sequence
from functools import partial

import torch

from lib.config.plan import Plan
from lib.engine.activations import Activations
from lib.errors import InputError
from lib.models.decoder import Decoder
from lib.models.experts import Experts, expert_groups, picked_experts
from lib.models.matrices import find_matrices, outputs_seen
from lib.runtime.batching import Batcher, Progress


def expert_saliency(
    decoder: Decoder, windows: torch.Tensor, batcher: Batcher, progress: Progress | None = None
) -> list[list[float]]:
    """The saliency of every expert, by layer; none for a dense layer.

    It is the mean, over the tokens of windows (N, T) that the router sends to the expert, of the norm of its output
    times the router's weight for it; 0 for an expert that gets no token. Raises `InputError` for a layer whose router
    weighs the experts in another way.
    """
    share, matrices = batcher.share(len(windows)), find_matrices(decoder)
    activations = Activations(decoder, windows[share], batcher, first=share.start)
    picked, found = picked_experts(decoder.config) or 0, []
    for index, experts in enumerate(decoder.experts):
        saliency: list[float] = []
        if experts:
            measure = partial(_weighted_norms, activations, matrices[index], experts)
            with decoder.at(index):
                totals = batcher.retry_smaller(measure, len(activations.windows))
            batcher.ranks.add(totals)
            if int(totals[1].sum()) != windows.numel() * picked:
                raise InputError(f"--method reap: how the router of {decoder.family} weighs experts is not seen")
            saliency = (totals[0] / totals[1].clamp(min=1)).tolist()
        found.append(saliency)
        activations.advance()
        if progress:
            progress(1)
    return found


def _weighted_norms(activations: Activations, matrices: dict, experts: Experts) -> torch.Tensor:
    """Sums of weighted norms, and numbers of tokens, (2, experts) in fp64, over this process's windows."""
    totals = torch.zeros(2, experts.count, dtype=torch.float64)

    def see(expert: int, outputs: torch.Tensor, weights: torch.Tensor) -> None:
        norms = outputs.float().norm(dim=-1) * weights.float().abs().squeeze(-1)
        totals[:, expert] += torch.tensor([float(norms.sum(dtype=torch.float64)), len(norms)], dtype=torch.float64)

    with outputs_seen(activations.decoder.layers[activations.layer], matrices, see):
        activations.look()
    return totals


def check_experts(decoder: Decoder, target: float) -> int:
    """How many experts each layer loses, so that the model loses a share of its parameters as near as can be.

    Raises `InputError` for a model without experts, or with such that cannot be removed, and for a rate out of reach.
    """
    name, sets = decoder.family, [experts for experts in decoder.experts if experts]
    if not sets:
        raise InputError(f"--method reap: {name} has no experts that could be removed")
    if decoder.is_offloaded or decoder.has_weights and any(p.is_meta for p in decoder.model.parameters()):
        raise InputError("--method reap: needs the whole model on its devices; leave --offload and --device_map out")
    picked, counts = picked_experts(decoder.config), sorted({experts.count for experts in sets})
    if picked is None or len(counts) > 1:
        raise InputError(f"--method reap: {name} does not say how many of its {counts} experts the router picks")
    if (groups := expert_groups(decoder.config)) > 1:
        raise InputError(f"--method reap: {name} has its experts in {groups} groups, which would no longer be alike")
    one, total = sum(experts.parameters for experts in sets), decoder.total_parameters
    most = counts[0] - max(picked, 1)
    best = min(range(most + 1), key=lambda number: abs(number * one - target * total))
    if not best or target * total > (most + 0.5) * one:
        reach = f"{one / total:.4f} to {most * one / total:.4f}" if most else "nothing, as all experts are picked"
        raise InputError(f"--prune_rate {target:g} cannot be reached by this method: it removes {reach}")
    if decoder.has_weights:  # two tokens show whether the router's weights are seen
        expert_saliency(decoder, torch.zeros(1, 2, dtype=torch.long), Batcher(1))
    return best


def remove_least(saliencies: Sequence[Sequence[float]], number: int) -> Plan:
    """The plan without the `number` experts of lowest saliency in each layer; ties go to the first."""
    return Plan(
        len(saliencies),
        experts_removed=tuple(
            tuple(sorted(sorted(range(len(of_layer)), key=of_layer.__getitem__)[:number])) for of_layer in saliencies
        ),
    )
