"""The PP-LLMs run, from settings to result.json: load, count, rank, search (or take a saved plan), measure, save."""

from dataclasses import dataclass

import torch

from lib import depth_report
from lib.batching import Batcher, automatic_batch_size
from lib.bi import block_influence
from lib.data import calibration_windows, evaluation_windows, load_corpus
from lib.errors import InputError
from lib.evaluate import perplexity
from lib.export import check_format, save_pruned
from lib.inputs import check_tokens, dtype_name, window_length
from lib.loading import load_config, load_model, load_outline, load_tokenizer, resolve_device
from lib.model import Decoder
from lib.modeling_pruned import skip_lists
from lib.names import local_path, short_name
from lib.plan import Plan
from lib.plots import REMOVALS, plot_removals
from lib.policies import blockpruner, check_reachable, moves_of, random_layers, shortgpt, sleb
from lib.report import Report, environment, peak_memory_bytes, quiet_libraries
from lib.search import Budget, Counts, Round, Sweep, choose_candidates, choose_counts, greedy_search
from lib.settings import DepthPruning
from lib.stream import plan_window_losses


@dataclass(frozen=True)
class Job:
    """What a run works on, all of it checked."""

    tokenizer: object
    decoder: Decoder
    windows: torch.Tensor | None  # (N, T), for the search
    eval_windows: dict[str, torch.Tensor]  # of each text
    batcher: Batcher
    seqlen: int  # tokens of a window


def run(settings: DepthPruning) -> dict:
    """Prunes one model; returns what it wrote to result.json. Raises `InputError` and `RunError`."""
    quiet_libraries()
    report = Report()
    job = prepare(report, settings)
    report.open(settings.output_dir)
    depth_report.say_model(report, settings.model_name, job.decoder)
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
        "perplexity": measure(report, job, plan),
        "seconds": report.seconds,
        "peak_memory_bytes": peak_memory_bytes(job.decoder.device),
        "environment": environment(job.decoder.device),
    }
    finish(report, settings, job, plan, result)
    return result


# Before work starts ---------------------------------------------------------------------------------------------------


def prepare(report: Report, settings: DepthPruning) -> Job:
    """Loads and checks everything. Raises `InputError`, where it can before the weights are read."""
    source = settings.source
    with report.timed("load"):
        resolve_device(source.device)
        config = load_config(source)
        seqlen = check_config(settings, config)
        tokenizer = load_tokenizer(source)
    with report.timed("data"):
        windows, eval_windows = load_windows(settings, tokenizer, seqlen, config.vocab_size)
    with report.timed("load"):
        outline = load_outline(config, source.trust_remote_code)
        if outline is not None:
            check_decoder(settings, Decoder(outline, has_weights=False))
        decoder = Decoder(load_model(source))
        check_decoder(settings, decoder)
    batcher = Batcher(settings.batch_size or automatic_batch_size(decoder.device, seqlen))
    return Job(tokenizer, decoder, windows, eval_windows, batcher, seqlen)


def check_config(settings: DepthPruning, config) -> int:
    """Checks counts and window length against a model's config; returns the window length in tokens."""
    layers, name = config.num_hidden_layers, settings.model_name
    if settings.num_blocks not in (None, layers):
        raise InputError(f"--num_blocks {settings.num_blocks}: {name} has {layers} decoder layers; leave the flag out")
    if settings.saved_plan:
        planned = settings.saved_plan.plan.num_layers
        if planned != layers:
            raise InputError(f"--apply_plan: was made for {planned} decoder layers, but {name} has {layers}")
    else:
        whole = layers - sum(map(bool, skip_lists(config)))
        check_counts(settings, whole, f"{name} has {whole} {'' if whole == layers else 'whole '}decoder layers")
    return window_length(name, config, settings.seqlen)


def check_counts(settings: DepthPruning, layers: int, having: str) -> None:
    """Raises `InputError` unless the counts asked for leave something of the layers that can be pruned."""
    if layers < 2 and settings.method != "blockpruner":
        raise InputError(f"{having}; pruning needs at least 2")
    if (settings.mha_remove_layers or 0) >= layers:
        raise InputError(f"--mha_remove_layers {settings.mha_remove_layers}: {having}; one must stay")
    if (settings.ffn_remove_layers or 0) > layers:
        raise InputError(f"--ffn_remove_layers {settings.ffn_remove_layers}: {having}, no more")


