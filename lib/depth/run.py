"""The PP-LLMs run, from settings to result.json: load, count, rank, search (or take a saved plan), measure, save."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lib.config.depth import DepthPruning
from lib.config.plan import Plan
from lib.config.sources import local_path, short_name
from lib.depth import report as depth_report
from lib.depth.beam import beam
from lib.depth.block_influence import block_influence
from lib.depth.budget import Counts
from lib.depth.greedy import Round, choose_candidates, greedy_search
from lib.depth.policies import blockpruner, random_layers, shortgpt, sleb
from lib.depth.prepare import Job, budget_of, check_config, check_decoder, find_counts, prepare
from lib.depth.trial_losses import Sweep
from lib.engine.window_losses import plan_window_losses
from lib.errors import InputError
from lib.evaluation.perplexity import Perplexity, as_fields, perplexity
from lib.export.huggingface import save_pruned
from lib.models.decoder import Decoder
from lib.models.limits import dtype_name
from lib.models.loading import load_config
from lib.reporting.console import Report
from lib.reporting.environment import environment
from lib.reporting.plots import REMOVALS, plot_removals
from lib.runs.grid import Grid, Keep, run_grid
from lib.runs.single import run_single
from lib.runtime.device import resolve_device
from lib.runtime.distributed import join
from lib.runtime.memory import peak_memory_bytes
from lib.runtime.setup import set_up
from lib.storage.resume_state import FOLDER, State, digest


def run(settings: DepthPruning) -> dict:
    """Prunes one model; returns what it wrote to result.json. Raises `InputError` and `RunError`."""
    return run_single(settings, prepare, prune_once)


def prune_once(report: Report, settings: DepthPruning, job: Job) -> dict:
    """A run on a job that is prepared."""
    depth_report.say_model(report, settings.model_name, job.decoder)
    plan, result = find_plan(report, settings, job)
    finish(report, settings, job, plan, result)
    return result


def run_all(cells: Sequence[DepthPruning], folder: Path, overwrite: bool) -> None:
    """Runs a grid, and keeps its tables in a folder. Raises `InputError` and `RunError`."""
    set_up()
    ranks = join(resolve_device(cells[0].source.device))
    grid = Grid(
        across="share of the parameters removed",
        check=lambda of_model: check_config(of_model, load_config(of_model[0].source)),
        prepare=lambda report, of_model: prepare(report, of_model, ranks),
        run=run_cell,
    )
    run_grid(grid, cells, folder, overwrite, ranks)


def run_cell(report: Report, settings: DepthPruning, job: Job, keep: Keep) -> dict:
    """One cell of a grid, which goes on with what is finished of it."""
    job.state = State.of_cell(report.folder / FOLDER, settings.key, job.batcher.ranks)
    with job.state.session(report.seconds):
        depth_report.say_model(report, settings.model_name, job.decoder)
        _, result = find_plan(report, settings, job)
        keep(result)
    return result


def find_plan(report: Report, settings: DepthPruning, job: Job) -> tuple[Plan, dict]:
    """The plan, searched or given, and all that result.json says of it."""
    if settings.saved_plan:
        plan, found = settings.saved_plan.plan, {"applied_plan": str(settings.saved_plan.path)}
        depth_report.say_saved_plan(report, settings.saved_plan, job.decoder.total_parameters)
    else:
        plan, found = search_plan(report, settings, job)
    parameters = count_parameters(settings, job.decoder, plan)
    depth_report.say_plan(report, plan, parameters)
    result = {
        **describe_run(settings, job),
        **found,
        "mha_removed": list(plan.mha_removed),
        "ffn_removed": list(plan.ffn_removed),
        "parameters": parameters,
        **measure(report, settings, job, plan),
        "seconds": report.seconds,
        "peak_memory_bytes": peak_memory_bytes(job.decoder.device),
        "environment": environment(job.decoder.device),
    }
    return plan, result


# The search -----------------------------------------------------------------------------------------------------------


def search_plan(report: Report, settings: DepthPruning, job: Job) -> tuple[Plan, dict]:
    """The plan that the method finds, and what result.json says of its making."""
    if settings.method == "random":
        return random_layers(job.decoder, settings.prune_rate, settings.seed), {}
    depth_report.say_calibration(report, settings.dataset, job.windows[settings.seed], settings.seed)
    found = SEARCHES[settings.method](report, settings, job)
    job.sweep(settings.seed).forget()  # what it kept is room for the rest of the run
    return found


def search_shortgpt(report: Report, settings: DepthPruning, job: Job) -> tuple[Plan, dict]:
    """ShortGPT: Block Influence only."""
    bi_scores = rank_layers(report, settings, job)
    return shortgpt(job.decoder, bi_scores, settings.prune_rate), {"bi_scores": bi_scores}


def search_greedy(report: Report, settings: DepthPruning, job: Job) -> tuple[Plan, dict]:
    """SLEB or BlockPruner."""
    sweep, policy = job.sweep(settings.seed), {"sleb": sleb, "blockpruner": blockpruner}[settings.method]
    depth_report.say_policy(report, settings.method, len(sweep.windows))
    with report.timed("search"):
        plan, steps = policy(sweep, settings.prune_rate, depth_report.step_sayer(report))
    return plan, {"rounds": describe_rounds(steps)}


def search_beam(report: Report, settings: DepthPruning, job: Job) -> tuple[Plan, dict]:
    """Ours: the beam search beside the plans of all other methods that can reach the rate."""
    sweep, others, bi_scores = job.sweep(settings.seed), {}, {}
    sweep.asked.clear()
    for method in ("shortgpt", "ppllms", "sleb", "blockpruner"):
        other = replace(settings, method=method, save_model=None)
        try:
            check_decoder(other, job.decoder)
        except InputError:
            continue  # it has no plan for this rate
        others[method], told = SEARCHES[method](report, other, job)
        bi_scores |= {name: value for name, value in told.items() if name == "bi_scores"}
    total = job.decoder.total_parameters
    with report.timed("search"):
        known = {
            method: {"loss": sweep.loss(plan), "actual_rate": job.decoder.removed_parameters(plan) / total}
            for method, plan in others.items()
        }
        found = beam(sweep, settings.prune_rate, settings.beam_width, others)
    depth_report.say_beam(report, found, known, job.decoder.removed_parameters(found.plan) / total)
    return found.plan, {
        **bi_scores,
        "beam": {"width": settings.beam_width, "loss": found.loss, "origin": found.origin, "others": known},
        "trials": {"measured": found.trials, "at_most": found.at_most},
    }


def search_ppllms(report: Report, settings: DepthPruning, job: Job) -> tuple[Plan, dict]:
    """PP-LLMs: Block Influence, candidates, greedy search."""
    decoder = job.decoder
    bi_scores = rank_layers(report, settings, job)
    counts = find_counts(settings, decoder)
    candidates = choose_candidates(bi_scores, counts.ffn, decoder.whole_layers)
    depth_report.say_counts(report, settings, budget_of(decoder), counts, candidates)
    plan, rounds = search_mha(report, job.sweep(settings.seed), candidates, counts)
    return plan, {
        "bi_scores": bi_scores,
        "candidates": candidates,
        "rounds": describe_rounds(rounds),
    }


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


def rank_layers(report: Report, settings: DepthPruning, job: Job) -> list[float]:
    """Block Influence of all layers, said as a table."""
    chosen = job.windows[settings.seed][: settings.bi_windows]
    if settings.seed not in job.bi_scores:
        with report.timed("bi"), report.progress(len(chosen), "Block Influence") as progress:
            job.bi_scores[settings.seed] = job.state.once(
                "bi_scores", lambda: block_influence(job.decoder, chosen, job.batcher, progress)
            )
    depth_report.say_influence(report, job.bi_scores[settings.seed], chosen)
    return job.bi_scores[settings.seed]


def search_mha(report: Report, sweep: Sweep, candidates: list[int], counts: Counts) -> tuple[Plan, list[Round]]:
    """The greedy search, each round said as it ends."""
    windows = len(sweep.windows)
    depth_report.say_search(report, counts, windows)
    with report.timed("search"), report.progress(counts.mha * windows, "search") as progress:
        on_round = depth_report.round_sayer(report)
        return greedy_search(sweep, candidates, counts.mha, on_round, progress)


SEARCHES = {
    "ppllms": search_ppllms,
    "shortgpt": search_shortgpt,
    "sleb": search_greedy,
    "blockpruner": search_greedy,
    "beam": search_beam,
}

# After it -------------------------------------------------------------------------------------------------------------


def count_parameters(settings: DepthPruning, decoder: Decoder, plan: Plan) -> dict:
    """The `parameters` of result.json."""
    total, removed = decoder.total_parameters, decoder.removed_parameters(plan)
    is_by_rate = settings.mha_remove_layers is None or settings.ffn_remove_layers is None
    target = settings.prune_rate if is_by_rate and not settings.saved_plan else None
    return {"total": total, "removed": removed, "target_rate": target, "actual_rate": removed / total}


def measure(report: Report, settings: DepthPruning, job: Job, plan: Plan) -> dict[str, dict]:
    """`perplexity` and `perplexity_standard_error`, of the dense and of the pruned model on every evaluation text."""

    def measured(which: Plan, text: str, stage: str) -> Perplexity:
        windows = job.eval_windows[text]

        def compute() -> Perplexity:
            with report.progress(len(windows), "perplexity") as progress:
                losses = plan_window_losses(job.decoder, which, job.batcher, progress)
                return perplexity(losses, windows, settings.eval_stride)

        with report.timed("evaluate"):
            return Perplexity(*job.state.once(f"perplexity of {stage} on {text}", compute))

    found: dict[str, dict[str, Perplexity]] = {}
    report.seconds.setdefault("evaluate", 0.0)
    for text, windows in job.eval_windows.items():
        if text not in job.dense:
            job.dense[text] = measured(Plan(job.decoder.num_layers), text, "dense")
        found[text] = {"dense": job.dense[text], "pruned": measured(plan, text, "pruned")}
        depth_report.say_perplexity(report, text, found[text], windows, is_first=len(found) == 1)
    return as_fields(found)


def finish(report: Report, settings: DepthPruning, job: Job, plan: Plan, result: dict) -> None:
    """Writes result.json and the plot, then the model; what was found is safe should saving fail."""
    report.seconds.setdefault("save", 0.0)
    if not report.is_first:
        return
    path = report.result(result)
    plot = report.folder / REMOVALS
    title = f"{short_name(settings.model_name)}: {result['parameters']['actual_rate']:.1%} of the parameters removed"
    drawn = "bi_scores" in result
    if drawn and not plot_removals(plot, result["bi_scores"], plan.mha_removed, plan.ffn_removed, title):
        plot = "none: matplotlib is not installed (pip install matplotlib)"
    if settings.save_model:
        with report.timed("save"):
            overwrite = job.state.claim_model_folder(settings.save_model, settings.overwrite)
            save_pruned(job.decoder, plan, job.tokenizer, settings.save_model, settings.save_format, overwrite)
        report.result(result | {"saved_model": str(settings.save_model.resolve())})
    depth_report.say_written(report, path, plot if drawn else None, settings.save_model)


def describe_run(settings: DepthPruning, job: Job) -> dict:
    """The fields of result.json that say what was asked for."""
    described = {
        "tool": "ppllms",
        "key": digest(settings.key),
        "model": settings.model_name,
        "model_path": local_path(settings.model_name),
        "seqlen": job.seqlen,
        "eval_stride": settings.eval_stride,
        "dtype": dtype_name(job.decoder.model),
        "batch_size": job.batcher.size,
        "num_layers": job.decoder.num_layers,
    }
    if settings.saved_plan:
        return described
    described |= {"method": settings.method, "seed": settings.seed}
    if not settings.needs_windows:
        return described
    windows = len(job.windows[settings.seed])
    return described | {
        "nsamples": settings.nsamples,
        "dataset": settings.dataset,
        "windows": windows,
        "bi_windows": min(settings.bi_windows or windows, windows),
    }
