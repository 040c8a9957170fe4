"""The run of `ppllms.py`: find a plan by a search (or take a saved one), measure it, save the pruned model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from lib.config.depth import DepthPruning
from lib.config.methods import DEPTH_METHODS
from lib.config.plan import Plan
from lib.config.sources import expand, local_path, short_name
from lib.depth import report as depth_report
from lib.depth.beam import trials_at_most
from lib.depth.compensation import Refit, compensate, token_counts
from lib.depth.moves import moves_of
from lib.depth.prepare import DepthWorkspace, budget_of, check_config, find_counts, prepare
from lib.depth.searches import BEAM_STARTS
from lib.engine.speed import tokens_per_second
from lib.errors import RunError, is_out_of_memory
from lib.evaluation.distance import Evaluation, as_fields
from lib.export import gguf
from lib.export.gguf_changed import InMemory
from lib.export.huggingface import save_pruned
from lib.export.reload import SaveError
from lib.models.residual_writers import has_writers
from lib.models.weight_deltas import Changes
from lib.reporting.plots import plot_removals
from lib.runs.outline import TRIAL, Part
from lib.runs.own_text import fill_in
from lib.runs.single import Run
from lib.runtime.batching import retry_once
from lib.storage.output_folder import PLAN, REMOVALS, RESULT

_OVER = 0.1  # of the parameters, that a plan may remove beyond its rate
_TIMED_TOKENS = 1024  # of a batch whose speed is measured


class DepthRun(Run[DepthPruning, DepthWorkspace]):
    """One run of `ppllms.py`."""

    tool = "ppllms"
    x_axis = "share of the parameters removed"

    plan: Plan  # what is removed; known once `prune` has searched
    refits: Sequence[Refit] = ()  # of a compensation

    check_config = staticmethod(check_config)
    load = staticmethod(prepare)

    def with_settings(self, settings: DepthPruning) -> DepthRun:
        """A run of other settings on the same workspace."""
        return DepthRun(self.report, settings, self.workspace)

    def restore(self) -> None:
        self.workspace.restore()

    def show_model(self) -> None:
        depth_report.show_model(self.report, self.settings.model_name, self.decoder)

    def prune(self) -> dict:
        """Finds the plan, measures the model, and compensates. The model loses its sublayers in `save_model`."""
        seed, by_seed = self.settings.seed, (self.workspace.windows, self.workspace.compensation_windows)
        fill_in(self.report, self.workspace, seed, [windows[seed] for windows in by_seed if seed in windows])
        self.tasks.measure("dense")
        if saved := self.settings.saved_plan:
            self.plan, found = saved.plan, {"applied_plan": str(saved.path)}
            total, compensates = self.decoder.total_parameters, self.settings.compensates
            depth_report.show_saved_plan(self.report, saved, total, compensates)
        else:
            self.plan, found = self.search()
        parameters = self.count_parameters()
        removed: dict[str, list] = {
            "mha_removed": list(self.plan.mha_removed),
            "ffn_removed": list(self.plan.ffn_removed),
        }
        if self.plan.experts_removed:
            removed["experts_removed"] = [list(experts) for experts in self.plan.experts_removed]
        depth_report.show_plan(self.report, self.plan, parameters)
        if not self.is_cell:
            self.report.discard(PLAN)
            if not self.settings.saved_plan:
                self.report.write(PLAN, {"tool": self.tool, **self.describe(), **removed, "parameters": parameters})
        evaluations = self.measure()
        speed = self.compare_speed()
        self.samples.measure("dense")
        self.samples.measure("pruned", self.plan)
        self.tasks.measure("pruned", self.plan)
        return {
            **found,
            **removed,
            "parameters": parameters,
            **speed,
            **(self.compensate(evaluations) if self.settings.compensates else {}),
            **as_fields(evaluations),
        }

    def search(self) -> tuple[Plan, dict]:
        """The plan that the method finds, and what result.json says of how it was found."""
        settings, workspace = self.settings, self.workspace
        search = settings.depth_method.load()
        if not settings.needs_windows:
            return search(self)
        windows = workspace.windows[settings.seed]
        depth_report.show_calibration(self.report, str(settings.dataset), windows, settings.seed)
        found = search(self)
        workspace.sweep(settings.seed).forget()  # frees the hidden states that it kept
        return found

    def count_parameters(self) -> dict:
        """The `parameters` of result.json."""
        settings, total = self.settings, self.decoder.total_parameters
        removed = self.decoder.removed_parameters(self.plan)
        is_by_rate = settings.mha_remove_layers is None or settings.ffn_remove_layers is None
        target = settings.prune_rate if is_by_rate and not settings.saved_plan else None
        return {"total": total, "removed": removed, "target_rate": target, "actual_rate": removed / total}

    @property
    def stages_after_dense(self) -> Sequence[str]:
        return ("pruned", "compensated") if self.settings.compensates else ("pruned",)

    def next_step(self, is_far: bool) -> str:
        if self.plan.experts_removed or not retry_once(partial(has_writers, self.decoder)):
            return "removing less, or python -m lib.heal"
        if self.settings.compensate != "all":
            return "removing less, and --compensate all" if is_far else "--compensate all"
        return "removing less, more text to compensate on, or python -m lib.heal"

    def measure(self) -> dict[str, dict[str, Evaluation]]:
        """Evaluates the dense and the pruned model on every text."""
        found: dict[str, dict[str, Evaluation]] = {}
        self.report.seconds.setdefault("evaluate", 0.0)
        for text, windows in self.workspace.eval_windows.items():
            dense = self.texts.measure("dense", text)
            found[text] = {"dense": dense, "pruned": self.texts.measure("pruned", text, self.plan)}
            depth_report.show_evaluation(self.report, text, found[text], windows, is_first=len(found) == 1)
        return found

    def compare_speed(self) -> dict[str, dict[str, float]]:
        """The `tokens_per_second` of result.json; nothing where they would be those of copies, or memory ran out."""
        windows = self.first_windows()
        if windows is None or self.decoder.is_offloaded or not self.report.is_first:
            return {}
        rows = min(self.workspace.batcher.size, -(-_TIMED_TOKENS // windows.shape[1]))
        plans = [Plan(self.decoder.num_layers), self.plan]
        try:
            with self.report.timed("speed"):
                dense, pruned = retry_once(partial(tokens_per_second, self.decoder, windows[:rows], plans))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.report.print("Prefill             not measured: too little memory")
            return {}
        depth_report.show_speed(self.report, dense, pruned)
        return {"tokens_per_second": {"dense": dense, "pruned": pruned}}

    def first_windows(self) -> torch.Tensor | None:
        """Windows (N, T) of the first text that the run has."""
        workspace = self.workspace
        texts = (workspace.eval_windows, workspace.windows, workspace.compensation_windows)
        return next((windows for of_texts in texts for windows in of_texts.values()), None)

    def compensate(self, evaluations: dict[str, dict[str, Evaluation]]) -> dict[str, dict]:
        """Refits projections, and measures the model again; returns the `compensation` of result.json."""
        settings, state, decoder = self.settings, self.state, self.decoder
        windows = self.workspace.compensation_windows[settings.seed]
        depth_report.show_compensation(self.report, settings, windows)
        changes = Changes(state.folder / "compensated", f"{state.key} compensated")
        with self.report.timed("compensate"), self.report.progress(decoder.num_layers, "compensation") as progress:
            mode, batcher = settings.compensate, self.workspace.batcher
            self.refits = refits = compensate(decoder, self.plan, windows, mode, batcher, changes, progress)
        depth_report.show_refits(self.report, refits)
        for text, stages in evaluations.items():
            stages["compensated"] = self.texts.measure("compensated", text, self.plan)
            depth_report.show_compensated(self.report, text, stages)
        self.samples.measure("compensated", self.plan)
        self.tasks.measure("compensated", self.plan)
        return {"compensation": describe_compensation(settings, windows, refits)}

    def describe(self) -> dict:
        settings, workspace = self.settings, self.workspace
        described = {
            "model": settings.model_name,
            "model_path": local_path(settings.model_name),
            **self.describe_measuring(),
            **({"save_format": settings.save_format} if settings.save_model else {}),
        }
        if settings.saved_plan:
            return described
        described |= {"method": settings.method, "seed": settings.seed}
        if not settings.needs_windows:
            return described
        windows = len(workspace.windows[settings.seed])
        return described | {
            "nsamples": settings.nsamples,
            "dataset": str(settings.dataset),
            "windows": windows,
            "bi_windows": min(settings.bi_windows or windows, windows),
        }

    def draw(self, result: dict) -> Path | str | None:
        if "bi_scores" not in result:
            return None
        plot, rate = self.report.folder / REMOVALS, result["parameters"]["actual_rate"]
        title = f"{short_name(self.settings.model_name)}: {rate:.1%} of the parameters removed"
        return plot_removals(plot, result["bi_scores"], self.plan.mha_removed, self.plan.ffn_removed, title) or plot

    def parts(self) -> list[Part]:
        settings, workspace = self.settings, self.workspace
        parts = []
        if settings.needs_windows:
            windows = len(workspace.windows[settings.seed])
            if settings.depth_method.takes("bi_windows"):
                parts.append(Part("Block Influence", min(settings.bi_windows or windows, windows)))
            if settings.depth_method.removes == "experts":
                parts.append(Part("saliency of experts", windows))
            elif trials := self.count_trials():
                most = "at most " if settings.depth_method.takes("beam_width") else ""
                note = f"{most}{trials:,} trials on {windows} windows"
                parts.append(Part("search", TRIAL * trials * windows, note=note))
        if settings.compensates:
            windows = len(workspace.compensation_windows[settings.seed])
            parts.append(Part("compensation", 3 * windows))  # of the dense and the pruned model, and what is fitted
        return parts

    def count_trials(self) -> int:
        """How many trials the search will measure: about, at most for the beam search, none where BI alone decides."""
        settings, decoder = self.settings, self.decoder
        method, target = settings.depth_method, settings.prune_rate
        if method.removes == "counts":
            counts = find_counts(settings, decoder)
            return sum(counts.ffn - found for found in range(counts.mha))
        moves, none = moves_of(method, decoder), Plan(decoder.num_layers)
        sizes = [decoder.removed_parameters(move.added_to(none)) for move in moves]
        if method.takes("beam_width"):
            return trials_at_most(sizes, target * decoder.total_parameters, settings.beam_width, len(BEAM_STARTS))
        if method.takes("bi_windows"):
            return 0
        steps = min(len(moves), round(target * decoder.total_parameters * len(moves) / sum(sizes)))
        return sum(len(moves) - step for step in range(steps))

    def bytes_to_save(self) -> int:
        settings, decoder = self.settings, self.decoder
        if settings.save_format == "masked":
            return super().bytes_to_save()
        if settings.saved_plan:
            rate = decoder.removed_parameters(settings.saved_plan.plan) / decoder.total_parameters
        elif settings.depth_method.removes == "counts":
            rate = budget_of(decoder).rate(*find_counts(settings, decoder))
        else:
            rate = min(1.0, settings.prune_rate + _OVER)
        source = expand(settings.model_name)
        whole = source.stat().st_size if settings.save_format == "gguf" else super().bytes_to_save()
        return int((1 - rate) * whole)

    def save_model(self, folder: Path) -> None:
        workspace, save_format = self.workspace, self.settings.save_format
        windows = self.first_windows()
        checking = partial(self.report.timed, "check")
        try:
            if save_format == "gguf":
                self.save_gguf(folder)
            else:
                save_pruned(self.decoder, self.plan, workspace.tokenizer, folder, save_format, windows, checking)
        except SaveError as error:
            how = f"; the plan is kept, add --apply_plan {self.report.folder / RESULT} --save_format masked"
            raise RunError(f"--save_format {save_format}: {error}{how * (save_format != 'masked')}") from error

    def save_gguf(self, target: Path) -> None:
        """Writes the GGUF file of the model without what the plan removes, and with the refitted projections."""
        changed = [(refit.layer, refit.name) for refit in self.refits if refit.is_changed]
        refitted = InMemory(self.decoder, changed) if changed else None
        found = gguf.prune(expand(self.settings.model_name), self.plan, refitted).write(target)
        if refitted:
            self.report.print(f"Changed     {found.changed.total()} tensors in the GGUF file: {found.changed_types}")


def describe_compensation(settings: DepthPruning, windows: torch.Tensor, refits: Sequence[Refit]) -> dict:
    """The `compensation` of result.json."""
    to_fit, to_check = token_counts(windows)
    return {
        "mode": settings.compensate,
        "dataset": list(settings.compensate_dataset.texts),
        "shares": list(settings.compensate_dataset.shares),
        "nsamples": settings.compensation_nsamples,
        "seed": settings.seed,
        "tokens": to_fit,
        "held_out_tokens": to_check,
        "projections": [{**asdict(refit), "kept": refit.is_changed} for refit in refits],
    }


for _method in DEPTH_METHODS.values():  # a method without an implementation fails here, not in the middle of a run
    _method.load()
