"""Names that `--tasks` takes besides those of lm_eval's tasks and of YAML files. Imports no torch."""

from collections.abc import Iterable

ZERO_SHOT_TASKS = ("boolq", "rte", "hellaswag", "arc_challenge", "mnli", "openbookqa")  # the tasks of ALP's table
TASK_SETS = {
    "common7": ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "boolq", "openbookqa"),
    "generation": ("gsm8k",),
}


def expand_sets(given: Iterable[str]) -> tuple[str, ...]:
    """The tasks that are asked for, each once, with those of a set in place of its name."""
    return tuple(dict.fromkeys(task for name in given for task in TASK_SETS.get(name, (name,))))


def flag_of(tasks: Iterable[str]) -> str:
    """The flag of `alp_prune.py` that asks for these tasks."""
    return "--eval_zero_shot" if tuple(tasks) == ZERO_SHOT_TASKS else "--tasks"
