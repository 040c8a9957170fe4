"""The console lines of a run of `ppllms.py`."""

from collections.abc import Sequence

import torch

from lib.config.depth import DepthPruning
from lib.config.plan import Plan, SavedPlan
from lib.depth.beam import Beam
from lib.depth.budget import Budget, Counts
from lib.depth.compensation import Refit, token_counts
from lib.depth.greedy import Round
from lib.evaluation.distance import Evaluation
from lib.models.decoder import Decoder
from lib.models.limits import dtype_name
from lib.reporting.console import Report, columns


def show_model(report: Report, name: str, decoder: Decoder) -> None:
    layers = decoder.paired_layers
    report.print(f"Model       {name} ({decoder.family}, {dtype_name(decoder.model)}, {decoder.device})")
    parameters = f"Parameters  {decoder.total_parameters:,} in {decoder.num_layers} layers"
    if len(layers) < decoder.num_layers:
        report.print(f"{parameters}, {len(layers)} of them whole")
    if not layers:
        return
    mha, ffn = decoder.sublayer_parameters(layers[0])
    if len(layers) == decoder.num_layers:
        report.print(f"{parameters}; a layer's attention {mha:,}")
        report.print(f"            and FFN {ffn:,}, {ffn / mha:.2f} times as many")
    else:
        report.print(f"            a layer's attention {mha:,} and FFN {ffn:,}, {ffn / mha:.2f} times as many")


def show_saved_plan(report: Report, saved: SavedPlan, parameters: int, compensates: bool) -> None:
    """The plan, and notes: when the given model has another size than the plan's, and when its changes are left out."""
    report.print(f"Plan        {saved.path}, found for {saved.model}")
    if not saved.fits(parameters):
        report.print(f"Note        that model has {saved.parameters:,} parameters: is this another?")
    if saved.changed and not compensates:
        changed = f"its run changed {len(saved.changed.linears)} of the matrices that stay"
        report.print(f"Note        {changed}; here they stay as they are, and --compensate would refit them")


def show_calibration(report: Report, dataset: str, windows: torch.Tensor, seed: int) -> None:
    report.print(f"Calibration {dataset}: {len(windows)} windows of {windows.shape[1]} tokens, seed {seed}")


def show_influence(report: Report, bi_scores: list[float], windows: torch.Tensor) -> None:
    report.print()
    report.print(f"Block Influence by layer, over {len(windows)} windows of {windows.shape[1]} tokens")
    for row in columns([f"{layer}: {score:.4f}" for layer, score in enumerate(bi_scores)], 6):
        report.print("  " + row)


def show_counts(report: Report, settings: DepthPruning, budget: Budget, counts: Counts, candidates: list[int]) -> None:
    """How many sublayers are removed, and which settings decided it."""
    given = [settings.mha_remove_layers is not None, settings.ffn_remove_layers is not None]
    ratio = settings.mha_ffn_ratio
    how = "as given" if all(given) else f"nearest to a rate of {settings.prune_rate:g}"
    if any(given) and not all(given):
        how += f", with the {'MHA' if given[0] else 'FFN'} count as given"
    elif not any(given):
        how += f" with about {'P_ffn/P_mha' if ratio == 'auto' else format(ratio, 'g')} FFNs for each MHA"
    report.print()
    report.print(f"Candidates  {candidates} lose their FFN (lowest BI first)")
    rate = budget.rate(*counts)
    report.print(f"Counts      {counts.mha} MHA and {counts.ffn} FFN layers, {rate:.2%} of all parameters: {how}")


def show_search(report: Report, counts: Counts, windows: int) -> None:
    report.print()
    rounds = f"{counts.mha} round{'s' * (counts.mha != 1)}"
    report.print(f"Greedy search: {rounds}, loss on {windows} windows with each candidate closed whole")


def show_round(report: Report, number: int, found: Round) -> None:
    report.print(f"  round {number}: layer {found.selected} is chosen, loss {found.loss:.2f}")
    for row in columns([f"{layer}: {loss:.2f}" for layer, loss in found.losses.items()], 5):
        report.print("    " + row)


def show_policy(report: Report, method: str, windows: int) -> None:
    report.print()
    report.print(f"Greedy search of {method}, loss on {windows} windows without each of what is left")