def check_decoder(settings: DepthPruning, decoder: Decoder) -> None:
    """Checks a model, which may be without weights, against the plan or the budget, and the format to be saved."""
    if settings.saved_plan:
        plan = settings.saved_plan.plan
        for what, layers, absent in (
            ("attention", plan.mha_removed, [not mode.attention for mode in decoder.given_modes]),
            ("FFN", plan.ffn_removed, [not mode.ffn for mode in decoder.given_modes]),
        ):
            if gone := [layer for layer in layers if absent[layer]]:
                raise InputError(
                    f"--apply_plan: layer {gone[0]} of {settings.model_name} has no {what} to remove; "
                    "give the model that the plan was made for"
                )
        if len(decoder.complete(plan).mha_removed) == decoder.num_layers:
            raise InputError(f"--apply_plan: would leave {settings.model_name} without any attention; one must stay")
    elif settings.method == "ppllms":
        find_counts(settings, decoder)
    else:
        check_reachable(decoder, moves_of(settings.method, decoder), settings.prune_rate)
    if settings.save_model:
        check_format(decoder, settings.save_format, settings.saved_plan.plan if settings.saved_plan else None)


def load_windows(
    settings: DepthPruning, tokenizer, seqlen: int, vocab_size: int
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """The calibration windows of a search, and those of every evaluation text; text is tokenized here, once."""
    windows = None
    if settings.needs_windows:
        corpus = load_corpus(settings.dataset, "train")
        windows = calibration_windows(corpus, tokenizer, settings.nsamples, seqlen, settings.seed)
        check_tokens(settings.model_name, windows, vocab_size)
    sources = settings.eval_datasets if settings.eval_ppl else []
    eval_windows = {s: evaluation_windows(load_corpus(s, "test"), tokenizer, seqlen) for s in sources}
    for tokens in eval_windows.values():
        check_tokens(settings.model_name, tokens, vocab_size)
    return windows, eval_windows


# The search -----------------------------------------------------------------------------------------------------------


def find_counts(settings: DepthPruning, decoder: Decoder) -> Counts:
    """How many layers lose attention and FFN, by the settings and the model's own parameter counts."""
    budget = budget_of(decoder)
    ratio = budget.natural_ratio if settings.mha_ffn_ratio == "auto" else settings.mha_ffn_ratio
    return choose_counts(budget, settings.prune_rate, ratio, settings.mha_remove_layers, settings.ffn_remove_layers)


def budget_of(decoder: Decoder) -> Budget:
    """The budget of a model's whole layers; those that differ in size count with their mean."""
    sizes = [decoder.sublayer_parameters(layer) for layer in decoder.whole_layers]
    mha, ffn = (sum(size[part] for size in sizes) / len(sizes) for part in (0, 1))
    return Budget(len(sizes), mha, ffn, decoder.total_parameters)


def search_plan(report: Report, settings: DepthPruning, job: Job) -> tuple[Plan, dict]:
    """The plan that the method finds, and what result.json says of its making."""
    if settings.method == "random":
        return random_layers(job.decoder, settings.prune_rate, settings.seed), {}
    depth_report.say_calibration(report, settings.dataset, job.windows, settings.seed)
    if settings.method == "ppllms":
        return search_ppllms(report, settings, job)
    if settings.method == "shortgpt":
        bi_scores = rank_layers(report, settings, job)
        return shortgpt(job.decoder, bi_scores, settings.prune_rate), {"bi_scores": bi_scores}
    policy = {"sleb": sleb, "blockpruner": blockpruner}[settings.method]
    depth_report.say_policy(report, settings.method, len(job.windows))
    with report.timed("search"):
        say_step = depth_report.step_sayer(report)
        plan, steps = policy(Sweep(job.decoder, job.windows, job.batcher), settings.prune_rate, say_step)
    return plan, {"rounds": describe_rounds(steps)}


def search_ppllms(report: Report, settings: DepthPruning, job: Job) -> tuple[Plan, dict]:
    """PP-LLMs: Block Influence, candidates, greedy search."""
    decoder = job.decoder
    bi_scores = rank_layers(report, settings, job)
    counts = find_counts(settings, decoder)
    candidates = choose_candidates(bi_scores, counts.ffn, decoder.whole_layers)
    depth_report.say_counts(report, settings, budget_of(decoder), counts, candidates)
    plan, rounds = search_mha(report, job, candidates, counts)
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
    chosen = job.windows[: settings.bi_windows]
    with report.timed("bi"), report.progress(len(chosen), "Block Influence") as progress:
        bi_scores = block_influence(job.decoder, chosen, job.batcher, progress)
    depth_report.say_influence(report, bi_scores, chosen)
    return bi_scores


def search_mha(report: Report, job: Job, candidates: list[int], counts: Counts) -> tuple[Plan, list[Round]]:
    """The greedy search, each round said as it ends."""
    depth_report.say_search(report, counts, len(job.windows))
    sweep = Sweep(job.decoder, job.windows, job.batcher)
    with report.timed("search"), report.progress(counts.mha * len(job.windows), "search") as progress:
        on_round = depth_report.round_sayer(report)
        return greedy_search(sweep, candidates, counts.mha, on_round, progress)


# After it -------------------------------------------------------------------------------------------------------------


def count_parameters(settings: DepthPruning, decoder: Decoder, plan: Plan) -> dict:
    """The `parameters` of result.json."""
    total, removed = decoder.total_parameters, decoder.removed_parameters(plan)
    is_by_rate = settings.mha_remove_layers is None or settings.ffn_remove_layers is None
    target = settings.prune_rate if is_by_rate and not settings.saved_plan else None
    return {"total": total, "removed": removed, "target_rate": target, "actual_rate": removed / total}


def measure(report: Report, job: Job, plan: Plan) -> dict[str, dict[str, float]]:
    """Perplexity of the dense and of the pruned model on every evaluation text: {text: {dense, pruned}}."""
    perplexities: dict[str, dict[str, float]] = {}
    plans = {"dense": Plan(job.decoder.num_layers), "pruned": plan}
    report.seconds["evaluate"] = 0.0
    for text, windows in job.eval_windows.items():
        with report.timed("evaluate"), report.progress(2 * len(windows), "perplexity") as progress:
            perplexities[text] = {
                name: perplexity(plan_window_losses(job.decoder, which), windows, job.batcher, progress)
                for name, which in plans.items()
            }
        depth_report.say_perplexity(report, text, perplexities[text], windows, is_first=len(perplexities) == 1)
    return perplexities


def finish(report: Report, settings: DepthPruning, job: Job, plan: Plan, result: dict) -> None:
    """Writes result.json and the plot, then the model; what was found is safe should saving fail."""
    report.seconds["save"] = 0.0
    path = report.result(result)
    plot = report.folder / REMOVALS
    title = f"{short_name(settings.model_name)}: {result['parameters']['actual_rate']:.1%} of the parameters removed"
    drawn = "bi_scores" in result
    if drawn and not plot_removals(plot, result["bi_scores"], plan.mha_removed, plan.ffn_removed, title):
        plot = "none: matplotlib is not installed (pip install matplotlib)"
    if settings.save_model:
        with report.timed("save"):
            save_pruned(job.decoder, plan, job.tokenizer, settings.save_model, settings.save_format, settings.overwrite)
        report.result(result)
    depth_report.say_written(report, path, plot if drawn else None, settings.save_model)


def describe_run(settings: DepthPruning, job: Job) -> dict:
    """The fields of result.json that say what was asked for."""
    described = {
        "tool": "ppllms",
        "model": settings.model_name,
        "model_path": local_path(settings.model_name),
        "seqlen": job.seqlen,
        "dtype": dtype_name(job.decoder.model),
        "batch_size": job.batcher.size,
        "num_layers": job.decoder.num_layers,
    }
    if settings.saved_plan:
        return described
    described |= {"method": settings.method, "seed": settings.seed}
    if not settings.needs_windows:
        return described
    return described | {
        "nsamples": settings.nsamples,
        "dataset": settings.dataset,
        "windows": len(job.windows),
        "bi_windows": min(settings.bi_windows or len(job.windows), len(job.windows)),
    }
