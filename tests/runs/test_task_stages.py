"""Tasks are measured at every stage of a run: on the dense, the pruned, the compensated and the quantized model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lib.demo
from lib.config.sources import ModelSource
from lib.errors import RunError
from lib.evaluation.answers import flips
from lib.evaluation.tasks import Tasks
from lib.models.loading import load_model
from tests.command import GOES_ON, run, run_alp
from tests.lm_eval_tasks import QUESTIONS, next_word, right_choices, write_choices, write_generation
from tests.reference import toggled
from tests.runs.interruption import Interruption, files_of, litter_of, result_of

pytest.importorskip("lm_eval")

COMPENSATED = ["--compensate", "all", "--nsamples", 8]
MIXED = (0, 0, 1, 1) * 8
DEMO = Path(lib.demo.__file__).parent / "model"


def accuracies(bits: dict[str, str]) -> dict[str, float]:
    return {stage: pytest.approx(100 * right.count("1") / len(right)) for stage, right in bits.items()}


def tasks_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())["tasks"]


@pytest.fixture
def measured(monkeypatch) -> list:
    """A list that every measurement of a model adds its batch size to."""
    calls, measure = [], Tasks.measure

    def counted(self, model, tokenizer, batch_size):
        calls.append(batch_size)
        return measure(self, model, tokenizer, batch_size)

    monkeypatch.setattr(Tasks, "measure", counted)
    return calls


@pytest.fixture
def fails(monkeypatch):
    """Lets a task fail on the model that is measured as the n-th."""

    def at(number: int) -> None:
        calls, measure = [], Tasks.measure

        def failing(self, *args):
            calls.append(1)
            if len(calls) == number:
                raise RunError("--tasks: lm_eval failed: KeyError: 'x'")
            return measure(self, *args)

        monkeypatch.setattr(Tasks, "measure", failing)

    return at


# Stages ---------------------------------------------------------------------------------------------------------------


def test_a_depth_run_measures_dense_pruned_and_compensated(text_file, demo_tokenizer, tmp_path, monkeypatch, capsys):
    task = write_choices(tmp_path, answers=MIXED)
    flags = ["--method", "shortgpt", "--prune_rate", 0.4, "--seqlen", 64, "--eval_ppl", "no", *COMPENSATED]
    flags += ["--dataset", text_file]
    flags += ["--output_dir", tmp_path / "run", "--save_model", tmp_path / "out", "--save_format", "masked"]
    assert run(*flags, "--tasks", task, monkeypatch=monkeypatch) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    dense = load_model(ModelSource("demo"))
    pruned = toggled(dense, result["mha_removed"], result["ffn_removed"])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    models = {"dense": dense, "pruned": pruned, "compensated": saved}
    bits = {stage: right_choices(model, demo_tokenizer, task) for stage, model in models.items()}
    assert len(set(bits.values())) == 3, "the stages are told apart"
    assert result["tasks"]["accuracy"]["layers"] == accuracies(bits)
    assert result["tasks"]["flips"]["layers"] == {
        stage: flips(bits["dense"], bits[stage]) for stage in ("pruned", "compensated")
    }
    assert result["seconds"]["tasks"] > 0
    told = capsys.readouterr().out
    assert "Accuracy in percent (dense -> pruned -> compensated), ± standard error over documents" in told
    assert f"mean of 1: {result['tasks']['mean']['dense']['accuracy']:.2f} ±" in told


def test_a_run_of_weights_measures_dense_pruned_and_quantized_and_logs_them(
    text_file, demo_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    task = write_choices(tmp_path, answers=MIXED)
    flags = ["--prune_method", "magnitude", "--dataset", text_file, "--seqlen", 64, "--output_dir", tmp_path / "run"]
    flags += ["--eval_windows", 3]
    more = ["--wbits", 2, "--save_log", "--tasks", task, "--save_model", tmp_path / "q"]
    assert run_alp(*flags, *more, monkeypatch=monkeypatch) == 0
    found = tasks_of(tmp_path / "run")
    assert run_alp(*flags, "--save_model", tmp_path / "p", "--overwrite", monkeypatch=monkeypatch) == 0
    folders = {"dense": DEMO, "pruned": tmp_path / "p", "quantized": tmp_path / "q"}
    bits = {
        stage: right_choices(AutoModelForCausalLM.from_pretrained(folder), demo_tokenizer, task)
        for stage, folder in folders.items()
    }
    assert found["accuracy"]["layers"] == accuracies(bits) and len(set(bits.values())) == 3
    assert found["flips"]["layers"]["quantized"] == flips(bits["dense"], bits["quantized"])
    header, row = (line.split("\t") for line in Path("results/log.tsv").read_text().splitlines())
    logged = dict(zip(header, row, strict=True))
    for stage in folders:
        assert logged[f"accuracy_{stage}"] == f"{found['accuracy']['layers'][stage]:.2f}"
    assert logged["flips"] == f"{flips(bits['dense'], bits['pruned'])['total']:.2f}"


def test_where_nothing_is_pruned_the_model_is_measured_once(alp_arguments, tmp_path, monkeypatch, measured):
    flags = ["--prune_method", "dense", "--tasks", write_choices(tmp_path)]
    assert run_alp(*alp_arguments, *flags, monkeypatch=monkeypatch) == 0
    found = tasks_of(tmp_path / "run")
    assert len(measured) == 1 and found["accuracy"]["layers"]["dense"] == found["accuracy"]["layers"]["pruned"]
    assert found["mean"]["pruned"]["flips"] == 0


def test_the_pruned_model_answers_as_its_saved_form_in_stock_lm_eval(arguments, demo_tokenizer, tmp_path, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    flags = [*arguments, "--mha_remove_layers", 1, "--ffn_remove_layers", 2]
    assert run(*flags, "--save_model", tmp_path / "first", monkeypatch=monkeypatch) == 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "first", trust_remote_code=True).eval()
    words = [next_word(saved, demo_tokenizer, question) for question in QUESTIONS]
    tasks = [write_generation(tmp_path, [*words[:3], "wrong", "wrong"]), write_choices(tmp_path)]
    flags += ["--tasks", *tasks, "--save_model", tmp_path / "out", "--batch_size", 4, "--overwrite"]
    assert run(*flags, monkeypatch=monkeypatch) == 0
    ours = tasks_of(tmp_path / "run")["metrics"]
    options = {"pretrained": str(tmp_path / "out"), "trust_remote_code": True, "dtype": "float32", "device": "cpu"}
    manager = TaskManager(include_path=str(tasks[0].parent), include_defaults=False)
    stock = simple_evaluate("hf", options, tasks=["goes_on", "layers"], batch_size=4, task_manager=manager)["results"]
    for task in ("goes_on", "layers"):
        for metric, value in ours[task]["pruned"].items():
            assert stock[task][metric] == pytest.approx(value), metric
    assert ours["goes_on"]["pruned"]["exact_match,first_word"] == 0.6
    assert ours["goes_on"]["dense"]["exact_match,first_word"] < 0.6, "the dense model goes on otherwise"
    assert files_of(tmp_path / "first") == files_of(tmp_path / "out"), "measuring changes no model"


@pytest.mark.parametrize("script", ["ppllms", "alp_prune"])
def test_a_model_read_from_disk_answers_the_same(script, arguments, alp_arguments, tmp_path, monkeypatch):
    tasks, found = [write_choices(tmp_path), write_generation(tmp_path, ["the"] * 5)], []
    command = {"ppllms": [run, arguments, COMPENSATED], "alp_prune": [run_alp, alp_arguments, ["--wbits", 3]]}[script]
    for mode in ("none", "disk"):
        flags = [*command[1], *command[2], "--tasks", *tasks, "--offload", mode, "--overwrite"]
        assert command[0](*flags, monkeypatch=monkeypatch) == 0
        found.append(tasks_of(tmp_path / "run"))
    assert found[0] == found[1]


def test_out_of_memory_halves_the_batch_and_tries_again(arguments, tmp_path, monkeypatch, measured):
    counted = Tasks.measure

    def large(self, model, tokenizer, batch_size):
        counted(self, model, tokenizer, batch_size)
        if batch_size > 2:
            raise torch.OutOfMemoryError("out of memory")
        return counted(self, model, tokenizer, batch_size)

    monkeypatch.setattr(Tasks, "measure", large)
    flags = [*arguments, "--batch_size", 8, "--tasks", write_choices(tmp_path)]
    assert run(*flags, monkeypatch=monkeypatch) == 0
    assert measured == [8, 4, 2, 2, 2, 2]
    assert json.loads((tmp_path / "run/result.json").read_text())["batch_size"] == 2


# Failures -------------------------------------------------------------------------------------------------------------


def test_a_task_that_fails_on_the_dense_model_ends_the_run_before_the_work(
    arguments, tmp_path, monkeypatch, capsys, fails
):
    fails(1)
    assert run(*arguments, "--tasks", write_choices(tmp_path), monkeypatch=monkeypatch) == 1
    told = capsys.readouterr()
    assert "ppllms.py: failed: --tasks: lm_eval failed: KeyError: 'x'; nothing is finished yet" in told.err
    assert "Block Influence" not in told.out and not (tmp_path / "run/result.json").exists()


def test_a_task_that_fails_later_is_one_line_and_keeps_result_model_and_log(
    alp_arguments, tmp_path, monkeypatch, capsys, fails
):
    flags = [*alp_arguments, "--save_model", tmp_path / "out", "--save_log", "--tasks", write_choices(tmp_path)]
    with monkeypatch.context():
        fails(2)
        assert run_alp(*flags, monkeypatch=monkeypatch) == 1
        told = capsys.readouterr().err.splitlines()[-1]
        failed = "alp_prune.py: failed: --tasks: lm_eval failed: KeyError: 'x'; what is finished is kept: "
        assert told.endswith(failed + GOES_ON.strip())
        assert set(tasks_of(tmp_path / "run")["mean"]) == {"dense"} and (tmp_path / "out/config.json").exists()
        for _ in range(2):  # what failed is done, and the log has it, once
            assert run_alp(*flags, "--resume", monkeypatch=monkeypatch) == 0
            header, *rows = (line.split("\t") for line in Path("results/log.tsv").read_text().splitlines())
            mean = tasks_of(tmp_path / "run")["mean"]["pruned"]["accuracy"]
            assert [row[header.index("accuracy_pruned")] for row in rows] == ["", f"{mean:.2f}"]


def test_a_model_too_large_for_a_batch_of_one_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    def full(self, model, tokenizer, batch_size):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Tasks, "measure", full)
    assert run(*arguments, "--tasks", write_choices(tmp_path), monkeypatch=monkeypatch) == 1
    assert "failed: --tasks: out of memory, though batches were made smaller" in capsys.readouterr().err


# Resuming, and tables -------------------------------------------------------------------------------------------------


def test_a_run_that_is_stopped_measures_no_stage_again(arguments, tmp_path, monkeypatch, measured):
    flags = [*arguments[:-2], *COMPENSATED, "--eval_windows", 8, "--tasks", write_choices(tmp_path)]
    with monkeypatch.context() as patches:
        whole = Interruption(patches)
        assert run(*flags, "--output_dir", tmp_path / "whole", monkeypatch=patches) == 0
    assert len(measured) == 3
    for at in range(1, len(whole.steps), 2):
        del measured[:]
        folder = tmp_path / f"{at}"
        with monkeypatch.context() as patches:
            Interruption(patches, at, is_after=True)
            assert run(*flags, "--output_dir", folder, monkeypatch=patches) == 130
        assert run(*flags, "--output_dir", folder, "--resume", monkeypatch=monkeypatch) == 0
        assert result_of(folder) == result_of(tmp_path / "whole") and not litter_of(folder)
        assert len(measured) == 3, at


@pytest.mark.parametrize("script", ["ppllms", "alp_prune"])
def test_cells_of_a_grid_are_runs_of_their_own_and_the_dense_model_is_measured_once(
    script, arguments, alp_arguments, tmp_path, monkeypatch, measured, capsys
):
    if script == "ppllms":
        start, base = run, [*arguments[: arguments.index("--mha_remove_layers")], "--prune_rate", 0.1]
        names, axis, more = ["sleb", "shortgpt"], "--method", COMPENSATED
    else:
        start, base = run_alp, alp_arguments[: alp_arguments.index("--output_dir")]
        names, axis, more = ["magnitude", "wanda"], "--prune_method", ["--wbits", 3]
    flags = [*base, *more, "--tasks", write_choices(tmp_path), "--output_dir"]
    assert start(*flags, tmp_path / "grid", axis, *names, monkeypatch=monkeypatch) == 0
    assert len(measured) == 1 + 2 * 2
    lines = (tmp_path / "grid/results.jsonl").read_text().splitlines()
    for name, cell in zip(names, (json.loads(line)["result"] for line in lines), strict=True):
        assert start(*flags, tmp_path / name, axis, name, monkeypatch=monkeypatch) == 0
        assert cell["tasks"] == tasks_of(tmp_path / name)
    table = (tmp_path / "grid/table.md").read_text()
    stage = list(cell["tasks"]["mean"])[-1]
    assert f"| {names[1]} {stage} | {cell['tasks']['accuracy']['layers'][stage]:.2f} ± " in table
    assert "answers that flipped between right and wrong" in table and "| dense | " in table
    mean = cell["tasks"]["mean"][stage]["accuracy"]
    assert f", accuracy {mean:.2f} (" in capsys.readouterr().out


# Wrong input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["ppllms", "alp_prune"])
def test_what_cannot_be_measured_is_refused_before_work_starts(
    script, arguments, alp_arguments, tmp_path, monkeypatch, capsys
):
    start, flags = {"ppllms": (run, arguments), "alp_prune": (run_alp, alp_arguments)}[script]

    def told(*tasks) -> str:
        assert start(*flags, "--tasks", *tasks, monkeypatch=monkeypatch) == 2
        assert not (tmp_path / "run").exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "--tasks /no/such.yaml: no such file" in told("/no/such.yaml")
    broken = write_choices(tmp_path)
    (tmp_path / "layers.jsonl").unlink()
    assert "--tasks layers: cannot be loaded" in told(broken)


def test_without_lm_eval_the_flag_that_was_given_is_refused(arguments, alp_arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    commands = [(run, arguments, ["--tasks", "common7"]), (run_alp, alp_arguments, ["--tasks", "boolq"])]
    for start, flags, asked in [*commands, (run_alp, alp_arguments, ["--eval_zero_shot"])]:
        assert start(*flags, *asked, monkeypatch=monkeypatch) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(f"{asked[0]}: lm_eval is not installed; pip install lm-eval")


def test_a_gguf_file_has_no_tasks(tmp_path, monkeypatch, capsys):
    flags = ["--apply_plan", "plan.json", "--gguf", "in.gguf", "out.gguf", "--tasks", "boolq"]
    assert run(*flags, monkeypatch=monkeypatch) == 2
    assert "--tasks: has no meaning with --gguf" in capsys.readouterr().err
