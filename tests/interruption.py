"""Stops a run, in this process, at a chosen one of the steps that it keeps, and counts the work that it does."""

import json
from collections.abc import Callable
from pathlib import Path

import lib.alp
import lib.depth
import lib.gradients
import lib.prune
import lib.search
from lib import artefact, sensitivity
from lib.changes import Changes
from lib.report import Report
from lib.state import State

KEPT = [
    (State, "put"),
    (Changes, "write"),
    (sensitivity._Unfinished, "save"),
    (artefact, "write"),
    (Report, "result"),
    (lib.depth, "save_pruned"),
    (lib.alp, "save_weights"),
]
WORK = [
    (lib.depth, "block_influence"),
    (lib.search.Sweep, "_measured"),
    (lib.depth, "perplexity"),
    (lib.alp, "perplexity"),
    (lib.alp, "layer_scores"),
    (lib.alp, "count_zeros"),
    (lib.prune, "_prune_layer"),
    (lib.gradients, "summarize"),
]
NOT_COMPARED = ("seconds", "prune_seconds", "peak_memory_bytes", "environment", "saved_model")


class Interruption:
    """Counts the steps that are kept and the work that is done; stops before or after the step `at`, if any."""

    def __init__(self, monkeypatch, at: int | None = None, is_after: bool = False, error: BaseException | None = None):
        self.steps: list[str] = []
        self.work: list[str] = []
        self.at, self.is_after, self.error = at, is_after, error or KeyboardInterrupt()
        for owner, name in KEPT:
            monkeypatch.setattr(owner, name, self._step(name, getattr(owner, name)))
        for owner, name in WORK:
            monkeypatch.setattr(owner, name, self._counted(name, getattr(owner, name)))

    def _step(self, name: str, function: Callable) -> Callable:
        def step(*args, **options):
            number = len(self.steps)
            self.steps.append(name)
            if number == self.at and not self.is_after:
                raise self.error
            result = function(*args, **options)
            if number == self.at:
                raise self.error
            return result

        return step

    def _counted(self, name: str, function: Callable) -> Callable:
        def counted(*args, **options):
            result = function(*args, **options)
            self.work.append(name)
            return result

        return counted


def result_of(folder: Path) -> dict:
    """What result.json says, but for what differs from run to run."""
    content = json.loads((folder / "result.json").read_text())
    return {name: value for name, value in content.items() if name not in NOT_COMPARED}


def artefact_of(path: Path) -> dict:
    """What an artefact says, but for what differs from run to run."""
    return {name: value for name, value in json.loads(path.read_text()).items() if name not in NOT_COMPARED}


def files_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def litter_of(folder: Path) -> list[str]:
    """What no finished run leaves: states, and what is only partly written."""
    return [path.name for path in folder.rglob("*") if ".partial-" in path.name or path.name.split(".")[-1] == "state"]
