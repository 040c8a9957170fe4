"""The ALP run, from settings to result.json: load, measure, allocate, prune, measure again, save."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

from lib.config.methods import DENSE
from lib.config.plan import Plan
from lib.config.sparsity import SparsityPruning
from lib.engine.window_losses import plan_window_losses
from lib.errors import InputError
from lib.evaluation.perplexity import Perplexity, as_fields, perplexity
from lib.export.huggingface import save_weights
from lib.models.limits import dtype_name
from lib.models.linears import InputGroup
from lib.models.loading import load_config
from lib.models.offload import fetched_by_forward, follow
from lib.models.weight_deltas import Changes
from lib.reporting.console import Report, timed
from lib.reporting.environment import environment
from lib.reporting.plots import SPARSITY, plot_sparsity
from lib.runs.grid import Grid, Keep, run_grid
from lib.runs.single import run_single
from lib.runtime.device import resolve_device
from lib.runtime.distributed import join
from lib.runtime.memory import peak_memory_bytes
from lib.runtime.setup import set_up
from lib.sensitivity import artifact, compute
from lib.sensitivity.gradients import importance
from lib.sparsity import report as alp_report
from lib.sparsity import semi_structured
from lib.sparsity.densities import spread_densities, uniform_densities
from lib.sparsity.layerwise import count_zeros, prune_layers
from lib.sparsity.outlier_scores import layer_scores, median, median_share, outlier_share
from lib.sparsity.prepare import Job, check_config, prepare
from lib.sparsity.pruners import Pruner
from lib.storage import log_tsv
from lib.storage.resume_state import FOLDER, State, digest, discard


def run(settings: SparsityPruning) -> dict:
    """Prunes one model; returns what it wrote to result.json. Raises `InputError` and `RunError`."""
    return run_single(settings, prepare, prune_once)


def prune_once(report: Report, settings: SparsityPruning, job: Job) -> dict:
    """A run on a job that is prepared."""
    result = prune_and_measure(report, settings, job)
    if report.is_first:
        finish(report, settings, job, result)
    return result


def run_all(cells: Sequence[SparsityPruning], folder: Path, overwrite: bool) -> None:
    """Runs a grid, and keeps its tables in a folder. Raises `InputError` and `RunError`."""
    set_up()
    ranks = join(resolve_device(cells[0].source.device))
    grid = Grid(
        across="sparsity",
        check=lambda of_model: check_config(of_model, load_config(of_model[0].source)),
        prepare=lambda report, of_model: prepare(report, of_model, ranks),
        run=run_cell,
    )
    run_grid(grid, cells, folder, overwrite, ranks)


def run_cell(report: Report, settings: SparsityPruning, job: Job, keep: Keep) -> dict:
    """One cell of a grid, from the weights as they were; it goes on with what is finished of it."""
    job.restore()
    job.state = State.of_cell(report.folder / FOLDER, settings.key, job.batcher.ranks)
    with job.state.session(report.seconds):
        result = prune_and_measure(report, settings, job)
        if report.is_first:
            try_out(report, settings, job, result)
            if settings.log:
                keep_rows(settings, job, result)
        keep(result)
    return result


def prune_and_measure(report: Report, settings: SparsityPruning, job: Job) -> dict:
    """Prunes the model, and measures it before and after: what result.json says."""
    alp_report.say_model(report, settings, job.decoder, sum(sizes_of(job.groups)), job.seqlen)
    for part in ("allocate", "prune", "evaluate", "save"):
        report.seconds.setdefault(part, 0.0)
    job.dense = job.dense or measure(report, settings, job, "dense")
    perplexities = {"dense": job.dense}
    scores, densities = allocate(report, settings, job)
    parts, zeros = {}, {}
    if settings.method.pruner == DENSE:
        perplexities["pruned"], zeros["pruned"] = perplexities["dense"], count_zeros(job.decoder, job.groups)
    for stage, pruner in stages(settings, job):
        parts[stage] = prune(report, settings, job, stage, pruner, densities)
        zeros[stage] = job.state.once(f"zeros of {stage}", lambda: count_zeros(job.decoder, job.groups))
        with kernels(settings, job):
            perplexities[stage] = measure(report, settings, job, stage)
    result = {
        **describe_run(settings, job),
        "importance": scores,
        "layer_density": densities,
        "sparsity": share(zeros["pruned"]),
        "layer_sparsity": [share([layer]) for layer in zeros["pruned"]],
        **({"quantized_sparsity": share(zeros["quantized"])} if settings.quantization else {}),
        **as_fields({text: {stage: found[text] for stage, found in perplexities.items()} for text in settings.dataset}),
        "seconds": report.seconds,
        "prune_seconds": parts,
        "peak_memory_bytes": peak_memory_bytes(job.decoder.device),
        "environment": environment(job.decoder.device),
    }
    alp_report.say_result(report, result)
    return result


# The stages -----------------------------------------------------------------------------------------------------------


def measure(report: Report, settings: SparsityPruning, job: Job, stage: str) -> dict[str, Perplexity]:
    """Perplexity of the model as it is, at a stage, on every evaluation text."""
    perplexities = {}
    for text, windows in job.texts.evaluation.items():
        with report.timed("evaluate"), report.progress(len(windows), "perplexity") as progress:
            losses = plan_window_losses(job.decoder, Plan(job.decoder.num_layers), job.batcher, progress)
            measured = partial(perplexity, losses, windows, settings.eval_stride)
            perplexities[text] = Perplexity(*job.state.once(f"perplexity of {stage} on {text}", measured))
    return perplexities


def kernels(settings: SparsityPruning, job: Job) -> AbstractContextManager:
    """Inside, the pruned model runs in torch's 2:4 kernels if that was asked for."""
    if not settings.semi_structured:
        return nullcontext()
    return semi_structured.compressed(job.linears)


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
    is_owl, windows = settings.method.allocator == "owl", job.texts.calibration[settings.seed]
    summary = outlier_share(settings.owl_m) if is_owl else median
    known = (settings.method.allocator, settings.owl_m, settings.seed)
    if known not in job.scores:
        with report.progress(job.decoder.num_layers, settings.method.allocator) as progress:
            compute = partial(layer_scores, job.decoder, job.groups, windows, job.batcher, summary, progress)
            job.scores[known] = job.state.once("scores", compute)
    return job.scores[known] if is_owl else median_share(job.scores[known])


