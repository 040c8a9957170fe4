"""Tasks of the Language Model Evaluation Harness (`pip install lm-eval`), on a model in memory."""

import copy
import logging
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lib.config.sources import expand
from lib.errors import InputError, RunError, first_line, is_out_of_memory
from lib.evaluation.answers import Answers, accuracy_metric


@dataclass(frozen=True)
class TaskNames:
    """Names of lm_eval tasks, and the folders of those given as YAML files."""

    names: tuple[str, ...]
    folders: tuple[str, ...]
    are_all_local: bool

    @classmethod
    def find(cls, given: Sequence[str]) -> "TaskNames":
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


class Tasks:
    """lm_eval tasks that exist and whose data is loaded; measures models on them."""

    def __init__(self, given: Sequence[str], flag: str = "--tasks"):
        """`flag` asked for them. Raises `InputError` for a task unknown to lm_eval, or whose data cannot be loaded."""
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        from lm_eval.tasks import TaskManager

        asked, self.flag = TaskNames.find(given), flag
        self._manager = TaskManager(include_path=list(asked.folders) or None, include_defaults=not asked.are_all_local)
        unknown = sorted(set(asked.names) - set(self._manager.all_tasks))
        if unknown:
            raise InputError(f"{flag} {unknown[0]}: lm_eval knows no such task; `lm_eval ls tasks` lists them")
        self._tasks: dict[str, set[str]] = {}  # those that each name stands for
        for name in asked.names:
            self._tasks |= self._load(name)
        for name, task in ((name, task) for name, tasks in self._tasks.items() for task in tasks):
            if any(task in tasks for other, tasks in self._tasks.items() if other != name):
                raise InputError(f"{flag}: {task} is asked for twice, by itself or in groups; leave one of them out")

    @property
    def names(self) -> list[str]:
        """The tasks and groups that are measured."""
        return list(self._tasks)

    def _load(self, name: str) -> dict[str, set[str]]:
        """Loads a task, group or tag. Returns the tasks of the task or group itself, or of all tasks with that tag."""
        try:
            loaded = self._manager.load([name])
        except Exception as error:  # a task's own code and data can raise anything
            raise InputError(f"{self.flag} {name}: cannot be loaded ({first_line(error)})") from error
        if name in loaded["tasks"] or name in loaded["groups"]:
            return {name: set(loaded["tasks"])}
        return {task: {task} for task in loaded["tasks"]}

    def measure(self, model: nn.Module, tokenizer, batch_size: int) -> Answers:
        """What the model answers, after as many examples as each task has by default.

        Raises `RunError` for errors in a task's own code.
        """
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            # A copy, since lm_eval gives the tokenizer a padding token, which must not be saved with the model.
            lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
            found = evaluate(lm, self._loaded())
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise RunError(f"{self.flag}: lm_eval failed: {first_line(error)}") from error
        results = {**found["results"], **found.get("groups", {})}
        metrics = {name: _numbers(results[name]) for name in self.names}
        right = {}
        for name, metric in ((name, accuracy_metric(of_task)) for name, of_task in metrics.items()):
            samples = [sample for task in sorted(self._tasks[name]) for sample in found["samples"][task]]
            if metric and (bits := _right(samples, metric)):
                right[name] = bits
        return Answers(metrics, {name: found["n-shot"][name] for name in self.names if name in found["n-shot"]}, right)

    def _loaded(self) -> dict:
        """The tasks as lm_eval loads them for its command line: seeds and numbers of examples are its defaults."""
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        loaded = self._manager.load(self.names)
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        return loaded


def _numbers(metrics: dict) -> dict[str, float]:
    found = {key: float(value) for key, value in metrics.items() if isinstance(value, int | float) and "," in key}
    return {key: value for key, value in found.items() if math.isfinite(value)}  # JSON has no NaN or infinity


def _right(samples: Sequence[dict], metric: str) -> str:
    """`1` for each document that was answered right, else `0`; empty where a document may be neither."""
    name, _, answer_filter = metric.partition(",")
    values = [sample.get(name, -1) for sample in samples if sample["filter"] == answer_filter]
    return "".join(str(int(value)) for value in values) if all(value in (0, 1) for value in values) else ""
