"""The tasks of a run: measured on the dense model and after each stage, and shown together."""

from functools import partial
from typing import TYPE_CHECKING

from lib.config.plan import Plan
from lib.errors import RunError, describe_failure
from lib.evaluation.answers import DENSE, Answers, as_fields
from lib.evaluation.tasks import Tasks
from lib.files import digest_of_json
from lib.models.offload import fetched_by_forward
from lib.reporting.console import Report

if TYPE_CHECKING:
    from lib.runs.single import Workspace


class TaskStages:
    """What the model of a workspace answers at each stage of one run; nothing where no tasks are asked for."""

    def __init__(self, report: Report, workspace: "Workspace", key: object):
        """`key`: what the answers depend on beside the model; a stopped run may go on with other tasks."""
        self.answers: dict[str, Answers] = {}  # by stage
        self.failure: RunError | None = None  # of a pruned model
        self._report, self._workspace, self._digest = report, workspace, digest_of_json({"of": key})[:16]

    def measure(self, stage: str, plan: Plan | None = None) -> None:
        """Measures the model as it is, under a plan if given; the dense model once for all runs on it.

        Raises `RunError` if a task fails on the dense model, before work was done. Later that must not cost the result:
        a failure is kept for `check`.
        """
        workspace = self._workspace
        if workspace.tasks is None or self.failure:
            return
        if stage == DENSE and workspace.dense_answers:
            self.answers[stage] = workspace.dense_answers
            return
        try:
            with self._report.timed("tasks"):
                answer = partial(self._answer, workspace.tasks, plan or Plan(workspace.decoder.num_layers))
                self.answers[stage] = Answers(*workspace.state.once(f"tasks {self._digest} of {stage}", answer))
        except RunError as error:
            if stage == DENSE:
                raise
            self.failure = error
        if stage == DENSE:
            workspace.dense_answers = self.answers[stage]

    def _answer(self, tasks: Tasks, plan: Plan) -> Answers:
        """What the model answers under a plan, measured by the first process. Raises `RunError` in all of them."""
        decoder, batcher = self._workspace.decoder, self._workspace.batcher

        def measure() -> Answers:
            return tasks.measure(decoder.model, self._workspace.tokenizer, batcher.size)

        def attempt() -> dict:
            try:
                with decoder.under(plan), fetched_by_forward(decoder.layers):
                    return {"answers": batcher.retry_smaller(measure, batcher.size)}
            except Exception as error:
                if not (problem := describe_failure(error)):
                    raise
                return {"problem": problem if isinstance(error, RunError) else f"{tasks.flag}: {problem}"}

        found = batcher.ranks.agree(attempt)
        if "problem" in found:
            raise RunError(found["problem"])
        return found["answers"]

    def copy(self, stage: str, to: str) -> None:
        """Takes the answers of one stage for another, whose model is the same."""
        if stage in self.answers:
            self.answers[to] = self.answers[stage]

    def show(self) -> dict:
        """Prints what was measured; returns the fields of result.json that this gives."""
        if not self.answers:
            return {}
        fields = as_fields(self.answers)
        for line in lines(fields):
            self._report.print(line)
        return {"tasks": fields}

    def check(self) -> None:
        """Raises the `RunError` of a task that failed after the dense model, when all else is done."""
        if self.failure:
            raise self.failure


def lines(tasks: dict) -> list[str]:
    """The console lines for the `tasks` of a result.json: accuracies, or all metrics of a task that has none."""
    stages = next(iter(tasks["metrics"].values()))
    found = ["", f"Accuracy in percent ({' -> '.join(stages)}), ± standard error over documents"]
    if any(tasks["flips"].values()):
        found.append("  flips: answers that went from right to wrong + from wrong to right, in percent")
    for task, by_stage in tasks["metrics"].items():
        if task in tasks["accuracy"]:
            errors, flips = tasks["accuracy_standard_error"][task], tasks["flips"].get(task, {})
            values = [
                _accuracy(value, errors[stage]) + (_flips(flips[stage]) if stage in flips else "")
                for stage, value in tasks["accuracy"][task].items()
            ]
        else:
            values = [", ".join(f"{key} {value:g}" for key, value in metrics.items()) for metrics in by_stage.values()]
        count = tasks["num_fewshot"].get(task, 0)
        found.append(f"  {task}{f' after {count} examples' if count else ''}: {' -> '.join(values)}")
    if tasks["mean"]:
        means = [
            _accuracy(mean["accuracy"], mean["standard_error"])
            + ("" if mean["flips"] is None else f" (flips {mean['flips']:.2f})")
            for mean in tasks["mean"].values()
        ]
        found.append(f"  mean of {len(tasks['accuracy'])}: {' -> '.join(means)}")
    return found


def _accuracy(value: float, error: float | None) -> str:
    return f"{value:.2f}" + ("" if error is None else f" ± {error:.2f}")


def _flips(found: dict[str, float]) -> str:
    return f" (flips {found['right_to_wrong']:.2f} + {found['wrong_to_right']:.2f})"
