"""`python -m lib.heal`: a pruned folder in, a better one out; and what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lib.heal.__main__
from lib.config.plan import read_plan
from lib.evaluation.answers import Answers
from lib.runs.tasks import TaskStages
from tests.command import ROOT, run, run_alp
from tests.families import tiny_model


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> list:
    """Flags of a text that does not change, and of few windows."""
    path = tmp_path_factory.mktemp("text") / "license.txt"
    shutil.copyfile(ROOT / "LICENSE", path)
    return ["--dataset", path, "--eval_datasets", path, "--seqlen", 16, "--eval_windows", 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("heal")


@pytest.fixture
def pruned(tiny_folder, text, folder, monkeypatch) -> Path:
    """A model without some blocks, saved by ppllms.py; made once."""
    if not (folder / "pruned").exists():
        flags = ["--model_name", tiny_folder, *text, "--mha_remove_layers", 1, "--ffn_remove_layers", 2]
        flags += ["--save_model", folder / "pruned", "--output_dir", folder / "run"]
        assert run(*flags, monkeypatch=monkeypatch) == 0
    return folder / "pruned"


@pytest.fixture
def heal(text, tmp_path, monkeypatch):
    """Runs the command on a model; `more` comes last."""

    def of(model: Path, *more) -> int:
        flags = ["--model", model, *text, "--steps", 12, "--train_batch_size", 4, "--learning_rate", 0.002]
        flags += ["--output_dir", tmp_path / "healed"]
        return run(*flags, *more, monkeypatch=monkeypatch, script=lib.heal.__main__)

    return of


def result_of(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "healed/result.json").read_text())


def test_a_healed_model_is_nearer_to_the_dense_one_and_saved_as_it_was_measured(heal, pruned, tmp_path, capsys):
    assert heal(pruned, "--save_model", tmp_path / "out") == 0
    result, told = result_of(tmp_path), capsys.readouterr().out
    (text,) = result["kl_divergence"]
    assert list(result["perplexity"][text]) == ["dense", "pruned", "healed"]
    assert result["kl_divergence"][text]["healed"] < 0.9 * result["kl_divergence"][text]["pruned"]
    assert result["verdict"] and "Perplexity (dense -> pruned -> healed)" in told and "Taken       the adapters" in told
    healing = result["healing"]
    assert healing["steps_taken"] == 12 and len(healing["checks"]) == 7 and healing["keeps_zeros"] is False
    before, after = (load_file(path / "model.safetensors") for path in (pruned, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {len(before), len(changed)} == {len(after), len(healing["changed"])}
    assert all("proj" in name for name in changed)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).num_parameters()


def test_the_healed_folder_tells_what_was_removed_and_what_was_changed(heal, pruned, text, tmp_path, monkeypatch):
    """By the refits before and by the training, in numbers of the dense model's layers."""
    compensated, out = tmp_path / "compensated", tmp_path / "out"
    again = ["--apply_plan", pruned, "--compensate", "all", "--compensate_dataset", *text[1:]]
    flags = [*again, "--save_model", compensated, "--output_dir", tmp_path / "run"]
    assert run(*flags, monkeypatch=monkeypatch) == 0
    assert heal(compensated, "--save_model", out) == 0
    earlier, now = (read_plan(path / "plan.json") for path in (compensated, out))
    assert now.plan == earlier.plan and now.model == earlier.model
    assert now.changed and earlier.changed and now.changed.folder == out
    assert set(earlier.changed.linears) < set(now.changed.linears)
    assert {layer for layer, _ in now.changed.linears} == set(now.plan.kept_layers)
    card = (out / "README.md").read_text()
    assert (
        "| FFN | " in card
        and "- healed" in card
        and "steps of training of low-rank adapters to the distributions of" in card
    )
    assert heal(compensated, "--save_model", out, "--overwrite") == 0  # its card and plan are known as its own


