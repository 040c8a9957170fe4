"""Zero-shot accuracy of a model in memory, by the Language Model Evaluation Harness (`pip install lm-eval`)."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lib.errors import InputError

_METRICS = ("acc_norm,none", "acc,none")  # the first that a task has is the one that tables show


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm_eval by name, and the folders of those that are given as a YAML file of one's own."""

    names: tuple[str, ...]
    folders: tuple[str, ...]
    are_all_local: bool

    @classmethod
    def find(cls, given: Sequence[str]) -> "Tasks":
        """From names of tasks and paths of YAML files. Raises `InputError` for a file that defines no task."""
        names, folders = [], []
        for task in given:
            path = Path(task).expanduser()
            if path.suffix not in (".yaml", ".yml"):
                names.append(task)
                continue
            if not path.is_file():
                raise InputError(f"--tasks {task}: no such file")
            named = re.search(r"^task:\s*['\"]?([\w./-]+)", path.read_text(encoding="utf-8"), re.M)
            if not named:
                raise InputError(f"--tasks {task}: no `task: NAME` in this file")
            names.append(named[1])
            folders.append(str(path.resolve().parent))
        return cls(tuple(dict.fromkeys(names)), tuple(dict.fromkeys(folders)), len(folders) == len(given))


class ZeroShot:
    """Tasks that are known to be there, their data loaded; measures models on them."""

    def __init__(self, given: Sequence[str]):
        """Raises `InputError` for a task that lm_eval does not know, or whose data cannot be loaded."""
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        from lm_eval.tasks import TaskManager

        self.tasks = Tasks.find(given)
        self._manager = TaskManager(
            include_path=list(self.tasks.folders) or None, include_defaults=not self.tasks.are_all_local
        )
        unknown = sorted(set(self.tasks.names) - set(self._manager.all_tasks))
        if unknown:
            raise InputError(f"--tasks {unknown[0]}: lm_eval knows no such task; `lm_eval ls tasks` lists them")
        for name in self.tasks.names:
            try:
                self._manager.load([name])
            except Exception as error:  # whatever a task's own code and data raise
                reason = (str(error) or type(error).__name__).strip().splitlines()[0]
                raise InputError(f"--tasks {name}: cannot be loaded ({reason})") from error

    def accuracy(self, model: nn.Module, tokenizer, batch_size: int) -> dict:
        """{"tasks": {name: {metric: value}}, "shown": {name: percent}, "mean": percent}.

        Shown is the length-normalized accuracy where a task has it, else the accuracy; the mean is over the tasks.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = simple_evaluate(
            model=lm, tasks=list(self.tasks.names), num_fewshot=0, task_manager=self._manager, log_samples=False
        )
        results = {**found["results"], **found.get("groups", {})}
        tasks = {name: _numbers(results[name]) for name in self.tasks.names}
        shown = {name: 100 * _shown(name, metrics) for name, metrics in tasks.items()}
        return {"tasks": tasks, "shown": shown, "mean": sum(shown.values()) / len(shown)}


def _numbers(metrics: dict) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items() if isinstance(value, int | float) and "," in key}


def _shown(name: str, metrics: dict[str, float]) -> float:
    for metric in (*_METRICS, *metrics):
        if metric in metrics:
            return metrics[metric]
    raise InputError(f"--tasks {name}: lm_eval gives no number for it")
