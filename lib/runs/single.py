"""One run from its settings to its result: the skeleton that `ppllms.py` and `alp_prune.py` share.

A subclass of `Run` says how its tool prepares, prunes, describes and saves; the order of these steps, timing, resume
state, perplexity and result.json are here.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch

from lib.config.depth import DepthPruning
from lib.config.keys import work_of
from lib.config.plan import Plan
from lib.config.snapshot import Snapshot
from lib.config.sources import short_name
from lib.config.sparsity import SparsityPruning
from lib.data.sampling import evenly_spread
from lib.engine.map_windows import waiting_bytes
from lib.engine.window_scores import DenseStates, dense_window_losses, window_scores
from lib.evaluation.distance import Evaluation, evaluation_of, packed, unpacked
from lib.evaluation.perplexity import Span, spans_of
from lib.export.huggingface import how_to_load
from lib.files import digest_of_json
from lib.models.decoder import Decoder
from lib.reporting.console import Report
from lib.reporting.environment import code_version, environment
from lib.reporting.verdict import describe, verdict_of
from lib.runtime.batching import Batcher, Progress
from lib.runtime.device import resolve_device
from lib.runtime.distributed import join
from lib.runtime.memory import free_host_memory, peak_memory_bytes
from lib.runtime.setup import set_up
from lib.storage import output_folder
from lib.storage.model_folder import signature
from lib.storage.output_folder import REMOVALS, RESULT, SPARSITY, STATE
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
    dense: dict[str, Evaluation] = field(default_factory=dict)  # by text
    dense_states: dict[str, DenseStates] = field(default_factory=dict)  # by text


_PARTS = 8  # of an evaluation that are kept one by one
_DISTANCE_TOKENS = 2**18  # of each text, whose distance to the dense model is measured
_ROOM = 0.25  # share of the free host memory, for their hidden states

Settings = TypeVar("Settings", bound=DepthPruning | SparsityPruning)
Space = TypeVar("Space", bound=Workspace)


class Run(ABC, Generic[Settings, Space]):
    """One run of a tool, on a workspace that other runs may share."""

    tool: ClassVar[str]
    x_axis: ClassVar[str]  # of the plots of a grid
    is_cell = False  # of a grid, whose folder is not the run's own

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

    @property
    @abstractmethod
    def stages_after_dense(self) -> Sequence[str]:
        """The names of the models that are evaluated after the dense one."""

    @abstractmethod
    def describe(self) -> dict:
        """The fields of result.json that say what was asked for."""

    @property
    @abstractmethod
    def next_step(self) -> str:
        """What to try when the pruned model is not usable."""

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
        fields["verdict"] = verdict_of(fields)
        if fields["verdict"]:
            self.report.print(f"Verdict     {describe(fields['verdict'], self.next_step)}")
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

    def evaluate(self, stage: str, text: str, plan: Plan | None = None) -> Evaluation:
        """Evaluates the model as it is, under a plan if given, on one text; `dense` comes first.

        Each part is kept in the state, so that a stopped run goes on where it was.
        """
        windows, batcher = self.workspace.eval_windows[text], self.workspace.batcher
        at_once = batcher.first_size * batcher.ranks.count  # the same for all stages and processes
        at_once *= -(-len(windows) // (at_once * (1 if self.decoder.is_offloaded else _PARTS)))
        spans = spans_of(len(windows), windows.shape[1], self.settings.eval_stride, at_once)
        with self.report.timed("evaluate"), self.report.progress(len(windows), f"{stage} on {text}") as progress:
            return evaluation_of(spans, [self._scores(stage, text, span, plan, progress) for span in spans])

    def _scores(self, stage: str, text: str, span: Span, plan: Plan | None, progress: Progress) -> torch.Tensor:
        """The scores (n, 1) of some windows for the dense model, or (n, 2 + scored) for another stage."""
        windows, batcher, state = self.workspace.eval_windows[text][span.rows], self.workspace.batcher, self.state
        digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]
        names = {one: f"{one}: last {span.scored} tokens of {digest}" for one in ("dense", *self.stages_after_dense)}
        columns = 1 if stage == "dense" else 2 + span.scored
        known = state.get(names[stage])
        if stage == "dense" and (self.is_cell or not all(map(state.get, names.values()))):
            known = None  # its hidden states are needed, by this run or by the next cell
        if known is not None:
            progress(len(windows))
            return unpacked(known, columns)
        dense, first = self.dense_states(text), span.rows.start
        if stage == "dense":
            scores = dense_window_losses(self.decoder, windows, span.scored, batcher, dense, first, progress)
        else:
            all_on = Plan(self.decoder.num_layers)
            scores = window_scores(self.decoder, plan or all_on, windows, span.scored, batcher, dense, first, progress)
        state.put(names[stage], packed(scores))
        return scores

    def dense_states(self, text: str) -> DenseStates:
        """What the distances on a text are measured to: evenly spread windows of it, as many as are kept."""
        workspace, windows = self.workspace, self.workspace.eval_windows[text]
        if text not in workspace.dense_states:
            bytes_per_token = waiting_bytes(self.decoder, 1, 0)
            fitting = workspace.batcher.ranks.agree(lambda: int(free_host_memory() * _ROOM / bytes_per_token))
            most = max(1, min(_DISTANCE_TOKENS, fitting) // windows.shape[1])
            workspace.dense_states[text] = DenseStates(evenly_spread(len(windows), most))
        return workspace.dense_states[text]

    def execute(self) -> dict:
        """Prunes, measures, writes result.json and the model; then all that only shows, which cannot fail the run."""
        result = self.compute()
        self.report.seconds.setdefault("save", 0.0)
        if not self.report.is_first:
            return result
        self.state.put("measured", True)  # so that a run that is stopped from here on is not taken for finished
        path, settings = self.report.write(RESULT, result), self.settings
        self.report.discard(REMOVALS, SPARSITY)
        if settings.save_model:
            with self.report.timed("save"):
                with self.state.saving(settings.save_model, settings.overwrite) as draft:
                    self.save_model(draft)
                    self.check_unchanged()
            result |= {"saved_model": str(settings.save_model.resolve()), "saved": signature(settings.save_model)}
            self.report.write(RESULT, result)
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
        self.report.write(RESULT, result)

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
        self.is_cell = True
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
        state = State(folder / STATE, work_of(settings.key), ranks, settings.resume)
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
    workspace.state = State.of_cell(report.folder / STATE, work_of(settings.key), workspace.batcher.ranks)
    run = kind(report, settings, workspace)
    run.check_unchanged()
    run.restore()
    with workspace.state.session(report.seconds):
        return run.execute_cell(keep)
