"""One run from its settings to its result: the skeleton that `ppllms.py` and `alp_prune.py` share.

A subclass of `Run` says how its tool prepares, prunes, describes and saves; the order of these steps, timing, resume
state, perplexity and result.json are here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch

from lib.config.depth import DepthPruning
from lib.config.plan import Plan
from lib.config.snapshot import Snapshot
from lib.config.sources import short_name
from lib.config.sparsity import SparsityPruning
from lib.engine.window_losses import plan_window_losses
from lib.evaluation.perplexity import Perplexity, perplexity
from lib.export.huggingface import how_to_load
from lib.files import digest_of_json
from lib.models.decoder import Decoder
from lib.reporting.console import Report
from lib.reporting.environment import code_version, environment
from lib.runtime.batching import Batcher
from lib.runtime.device import resolve_device
from lib.runtime.distributed import join
from lib.runtime.memory import peak_memory_bytes
from lib.runtime.setup import set_up
from lib.storage import output_folder
from lib.storage.model_folder import signature
from lib.storage.output_folder import RESULT, STATE
from lib.storage.resume_state import State, check_saved, finished, how_to_resume


@dataclass(kw_only=True)
class Workspace:
    """The model, text and caches that the runs on one model share; everything in it is checked."""

    tokenizer: Any
    decoder: Decoder
    batcher: Batcher
    seqlen: int
    eval_windows: dict[str, torch.Tensor]  # (N, T), by text
    state: State = field(default_factory=lambda: State(None, {}))  # of the current run
    dense: dict[str, Perplexity] = field(default_factory=dict)  # by text
    own_text: dict[int, torch.Tensor] = field(default_factory=dict)  # windows (N, T) that the model made, by seed


Settings = TypeVar("Settings", bound=DepthPruning | SparsityPruning)
Space = TypeVar("Space", bound=Workspace)


class Run(ABC, Generic[Settings, Space]):
    """One run of a tool, on a workspace that other runs may share."""

    tool: ClassVar[str]
    x_axis: ClassVar[str]  # of the plots of a grid

    def __init__(self, report: Report, settings: Settings, workspace: Space):
        self.report, self.settings, self.workspace = report, settings, workspace
        self.decoder, self.state = workspace.decoder, workspace.state

    # What a tool defines

    check_config: ClassVar[Callable[..., int]]  # (cells of one model, its config): raises `InputError`
    load: ClassVar[Callable[..., Any]]  # (report, cells of one model, ranks) -> their workspace, all of it checked

    @abstractmethod
    def show_model(self) -> None:
        """Prints the model and what will be done with it."""

    @abstractmethod
    def prune(self) -> dict:
        """Prunes the model and measures it; returns the fields of result.json that this gives."""

    @abstractmethod
    def describe(self) -> dict:
        """The fields of result.json that say what was asked for."""

    @abstractmethod
    def draw(self, result: dict) -> Path | str | None:
        """Draws the plot; returns its path, why there is none, or None where there is nothing to draw."""

    @abstractmethod
    def save_model(self, folder: Path) -> None:
        """Writes the pruned model to an empty folder."""

    def restore(self) -> None:  # noqa: B027  (a tool that changes no weights has nothing to restore)
        """Gives the model its dense weights back before the next cell of a grid."""

    def evaluate_tasks(self, result: dict, keep: Callable[[dict], object]) -> None:  # noqa: B027
        """Adds measurements that take long or may fail; `keep` writes the result after each."""

    def append_log(self, result: dict) -> Path | None:
        """Appends the result to the log of runs, where one is asked for; returns its path."""
        return None

    # What all tools share

    def compute(self) -> dict:
        """Prunes and measures; returns what result.json holds."""
        self.show_model()
        fields = self.prune()
        self.check_unchanged()
        return {
            "tool": self.tool,
            "key": digest_of_json(self.settings.key),
            **self.describe(),
            **fields,
            "seconds": self.report.seconds,
            "peak_memory_bytes": peak_memory_bytes(self.decoder.device),
            "environment": environment(self.decoder.device),
        }

    def check_unchanged(self) -> None:
        """Raises `InputsChanged` when something that the run reads is no longer what its key says."""
        if self.report.is_first and self.settings.snapshot:
            self.settings.snapshot.check(self.settings.inputs)

    def perplexity(self, stage: str, text: str, plan: Plan | None = None) -> Perplexity:
        """Perplexity of the model as it is, under a plan if given, on one evaluation text; measured once."""
        windows = self.workspace.eval_windows[text]

        def measure() -> Perplexity:
            with self.report.progress(len(windows), "perplexity") as progress:
                all_on = Plan(self.decoder.num_layers)
                losses = plan_window_losses(self.decoder, plan or all_on, self.workspace.batcher, progress)
                return perplexity(losses, windows, self.settings.eval_stride)

        with self.report.timed("evaluate"):
            return Perplexity(*self.state.once(f"perplexity of {stage} on {text}", measure))

    def execute(self) -> dict:
        """Prunes, measures, writes result.json and the model; then all that only shows, which cannot fail the run."""
        result = self.compute()
        self.report.seconds.setdefault("save", 0.0)
        if not self.report.is_first:
            return result
        self.state.put("measured", True)  # so that a run that is stopped from here on is not taken for finished
        path, settings = self.report.result(result), self.settings
        self.report.discard_plots()
        if settings.save_model:
            with self.report.timed("save"):
                with self.state.saving(settings.save_model, settings.overwrite) as draft:
                    self.save_model(draft)
                    self.check_unchanged()
            result |= {"saved_model": str(settings.save_model.resolve()), "saved": signature(settings.save_model)}
            self.report.result(result)
        plot = self.draw(result)
        try:
            self.evaluate_tasks(result, self.keep)
        finally:
            log = self.append_log(result)
        self.show_written(path, plot, log)
        return result

    def keep(self, result: dict) -> None:
        """Writes a result to which something was added."""
        self.check_unchanged()
        self.report.result(result)

    def show_written(self, result: Path, plot: Path | str | None, log: Path | None) -> None:
        """Prints which files were written."""
        print_line, model = self.report.print, self.settings.save_model
        print_line()
        print_line("Written")
        print_line(f"  result  {result}")
        if plot:
            print_line(f"  plot    {plot}")
        if model:
            print_line(f"  model   {model}: {how_to_load(model)}")
        if log:
            print_line(f"  log     {log}: a row for each text")

    def execute_cell(self, keep: Callable[[dict], object]) -> dict:
        """One cell of a grid: no model is saved, and `keep` gets the result. Continues from the cell's resume state."""
        result = self.compute()
        if self.report.is_first:
            self.evaluate_tasks(result, lambda result: self.check_unchanged())
            self.append_log(result)
        keep(result)
        return result


