"""Zero-shot accuracy by lm_eval, offline, on a small task of our own."""

import json
import sys
from pathlib import Path

import pytest
import torch

from lib.errors import RunError
from lib.evaluation.zero_shot import Tasks, ZeroShot
from tests.command import GOES_ON, run_alp

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""
NORMALIZED = "  - metric: acc_norm\n"


@pytest.fixture
def task(tmp_path):
    """Writes a task of lm_eval about layers, with what is right chosen by the caller."""
    pytest.importorskip("lm_eval")

    def write(name="layers", answers=(0, 1, 0, 1, 1, 0, 0), metrics="") -> Path:
        questions = [f"The layer {i} was" for i in range(len(answers))]
        choices = [["removed", "of 31"] if i % 2 else ["changed.", "layer"] for i in range(len(answers))]
        rows = [{"question": q, "choices": c, "answer": a} for q, c, a in zip(questions, choices, answers, strict=True)]
        data = tmp_path / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        path = tmp_path / "tasks" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(TASK.format(name=name, data=data) + metrics)
        return path

    return write


def likelier(model, tokenizer, question: str, choices: list[str]) -> int:
    """The choice with the higher log-likelihood after the question, by the model's own forward."""
    sums = []
    for choice in choices:
        context, whole = tokenizer(question)["input_ids"], tokenizer(f"{question} {choice}")["input_ids"]
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        sums.append(sum(logits[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
    return max(range(len(choices)), key=sums.__getitem__)


def test_accuracy_is_that_of_the_models_own_likelihoods(task, demo_tokenizer):
    from lib.config.sources import ModelSource
    from lib.models.loading import load_model

    path = task()
    model = load_model(ModelSource("demo"))
    found = ZeroShot([str(path)]).accuracy(model, demo_tokenizer, 4)
    rows = [json.loads(line) for line in (path.parents[1] / "layers.jsonl").read_text().splitlines()]
    right = [likelier(model, demo_tokenizer, row["question"], row["choices"]) == row["answer"] for row in rows]
    assert 0 < sum(right) < len(right)
    assert found["shown"] == {"layers": pytest.approx(100 * sum(right) / len(right))}
    assert found["mean"] == found["shown"]["layers"] and "acc,none" in found["tasks"]["layers"]


def test_the_mean_is_over_the_tasks_and_normalized_accuracy_is_shown(task, demo_tokenizer):
    from lib.config.sources import ModelSource
    from lib.models.loading import load_model

    paths = [task(), task("others", (1, 1, 1, 0), NORMALIZED)]
    found = ZeroShot(list(map(str, paths))).accuracy(load_model(ModelSource("demo")), demo_tokenizer, 4)
    assert found["mean"] == pytest.approx(sum(found["shown"].values()) / 2)
    assert found["shown"]["others"] == 100 * found["tasks"]["others"]["acc_norm,none"]


def test_a_tag_stands_for_its_tasks_and_other_metrics_are_no_accuracy(task, demo_tokenizer):
    from lib.config.sources import ModelSource
    from lib.models.loading import load_model

    path = task("one", metrics="tag: pair\n")
    path.write_text(path.read_text().replace("  - metric: acc\n", "  - metric: brier_score\n"))
    paths = [path, task("two", metrics="tag: pair\n")]
    zero_shot = ZeroShot([*map(str, paths), "pair"])
    assert sorted(set(zero_shot.names)) == ["one", "two"]
    found = zero_shot.accuracy(load_model(ModelSource("demo")), demo_tokenizer, 4)
    assert set(found["shown"]) == {"two"} and found["mean"] == found["shown"]["two"]
    assert "brier_score,none" in found["tasks"]["one"]


def test_a_failing_evaluation_is_one_line_and_keeps_result_model_and_log(
    task, alp_arguments, tmp_path, monkeypatch, capsys
):
    def fail(self, *args):
        raise RunError("--eval_zero_shot: KeyError in lm_eval: 'x'")

    monkeypatch.setattr(ZeroShot, "accuracy", fail)
    flags = ["--save_model", tmp_path / "out", "--save_log", "--eval_zero_shot", "--tasks", task()]
    assert run_alp(*alp_arguments, *flags, monkeypatch=monkeypatch) == 1
    assert (
        capsys.readouterr().err
        == "alp_prune.py: failed: --eval_zero_shot: KeyError in lm_eval: 'x'; what is finished is kept: " + GOES_ON
    )
    assert (tmp_path / "run/result.json").exists() and (tmp_path / "out/config.json").exists()
    assert len(Path("results/log.tsv").read_text().splitlines()) == 2
    found = {"tasks": {"layers": {"acc,none": 0.5}}, "shown": {"layers": 50.0}, "mean": 50.0}
    for _ in range(2):  # what failed is done, and the log has it, once
        monkeypatch.setattr(ZeroShot, "accuracy", lambda self, *args: found)
        assert run_alp(*alp_arguments, *flags, "--resume", monkeypatch=monkeypatch) == 0
        header, *rows = (line.split("\t") for line in Path("results/log.tsv").read_text().splitlines())
        assert [row[header.index("zero_shot_mean")] for row in rows] == ["", "50.00"]


def test_a_run_measures_the_pruned_model(task, alp_arguments, tmp_path, monkeypatch, capsys):
    flags = [*alp_arguments, "--prune_method", "magnitude", "--save_log", "--eval_zero_shot", "--tasks", task()]
    assert run_alp(*flags, monkeypatch=monkeypatch) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert set(result["zero_shot"]["shown"]) == {"layers"} and result["seconds"]["zero_shot"] > 0
    assert f"mean of 1: {result['zero_shot']['mean']:.2f}" in capsys.readouterr().out
    header, row = (line.split("\t") for line in Path("results/log.tsv").read_text().splitlines())
    assert float(row[header.index("zero_shot_mean")]) == pytest.approx(result["zero_shot"]["mean"], abs=0.01)


def test_a_model_read_from_disk_has_the_same_accuracy(task, alp_arguments, tmp_path, monkeypatch):
    found = []
    for mode in ("none", "disk"):
        flags = ["--eval_zero_shot", "--tasks", task(), "--offload", mode, "--overwrite"]
        assert run_alp(*alp_arguments, *flags, monkeypatch=monkeypatch) == 0
        found.append(json.loads((tmp_path / "run/result.json").read_text())["zero_shot"])
    assert found[0] == found[1]


def test_what_cannot_be_evaluated_is_refused_before_work_starts(task, alp_arguments, tmp_path, monkeypatch, capsys):
    def told(*tasks) -> str:
        assert run_alp(*alp_arguments, "--eval_zero_shot", "--tasks", *tasks, monkeypatch=monkeypatch) == 2
        assert not (tmp_path / "run").exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "--tasks /no/such.yaml: no such file" in told("/no/such.yaml")
    broken = task()
    (tmp_path / "layers.jsonl").unlink()
    assert "--tasks layers: cannot be loaded" in told(broken)
    empty = tmp_path / "empty.yaml"
    empty.write_text("dataset_path: json\n")
    assert "no `task: NAME` in this file" in told(empty)
    assert "--tasks no_such_task: lm_eval knows no such task" in told("no_such_task")


def test_without_lm_eval_the_flag_is_refused(alp_arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run_alp(*alp_arguments, "--eval_zero_shot", monkeypatch=monkeypatch) == 2
    assert "--eval_zero_shot: lm_eval is not installed; pip install lm-eval" in capsys.readouterr().err


def test_names_and_files_may_be_mixed(task):
    path = task()
    tasks = Tasks.find(["boolq", str(path), "boolq"])
    assert tasks == Tasks(("boolq", "layers"), (str(path.parent),), False)
