"""One run from its settings to its result: the skeleton that `ppllms.py` and `alp_prune.py` share.

A subclass of `Run` says how its tool prepares, prunes, describes and saves; the order of these steps, timing, resume
state, perplexity, samples and result.json are here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch

from lib.config.depth import DepthPruning
from lib.config.healing import Healing
from lib.config.keys import EVALUATION, work_of
from lib.config.snapshot import Snapshot
from lib.config.sources import short_name
from lib.config.sparsity import SparsityPruning
from lib.engine.window_scores import DenseStates
from lib.evaluation.answers import Answers
from lib.evaluation.distance import Evaluation
from lib.evaluation.samples import Prompt
from lib.evaluation.tasks import Tasks
from lib.export.huggingface import how_to_load
from lib.export.model_card import write_card
from lib.files import digest_of_json
from lib.models.decoder import Decoder
from lib.models.limits import dtype_name
from lib.reporting.console import Report
from lib.reporting.environment import environment
from lib.reporting.verdict import FAR, describe, verdict_of, worst_divergence
from lib.runs import outline
from lib.runs.outline import Part, sample_passes
from lib.runs.samples import SampleStages
from lib.runs.tasks import TaskStages
from lib.runs.texts import TextStages
from lib.runtime.batching import Batcher
from lib.runtime.device import resolve_device
from lib.runtime.distributed import join
from lib.runtime.memory import peak_memory_bytes
from lib.runtime.setup import set_up
from lib.storage import output_folder
from lib.storage.model_folder import check_room, signature
from lib.storage.output_folder import REMOVALS, RESULT, SAMPLES, SPARSITY, STATE
from lib.storage.resume_state import State, check_saved, finished, how_to_resume
from lib.version import code_version


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
    tasks: Tasks | None = None
    dense_answers: Answers | None = None  # to the tasks
    prompts: Sequence[Prompt] = ()  # of the samples of a single run
    has_dense: bool = True  # False: nothing is known of the dense model
    own_text: dict[int, torch.Tensor] = field(default_factory=dict)  # windows (N, T) that the model made, by seed


Settings = TypeVar("Settings", bound=DepthPruning | SparsityPruning | Healing)
Space = TypeVar("Space", bound=Workspace)


SCHEMA = 1  # of result.json: one more when a field goes, or comes to mean something else


class Run(ABC, Generic[Settings, Space]):
    """One run of a tool, on a workspace that other runs may share."""

    tool: ClassVar[str]
    x_axis: ClassVar[str]  # of the plots of a grid

    def __init__(self, report: Report, settings: Settings, workspace: Space, is_cell: bool = False):
        """`is_cell`: of a grid, so its folder is not the run's own, and other runs on the workspace may follow."""
        self.report, self.settings, self.workspace, self.is_cell = report, settings, workspace, is_cell
        self.decoder, self.state = workspace.decoder, workspace.state
        self.texts = TextStages(report, workspace, self.stages_after_dense, settings.eval_stride, is_cell)
        key = settings.key
        self.tasks = TaskStages(report, workspace, key.get("tasks"))
        self.samples = SampleStages(report, workspace, [key.get(name) for name in EVALUATION[self.tool]], is_cell)

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

    @abstractmethod
    def next_step(self, is_far: bool) -> str:
        """What to try when the pruned model is not usable; `is_far`: too far from the dense model to be repaired."""

    @abstractmethod
    def draw(self, result: dict) -> Path | str | None:
        """Draws the plot; returns its path, why there is none, or None where there is nothing to draw."""

    @abstractmethod
    def save_model(self, folder: Path) -> None:
        """Writes the pruned model to an empty folder."""

    @abstractmethod
    def parts(self) -> list[Part]:
        """What the run would do before it evaluates, in order."""

    def describe_measuring(self) -> dict:
        """The fields of result.json that say how a model was measured, whatever was done to it."""
        return {
            "seqlen": self.workspace.seqlen,
            "eval_stride": self.settings.eval_stride,
            "eval_windows": self.settings.eval_windows,
            "dtype": dtype_name(self.decoder.model),
            "batch_size": self.workspace.batcher.size,
            "num_layers": self.decoder.num_layers,
        }

    def bytes_to_save(self) -> int:
        """The least disk space that the saved model will take."""
        return sum(one.numel() * one.element_size() for one in self.decoder.model.parameters())

    def restore(self) -> None:  # noqa: B027  (a tool that changes no weights has nothing to restore)
        """Gives the model its dense weights back before the next cell of a grid."""

    def measure_speed(self, result: dict, keep: Callable[[dict], object]) -> None:  # noqa: B027
        """Adds the speed of the pruned model, where it is asked for; `keep` writes the result."""

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
            next_step = self.next_step(worst_divergence(fields) > FAR)
            self.report.print(f"Verdict     {describe(fields['verdict'], next_step)}")
        fields |= self.samples.show() | self.tasks.show()
        self.check_unchanged()
        return {
            "schema": SCHEMA,
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

    def execute(self) -> dict:
        """Prunes, measures, writes result.json and the model; then all that only shows, which cannot fail the run."""
        result = self.compute()
        self.report.seconds.setdefault("save", 0.0)
        if not self.report.is_first:
            return result
        self.state.put("measured", True)  # so that a run that is stopped from here on is not taken for finished
        path, settings = self.report.write(RESULT, result), self.settings
        self.report.discard(REMOVALS, SPARSITY)
        self.samples.write()
        if settings.save_model:
            with self.report.timed("save"):
                with self.state.saving(settings.save_model, settings.overwrite) as draft:
                    self.save_model(draft)
                    if draft.is_dir():
                        write_card(draft, result, settings.source, self.samples.text("##"))
                    self.check_unchanged()
            result |= {"saved_model": str(settings.save_model.resolve()), "saved": signature(settings.save_model)}
            self.report.write(RESULT, result)
        plot = self.draw(result)
        try:
            self.measure_speed(result, self.keep)
        finally:
            log = self.append_log(result)
        self.show_written(path, plot, log)
        self.tasks.check()
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
        if self.samples.written:
            print_line(f"  samples {result.with_name(SAMPLES)}")
        if plot:
            print_line(f"  plot    {plot}")
        if model:
            print_line(f"  model   {model}: {how_to_load(model)}")
        if log:
            print_line(f"  log     {log}: a row for each text")

    def execute_cell(self, keep: Callable[[dict], object]) -> dict:
        """One cell of a grid: no model is saved, and `keep` gets the result. Continues from the cell's resume state."""
        result = self.compute()
        self.tasks.check()
        if self.report.is_first:
            self.measure_speed(result, lambda result: self.check_unchanged())
            self.append_log(result)
        keep(result)
        return result


def outline_run(kind: type[Run[Settings, Space]], settings: Settings) -> None:
    """Loads and checks all that a run needs, measures one batch, and prints the plan of work. Writes nothing.

    Raises `InputError` as the run would.
    """
    set_up()
    ranks = join(resolve_device(settings.source.device))
    report = Report(ranks.is_first)
    settings = replace(settings, snapshot=Snapshot.take(settings.inputs, ranks.agree, report.print))
    workspace = kind.load(report, [settings], ranks)
    run = kind(report, settings, workspace)
    run.show_model()
    models = workspace.has_dense + len(run.stages_after_dense)
    windows = sum(map(len, workspace.eval_windows.values()))
    samples = models * sample_passes(workspace.prompts, workspace.seqlen)
    parts = [
        *run.parts(),
        Part("evaluation", models * windows, note=f"{windows} windows, {models} models"),
        Part("samples", 0.0 if workspace.decoder.is_on_disk else samples),
    ]
    disk = None
    if settings.save_model:
        free = check_room(settings.save_model, needed := run.bytes_to_save())
        disk = f"{needed / 10**6:,.0f} MB for the model at least; {free / 10**6:,.0f} MB free"
    tasks = [Part("tasks", 0.0, note="not estimated")] if settings.tasks else []
    batch_size = min(workspace.batcher.size, max(1, windows))
    for line in outline.describe([*parts, *tasks], workspace.decoder, workspace.seqlen, batch_size, disk):
        report.print(line)


def run_single(kind: type[Run[Settings, Space]], settings: Settings) -> dict:
    """The result of a run, as written to result.json. With `resume` it continues a stopped run; a dry one has none.

    Raises `InputError`, and `RunError` that says what is kept and how to resume.
    """
    if settings.dry_run:
        outline_run(kind, settings)
        return {}
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
            if report.is_first and settings.save_model:
                check_room(settings.save_model, kind(report, settings, workspace).bytes_to_save())
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
    run = kind(report, settings, workspace, is_cell=True)
    run.check_unchanged()
    run.restore()
    with workspace.state.session(report.seconds):
        return run.execute_cell(keep)
