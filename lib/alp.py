"""The ALP run, from settings to result.json: load, measure, allocate, prune, measure again, save."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lib import alp_report, artefact, log, semi_structured, sensitivity
from lib.allocators import importance, spread_densities, uniform_densities
from lib.batching import Batcher, automatic_batch_size
from lib.changes import Changes
from lib.data import evaluation_windows, load_corpus, sampled_windows
from lib.errors import InputError
from lib.evaluate import Perplexity, as_fields, perplexity
from lib.export import save_weights
from lib.files import RESULT
from lib.grid import Grid, Keep, run_grid
from lib.inputs import check_stride, check_tokens, dtype_name, window_length
from lib.layer_scores import layer_scores, median, median_share, outlier_share
from lib.linears import InputGroup, check_columns, check_not_offloaded, find_linears, input_groups
from lib.loading import load_config, load_model, load_outline, load_tokenizer, resolve_device
from lib.methods import DENSE, GradientSettings
from lib.model import Decoder
from lib.offload import fetched_by_forward, follow, free_host_memory
from lib.plan import Plan
from lib.plots import SPARSITY, plot_sparsity
from lib.prune import count_zeros, prune_layers
from lib.pruners import Pruner
from lib.ranks import Ranks, join
from lib.report import Report, environment, peak_memory_bytes, quiet_libraries, timed
from lib.settings import SparsityPruning
from lib.state import FOLDER, State, check_saved, digest, discard, finished, how_to_resume
from lib.stream import plan_window_losses
from lib.zero_shot import ZeroShot


@dataclass(frozen=True)
class Texts:
    """The windows (N, T) of the runs on one model, as far as any of them needs some."""

    calibration: dict[int, torch.Tensor]  # by seed
    gradients: dict[GradientSettings, torch.Tensor]
    evaluation: dict[str, torch.Tensor]


@dataclass
class Job:
    """What the runs on one model work on, all of it checked, and what one of them found that serves the others."""

    tokenizer: object
    decoder: Decoder
    groups: list[list[InputGroup]]
    texts: Texts
    gradients: dict[GradientSettings, artefact.Artefact]  # those that are known
    weights: list[torch.Tensor]  # of all linears, as they were; empty when nothing begins with them again
    zero_shot: ZeroShot | None
    batcher: Batcher
    seqlen: int  # tokens of a window
    state: State  # of the run at work
    dense: dict[str, Perplexity] | None = None  # on each text
    scores: dict[tuple, list[float]] = field(default_factory=dict)  # of OWL and DLP, by their settings

    @property
    def linears(self) -> list[nn.Linear]:
        return [linear for layer in self.groups for group in layer for linear in group.linears]

    def restore(self) -> None:
        """Gives the linears the weights that they had."""
        follow(self.decoder.layers, [])
        for linear, weight in zip(self.linears, self.weights, strict=False):
            linear.weight.data.copy_(weight)


def run(settings: SparsityPruning) -> dict:
    """Prunes one model; returns what it wrote to result.json. Raises `InputError` and `RunError`."""
    quiet_libraries()
    ranks = join(resolve_device(settings.source.device))
    settings = replace(settings, output_dir=Path(ranks.tell(str(settings.output_dir), 0)))  # it may have the time in it
    report = Report(ranks.is_first)
    folder, overwrite = settings.output_dir, settings.overwrite
    if settings.resume and (before := finished(folder, settings.key, overwrite, ranks.is_first)):
        check_saved(before, settings.save_model)
        report.say(f"Finished before: {folder / RESULT}")
        return before
    state = State(folder / FOLDER, settings.key, ranks.is_first, settings.resume)
    with state.told(how_to_resume(folder)):
        job = prepare(report, [settings], ranks, state)
        with state.at_work(report.seconds):
            report.open(folder, goes_on=settings.resume)
            alp_report.say_model(report, settings, job.decoder, sum(sizes_of(job.groups)), job.seqlen)
            result = prune_and_measure(report, settings, job)
            alp_report.say_result(report, result)
            if report.is_first:
                finish(report, settings, job, result)
    return result


def run_all(cells: Sequence[SparsityPruning], folder: Path, anew: bool) -> None:
    """Runs a grid, and keeps its tables in a folder. Raises `InputError` and `RunError`."""
    quiet_libraries()
    ranks = join(resolve_device(cells[0].source.device))
    grid = Grid(
        across="sparsity",
        check=lambda of_model: check_config(of_model, load_config(of_model[0].source)),
        prepare=lambda report, of_model: prepare(report, of_model, ranks, State(None, {})),
        run=run_cell,
    )
    run_grid(grid, cells, folder, anew, ranks)


def run_cell(report: Report, settings: SparsityPruning, job: Job, keep: Keep) -> dict:
    """One cell of a grid, from the weights as they were; it goes on with what is finished of it."""
    job.restore()
    job.state = State.of_cell(report.folder / FOLDER, settings.key, report.is_first)
    with job.state.at_work(report.seconds):
        alp_report.say_model(report, settings, job.decoder, sum(sizes_of(job.groups)), job.seqlen)
        result = prune_and_measure(report, settings, job)
        alp_report.say_result(report, result)
        if report.is_first:
            try_out(report, settings, job, result)
            if settings.log:
                log.append(settings.log, result, settings.output_dir)
        keep(result)
    return result


def prune_and_measure(report: Report, settings: SparsityPruning, job: Job) -> dict:
    """Prunes the model, and measures it before and after: what result.json says."""
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
    return {
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


# Before work starts ---------------------------------------------------------------------------------------------------


def prepare(report: Report, cells: Sequence[SparsityPruning], ranks: Ranks, state: State) -> Job:
    """Loads and checks everything for runs on one model, which differ in method, sparsity and seed only.

    Raises `InputError`, where it can before the weights are read.
    """
    settings, by_gradients = cells[0], {cell.gradients: cell for cell in cells if cell.uses_gradients}
    found = {
        asked: sensitivity.find(cell.gradient_path, must_exist=cell.gradient_file is not None)
        for asked, cell in by_gradients.items()
    }
    gradients = {asked: known for asked, known in found.items() if known}
    with report.timed("load"):
        if settings.semi_structured:
            semi_structured.check_device(resolve_device(settings.source.device))
        config = load_config(settings.source)
        seqlen = check_config(cells, config)
        tokenizer = load_tokenizer(settings.source)
    with report.timed("data"):
        zero_shot = ZeroShot(settings.tasks) if settings.tasks else None
        texts = load_texts(cells, tokenizer, seqlen, config.vocab_size)
        for asked, known in gradients.items():
            artefact.check_settings(known, by_gradients[asked].gradient_path, asked, texts.gradients[asked])
    with report.timed("load"):
        decoder = Decoder(load_model(settings.source))
        if settings.semi_structured and decoder.is_offloaded:
            raise InputError("--semi_structured: is for models that fit the device; leave it, or --offload, out")
        for cell in cells:
            check_not_offloaded(decoder, check_linears(cell, decoder))
        for asked, known in gradients.items():
            artefact.check_model(known, by_gradients[asked].gradient_path, settings.model, decoder)
        groups = input_groups(decoder)
    batcher = Batcher(settings.batch_size or automatic_batch_size(decoder.device, seqlen), ranks)
    job = Job(tokenizer, decoder, groups, texts, gradients, [], zero_shot, batcher, seqlen, state)
    if (len(cells) > 1 or settings.rounds_while_pruning) and not decoder.is_on_disk:
        size = sum(linear.weight.nbytes for linear in job.linears)
        if size > free_host_memory():
            raise InputError(
                f"--model {settings.model}: host memory has no room for a second copy of its weights, from which each "
                "cell of a table, and rounding by sparsegpt, begins; use --offload disk"
            )
        job.weights = [linear.weight.detach().to("cpu", copy=True) for linear in job.linears]
    return job


def check_config(cells: Sequence[SparsityPruning], config) -> int:
    """Checks what can be before the weights are read; returns the window length in tokens. Raises `InputError`."""
    seqlen = window_length(cells[0].model, config, cells[0].seqlen)
    check_stride(cells[0].eval_stride, seqlen)
    if any(cell.uses_gradients for cell in cells):
        window_length(cells[0].model, config, cells[0].gradients.seqlen, "--grad_seqlen")
    outline = load_outline(config, cells[0].source.trust_remote_code)
    if outline is not None:
        decoder = Decoder(outline, has_weights=False)
        for cell in cells:
            check_linears(cell, decoder)
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


def load_texts(cells: Sequence[SparsityPruning], tokenizer, seqlen: int, vocab_size: int) -> Texts:
    """All the text of the runs, tokenized; only what one of them needs is read."""
    settings, calibration, gradients = cells[0], {}, {}
    if any(cell.needs_text for cell in cells):
        corpus = load_corpus(settings.calibration_dataset, "train")
        for seed in dict.fromkeys(cell.seed for cell in cells if cell.needs_inputs):
            calibration[seed] = sampled_windows(corpus, tokenizer, settings.nsamples, seqlen, seed)
        for asked in dict.fromkeys(cell.gradients for cell in cells if cell.uses_gradients):
            gradients[asked] = sensitivity.gradient_windows(asked, corpus, tokenizer)
    stride = settings.eval_stride
    evaluation = {
        text: evaluation_windows(load_corpus(text, "test"), tokenizer, seqlen, stride) for text in settings.dataset
    }
    for windows in (*calibration.values(), *gradients.values(), *evaluation.values()):
        check_tokens(settings.model, windows, vocab_size)
    return Texts(calibration, gradients, evaluation)


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


def find_gradients(report: Report, settings: SparsityPruning, job: Job) -> artefact.Artefact:
    """The sensitivities that were found, or new ones, which are kept."""
    path, asked = settings.gradient_path, settings.gradients
    folder = sensitivity.state_folder(path)
    if asked in job.gradients:
        report.say(f"            found in {path}")
        if report.is_first and settings.gradient_file is None:
            with suppress(InputError):  # another run is at work on them
                discard(folder)  # what is left when a run is killed as it writes them
        return job.gradients[asked]
    report.say(f"            not in {path} yet: computing, and keeping them there")
    windows, ranks = job.texts.gradients[asked], job.batcher.ranks
    key = sensitivity.key_of(job.decoder, asked, windows)
    if settings.resume or settings.overwrite:
        state = State(folder, key, ranks.is_first, settings.resume)
    else:  # what some run has begun is taken, as what it has finished is
        state = State.of_cell(folder, key, ranks.is_first)
    with state.at_work({}):
        found = sensitivity.compute(report, job.decoder, settings.source, asked, windows, path, state, key, ranks)
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
            report.say,
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
            overwrite = job.state.will_save(settings.save_model, settings.overwrite)
            save_weights(job.decoder.model, job.tokenizer, settings.save_model, overwrite)
        result["saved_model"] = str(settings.save_model.resolve())
        report.result(result)
    plot = report.folder / SPARSITY
    title = f"{settings.model_name}: {settings.method.name}, {settings.target_sparsity:g} {settings.pattern}"
    has_plot = plot_sparsity(plot, result["layer_sparsity"], result["importance"], settings.target_sparsity, title)
    try:
        try_out(report, settings, job, result, report.result)
    finally:
        logged = (
            job.state.once("log", lambda: str(log.append(settings.log, result, settings.output_dir)))
            if settings.log
            else None
        )
    plot = plot if has_plot else "none: matplotlib is not installed (pip install matplotlib)"
    alp_report.say_written(report, path, plot, settings.save_model, logged)


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
