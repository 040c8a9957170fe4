"""The search of every depth method: from a run to a plan, and what result.json says of how it was found.

Each function here is the `implementation` of an entry in `lib.config.methods.DEPTH_METHODS`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lib.config.methods import DEPTH_METHODS
from lib.config.plan import Plan
from lib.depth import report as depth_report
from lib.depth.beam import beam
from lib.depth.block_influence import block_influence
from lib.depth.greedy import Round, choose_candidates, greedy_search
from lib.depth.moves import greedy, moves_of
from lib.depth.policies import random_layers, shortgpt
from lib.depth.prepare import budget_of, check_decoder, find_counts
from lib.depth.reap import check_experts, expert_saliency, remove_least
from lib.errors import InputError

if TYPE_CHECKING:
    from lib.depth.run import DepthRun

BEAM_STARTS = ("shortgpt", "ppllms", "sleb", "blockpruner")  # methods whose plans the beam search starts beside


def search_ppllms(run: DepthRun) -> tuple[Plan, dict]:
    """PP-LLMs: Block Influence, candidates, greedy search."""
    report, settings = run.report, run.settings
    bi_scores = rank_layers(run)
    counts = find_counts(settings, run.decoder)
    candidates = choose_candidates(bi_scores, counts.ffn, run.decoder.paired_layers)
    depth_report.show_counts(report, settings, budget_of(run.decoder), counts, candidates)
    sweep = run.workspace.sweep(settings.seed)
    windows = len(sweep.windows)
    depth_report.show_search(report, counts, windows)
    with report.timed("search"), report.progress(counts.mha * windows, "search") as progress:
        on_round = partial(depth_report.show_round, report)
        plan, rounds = greedy_search(sweep, candidates, counts.mha, on_round, progress)
    return plan, {"bi_scores": bi_scores, "candidates": candidates, "rounds": describe_rounds(rounds)}


def search_shortgpt(run: DepthRun) -> tuple[Plan, dict]:
    """ShortGPT: Block Influence only."""
    bi_scores = rank_layers(run)
    return shortgpt(run.decoder, bi_scores, run.settings.prune_rate), {"bi_scores": bi_scores}


def search_greedy(run: DepthRun) -> tuple[Plan, dict]:
    """SLEB (whole layers) and BlockPruner (sublayers): at each step the removal that gives the lowest loss."""
    sweep, moves = run.workspace.sweep(run.settings.seed), moves_of(run.settings.depth_method, run.decoder)
    depth_report.show_policy(run.report, run.settings.method, len(sweep.windows))
    with run.report.timed("search"):
        plan, steps = greedy(sweep, moves, run.settings.prune_rate, partial(depth_report.show_step, run.report))
    return plan, {"rounds": describe_rounds(steps)}


def search_random(run: DepthRun) -> tuple[Plan, dict]:
    """Whole layers drawn by the seed."""
    return random_layers(run.decoder, run.settings.prune_rate, run.settings.seed), {}


def search_beam(run: DepthRun) -> tuple[Plan, dict]:
    """Ours: beam search beside the plans of all methods in `BEAM_STARTS` that can reach the rate."""
    settings, decoder = run.settings, run.decoder
    sweep = run.workspace.sweep(settings.seed)
    others: dict[str, Plan] = {}
    bi_scores: dict[str, list[float]] = {}
    sweep.asked.clear()
    for method in BEAM_STARTS:
        other = run.with_settings(replace(settings, method=method, save_model=None))
        try:
            check_decoder(other.settings, decoder)
        except InputError:
            continue  # it has no plan for this rate
        others[method], found = DEPTH_METHODS[method].load()(other)
        bi_scores |= {name: value for name, value in found.items() if name == "bi_scores"}
    total = decoder.total_parameters
    with run.report.timed("search"):
        known = {
            method: {"loss": sweep.loss(plan), "actual_rate": decoder.removed_parameters(plan) / total}
            for method, plan in others.items()
        }
        best = beam(sweep, settings.prune_rate, settings.beam_width, others)
    depth_report.show_beam(run.report, best, known, decoder.removed_parameters(best.plan) / total)
    return best.plan, {
        **bi_scores,
        "beam": {"width": settings.beam_width, "loss": best.loss, "origin": best.origin, "others": known},
        "trials": {"measured": best.trials, "at_most": best.at_most},
    }


def search_reap(run: DepthRun) -> tuple[Plan, dict]:
    """REAP: in each layer the experts of lowest saliency."""
    workspace, seed = run.workspace, run.settings.seed
    windows, number = workspace.windows[seed], check_experts(run.decoder, run.settings.prune_rate)
    depth_report.show_experts(run.report, run.decoder, number)
    with run.report.timed("search"), run.report.progress(run.decoder.num_layers, "saliency") as progress:
        saliencies = run.state.once(
            f"saliency {seed}", lambda: expert_saliency(run.decoder, windows, workspace.batcher, progress)
        )
    return remove_least(saliencies, number), {"expert_saliency": saliencies}


def rank_layers(run: DepthRun) -> list[float]:
    """Block Influence of all layers, computed once for a seed and printed as a table."""
    seed, workspace = run.settings.seed, run.workspace
    chosen = workspace.windows[seed][: run.settings.bi_windows]
    if seed not in workspace.bi_scores:
        with run.report.timed("bi"), run.report.progress(len(chosen), "Block Influence") as progress:
            workspace.bi_scores[seed] = run.state.once(
                "bi_scores", lambda: block_influence(run.decoder, chosen, workspace.batcher, progress)
            )
    depth_report.show_influence(run.report, workspace.bi_scores[seed], chosen)
    return workspace.bi_scores[seed]


def describe_rounds(rounds: list[Round]) -> list[dict]:
    """The `rounds` of result.json: removals by the numbers of layers, or in words."""

    def label(removal):
        return removal if isinstance(removal, int) else str(removal)

    return [
        {
            "losses": {label(removal): loss for removal, loss in found.losses.items()},
            "selected": label(found.selected),
            "loss": found.loss,
        }
        for found in rounds
    ]
