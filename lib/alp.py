"""The ALP run, from settings to result.json: load, measure, allocate, prune, measure again, save."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial

import torch

from lib import alp_report, artefact, log, semi_structured, sensitivity
from lib.allocators import importance, spread_densities, uniform_densities
from lib.batching import Batcher, automatic_batch_size
from lib.data import evaluation_windows, load_corpus, sampled_windows
from lib.evaluate import perplexity
from lib.export import save_weights
from lib.inputs import check_tokens, dtype_name, window_length
from lib.layer_scores import layer_scores, median, median_share, outlier_share
from lib.linears import InputGroup, check_columns, check_not_offloaded, find_linears, input_groups
from lib.loading import load_config, load_model, load_outline, load_tokenizer, resolve_device
from lib.methods import DENSE
from lib.model import Decoder
from lib.plan import Plan
from lib.plots import SPARSITY, plot_sparsity
from lib.prune import count_zeros, prune_layers
from lib.pruners import Pruner
from lib.report import Report, environment, peak_memory_bytes, quiet_libraries, timed
from lib.settings import SparsityPruning
from lib.stream import plan_window_losses
from lib.zero_shot import ZeroShot


@dataclass(frozen=True)
class Texts:
    """The windows (N, T) of a run; None where the run needs none."""

    calibration: torch.Tensor | None
    gradients: torch.Tensor | None
    evaluation: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Job:
    """What a run works on, all of it checked."""

    tokenizer: object
    decoder: Decoder
    groups: list[list[InputGroup]]
    texts: Texts
    gradients: artefact.Artefact | None  # those that were found
    zero_shot: ZeroShot | None
    batcher: Batcher
    seqlen: int  # tokens of a window


def run(settings: SparsityPruning) -> dict:
    """Prunes one model; returns what it wrote to result.json. Raises `InputError` and `RunError`."""
    quiet_libraries()
    report = Report()
    job = prepare(report, settings)
    report.seconds.update(dict.fromkeys(("allocate", "prune", "evaluate", "save"), 0.0))
    report.open(settings.output_dir)
    alp_report.say_model(report, settings, job.decoder, sum(sizes_of(job.groups)), job.seqlen)

    perplexities = {"dense": measure(report, job)}
    scores, densities = allocate(report, settings, job)
    parts, zeros = {}, {}
    if settings.method.pruner == DENSE:
        perplexities["pruned"], zeros["pruned"] = perplexities["dense"], count_zeros(job.groups)
    for stage, pruner in stages(settings, job.groups):
        parts[stage] = prune(report, job, stage, pruner, densities)
        zeros[stage] = count_zeros(job.groups)
        with kernels(settings, job):
            perplexities[stage] = measure(report, job)

    result = {
        **describe_run(settings, job),
        "importance": scores,
        "layer_density": densities,
        "sparsity": share(zeros["pruned"]),
        "layer_sparsity": [share([layer]) for layer in zeros["pruned"]],
        **({"quantized_sparsity": share(zeros["quantized"])} if settings.quantization else {}),
        "perplexity": {
            text: {stage: found[text] for stage, found in perplexities.items()} for text in settings.dataset
        },
        "seconds": report.seconds,
        "prune_seconds": parts,
        "peak_memory_bytes": peak_memory_bytes(job.decoder.device),
        "environment": environment(job.decoder.device),
    }
    alp_report.say_result(report, result)
    finish(report, settings, job, result)
    return result


# Before work starts ---------------------------------------------------------------------------------------------------


def prepare(report: Report, settings: SparsityPruning) -> Job:
    """Loads and checks everything. Raises `InputError`, where it can before the weights are read."""
    gradients = None
    if settings.uses_gradients:
        gradients = sensitivity.find(settings.gradient_path, must_exist=settings.gradient_file is not None)
    with report.timed("load"):
        device = resolve_device(settings.source.device)
        if settings.semi_structured:
            semi_structured.check_device(device)
        config = load_config(settings.source)
        seqlen = check_config(settings, config)
        tokenizer = load_tokenizer(settings.source)
    with report.timed("data"):
        zero_shot = ZeroShot(settings.tasks) if settings.tasks else None
        texts = load_texts(settings, tokenizer, seqlen, config.vocab_size)
        if gradients:
            artefact.check_settings(gradients, settings.gradient_path, settings.gradients, texts.gradients)
    with report.timed("load"):
        decoder = load_decoder(settings)
        if gradients:
            artefact.check_model(gradients, settings.gradient_path, settings.model, decoder)
        groups = input_groups(decoder)
    batcher = Batcher(settings.batch_size or automatic_batch_size(decoder.device, seqlen))
    return Job(tokenizer, decoder, groups, texts, gradients, zero_shot, batcher, seqlen)


def check_config(settings: SparsityPruning, config) -> int:
    """Checks what can be before the weights are read; returns the window length in tokens. Raises `InputError`."""
    seqlen = window_length(settings.model, config, settings.seqlen)
    if settings.uses_gradients:
        window_length(settings.model, config, settings.gradients.seqlen, "--grad_seqlen")
    outline = load_outline(config, settings.source.trust_remote_code)
    if outline is not None:
        check_linears(settings, Decoder(outline, has_weights=False))
    return seqlen


def check_linears(settings: SparsityPruning, decoder: Decoder) -> list[dict]:
    """The linears of a model, when all can be pruned and rounded as asked for. Raises `InputError`."""
    linears = find_linears(decoder)
    if settings.pattern.is_structured and settings.method.pruner != DENSE:
        check_columns(linears, settings.pattern.m, f"--sparsity_type {settings.pattern}")
    if settings.semi_structured:
        semi_structured.check_linears(linears, decoder.has_weights)
    if settings.quantization and settings.quantization.group_size:
        check_columns(linears, settings.quantization.group_size, f"--groupsize {settings.quantization.group_size}")
    return linears


def load_texts(settings: SparsityPruning, tokenizer, seqlen: int, vocab_size: int) -> Texts:
    """All the text of a run, tokenized; only what the run needs is read."""
    calibration, gradients = None, None
    if settings.needs_inputs or settings.uses_gradients:
        corpus = load_corpus(settings.calibration_dataset, "train")
        if settings.needs_inputs:
            calibration = sampled_windows(corpus, tokenizer, settings.nsamples, seqlen, settings.seed)
        if settings.uses_gradients:
            gradients = sensitivity.gradient_windows(settings.gradients, corpus, tokenizer)
    evaluation = {text: evaluation_windows(load_corpus(text, "test"), tokenizer, seqlen) for text in settings.dataset}
    for windows in (calibration, gradients, *evaluation.values()):
        if windows is not None:
            check_tokens(settings.model, windows, vocab_size)
    return Texts(calibration, gradients, evaluation)


def load_decoder(settings: SparsityPruning) -> Decoder:
    """The model, checked to be one that can be pruned as asked for."""
    decoder = Decoder(load_model(settings.source))
    check_not_offloaded(check_linears(settings, decoder))
    return decoder


# The stages -----------------------------------------------------------------------------------------------------------


def measure(report: Report, job: Job) -> dict[str, float]:
    """Perplexity of the model as it is on every evaluation text."""
    losses = plan_window_losses(job.decoder, Plan(job.decoder.num_layers))
    perplexities = {}
    for text, windows in job.texts.evaluation.items():
        with report.timed("evaluate"), report.progress(len(windows), "perplexity") as progress:
            perplexities[text] = perplexity(losses, windows, job.batcher, progress)
    return perplexities


def kernels(settings: SparsityPruning, job: Job) -> AbstractContextManager:
    """Inside, the pruned model runs in torch's 2:4 kernels if that was asked for."""
    if not settings.semi_structured:
        return nullcontext()
    return semi_structured.compressed([linear for layer in job.groups for group in layer for linear in group.linears])