def find_gradients(report: Report, settings: SparsityPruning, job: Job) -> artifact.Artefact:
    """The sensitivities that were found, or new ones, which are kept."""
    path, asked = settings.gradient_path, settings.gradients
    folder = compute.state_folder(path)
    if asked in job.gradients:
        report.print(f"            found in {path}")
        if report.is_first and settings.gradient_file is None:
            with suppress(InputError):  # another run is at work on them
                discard(folder)  # what is left when a run is killed as it writes them
        return job.gradients[asked]
    report.print(f"            not in {path} yet: computing, and keeping them there")
    windows, ranks = job.texts.gradients[asked], job.batcher.ranks
    key = compute.key_of(job.decoder, asked, windows)
    if settings.resume or settings.overwrite:
        state = State(folder, key, ranks, settings.resume)
    else:  # what some run has begun is taken, as what it has finished is
        state = State.of_cell(folder, key, ranks)
    with state.session({}):
        found = compute.compute(report, job.decoder, settings.source, asked, windows, path, state, key, ranks)
    job.gradients[asked] = found
    return found


def prune(
    report: Report, settings: SparsityPruning, job: Job, stage: str, pruner: Pruner, densities: Sequence[float]
) -> dict[str, float]:
    """Runs one pruner over the model; the seconds of its parts."""
    parts: dict[str, float] = {}
    sparsities = [1 - density for density in densities]
    changes = Changes(job.state.folder / stage)
    upon = [] if stage == "pruned" or settings.rounds_while_pruning else [Changes(job.state.folder / "pruned")]
    follow(job.decoder.layers, [*upon, changes])
    with report.timed("prune"), report.progress(job.decoder.num_layers, stage) as progress:
        prune_layers(
            job.decoder,
            job.groups,
            pruner,
            sparsities,
            job.texts.calibration.get(settings.seed),
            job.batcher,
            report.print,
            progress,
            partial(timed, parts),
            changes,
        )
    return parts


