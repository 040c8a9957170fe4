"""What models answered in lm_eval's tasks: accuracies, and how many answers pruning turned right or wrong."""

import math
from collections.abc import Mapping
from typing import NamedTuple

DENSE = "dense"
_ACCURACIES = ("acc_norm", "acc", "exact_match")  # the accuracy of a task is the first that it has


class Answers(NamedTuple):
    """What one model answered, in plain values, as the resume state keeps them; each by task."""

    metrics: dict[str, dict[str, float]]  # lm_eval's: `METRIC,FILTER`, with `METRIC_stderr,FILTER`
    num_fewshot: dict[str, int]  # examples before each question
    right: dict[str, str]  # `1` for each document that was answered right, else `0`; for tasks where that is told


def accuracy_metric(metrics: Mapping[str, float]) -> str | None:
    """The metric that is a task's accuracy, with the first of its filters; None for a task without."""
    return next((key for name in _ACCURACIES for key in metrics if key.partition(",")[0] == name), None)


def flips(dense: str, other: str) -> dict[str, float]:
    """How many answers changed, in percent of all documents: both ways, and in total (arXiv:2407.09141)."""
    pairs = list(zip(dense, other, strict=True))
    lost, won = (100 * pairs.count(pair) / len(pairs) for pair in (("1", "0"), ("0", "1")))
    return {"right_to_wrong": lost, "wrong_to_right": won, "total": lost + won}


def as_fields(found: Mapping[str, Answers]) -> dict:
    """The `tasks` of result.json for what each stage answered, the dense model first; without it nothing flips."""
    first, dense = next(iter(found.values())), found.get(DENSE)
    shown = {task: metric for task, metrics in first.metrics.items() if (metric := accuracy_metric(metrics))}
    accuracy: dict[str, dict] = {task: {} for task in shown}
    errors: dict[str, dict] = {task: {} for task in shown}
    for task, metric in shown.items():
        name, _, answer_filter = metric.partition(",")
        for stage, answers in found.items():
            accuracy[task][stage] = 100 * answers.metrics[task][metric]
            error = answers.metrics[task].get(f"{name}_stderr,{answer_filter}")
            errors[task][stage] = None if error is None else 100 * error
    changed = {
        task: {
            stage: flips(right, answers.right[task])
            for stage, answers in found.items()
            if stage != DENSE and task in answers.right
        }
        for task, right in (dense.right.items() if dense else ())
    }
    return {
        "metrics": {task: {stage: answers.metrics[task] for stage, answers in found.items()} for task in first.metrics},
        "num_fewshot": first.num_fewshot,
        "accuracy": accuracy,
        "accuracy_standard_error": errors,
        "flips": changed,
        "mean": {stage: _mean(stage, accuracy, errors, changed) for stage in found} if shown else {},
    }


def _mean(stage: str, accuracy: dict, errors: dict, changed: dict) -> dict[str, float | None]:
    """The means over tasks of a stage; their documents are independent of each other."""
    values, own = ([by_stage[stage] for by_stage in field.values()] for field in (accuracy, errors))
    totals = [by_stage[stage]["total"] for by_stage in changed.values() if stage in by_stage]
    return {
        "accuracy": sum(values) / len(values),
        "standard_error": None if None in own else math.hypot(*own) / len(own),
        "flips": sum(totals) / len(totals) if totals else None,
    }