def show_step(report: Report, number: int, step: Round) -> None:
    report.print(f"  step {number}: {step.selected} goes, loss {step.loss:.2f}, the lowest of {len(step.losses)}")


def show_beam(report: Report, found: Beam, others: dict[str, dict], rate: float) -> None:
    """The plan of the beam search, which removes a share `rate`, beside the plans of the other methods."""
    report.print()
    report.print("Beam search: of every amount of removed parameters the plans of lowest loss, grown by every sublayer")
    for method, plan in others.items():
        report.print(f"  {method}: loss {plan['loss']:.2f} with {plan['actual_rate']:.2%} removed")
    whose = "its own" if found.origin == "beam" else f"that of {found.origin}, taken up to the rate"
    report.print(f"  chosen: loss {found.loss:.2f} with {rate:.2%} removed, {whose}")
    report.print(f"  {found.trials:,} models measured in all these searches, {found.at_most:,} at most")


def show_experts(report: Report, decoder: Decoder, number: int) -> None:
    """How many experts are removed, and from how many layers."""
    sets = [experts for experts in decoder.experts if experts]
    report.print(f"REAP        {number} of {sets[0].count} experts go in each of {len(sets)} layers")


def show_plan(report: Report, plan: Plan, parameters: dict) -> None:
    total, removed = parameters["total"], parameters["removed"]
    report.print()
    if plan.experts_removed:
        for layer, experts in enumerate(plan.experts_removed):
            report.print(f"Experts removed     layer {layer}: {', '.join(map(str, experts)) or 'none'}")
    else:
        report.print(f"MHA removal layers  {list(plan.mha_removed)}  (in order of choice)")
        report.print(f"FFN removal layers  {list(plan.ffn_removed)}")
    if plan.removed_layers:
        report.print(f"Gone whole          {plan.removed_layers}")
        if set(plan.mha_removed) == set(plan.ffn_removed):
            numbers = ",".join(map(str, plan.removed_layers))
            report.print(f"In llama.cpp        llama-quantize --prune-layers {numbers} IN.gguf OUT.gguf TYPE")
    report.print(f"Parameters          {total:,} -> {total - removed:,}, {parameters['actual_rate']:.2%} removed")


def show_evaluation(
    report: Report, text: str, found: dict[str, Evaluation], windows: torch.Tensor, is_first: bool
) -> None:
    if is_first:
        report.print()
        report.print("Perplexity (dense -> pruned), and distance to the dense model; ± standard error over windows")
    size = f"{len(windows)} windows of {windows.shape[1]} tokens"
    pruned = found["pruned"]
    report.print(f"  {text}: {found['dense'].perplexity} -> {pruned.perplexity}  ({size})")
    report.print(f"    {pruned.distance}")


def show_speed(report: Report, dense: float, pruned: float) -> None:
    report.print(f"Prefill             {dense:,.0f} -> {pruned:,.0f} tokens/s here, {pruned / dense:.2f} times")


def show_compensation(report: Report, settings: DepthPruning, windows: torch.Tensor) -> None:
    """What projections are refitted on."""
    to_fit, to_check = token_counts(windows)
    report.print()
    report.print(f"Compensation {settings.compensate}, on {settings.compensate_dataset}")
    report.print(f"  output projections are fitted to {to_fit:,} tokens, and chosen by {to_check:,} others")


def show_refits(report: Report, refits: Sequence[Refit]) -> None:
    """How many projections were changed, and where the hidden states came back the most."""
    changed = [refit for refit in refits if refit.is_changed]
    most = max((refit.unknowns for refit in refits), default=0)
    report.print(f"  {len(changed)} of {len(refits)} changed; each of their outputs has up to {most:,} unknowns")
    if changed:
        best = min(changed, key=lambda refit: refit.held_out_error)
        taken = f"takes back {1 - best.held_out_error:.1%} of what is missing after it"
        report.print(f"  the most: layer {best.layer} {best.name} {taken}")


def show_compensated(report: Report, text: str, found: dict[str, Evaluation]) -> None:
    pruned, compensated = found["pruned"], found["compensated"]
    report.print(f"  {text}: perplexity {pruned.perplexity} -> {compensated.perplexity}")
    report.print(f"    {compensated.distance}")