def stages(settings: SparsityPruning, job: Job) -> Iterator[tuple[str, Pruner]]:
    """(name of the model that comes out, what makes it): `pruned`, then `quantized`, as far as they are asked for."""
    if settings.method.pruner != DENSE:
        yield "pruned", settings.pruner
    if settings.rounds_while_pruning:
        job.restore()
    if settings.rounder:
        yield "quantized", settings.rounder


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
            overwrite = job.state.claim_model_folder(settings.save_model, settings.overwrite)
            save_weights(job.decoder.model, job.tokenizer, settings.save_model, overwrite)
        result["saved_model"] = str(settings.save_model.resolve())
        report.result(result)
    plot = report.folder / SPARSITY
    title = f"{settings.model_name}: {settings.method.name}, {settings.target_sparsity:g} {settings.pattern}"
    has_plot = plot_sparsity(plot, result["layer_sparsity"], result["importance"], settings.target_sparsity, title)
    try:
        try_out(report, settings, job, result, report.result)
    finally:
        logged = keep_rows(settings, job, result) if settings.log else None
    plot = plot if has_plot else "none: matplotlib is not installed (pip install matplotlib)"
    alp_report.say_written(report, path, plot, settings.save_model, logged)


def keep_rows(settings: SparsityPruning, job: Job, result: dict) -> Path:
    """Appends a result to the log, once, whenever the run is killed; the log's path.

    Once more where tasks were not evaluated the first time, as that failed.
    """
    name = "rows with tasks" if "zero_shot" in result else "rows"
    return log_tsv.append(settings.log, job.state.once(name, lambda: log_tsv.rows(result, settings.output_dir)))


def try_out(
    report: Report,
    settings: SparsityPruning,
    job: Job,
    result: dict,
    keep: Callable[[dict], object] = lambda result: None,
) -> None:
    """Adds the speed in 2:4 kernels and the accuracy on tasks to the result, as far as they are asked for."""
    if settings.semi_structured:
        result["tokens_per_second"] = compare_speed(settings, job)
        keep(result)
        alp_report.say_speed(report, result["tokens_per_second"], job.seqlen)
    if job.zero_shot:
        with report.timed("zero_shot"), kernels(settings, job), fetched_by_forward(job.decoder.layers):
            result["zero_shot"] = job.zero_shot.accuracy(job.decoder.model, job.tokenizer, job.batcher.size)
        keep(result)
        alp_report.say_zero_shot(report, result["zero_shot"])


def describe_run(settings: SparsityPruning, job: Job) -> dict:
    """The fields of result.json that say what was asked for."""
    by_gradients = settings.uses_gradients
    return {
        "tool": "alp_prune",
        "key": digest(settings.key),
        "model": settings.model,
        "model_name": settings.model_name,
        "prune_method": settings.method.name,
        "sparsity_ratio": settings.target_sparsity,
        "sparsity_type": str(settings.pattern),
        "alpha": settings.alpha if settings.is_allocated else None,
        "owl_m": settings.owl_m if settings.is_allocated and settings.method.allocator == "owl" else None,
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
        "eval_stride": settings.eval_stride,
        "seed": settings.seed,
        "dtype": dtype_name(job.decoder.model),
        "batch_size": job.batcher.size,
        "num_layers": job.decoder.num_layers,
    }
