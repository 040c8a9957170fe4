"""The run of `alp_prune.py`: evaluate, allocate a sparsity to each layer, prune, evaluate again, save."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lib.config.gradients import GradientSettings
from lib.config.plan import Plan
from lib.config.sparsity import SparsityPruning
from lib.engine.speed import tokens_per_second
from lib.errors import InputError, RunError
from lib.evaluation.distance import Evaluation, as_fields
from lib.export.huggingface import save_weights
from lib.export.reload import SaveError
from lib.files import digest_of_json
from lib.models.matrices import InputGroup
from lib.models.offload import follow
from lib.models.weight_deltas import Changes
from lib.reporting.console import timed
from lib.reporting.plots import plot_sparsity
from lib.runs.outline import Part
from lib.runs.own_text import fill_in
from lib.runs.single import Run
from lib.sensitivity.compute import Sensitivities, state_folder
from lib.sensitivity.gradients import LayerSensitivity
from lib.sparsity import report as sparsity_report
from lib.sparsity import semi_structured_kernels
from lib.sparsity.densities import spread_densities, uniform_densities
from lib.sparsity.layerwise import Monitor, count_zeros, prune_layers
from lib.sparsity.outlier_scores import Summary, layer_scores
from lib.sparsity.prepare import SparsityWorkspace, check_config, prepare
from lib.sparsity.pruners import Pruner, SparseGpt
from lib.sparsity.sparsegpt import find_kernel
from lib.sparsity.stages import make_pruner, make_quantizer
from lib.storage import log_tsv
from lib.storage.output_folder import SPARSITY
from lib.storage.resume_state import State
from lib.storage.state_folder import discard


class SparsityRun(Run[SparsityPruning, SparsityWorkspace]):
    """One run of `alp_prune.py`."""

    tool = "alp_prune"
    x_axis = "sparsity"

    check_config = staticmethod(check_config)
    load = staticmethod(prepare)

    def restore(self) -> None:
        self.workspace.restore()

    def show_model(self) -> None:
        weights = sum(count_weights(self.workspace.groups))
        sparsity_report.show_model(
            self.report, self.settings, self.gradients, self.decoder, weights, self.workspace.seqlen
        )

    def prune(self) -> dict:
        """Prunes the model in place; evaluates it before and after."""
        settings, workspace = self.settings, self.workspace
        for part in ("allocate", "prune", "evaluate", "save"):
            self.report.seconds.setdefault(part, 0.0)
        windows = [workspace.calibration[settings.seed]] if settings.needs_inputs else []
        fill_in(self.report, workspace, settings.seed, windows)
        evaluations = {"dense": self.measure("dense")}
        self.samples.measure("dense")
        self.tasks.measure("dense")
        scores, densities = self.allocate()
        parts, zeros = {}, {}
        if not settings.method.pruning.prunes:
            evaluations["pruned"] = {text: self.texts.unchanged(text) for text in workspace.eval_windows}
            self.tasks.copy("dense", to="pruned")
            zeros["pruned"] = count_zeros(self.decoder, workspace.groups)
        for stage, pruner in self.stages().items():
            parts[stage] = self.prune_stage(stage, pruner, densities)
            zeros[stage] = self.state.once(f"zeros of {stage}", lambda: count_zeros(self.decoder, workspace.groups))
            with self.sparse_kernels():
                evaluations[stage] = self.measure(stage)
                self.samples.measure(stage)
                self.tasks.measure(stage)
        by_text = {text: {stage: found[text] for stage, found in evaluations.items()} for text in settings.dataset}
        result = {
            "importance": scores,
            "layer_density": densities,
            "sparsity": share(zeros["pruned"]),
            "layer_sparsity": [share([layer]) for layer in zeros["pruned"]],
            **({"quantized_sparsity": share(zeros["quantized"])} if settings.quantization else {}),
            **as_fields(by_text),
            "prune_seconds": parts,
        }
        sparsity_report.show_result(self.report, result, by_text)
        return result

    def parts(self) -> list[Part]:
        settings, workspace = self.settings, self.workspace
        parts = []
        if settings.uses_gradients and settings.gradients not in workspace.gradients:
            windows = workspace.gradient_windows[settings.gradients]
            note = f"{len(windows)} windows of {windows.shape[1]} tokens"
            parts.append(Part("gradients", 3 * windows.numel() / workspace.seqlen, note=note))
        elif settings.method.allocation is not None and settings.is_allocated and not settings.uses_gradients:
            parts.append(Part(f"scores of {settings.method.allocator}", len(workspace.calibration[settings.seed])))
        for stage, pruner in self.stages().items():
            inputs = workspace.calibration[settings.seed] if pruner.needs_inputs else None
            passes = 0 if inputs is None else 2 * len(inputs)
            seconds = 0.0 if self.decoder.is_on_disk else self.seconds_to_select(pruner, inputs)
            parts.append(Part("pruning" if stage == "pruned" else "quantization", passes, seconds))
        return parts

    def seconds_to_select(self, pruner: Pruner, windows: torch.Tensor | None) -> float:
        """The seconds that a pruner takes for all layers, by the first one, which it changes."""
        seconds: dict[str, float] = {}
        monitor = Monitor(timed=partial(timed, seconds))
        few = None if windows is None else windows[:2]
        sparsity = [self.settings.target_sparsity]
        prune_layers(self.decoder, self.workspace.groups[:1], pruner, sparsity, few, self.workspace.batcher, monitor)
        return seconds["select"] * self.decoder.num_layers

    def measure(self, stage: str) -> dict[str, Evaluation]:
        """Evaluates the current model on every text."""
        return {text: self.texts.measure(stage, text) for text in self.workspace.eval_windows}

    def next_step(self, is_far: bool) -> str:
        settings = self.settings
        if not settings.method.pruning.prunes:
            is_compensated = settings.quantization and settings.quantization.is_compensated
            return "more bits" if is_compensated else "--gptq, or more bits"
        if settings.method.pruner == "admm":
            return "a lower sparsity, or more calibration text"
        return "a lower sparsity, and --prune_method admm" if is_far else "--prune_method admm, or a lower sparsity"

    @property
    def stages_after_dense(self) -> Sequence[str]:
        return list(self.stages())

    # Allocation

    @property
    def num_layers(self) -> int:
        return self.decoder.num_layers

    def allocate(self) -> tuple[list[float] | None, list[float]]:
        """The scores of all layers (None for a uniform allocation), and their densities."""
        settings, allocator = self.settings, self.settings.method.allocation
        if allocator is None or not settings.is_allocated:
            return None, uniform_densities(self.decoder.num_layers, settings.target_sparsity)
        with self.report.timed("allocate"):
            scores = allocator.load()(self)
            sizes = count_weights(self.workspace.groups)
            densities = spread_densities(scores, sizes, settings.sparsity_ratio, settings.alpha)
        sparsity_report.show_densities(self.report, scores, densities)
        return scores, densities

    def summaries(self, summary: Summary) -> list[float]:
        """A summary of each layer's Wanda scores in the dense model, computed once per allocator, `owl_m` and seed."""
        workspace, allocator = self.workspace, self.settings.method.allocator
        known = (allocator, self.settings.owl_m, self.settings.seed)
        if known not in workspace.scores:
            windows = workspace.calibration[self.settings.seed]
            with self.report.progress(self.decoder.num_layers, allocator) as progress:
                compute = partial(
                    layer_scores, self.decoder, workspace.groups, windows, workspace.batcher, summary, progress
                )
                workspace.scores[known] = self.state.once("scores", compute)
        return workspace.scores[known]

    @property
    def gradients(self) -> GradientSettings:
        """The settings of the gradients: those of the file, if one is given by name."""
        known = self.workspace.gradients.get(self.settings.gradients)
        return known.settings if known and self.settings.gradient_file else self.settings.gradients

    def sensitivities(self) -> list[LayerSensitivity]:
        """Connection sensitivities, read from their file, or computed and written to it."""
        settings, asked, known = self.settings, self.settings.gradients, self.workspace.gradients
        path, report = settings.gradient_path, self.report
        folder = state_folder(path)
        if asked in known:
            report.print(f"            found in {path}")
            if report.is_first and settings.gradient_file is None:
                with suppress(InputError):  # another run is computing them
                    discard(folder)  # left behind if a run was killed while writing them
            return known[asked].layers
        report.print(f"            not in {path} yet: computing, and keeping them there")
        ranks, windows = self.workspace.batcher.ranks, self.workspace.gradient_windows[asked]
        assert settings.snapshot is not None
        wanted = Sensitivities(
            self.decoder, settings.source, asked, windows, path, self.workspace.fingerprint, settings.snapshot, ranks
        )
        if settings.resume or settings.overwrite:
            state = State(folder, wanted.key, ranks, settings.resume)
        else:  # continue any run's unfinished state, just as any run's finished file is used
            state = State.of_cell(folder, wanted.key, ranks)
        with state.session({}):
            known[asked] = wanted.compute(report, state)
        return known[asked].layers

    # Pruning

    def stages(self) -> dict[str, Pruner]:
        """The pruner of each resulting model: `pruned`, then `quantized`, as far as requested."""
        stages = {"pruned": make_pruner(self.settings)} if self.settings.method.pruning.prunes else {}
        quantizer = make_quantizer(self.settings)
        return stages | ({"quantized": quantizer} if quantizer else {})

    def prune_stage(self, stage: str, pruner: Pruner, densities: Sequence[float]) -> dict[str, float]:
        """Runs one pruner over the model; returns the seconds that each part took.

        `quantized` continues from the pruned weights, or from the dense ones where it prunes and rounds in one pass.
        """
        parts: dict[str, float] = {}
        workspace, changes = self.workspace, self.changes_of(stage)
        starts_dense = stage == "pruned" or self.settings.rounds_while_pruning
        if starts_dense and stage != "pruned":
            self.restore()
        follow(self.decoder.layers, [*([] if starts_dense else [self.changes_of("pruned")]), changes])
        if isinstance(pruner, SparseGpt) and self.decoder.device.type == "cuda":
            sparsity_report.show_kernel(self.report, *find_kernel(self.decoder.device))
        with self.report.timed("prune"), self.report.progress(self.decoder.num_layers, stage) as progress:
            prune_layers(
                self.decoder,
                workspace.groups,
                pruner,
                [1 - density for density in densities],
                workspace.calibration.get(self.settings.seed),
                workspace.batcher,
                Monitor(self.report.print, progress, partial(timed, parts)),
                changes,
            )
        return parts

    def changes_of(self, stage: str) -> Changes:
        """The weights that a stage has changed so far, kept with the state."""
        return Changes(self.state.folder / stage, f"{self.state.key} {stage}")

    # 2:4 kernels

    def sparse_kernels(self) -> AbstractContextManager:
        """Inside, the pruned model runs in torch's 2:4 kernels, if requested."""
        if not self.settings.semi_structured:
            return nullcontext()
        linears = [one.module for one in self.workspace.matrices if isinstance(one.module, nn.Linear)]
        return semi_structured_kernels.compressed(linears)

    def compare_speed(self) -> dict[str, float]:
        """Tokens per second through the layers on one batch of evaluation windows, dense and in the 2:4 kernels."""
        input_ids = next(iter(self.workspace.eval_windows.values()))[: self.workspace.batcher.size]
        whole = [Plan(self.decoder.num_layers)]
        (dense,) = tokens_per_second(self.decoder, input_ids, whole)
        with self.sparse_kernels():
            (sparse,) = tokens_per_second(self.decoder, input_ids, whole)
        return {"dense": dense, "semi_structured": sparse}

    def measure_speed(self, result: dict, keep: Callable[[dict], object]) -> None:
        """Adds the speed in 2:4 kernels, if requested."""
        if self.settings.semi_structured:
            result["tokens_per_second"] = self.compare_speed()
            keep(result)
            library = semi_structured_kernels.find_library(self.decoder.device)
            sparsity_report.show_speed(self.report, result["tokens_per_second"], self.workspace.seqlen, library)

    # Output

    def append_log(self, result: dict) -> Path | None:
        """Appends a result to the log once, however often the run is resumed.

        Appends it again if a task failed the first time and all are measured now.
        """
        if not self.settings.log:
            return None
        name = f"rows{' without tasks' if self.tasks.failure else ''} of {digest_of_json(self.settings.key)[:16]}"
        rows = self.state.once(name, lambda: log_tsv.rows(result, self.report.folder))
        return log_tsv.append(self.settings.log, rows)

    def draw(self, result: dict) -> Path | str:
        settings, plot = self.settings, self.report.folder / SPARSITY
        target = settings.target_sparsity
        title = f"{settings.model_name}: {settings.method.name}, {target:g} {settings.pattern}"
        return plot_sparsity(plot, result["layer_sparsity"], result["importance"], target, title) or plot

    def save_model(self, folder: Path) -> None:
        workspace, checking = self.workspace, partial(self.report.timed, "check")
        windows = next(iter((*workspace.eval_windows.values(), *workspace.calibration.values())), None)
        try:
            save_weights(self.decoder, workspace.tokenizer, folder, windows, checking)
        except SaveError as error:
            raise RunError(f"--save_model {self.settings.save_model}: {error}") from error

    def describe(self) -> dict:
        settings, allocator = self.settings, self.settings.method.allocation
        by_gradients = settings.uses_gradients
        flags = allocator.flags if allocator and settings.is_allocated else ()
        return {
            "model": settings.model,
            "model_name": settings.model_name,
            "prune_method": settings.method.name,
            "sparsity_ratio": settings.target_sparsity,
            "sparsity_type": str(settings.pattern),
            "alpha": settings.alpha if "alpha" in flags else None,
            "owl_m": settings.owl_m if "owl_m" in flags else None,
            "grad_type": self.gradients.gradient_type if by_gradients else None,
            "grad_nsamples": self.gradients.nsamples if by_gradients else None,
            "gradients": self.gradients.as_json() if by_gradients else None,
            "use_variant": settings.use_variant,
            "a": settings.a,
            "percdamp": settings.percdamp,
            **({"quantization": str(settings.quantization)} if settings.quantization else {}),
            "dataset": str(settings.calibration_dataset),
            "nsamples": settings.nsamples,
            "seed": settings.seed,
            **self.describe_measuring(),
        }


def count_weights(groups: Sequence[Sequence[InputGroup]]) -> list[int]:
    """The number of weights in the matrices of every layer."""
    return [sum(matrix.stored.numel() for group in layer for matrix in group.matrices) for layer in groups]


def share(counts: Sequence[tuple[int, int]]) -> float:
    """The fraction of zeros among the weights of some layers, given as (zeros, weights) of each."""
    return sum(zeros for zeros, _ in counts) / sum(weights for _, weights in counts)
