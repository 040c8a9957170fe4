"""Zero-shot accuracy of a model in memory, with the Language Model Evaluation Harness (`pip install lm-eval`)."""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lib.config.sources import expand
from lib.errors import InputError, RunError, first_line, is_out_of_memory

_METRICS = ("acc_norm,none", "acc,none")  # tables show the first that a task has


@dataclass(frozen=True)
class Tasks:
    """Names of lm_eval tasks, and the folders of those given as YAML files."""

    names: tuple[str, ...]
    folders: tuple[str, ...]
    are_all_local: bool

    @classmethod
    def find(cls, given: Sequence[str]) -> "Tasks":
        """From task names and paths of YAML files. Raises `InputError` for a file that defines no task."""
        names, folders = [], []
        for task in given:
            path = expand(task)
            if path.suffix not in (".yaml", ".yml"):
                names.append(task)
                continue
            if not path.is_file():
                raise InputError(f"--tasks {task}: no such file")
            text = path.read_text(encoding="utf-8", errors="replace")
            named = re.search(r"^task:\s*['\"]?([\w./-]+)", text, re.M)
            if not named:
                raise InputError(f"--tasks {task}: no `task: NAME` in this file")
            names.append(named[1])
            folders.append(str(path.resolve().parent))
        return cls(tuple(dict.fromkeys(names)), tuple(dict.fromkeys(folders)), len(folders) == len(given))


class ZeroShot:
    """lm_eval tasks that exist and whose data is loaded; measures models on them."""

    def __init__(self, given: Sequence[str]):
        """Raises `InputError` for a task that lm_eval does not know or whose data cannot be loaded."""
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        from lm_eval.tasks import TaskManager

        self.tasks = Tasks.find(given)
        self._manager = TaskManager(
            include_path=list(self.tasks.folders) or None, include_defaults=not self.tasks.are_all_local
        )
        unknown = sorted(set(self.tasks.names) - set(self._manager.all_tasks))
        if unknown:
            raise InputError(f"--tasks {unknown[0]}: lm_eval knows no such task; `lm_eval ls tasks` lists them")
        self.names = [name for given_name in self.tasks.names for name in self._load(given_name)]

    def _load(self, name: str) -> list[str]:
        """Loads a task, group or tag. Returns the task or group itself, or all tasks with that tag."""
        try:
            loaded = self._manager.load([name])
        except Exception as error:  # a task's own code and data can raise anything
            raise InputError(f"--tasks {name}: cannot be loaded ({first_line(error)})") from error
        return [name] if name in loaded["tasks"] or name in loaded["groups"] else list(loaded["tasks"])

    def accuracy(self, model: nn.Module, tokenizer, batch_size: int) -> dict:
        """{"tasks": {name: {metric: value}}, "shown": {name: percent}, "mean": percent}.

        `shown` is the length-normalized accuracy if a task has it, else the accuracy. `mean` is the average of these,
        or None if there are none. Raises `RunError` for errors in a task's own code.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            found = simple_evaluate(
                model=lm, tasks=self.names, num_fewshot=0, task_manager=self._manager, log_samples=False
            )
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise RunError(f"--eval_zero_shot: {type(error).__name__} in lm_eval: {first_line(error)}") from error
        results = {**found["results"], **found.get("groups", {})}
        tasks = {name: _numbers(results[name]) for name in self.names}
        shown = {
            name: 100 * next(metrics[metric] for metric in _METRICS if metric in metrics)
            for name, metrics in tasks.items()
            if not metrics.keys().isdisjoint(_METRICS)
        }
        return {"tasks": tasks, "shown": shown, "mean": sum(shown.values()) / len(shown) if shown else None}


def _numbers(metrics: dict) -> dict[str, float]:
    found = {key: float(value) for key, value in metrics.items() if isinstance(value, int | float) and "," in key}
    return {key: value for key, value in found.items() if math.isfinite(value)}  # JSON has no NaN or infinity
