"""The PP-LLMs run, from settings to result.json: load, count, rank, search, measure, save."""

from dataclasses import dataclass
from pathlib import Path

import torch

from lib.batching import Batcher, automatic_batch_size
from lib.bi import block_influence
from lib.data import calibration_windows, evaluation_windows, load_corpus
from lib.errors import InputError
from lib.evaluate import perplexity
from lib.export import check_format, save_pruned
from lib.inputs import check_tokens, check_whole, dtype_name, window_length
from lib.loading import load_config, load_model, load_outline, load_tokenizer, resolve_device
from lib.model import Decoder, Plan
from lib.names import short_name
from lib.plots import REMOVALS, plot_removals
from lib.report import Report, columns, environment, peak_memory_bytes, quiet_libraries
from lib.search import Budget, Counts, Round, Sweep, choose_candidates, choose_counts, greedy_search
from lib.stream import plan_window_losses


@dataclass(frozen=True)
class DepthPruning:
    """The settings of a run; the flags of `ppllms.py` have the same names and meanings."""

    model_name: str
    dataset: str
    eval_datasets: list[str]
    output_dir: Path
    num_blocks: int | None = None
    prune_rate: float = 0.25
    mha_remove_layers: int | None = None
    ffn_remove_layers: int | None = None
    mha_ffn_ratio: float | str = 2.0
    nsamples: int = 128
    bi_windows: int | None = None
    eval_ppl: bool = True
    seed: int = 0
    seqlen: int | None = None
    batch_size: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    save_model: Path | None = None
    save_format: str = "hf"


def run(settings: DepthPruning) -> dict:
    """Prunes one model; returns what it wrote to result.json. Raises `InputError` and `RunError`."""
    quiet_libraries()
    report = Report()
    with report.timed("load"):
        device = resolve_device(settings.device)
        config = load_config(settings.model_name, settings.trust_remote_code)
        seqlen = check_config(settings, config)
        tokenizer = load_tokenizer(settings.model_name, settings.trust_remote_code)
    with report.timed("data"):
        windows, eval_windows = load_windows(settings, tokenizer, seqlen, config.vocab_size)
    with report.timed("load"):
        outline = load_outline(config, settings.trust_remote_code)
        if outline is not None:
            find_counts(settings, Decoder(outline, has_weights=False))
        model = load_model(settings.model_name, settings.dtype, device, settings.device_map, settings.trust_remote_code)
        decoder = Decoder(model)
        if settings.save_model:
            check_format(model, settings.save_format)
    report.open(settings.output_dir)
    report_model(report, settings, decoder, windows)

    batcher = Batcher(settings.batch_size or automatic_batch_size(decoder.device, seqlen))
    bi_scores = rank_layers(report, settings, decoder, windows, batcher)
    counts = find_counts(settings, decoder)
    candidates = choose_candidates(bi_scores, counts.ffn)
    report_counts(report, settings, decoder, counts, candidates)
    plan, rounds = search_plan(report, decoder, windows, batcher, candidates, counts)
    parameters = report_plan(report, settings, decoder, plan)
    perplexities = measure(report, decoder, plan, eval_windows, batcher)

    result = {
        **describe_run(settings, decoder, windows, batcher),
        "bi_scores": bi_scores,
        "candidates": candidates,
        "rounds": [{"losses": r.losses, "selected": r.selected, "loss": r.loss} for r in rounds],
        "mha_removed": list(plan.mha_removed),
        "ffn_removed": list(plan.ffn_removed),
        "parameters": parameters,
        "perplexity": perplexities,
        "seconds": report.seconds,
        "peak_memory_bytes": peak_memory_bytes(decoder.device),
        "environment": environment(decoder.device),
    }
    finish(report, settings, decoder, plan, tokenizer, result)
    return result


# Before the model -----------------------------------------------------------------------------------------------------


def check_config(settings: DepthPruning, config) -> int:
    """Checks counts and window length against a model's config; returns the window length in tokens."""
    layers, name = config.num_hidden_layers, settings.model_name
    if layers < 2:
        raise InputError(f"{name} has {layers} decoder layers; pruning needs at least 2")
    check_whole(name, config)
    if settings.num_blocks not in (None, layers):
        raise InputError(f"--num_blocks {settings.num_blocks}: {name} has {layers} decoder layers; leave the flag out")
    if (settings.mha_remove_layers or 0) >= layers:
        raise InputError(f"--mha_remove_layers {settings.mha_remove_layers}: {name} has {layers} layers; one must stay")
    if (settings.ffn_remove_layers or 0) > layers:
        raise InputError(f"--ffn_remove_layers {settings.ffn_remove_layers}: {name} has only {layers} layers")
    return window_length(name, config, settings.seqlen)


