"""Tasks of lm_eval on a model in memory, offline, against the model's own forward."""

import copy
import json
from pathlib import Path

import pytest

from lib.config.sources import ModelSource
from lib.config.tasks import TASK_SETS, ZERO_SHOT_TASKS, expand_sets
from lib.errors import InputError, RunError
from lib.evaluation.tasks import TaskNames, Tasks
from lib.models.loading import load_model
from tests.lm_eval_tasks import NORMALIZED, QUESTIONS, next_word, right_choices, write_choices, write_generation

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def model():
    return load_model(ModelSource("demo"))


@pytest.fixture
def local_only(monkeypatch):
    """Without the thousands of tasks that come with lm_eval, whose index takes seconds."""
    import lm_eval.tasks

    whole = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_path, **rest: whole(include_path=include_path, include_defaults=False),
    )


def test_right_choices_are_those_of_the_models_own_likelihoods(model, demo_tokenizer, tmp_path):
    path = write_choices(tmp_path)
    found = Tasks([str(path)]).measure(model, demo_tokenizer, 4)
    right = right_choices(model, demo_tokenizer, path)
    assert 0 < right.count("1") < len(right) and found.right == {"layers": right}
    share = right.count("1") / len(right)
    assert found.metrics["layers"]["acc,none"] == pytest.approx(share)
    error = (share * (1 - share) / (len(right) - 1)) ** 0.5
    assert found.metrics["layers"]["acc_stderr,none"] == pytest.approx(error)


@pytest.mark.parametrize("examples", [(), ("pruned", "dense")], ids=["no examples", "two examples"])
def test_text_is_generated_after_as_many_examples_as_the_task_has(model, demo_tokenizer, tmp_path, examples):
    shown = "".join(f"This is {word} {word}\n\n" for word in examples)
    words = [next_word(model, demo_tokenizer, shown + question) for question in QUESTIONS]
    path = write_generation(tmp_path, [*words[:3], "wrong", "wrong"], examples=examples)
    found = Tasks([str(path)]).measure(model, demo_tokenizer, 2)
    assert found.right == {"goes_on": "11100"} and found.num_fewshot == {"goes_on": len(examples)}
    assert found.metrics["goes_on"]["exact_match,first_word"] == pytest.approx(0.6)


def test_a_group_has_the_answers_of_all_its_tasks(local_only, model, demo_tokenizer, tmp_path):
    paths = [write_choices(tmp_path, "one"), write_choices(tmp_path, "two", (1, 1, 1, 0))]
    other = write_choices(tmp_path, "three")
    metrics = "[{metric: acc, weight_by_size: true}]"
    (tmp_path / "tasks/all.yaml").write_text(f"group: all\ntask: [two, inner]\naggregate_metric_list: {metrics}\n")
    (tmp_path / "tasks/inner.yaml").write_text(f"group: inner\ntask: [one]\naggregate_metric_list: {metrics}\n")
    found = Tasks([str(other), "all"]).measure(model, demo_tokenizer, 4)
    one, two = (right_choices(model, demo_tokenizer, path) for path in paths)
    assert found.right == {"three": one, "all": one + two}
    assert found.metrics["all"]["acc,none"] == pytest.approx((one + two).count("1") / 11)
    with pytest.raises(InputError, match="--tasks: one is asked for twice, by itself or in groups"):
        Tasks([str(paths[0]), "all"])


def test_a_tag_stands_for_its_tasks_and_other_metrics_are_no_accuracy(local_only, model, demo_tokenizer, tmp_path):
    path = write_choices(tmp_path, "one", metrics="tag: pair\n")
    path.write_text(path.read_text().replace("  - metric: acc\n", "  - metric: brier_score\n"))
    other = write_choices(tmp_path, "two", metrics=NORMALIZED + "tag: pair\n")
    tasks = Tasks([str(path), str(other), "pair"])
    assert sorted(tasks.names) == ["one", "two"]
    found = tasks.measure(model, demo_tokenizer, 4)
    assert set(found.right) == {"two"} and "acc_norm,none" in found.metrics["two"]
    assert "brier_score,none" in found.metrics["one"]