def test_the_teacher_is_that_of_the_plan_another_or_none(heal, pruned, tiny_folder, tmp_path, capsys):
    for flags, told in (
        ([], f"Teacher     {tiny_folder.resolve()}\n"),
        (["--teacher", tiny_folder], f"Teacher     {tiny_folder}\n"),
        (["--teacher", "none"], "Teacher     none: it is trained on the text itself\n"),
    ):
        assert heal(pruned, *flags, "--overwrite") == 0
        assert told in capsys.readouterr().out
    result = result_of(tmp_path)
    (text,) = result["perplexity"]
    assert result["kl_divergence"][text] == {} and result["verdict"] is None
    assert result["perplexity"][text]["healed"] < result["perplexity"][text]["pruned"]


def test_a_sparse_model_stays_sparse(heal, tiny_folder, text_file, tmp_path, monkeypatch):
    flags = ["--model", tiny_folder, "--calibration_dataset", text_file, "--dataset", text_file, "--seqlen", 16]
    flags += ["--prune_method", "wanda", "--sparsity_type", "2:4", "--nsamples", 4, "--eval_windows", 4]
    assert run_alp(*flags, "--save_model", tmp_path / "sparse", monkeypatch=monkeypatch) == 0
    assert heal(tmp_path / "sparse", "--teacher", tiny_folder, "--save_model", tmp_path / "out") == 0
    result = result_of(tmp_path)
    (divergences,) = result["kl_divergence"].values()
    assert divergences["healed"] < divergences["pruned"]
    assert result["healing"]["keeps_zeros"] is True and result["healing"]["zeros"] == pytest.approx(0.5, abs=1e-3)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("sparse", "out"))
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before)
    assert not (tmp_path / "out/plan.json").exists()


def test_text_of_the_dense_model_itself(heal, pruned, tmp_path, capsys):
    assert heal(pruned, "--dataset", "self", "--nsamples", 8) == 0
    assert "Text        self (calibration): sampled from the model" in capsys.readouterr().out
    assert result_of(tmp_path)["healing"]["windows"] == 7


def test_the_format_nemotron_nas_holds_the_same_model(heal, pruned, tmp_path):
    for name in ("hf", "nemotron-nas"):
        assert heal(pruned, "--save_model", tmp_path / name, "--save_format", name, "--overwrite") == 0
    hf, nas = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "nemotron-nas"))
    assert all(torch.equal(hf[name], nas[name]) for name in nas)
    assert not [name for name in hf.keys() - nas.keys() if "norm" not in name]


