"""One run from its settings to its result: what the runs of `ppllms.py` and `alp_prune.py` have in common."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from lib.config.depth import DepthPruning
from lib.config.sparsity import SparsityPruning
from lib.reporting.console import Report
from lib.runtime.device import resolve_device
from lib.runtime.distributed import Ranks, join
from lib.runtime.setup import set_up
from lib.storage.atomic import RESULT
from lib.storage.resume_state import FOLDER, State, check_saved, finished, how_to_resume


class HasState(Protocol):
    """A job: what a run works on, and where it keeps what is finished."""

    state: State


Settings = TypeVar("Settings", DepthPruning, SparsityPruning)
Job = TypeVar("Job", bound=HasState)


def run_single(
    settings: Settings,
    prepare: Callable[[Report, Sequence[Settings], Ranks], Job],
    work: Callable[[Report, Settings, Job], dict],
) -> dict:
    """The result of a run, which goes on with one that was stopped, or says that it is finished, if it is to.

    `prepare` loads and checks all that it needs, and `work` does it, with what is finished kept in the job's state.
    Raises `InputError`, and `RunError` that says what is kept.
    """
    set_up()
    ranks = join(resolve_device(settings.source.device))
    folder = Path(ranks.agree(lambda: str(settings.output_dir)))  # which may have the time in it
    settings, report = replace(settings, output_dir=folder), Report(ranks.is_first)
    if settings.resume and (before := ranks.agree(partial(finished, folder, settings.key, settings.overwrite))):
        check_saved(before, settings.save_model)
        report.print(f"Finished before: {folder / RESULT}")
        return before
    state = State(folder / FOLDER, settings.key, ranks, settings.resume)
    with state.advise_resume(how_to_resume(folder)):
        job = prepare(report, [settings], ranks)
        job.state = state
        with state.session(report.seconds):
            report.open(folder, resume=settings.resume)
            return work(report, settings, job)
