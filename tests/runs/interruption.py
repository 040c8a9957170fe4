"""Runs a command in this process, and stops it at a chosen one of the steps that it keeps; counts the work it does."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import lib.depth.compensation
import lib.depth.run
import lib.depth.searches
import lib.depth.trial_losses
import lib.evaluation.samples
import lib.heal.run
import lib.reporting.plots
import lib.runs.own_text
import lib.runs.texts
import lib.sensitivity.gradients
import lib.sparsity.layerwise
import lib.sparsity.run
import save_gradient
from lib.heal.training import Training
from lib.models.weight_deltas import Changes
from lib.reporting.console import Report
from lib.sensitivity import artifact, compute
from lib.storage.resume_state import State
from tests.command import DIFFERS, run

KEPT = [
    (State, "put"),
    (Changes, "write"),
    (compute._Unfinished, "save"),
    (lib.runs.own_text, "save_sealed"),
    (artifact, "write"),
    (Report, "write"),
    (lib.depth.run, "save_pruned"),
    (lib.sparsity.run, "save_weights"),
    (Training, "save"),
    (lib.heal.run, "save_weights"),
]
WORK = [
    (lib.depth.searches, "block_influence"),
    (lib.depth.trial_losses.Sweep, "_measured"),
    (lib.runs.own_text, "sample_windows"),
    (lib.runs.texts, "window_scores"),
    (lib.evaluation.samples, "continuations"),
    (lib.depth.compensation, "_refit_layer"),
    (lib.sparsity.run, "layer_scores"),
    (lib.sparsity.run, "count_zeros"),
    (lib.sparsity.layerwise, "_prune_part"),
    (lib.sensitivity.gradients, "summarize"),
    (Training, "_take_step"),
]
Place = int | tuple[str, int]  # of a step
NOT_COMPARED = DIFFERS | {"saved_model", "saved", "digest"}

COUNTS = ["--mha_remove_layers", 2, "--ffn_remove_layers", 3]
RUNS = {
    "ppllms": ("depth", COUNTS),
    "ppllms-disk": ("depth", [*COUNTS, "--offload", "disk", "--save_format", "masked"]),
    "blockpruner": ("depth", ["--method", "blockpruner", "--prune_rate", 0.1]),
    "beam": ("depth", ["--method", "beam", "--prune_rate", 0.1]),
    "compensated": ("depth", [*COUNTS, "--compensate", "all"]),
    "compensated-disk": ("depth", [*COUNTS, "--compensate", "nearest", "--offload", "disk", "--save_format", "masked"]),
    "random": ("depth", ["--method", "random", "--prune_rate", 0.1, "--eval_ppl", "no"]),
    "own text": ("depth", [*COUNTS, "--dataset", "self", "--seqlen", 16]),
    "wanda_alp": ("alp", ["--prune_method", "wanda_alp", "--grad_nsamples", 3, "--grad_seqlen", 16]),
    "sparsegpt": ("alp", ["--prune_method", "sparsegpt"]),
    "gptq": ("alp", ["--prune_method", "wanda", "--wbits", 4, "--gptq"]),
    "gptq-disk": ("alp", ["--prune_method", "wanda", "--wbits", 4, "--gptq", "--offload", "disk"]),
    "sparsegpt-gptq": ("alp", ["--prune_method", "sparsegpt", "--wbits", 4]),
    "admm-gptq": ("alp", ["--prune_method", "admm", "--wbits", 4, "--gptq"]),
    "owl": ("alp", ["--prune_method", "wanda_owl"]),
    "save_gradient": ("gradient", []),
    "heal": ("heal", ["--steps", 4]),
}


def stop() -> None:
    raise KeyboardInterrupt


class Interruption:
    """Counts the steps that are kept and the work that is done; acts before or after the step `at`, if any.

    That is its number among all steps, or its name and its number among those of that name.
    """

    def __init__(
        self, monkeypatch, at: Place | None = None, is_after: bool = False, act: Callable[[], object] | None = None
    ):
        self.steps: list[str] = []
        self.work: list[str] = []
        self.at, self.is_after, self.act = at, is_after, act or stop
        for owner, name in KEPT:
            monkeypatch.setattr(owner, name, self._step(owner, name, getattr(owner, name)))
        for owner, name in WORK:
            monkeypatch.setattr(owner, name, self._counted(name, getattr(owner, name)))

    def _step(self, owner: object, name: str, function: Callable) -> Callable:
        def step(*args, **options):
            step_name = args[1] if owner is Report else name  # the file that is written
            places = (len(self.steps), (step_name, self.steps.count(step_name)))
            self.steps.append(step_name)
            if self.at in places and not self.is_after:
                self.act()
            result = function(*args, **options)
            if self.at in places and self.is_after:
                self.act()
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
    """All files below a folder, of the card of a model only what stands before the command."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: content.partition(b"## How it was made")[0] for name, content in files.items()}


def litter_of(folder: Path) -> list[str]:
    """What no finished run leaves: states, and what is only partly written."""
    return [path.name for path in folder.rglob("*") if ".partial-" in path.name or path.name.split(".")[-1] == "state"]


@dataclass
class Command:
    """A command line, run in a folder, where it writes `run`, `out` or `gradient.json`."""

    script: object
    flags: list
    monkeypatch: pytest.MonkeyPatch

    @property
    def is_gradient(self) -> bool:
        return self.script is save_gradient

    def run(self, folder: Path, *more, at: Place | None = None, is_after=False, act=None) -> tuple[int, Interruption]:
        """The exit status of a run that is stopped at a step, if one is given; and what it did until then."""
        folder.mkdir(exist_ok=True)
        paths = ["--output", "gradient.json"] if self.is_gradient else ["--output_dir", "run"]
        with self.monkeypatch.context() as patches:
            patches.chdir(folder)
            patches.setattr(lib.reporting.plots, "has_matplotlib", lambda: False)  # drawing takes longer than all else
            patches.setattr(lib.runs.texts, "_PARTS", 2)  # enough to stop between them
            interruption = Interruption(patches, at, is_after, act)
            return run(*self.flags, *paths, *more, monkeypatch=patches, script=self.script), interruption

    def found(self, folder: Path) -> tuple[dict, dict[str, bytes]]:
        """The result in a folder, and the files of the saved model."""
        if self.is_gradient:
            return artefact_of(folder / "gradient.json"), {}
        return result_of(folder / "run"), files_of(folder / "out")

    def state(self, folder: Path) -> Path:
        return folder / ("gradient.state" if self.is_gradient else "run/state")