def test_a_dry_run_tells_the_plan_of_work_and_writes_nothing(heal, pruned, tmp_path, capsys):
    assert heal(pruned, "--dry_run") == 0
    assert "training: " in capsys.readouterr().out and not (tmp_path / "healed").exists()


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, told",
    [
        (
            ["--teacher", "{other}"],
            "--teacher {other}: has another head than {pruned}; give the model that",
        ),
        (["--teacher", "{missing}"], "{missing}"),
        (["--teacher", "none", "--dataset", "self"], "--dataset self: is text of the dense model; give --teacher"),
        (["--dataset", "{text}", "--nsamples", 1, "--seqlen", 64], None),
        (["--save_model", "{missing}.gguf"], "is a GGUF file; save a folder, and give that to ppllms.py --apply_plan"),
        (["--save_model", "{pruned}"], "--save_model {pruned}: would replace {pruned}, which this run uses"),
        (["--save_format", "masked"], "--save_format"),
        (["--learning_rate", "0"], "not a number above 0"),
        (["--steps", "0"], "--steps"),
        (["--offload", "cpu"], "unrecognized arguments: --offload cpu"),
        (["--device_map", "auto", "--device", "cpu"], "give one of them"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(heal, pruned, demo_tokenizer, tmp_path, capsys, flags, told):
    other, text = tmp_path / "other", tmp_path / "short.txt"
    tiny_model("Llama", vocab_size=4096).save_pretrained(other)
    demo_tokenizer.save_pretrained(other)
    text.write_text("A few words. " * 20)
    names = {"other": other, "missing": tmp_path / "missing", "pruned": pruned, "text": text}
    flags = [flag.format(**names) if isinstance(flag, str) else flag for flag in flags]
    capsys.readouterr()
    try:
        status = heal(pruned, *flags)
    except SystemExit as end:  # of the parser
        status = end.code
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1, error
    assert (told or "at least 2 windows of 64 tokens").format(**names) in error
    assert not (tmp_path / "healed").exists()


@pytest.mark.parametrize(
    "change, told",
    [
        ({"num_layers": "many"}, "plan.json holds no plan that can be read; mend it, or take it out of the folder"),
        ({"num_layers": 9}, "the plan in its folder is another's: it leaves 8 of 9 layers, and the model has 3"),
        (
            {"ffn_removed": [0, 1, 2]},
            "has blocks that the plan in its folder removes, which a training would bring back",
        ),
    ],
)
def test_a_plan_that_does_not_fit_its_folder_is_told_before_the_training(
    heal, pruned, tiny_folder, tmp_path, capsys, change, told
):
    shutil.copytree(pruned, tmp_path / "other")
    plan = json.loads((pruned / "plan.json").read_text())
    (tmp_path / "other/plan.json").write_text(json.dumps(plan | change))
    capsys.readouterr()
    assert heal(tmp_path / "other", "--teacher", tiny_folder) == 2
    told_there = capsys.readouterr()
    assert told in told_there.err and "step" not in told_there.out


def test_a_masked_model_is_refused(heal, pruned, tmp_path, monkeypatch, capsys):
    flags = ["--apply_plan", pruned, "--eval_ppl", "no", "--save_model", tmp_path / "masked", "--save_format", "masked"]
    assert run(*flags, "--output_dir", tmp_path / "run", monkeypatch=monkeypatch) == 0
    assert heal(tmp_path / "masked") == 2
    assert "a training would bring back; give one that was saved with --save_format hf" in capsys.readouterr().err


def test_few_zeros_are_trained_too_and_that_is_said(heal, tiny_folder, text, tmp_path, monkeypatch, capsys):
    flags = ["--model", tiny_folder, "--calibration_dataset", text[1], "--dataset", text[1], *text[4:]]
    flags += ["--prune_method", "magnitude", "--sparsity_ratio", 0.2, "--save_model", tmp_path / "sparse"]
    assert run_alp(*flags, monkeypatch=monkeypatch) == 0
    assert heal(tmp_path / "sparse", "--teacher", tiny_folder, "--save_model", tmp_path / "out") == 0
    assert "too few for a sparse model: they are trained too" in capsys.readouterr().out
    assert "- sparse" not in (tmp_path / "out/README.md").read_text()


def test_tasks_without_a_teacher_have_accuracies_and_no_flips(heal, pruned, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    answers = Answers({"some": {"acc,none": 0.5, "acc_stderr,none": 0.1}}, {"some": 0}, {"some": "10"})
    monkeypatch.setattr(TaskStages, "measure", lambda self, stage, plan=None: self.answers.update({stage: answers}))
    assert heal(pruned, "--teacher", "None") == 0
    tasks = json.loads((tmp_path / "healed/result.json").read_text())["tasks"]
    assert tasks["accuracy"]["some"] == {"pruned": 50.0, "healed": 50.0} and tasks["flips"] == {}


def test_a_dense_model_that_is_gone_is_told(heal, pruned, tmp_path, capsys):
    shutil.copytree(pruned, tmp_path / "moved")
    plan = tmp_path / "moved/plan.json"
    content = json.loads(plan.read_text())
    plan.write_text(json.dumps({**content, "model": "/not/there", "model_path": "/not/there"}))
    assert heal(tmp_path / "moved") == 2
    error = capsys.readouterr().err
    assert f"--teacher: {plan} names /not/there, which is not there; give the dense model, or none" in error


def test_several_processes_are_refused(heal, pruned, capsys, monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert heal(pruned) == 2
    assert "healing runs in one process; start it without torchrun" in capsys.readouterr().err


def test_a_card_quotes_the_command_by_its_name(heal, pruned, text, tmp_path):
    flags = [
        "--model",
        pruned,
        *text,
        "--steps",
        1,
        "--output_dir",
        tmp_path / "healed",
        "--save_model",
        tmp_path / "out",
    ]
    command = [sys.executable, "-m", "lib.heal", *map(str, flags)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert f"\nheal --model {pruned} " in (tmp_path / "out/README.md").read_text()


def test_the_command_answers_at_once_and_needs_no_torch():
    code = "import sys, lib.heal.__main__ as heal; heal.build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