def load_windows(
    settings: DepthPruning, tokenizer, seqlen: int, vocab_size: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The calibration windows, and those of every evaluation text; the text is tokenized here, once."""
    corpus = load_corpus(settings.dataset, "train")
    windows = calibration_windows(corpus, tokenizer, settings.nsamples, seqlen, settings.seed)
    sources = settings.eval_datasets if settings.eval_ppl else []
    eval_windows = {s: evaluation_windows(load_corpus(s, "test"), tokenizer, seqlen) for s in sources}
    for tokens in (windows, *eval_windows.values()):
        check_tokens(settings.model_name, tokens, vocab_size)
    return windows, eval_windows


# The stages -----------------------------------------------------------------------------------------------------------


def find_counts(settings: DepthPruning, decoder: Decoder) -> Counts:
    """How many layers lose attention and FFN, by the settings and the model's own parameter counts."""
    budget = budget_of(decoder)
    ratio = budget.natural_ratio if settings.mha_ffn_ratio == "auto" else settings.mha_ffn_ratio
    return choose_counts(budget, settings.prune_rate, ratio, settings.mha_remove_layers, settings.ffn_remove_layers)


def budget_of(decoder: Decoder) -> Budget:
    """The budget of a model; layers that differ in size count with their mean."""
    layers = decoder.num_layers
    sizes = [decoder.sublayer_parameters(layer) for layer in range(layers)]
    mha, ffn = (sum(size[part] for size in sizes) / layers for part in (0, 1))
    return Budget(layers, mha, ffn, decoder.total_parameters)


def rank_layers(
    report: Report, settings: DepthPruning, decoder: Decoder, windows: torch.Tensor, batcher: Batcher
) -> list[float]:
    """Block Influence of all layers, said as a table."""
    chosen = windows[: settings.bi_windows]
    with report.timed("bi"), report.progress(len(chosen), "Block Influence") as progress:
        bi_scores = block_influence(decoder, chosen, batcher, progress)
    report.say()
    report.say(f"Block Influence by layer, over {len(chosen)} windows of {chosen.shape[1]} tokens")
    for row in columns([f"{layer}: {score:.4f}" for layer, score in enumerate(bi_scores)], 6):
        report.say("  " + row)
    return bi_scores


def search_plan(
    report: Report,
    decoder: Decoder,
    windows: torch.Tensor,
    batcher: Batcher,
    candidates: list[int],
    counts: Counts,
) -> tuple[Plan, list[Round]]:
    """The greedy search, each round said as it ends."""
    report.say()
    report.say(f"Greedy search: {counts.mha} rounds, loss on {len(windows)} windows with each candidate closed whole")

    def say_round(number: int, round_: Round) -> None:
        report.say(f"  round {number}: layer {round_.selected} is chosen, loss {round_.loss:.2f}")
        for row in columns([f"{layer}: {loss:.2f}" for layer, loss in round_.losses.items()], 5):
            report.say("    " + row)

    with report.timed("search"), report.progress(counts.mha * len(windows), "search") as progress:
        return greedy_search(Sweep(decoder, windows, batcher), candidates, counts.mha, say_round, progress)


def measure(
    report: Report, decoder: Decoder, plan: Plan, eval_windows: dict[str, torch.Tensor], batcher: Batcher
) -> dict[str, dict[str, float]]:
    """Perplexity of the dense and of the pruned model on every evaluation text: {text: {dense, pruned}}."""
    perplexities: dict[str, dict[str, float]] = {}
    plans = {"dense": Plan(decoder.num_layers), "pruned": plan}
    report.seconds["evaluate"] = 0.0
    for source, windows in eval_windows.items():
        with report.timed("evaluate"), report.progress(2 * len(windows), "perplexity") as progress:
            perplexities[source] = {
                name: perplexity(plan_window_losses(decoder, which), windows, batcher, progress)
                for name, which in plans.items()
            }
        if len(perplexities) == 1:
            report.say()
            report.say("Perplexity (dense -> pruned)")
        dense, pruned = perplexities[source].values()
        report.say(f"  {source}: {dense:.3f} -> {pruned:.3f}  ({len(windows)} windows of {windows.shape[1]} tokens)")
    return perplexities


def finish(report: Report, settings: DepthPruning, decoder: Decoder, plan: Plan, tokenizer, result: dict) -> None:
    """Writes result.json and the plot, then the model; what was found is safe should saving fail."""
    report.seconds["save"] = 0.0
    path = report.result(result)
    plot = report.folder / REMOVALS
    title = f"{short_name(settings.model_name)}: {result['parameters']['actual_rate']:.1%} of the parameters removed"
    has_plot = plot_removals(plot, result["bi_scores"], plan.mha_removed, plan.ffn_removed, title)
    if settings.save_model:
        with report.timed("save"):
            save_pruned(decoder, plan, tokenizer, settings.save_model, settings.save_format, settings.overwrite)
        report.result(result)
    report.say()
    report.say("Written")
    report.say(f"  result  {path}")
    report.say(f"  plot    {plot if has_plot else 'none: matplotlib is not installed (pip install matplotlib)'}")
    if settings.save_model:
        needs_code = (settings.save_model / "modeling_pruned.py").exists()
        how = ", trust_remote_code=True" if needs_code else ""
        report.say(
            f'  model   {settings.save_model}: AutoModelForCausalLM.from_pretrained("{settings.save_model}"{how})'
        )


def describe_run(settings: DepthPruning, decoder: Decoder, windows: torch.Tensor, batcher: Batcher) -> dict:
    """The fields of result.json that say what was asked for."""
    return {
        "tool": "ppllms",
        "model": settings.model_name,
        "seed": settings.seed,
        "nsamples": settings.nsamples,
        "seqlen": windows.shape[1],
        "dataset": settings.dataset,
        "windows": len(windows),
        "bi_windows": min(settings.bi_windows or len(windows), len(windows)),
        "dtype": dtype_name(decoder.model),
        "batch_size": batcher.size,
        "num_layers": decoder.num_layers,
    }


# What is said ---------------------------------------------------------------------------------------------------------


def report_model(report: Report, settings: DepthPruning, decoder: Decoder, windows: torch.Tensor) -> None:
    mha, ffn = decoder.sublayer_parameters(0)
    name = f"{decoder.family}, {dtype_name(decoder.model)}, {decoder.device}"
    report.say(f"Model       {settings.model_name} ({name})")
    report.say(f"Parameters  {decoder.total_parameters:,} in {decoder.num_layers} layers; a layer's attention {mha:,}")
    report.say(f"            and FFN {ffn:,}, {ffn / mha:.2f} times as many")
    report.say(
        f"Calibration {settings.dataset}: {len(windows)} windows of {windows.shape[1]} tokens, seed {settings.seed}"
    )


def report_counts(
    report: Report, settings: DepthPruning, decoder: Decoder, counts: Counts, candidates: list[int]
) -> None:
    given = [settings.mha_remove_layers is not None, settings.ffn_remove_layers is not None]
    ratio = settings.mha_ffn_ratio
    how = "as given" if all(given) else f"nearest to a rate of {settings.prune_rate:g}"
    if any(given) and not all(given):
        how += f", with the {'MHA' if given[0] else 'FFN'} count as given"
    elif not any(given):
        how += f" with about {'P_ffn/P_mha' if ratio == 'auto' else format(ratio, 'g')} FFNs for each MHA"
    rate = budget_of(decoder).rate(*counts)
    report.say()
    report.say(f"Candidates  {candidates} lose their FFN (lowest BI first)")
    report.say(f"Counts      {counts.mha} MHA and {counts.ffn} FFN layers, {rate:.2%} of all parameters: {how}")


def report_plan(report: Report, settings: DepthPruning, decoder: Decoder, plan: Plan) -> dict:
    """Says what is removed; returns the `parameters` of result.json."""
    total, removed = decoder.total_parameters, decoder.removed_parameters(plan)
    rate = removed / total
    report.say()
    report.say(f"MHA removal layers  {list(plan.mha_removed)}  (in order of choice)")
    report.say(f"FFN removal layers  {list(plan.ffn_removed)}")
    if plan.whole_layers:
        report.say(f"Gone whole          {plan.whole_layers}")
    report.say(f"Parameters          {total:,} -> {total - removed:,}, {rate:.2%} removed")
    by_rate = settings.mha_remove_layers is None or settings.ffn_remove_layers is None
    target = settings.prune_rate if by_rate else None
    return {"total": total, "removed": removed, "target_rate": target, "actual_rate": rate}