def test_answers_that_are_neither_right_nor_wrong_have_no_flips(model, demo_tokenizer, tmp_path):
    path = write_choices(tmp_path)
    (path.parent / "halves.py").write_text("def halves(doc, results):\n    return {'acc': 0.5}\n")
    path.write_text(path.read_text() + "    aggregation: mean\nprocess_results: !function halves.halves\n")
    found = Tasks([str(path)]).measure(model, demo_tokenizer, 4)
    assert found.metrics["layers"]["acc,none"] == 0.5 and not found.right


def test_measuring_leaves_model_and_tokenizer_as_they_are(model, demo_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.pad_token = None
    before = model.config.to_json_string(), model.generation_config.to_json_string()
    Tasks([str(write_generation(tmp_path, ["a"] * 5))]).measure(model, tokenizer, 4)
    assert tokenizer.pad_token is None
    assert (model.config.to_json_string(), model.generation_config.to_json_string()) == before


def test_an_error_in_the_code_of_a_task_names_the_flag(model, demo_tokenizer, tmp_path):
    path = write_choices(tmp_path)
    (path.parent / "broken.py").write_text("def broken(doc, results):\n    raise KeyError('x')\n")
    path.write_text(path.read_text() + "process_results: !function broken.broken\n")
    for flag in ("--tasks", "--eval_zero_shot"):
        with pytest.raises(RunError, match=f"^{flag}: lm_eval failed: KeyError: 'x'$"):
            Tasks([str(path)], flag).measure(model, demo_tokenizer, 4)


# Names ----------------------------------------------------------------------------------------------------------------


def test_names_and_files_may_be_mixed(tmp_path):
    path = write_choices(tmp_path)
    assert TaskNames.find(["boolq", str(path), "boolq"]) == TaskNames(("boolq", "layers"), (str(path.parent),), False)


def test_a_name_of_a_set_stands_for_its_tasks_each_once():
    assert expand_sets(["boolq", "common7", "mine.yaml", "generation"])[:3] == ("boolq", "arc_easy", "arc_challenge")
    assert len(expand_sets(["boolq", "common7"])) == 7 and expand_sets(["generation"]) == ("gsm8k",)


@pytest.mark.slow
def test_lm_eval_knows_our_sets_and_gives_examples_to_generation_only():
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    names = {*ZERO_SHOT_TASKS, *(task for tasks in TASK_SETS.values() for task in tasks)}
    assert names <= set(manager.all_tasks)
    texts = {name: Path(manager.task_index[name].yaml_path).read_text() for name in names}
    assert {name for name, text in texts.items() if "num_fewshot" in text} == {"gsm8k"}
    assert "num_fewshot: 5" in texts["gsm8k"]


@pytest.mark.parametrize(
    "text, problem",
    [
        (None, "--tasks FILE: no such file"),
        ("dataset_path: json\n", "--tasks FILE: no `task: NAME` in this file"),
        ("task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: /no/such.jsonl}}\n", "cannot be loaded"),
    ],
)
def test_a_file_that_is_no_task_is_refused(tmp_path, text, problem):
    path = tmp_path / "task.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as told:
        Tasks([str(path)])
    assert problem.replace("FILE", str(path)) in str(told.value) and "\n" not in str(told.value)


def test_a_task_that_lm_eval_does_not_know_is_refused(local_only):
    with pytest.raises(InputError, match="--tasks no_such_task: lm_eval knows no such task; `lm_eval ls tasks` lists"):
        Tasks(["no_such_task"])


def test_answers_survive_the_resume_state(model, demo_tokenizer, tmp_path):
    found = Tasks([str(write_choices(tmp_path))]).measure(model, demo_tokenizer, 4)
    assert type(found)(*json.loads(json.dumps(found))) == found