def compare_speed(settings: SparsityPruning, job: Job) -> dict[str, float]:
    """Tokens a second through the layers of one batch of evaluation windows, dense and in the 2:4 kernels."""
    input_ids = next(iter(job.texts.evaluation.values()))[: job.batcher.size]
    dense = semi_structured.tokens_per_second(job.decoder, input_ids)
    with kernels(settings, job):
        return {"dense": dense, "semi_structured": semi_structured.tokens_per_second(job.decoder, input_ids)}


def allocate(report: Report, settings: SparsityPruning, job: Job) -> tuple[list[float] | None, list[float]]:
    """The importance (None where all layers are treated alike) and the density of every layer."""
    if not settings.is_allocated:
        return None, uniform_densities(job.decoder.num_layers, settings.target_sparsity)
    with report.timed("allocate"):
        scores = score_layers(report, settings, job)
        densities = spread_densities(scores, sizes_of(job.groups), settings.sparsity_ratio, settings.alpha)
    alp_report.say_densities(report, scores, densities)
    return scores, densities


def score_layers(report: Report, settings: SparsityPruning, job: Job) -> list[float]:
    """How important each layer is to the allocator: the more, the more of it stays."""
    if settings.uses_gradients:
        return importance(find_gradients(report, settings, job).layers)
    is_owl = settings.method.allocator == "owl"
    summary = outlier_share(settings.owl_m) if is_owl else median
    with report.progress(job.decoder.num_layers, settings.method.allocator) as progress:
        scores = layer_scores(job.decoder, job.groups, job.texts.calibration, job.batcher, summary, progress)
    return scores if is_owl else median_share(scores)