def run_single(kind: type[Run[Settings, Space]], settings: Settings) -> dict:
    """The result of a run, as written to result.json. With `resume` it continues a stopped run.

    Raises `InputError`, and `RunError` that says what is kept and how to resume.
    """
    set_up()
    ranks = join(resolve_device(settings.source.device))
    report = Report(ranks.is_first)
    stem = f"{kind.tool}-{short_name(settings.model_name)[:80]}"
    with output_folder.chosen(settings.output_dir, stem) if report.is_first else nullcontext() as chosen:
        folder = Path(ranks.agree(lambda: str(chosen)))
        with report.timed("snapshot"):
            code_version()
            settings = replace(settings, snapshot=Snapshot.take(settings.inputs, ranks.agree, report.print))
        if settings.resume and (before := ranks.agree(partial(finished, folder, settings.key, settings.overwrite))):
            check_saved(before, settings.save_model, settings.save_format)
            report.print(f"Finished before: {folder / RESULT}")
            return before
        state = State(folder / STATE, settings.key, ranks, settings.resume)
        with state.advise_resume(how_to_resume(folder)):
            workspace = kind.load(report, [settings], ranks)
            workspace.state = state
            if report.is_first:
                output_folder.claim(folder, "run")
            with state.session(report.seconds):
                report.open(folder)
                return kind(report, settings, workspace).execute()


def run_cell(
    kind: type[Run[Settings, Space]],
    report: Report,
    settings: Settings,
    workspace: Space,
    keep: Callable[[dict], object],
) -> dict:
    """The result of one cell of a grid, which resumes like a single run."""
    workspace.state = State.of_cell(report.folder / STATE, settings.key, workspace.batcher.ranks)
    run = kind(report, settings, workspace)
    run.check_unchanged()
    run.restore()
    with workspace.state.session(report.seconds):
        return run.execute_cell(keep)