def find_gradients(report: Report, settings: SparsityPruning, job: Job) -> artefact.Artefact:
    """The sensitivities that were found, or new ones, which are kept."""
    path = settings.gradient_path
    if job.gradients:
        report.say(f"            found in {path}")
        return job.gradients
    report.say(f"            not in {path} yet: computing, and keeping them there")
    found = sensitivity.compute(report, job.decoder, settings.model, settings.gradients, job.texts.gradients)
    artefact.write(path, found)
    return found


def prune(report: Report, job: Job, stage: str, pruner: Pruner, densities: Sequence[float]) -> dict[str, float]:
    """Runs one pruner over the model; the seconds of its parts."""
    parts: dict[str, float] = {}
    sparsities = [1 - density for density in densities]
    with report.timed("prune"), report.progress(job.decoder.num_layers, stage) as progress:
        prune_layers(
            job.decoder,
            job.groups,
            pruner,
            sparsities,
            job.texts.calibration,
            job.batcher,
            report.say,
            progress,
            partial(timed, parts),
        )
    return parts


def stages(settings: SparsityPruning, groups: Sequence[Sequence[InputGroup]]) -> Iterator[tuple[str, Pruner]]:
    """(name of the model that comes out, what makes it): `pruned`, then `quantized`, as far as they are asked for.

    SparseGPT rounds while it prunes, so that its second stage begins with the dense weights again, of which a copy is
    kept in host memory meanwhile.
    """
    pruner, rounder = settings.pruner, settings.rounder
    linears = [linear for layer in groups for group in layer for linear in group.linears]
    begins_anew = rounder is not None and settings.method.pruner == "sparsegpt"
    dense = [linear.weight.detach().to("cpu", copy=True) for linear in linears] if begins_anew else []
    if settings.method.pruner != DENSE:
        yield "pruned", pruner
    if rounder:
        for linear, weight in zip(linears, dense, strict=False):
            linear.weight.data.copy_(weight)
        yield "quantized", rounder


def sizes_of(groups: Sequence[Sequence[InputGroup]]) -> list[int]:
    """The number of weights in the linears of every layer."""
    return [sum(linear.weight.numel() for group in layer for linear in group.linears) for layer in groups]


def share(counts: Sequence[tuple[int, int]]) -> float:
    """The share of zeros among the weights of some layers, each (zeros, weights)."""
    return sum(zeros for zeros, _ in counts) / sum(weights for _, weights in counts)


def finish(report: Report, settings: SparsityPruning, job: Job, result: dict) -> None:
    """Writes result.json, saves the model, draws, evaluates tasks; what was found is safe if one of them fails."""
    path = report.result(result)
    if settings.save_model:
        with report.timed("save"):
            save_weights(job.decoder.model, job.tokenizer, settings.save_model, settings.overwrite)
        report.result(result)
    plot = report.folder / SPARSITY
    title = f"{settings.model_name}: {settings.method.name}, {settings.target_sparsity:g} {settings.pattern}"
    has_plot = plot_sparsity(plot, result["layer_sparsity"], result["importance"], settings.target_sparsity, title)
    try:
        if settings.semi_structured:
            result["tokens_per_second"] = compare_speed(settings, job)
            report.result(result)
            alp_report.say_speed(report, result["tokens_per_second"], job.seqlen)
        if job.zero_shot:
            with report.timed("zero_shot"), kernels(settings, job):
                result["zero_shot"] = job.zero_shot.accuracy(job.decoder.model, job.tokenizer, job.batcher.size)
            report.result(result)
            alp_report.say_zero_shot(report, result["zero_shot"])
    finally:
        logged = log.append(settings.log, result, settings.output_dir) if settings.log else None
    plot = plot if has_plot else "none: matplotlib is not installed (pip install matplotlib)"
    alp_report.say_written(report, path, plot, settings.save_model, logged)


def describe_run(settings: SparsityPruning, job: Job) -> dict:
    """The fields of result.json that say what was asked for."""
    by_gradients = settings.uses_gradients
    return {
        "tool": "alp_prune",
        "model": settings.model,
        "model_name": settings.model_name,
        "prune_method": settings.method.name,
        "sparsity_ratio": settings.target_sparsity,
        "sparsity_type": str(settings.pattern),
        "alpha": settings.alpha if settings.is_allocated else None,
        "grad_type": settings.gradients.gradient_type if by_gradients else None,
        "grad_nsamples": settings.gradients.nsamples if by_gradients else None,
        "gradients": asdict(settings.gradients) if by_gradients else None,
        "use_variant": settings.use_variant,
        "a": settings.a,
        "percdamp": settings.percdamp,
        **({"quantization": str(settings.quantization)} if settings.quantization else {}),
        "dataset": settings.calibration_dataset,
        "nsamples": settings.nsamples,
        "seqlen": job.seqlen,
        "seed": settings.seed,
        "dtype": dtype_name(job.decoder.model),
        "batch_size": job.batcher.size,
        "num_layers": job.decoder.num_layers,
    }
