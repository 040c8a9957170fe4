"""A run that is stopped goes on with what is finished, and ends as if it never had been; what does not fit is told."""

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lib.runs.texts
import lib.sparsity.layerwise
from tests.command import DIFFERS, GOES_ON, run
from tests.runs.interruption import COUNTS, RUNS, Command, Interruption, files_of, litter_of, result_of

STOPPED = ": stopped; what is finished is kept: " + GOES_ON
NOTHING_YET = ": stopped; nothing is finished yet, and the same command starts again\n"


EVERY_STEP = ("ppllms", "save_gradient", "random")  # of others, some: each run takes its time
LONG = ("blockpruner", "beam", "sparsegpt", "owl", "gptq", "admm-gptq")  # run by -m slow


# Going on -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in RUNS])
def test_a_run_that_is_stopped_anywhere_goes_on_to_the_same_result(command, name, tmp_path, capsys):
    asked = command(name)
    status, whole = asked.run(tmp_path / "whole")
    assert status == 0 and not litter_of(tmp_path)
    expected, steps = asked.found(tmp_path / "whole"), whole.steps
    assert asked.is_gradient or expected[1]
    for at in range(0, len(steps), 1 if name in EVERY_STEP else 5):
        is_after, folder = at % 2 == 1, tmp_path / f"{at}"
        what = f"{'after' if is_after else 'before'} step {at}, {steps[at]}"
        capsys.readouterr()
        status, stopped = asked.run(folder, at=at, is_after=is_after)
        told = capsys.readouterr().err
        assert status == 130 and told.endswith((STOPPED, NOTHING_YET)), (what, told)
        assert asked.state(folder).exists() == told.endswith(STOPPED), what
        status, rest = asked.run(folder, "--resume")
        assert status == 0 and asked.found(folder) == expected, (what, capsys.readouterr().err)
        assert not litter_of(folder), what
        again = len(stopped.work) + len(rest.work) - len(whole.work)
        assert again == 0 if is_after and steps[at] in ("put", "write", "save", "save_sealed") else again <= 1, what


@pytest.mark.parametrize("name", ["ppllms", "gptq", "save_gradient"])
def test_a_run_may_be_stopped_again_and_again(command, name, tmp_path):
    asked = command(name)
    _, whole = asked.run(tmp_path / "whole")
    work, goes_on = 0, []
    for at in range(100):
        status, stopped = asked.run(tmp_path / "run", *goes_on, at=at // 2, is_after=True)
        work, goes_on = work + len(stopped.work), ["--resume"]
        if status == 0:
            break
    assert status == 0 and asked.found(tmp_path / "run") == asked.found(tmp_path / "whole")
    assert work <= len(whole.work) + 2 and not litter_of(tmp_path / "run")


@pytest.mark.parametrize("name", ["ppllms", "wanda_alp", "save_gradient"])
def test_a_finished_run_says_so_and_touches_nothing(command, name, tmp_path, capsys):
    asked = command(name)
    asked.run(tmp_path)

    def everything() -> dict:
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.rglob("*")}

    before = everything()
    status, again = asked.run(tmp_path, "--resume")
    assert status == 0 and not again.work and not again.steps and everything() == before
    assert "Finished before: " in capsys.readouterr().out
    asked.state(tmp_path).mkdir()  # killed as it deleted its state
    (asked.state(tmp_path) / "lock").touch()
    assert asked.run(tmp_path, "--resume")[0] == 0 and not asked.state(tmp_path).exists()


@pytest.mark.parametrize("name", ["ppllms", "wanda_alp", "save_gradient"])
def test_unfinished_work_is_neither_gone_on_with_nor_lost_unless_told(command, name, tmp_path, capsys):
    asked = command(name)
    _, whole = asked.run(tmp_path / "whole")
    asked.run(tmp_path / "run", at=2, is_after=True)
    before = files_of(tmp_path / "run")
    capsys.readouterr()
    status, refused = asked.run(tmp_path / "run")
    told = capsys.readouterr().err
    assert status == 2 and told.count("\n") == 1 and "unfinished" in told
    assert "--resume" in told and "--overwrite" in told and files_of(tmp_path / "run") == before
    status, anew = asked.run(tmp_path / "run", "--overwrite")
    known = 5 if name == "wanda_alp" else 0  # 4 layers and their sum
    assert status == 0 and len(anew.work) >= len(whole.work) - known
    assert asked.found(tmp_path / "run") == asked.found(tmp_path / "whole") and not litter_of(tmp_path / "run")


@pytest.mark.parametrize("name", ["ppllms", "wanda_alp", "save_gradient"])
def test_a_run_that_was_to_overwrite_another_goes_on_wherever_it_was_stopped(command, name, tmp_path):
    asked, seed = command(name), ["--seed", 1, *(["--grad_seed", 1] if name == "wanda_alp" else [])]
    _, whole = asked.run(tmp_path / "whole", *seed)
    for at in dict.fromkeys((None, 0, 3, len(whole.steps) - 1)):
        folder = tmp_path / f"{at}"
        assert asked.run(folder)[0] == 0
        if at is not None:
            assert asked.run(folder, *seed, "--overwrite", at=at)[0] == 130
        assert asked.run(folder, *seed, "--overwrite", "--resume")[0] == 0
        assert asked.found(folder) == asked.found(tmp_path / "whole") and not litter_of(folder), at


def test_what_is_kept_of_another_run_is_not_taken_for_work_on_this_one(alp, tmp_path):
    asked = alp("--prune_method", "wanda")
    asked.run(tmp_path / "whole")
    asked.run(tmp_path / "run", "--sparsity_ratio", 0.7, at=("write", 1), is_after=True)
    (tmp_path / "run/run/state/state.json").unlink()  # killed as it deleted its state
    assert list(tmp_path.glob("run/run/state/pruned/layer-*"))
    assert asked.run(tmp_path / "run", "--resume")[0] == 0
    assert asked.found(tmp_path / "run") == asked.found(tmp_path / "whole")


def test_what_a_kill_left_of_writing_a_result_is_cleared(command, tmp_path):
    for name in ("ppllms", "save_gradient"):
        asked, folder = command(name), tmp_path / name
        asked.run(folder, at=2, is_after=True)
        result = folder / ("gradient.json" if asked.is_gradient else "run/result.json")
        result.with_name(f".{result.name}.partial-1").write_text("{")
        assert asked.run(folder, "--resume")[0] == 0 and not litter_of(folder)


def test_how_to_go_on_names_the_folder_that_was_chosen_for_the_run(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Interruption(monkeypatch, at=1)
    assert run(*arguments[:-2], monkeypatch=monkeypatch) == 130
    (folder,) = Path("runs").iterdir()
    assert capsys.readouterr().err.endswith(f"the same command with --resume --output_dir {folder} goes on\n")


@pytest.mark.parametrize("name", ["ppllms", "wanda_alp"])
def test_a_model_that_another_saves_there_meanwhile_is_not_replaced(command, name, tmp_path, capsys):
    asked = command(name)
    _, whole = asked.run(tmp_path / "whole")

    def save() -> None:
        (tmp_path / "run/out").mkdir()
        (tmp_path / "run/out/config.json").write_text("of somebody else")

    assert asked.run(tmp_path / "run", at=whole.steps.index("result.json"), act=save)[0] == 2
    for flags in (["--resume"], []):
        told = capsys.readouterr().err
        assert "out: exists and is not empty" in told or "unfinished work" in told
        assert files_of(tmp_path / "run/out") == {"config.json": b"of somebody else"}
        assert asked.run(tmp_path / "run", *flags)[0] == 2
    assert asked.run(tmp_path / "run", "--resume", "--overwrite")[0] == 0
    assert asked.found(tmp_path / "run") == asked.found(tmp_path / "whole")


@pytest.mark.parametrize("name", ["ppllms", "wanda_alp"])
def test_a_stopped_run_may_go_on_with_another_evaluation(command, name, text_file, tmp_path):
    asked, flags = command(name), ["--eval_windows", 3, "--eval_stride", 16]
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    flags += ["--eval_datasets" if name == "ppllms" else "--dataset", other, text_file]
    _, whole = asked.run(tmp_path / "whole", *flags)
    asked.run(tmp_path / "run", at=STOPPED_AT[name], is_after=True)
    status, rest = asked.run(tmp_path / "run", *flags, "--resume")
    assert status == 0 and asked.found(tmp_path / "run") == asked.found(tmp_path / "whole")
    assert not {"block_influence", "summarize"} & set(rest.work)  # which were finished
    assert not litter_of(tmp_path / "run")


def test_distances_of_one_run_are_on_the_same_windows_however_much_memory_there_is(command, tmp_path, monkeypatch):
    """Less memory means fewer windows."""
    asked = command("compensated")
    asked.run(tmp_path / "whole")
    with monkeypatch.context() as patches:
        patches.setattr(lib.runs.texts, "free_host_memory", lambda: 0)
        asked.run(tmp_path / "run", at=("write", 0), is_after=True)  # all but the compensated model
    assert asked.run(tmp_path / "run", "--resume")[0] == 0
    assert asked.found(tmp_path / "run") == asked.found(tmp_path / "whole")


def test_the_plan_is_kept_as_soon_as_the_search_has_ended(depth, tmp_path, monkeypatch):
    asked = depth(*COUNTS)
    _, whole = asked.run(tmp_path / "whole")
    asked.run(tmp_path / "run", at=whole.steps.index("plan.json"), is_after=True)
    assert not (tmp_path / "run/run/result.json").exists()
    flags = ["--apply_plan", tmp_path / "run/run", "--eval_ppl", "no", "--output_dir", tmp_path / "applied"]
    assert run(*flags, monkeypatch=monkeypatch) == 0
    found = json.loads((tmp_path / "applied/result.json").read_text())
    assert found["mha_removed"] == result_of(tmp_path / "whole/run")["mha_removed"]
    assert not (tmp_path / "applied/plan.json").exists()  # it is where it was found


# What does not fit ----------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


STOPPED_AT = {"ppllms": ("put", 2), "wanda_alp": ("write", 2), "save_gradient": ("save", 1)}  # in the midst of work


@pytest.fixture
def refused(tmp_path, capsys):
    """Whether a run is refused with one line that has some words, and leaves everything as it is."""

    def is_refused(asked: Command, words: str, *flags) -> bool:
        before = files_of(tmp_path)
        capsys.readouterr()
        status, tried = asked.run(tmp_path / "run", *flags)
        told = capsys.readouterr().err
        assert (status, told.count("\n")) == (2, 1) and words in told and ": error: " in told, told
        return not tried.work and files_of(tmp_path) == before

    return is_refused


@pytest.mark.parametrize("name", STOPPED_AT)
def test_work_of_other_settings_is_refused(command, name, tmp_path, refused):
    asked = command(name)
    asked.run(tmp_path / "run", at=STOPPED_AT[name], is_after=True)
    other = {"ppllms": ["--method", "sleb"], "wanda_alp": ["--prune_method", "wanda_dlp"]}
    changes = [["--seed", 1], other.get(name, ["--grad_type", "l1"])]
    for flags in changes:
        if name == "ppllms" and "sleb" in flags:
            asked.flags = asked.flags[: asked.flags.index("--mha_remove_layers")]
        assert refused(asked, "holds work on other settings", *flags, "--resume")
    assert command(name).run(tmp_path / "run", "--resume")[0] == 0


@pytest.mark.parametrize("name", STOPPED_AT)
def test_work_on_another_model_or_text_is_refused(command, name, tiny_folder, text_file, tmp_path, refused):
    asked, model, text = command(name), tmp_path / "model", tmp_path / "words.txt"
    shutil.copytree(tiny_folder, model)
    shutil.copy(text_file, text)
    asked.flags = [{tiny_folder: model, text_file: text}.get(flag, flag) for flag in asked.flags]
    asked.run(tmp_path / "run", at=STOPPED_AT[name], is_after=True)
    weights, words = (model / "model.safetensors").read_bytes(), text.read_text()
    times = {path: path.stat() for path in (model / "model.safetensors", text)}
    changed = load_file(model / "model.safetensors")
    changed["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(changed, model / "model.safetensors", {"format": "pt"})
    assert refused(asked, "another model", "--resume")
    (model / "model.safetensors").write_bytes(weights)
    text.write_text("But " + words)
    for path, stat in times.items():
        if path != text:
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert refused(asked, "text", "--resume")
    text.write_text(words)
    os.utime(text, ns=(times[text].st_atime_ns, times[text].st_mtime_ns))
    assert asked.run(tmp_path / "run", "--resume")[0] == 0


@pytest.mark.parametrize(
    "name, file",
    [
        ("ppllms", "run/state/state.json"),
        ("wanda_alp", "run/state/state.json"),
        ("wanda_alp", "run/state/pruned/layer-00001.safetensors"),
        ("save_gradient", "gradient.state/state.json"),
        ("save_gradient", "gradient.state/gradient.safetensors"),
    ],
)
def test_a_file_that_was_cut_off_is_refused(command, name, file, tmp_path, refused, capsys):
    asked = command(name)
    asked.run(tmp_path / "run", at=STOPPED_AT[name], is_after=True)
    cut(tmp_path / "run" / file)
    before = (tmp_path / "run" / file).read_bytes()
    status, _ = asked.run(tmp_path / "run", "--resume")
    told = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and f"{Path(file).name}: broken" in told and "--overwrite, and without --resume" in told
    assert (tmp_path / "run" / file).read_bytes() == before
    assert asked.run(tmp_path / "run", "--overwrite")[0] == 0


@pytest.mark.parametrize(
    "name, file, flags",
    [
        ("wanda_alp", "run/state/pruned/layer-00001.safetensors", ["--sparsity_ratio", 0.7]),
        ("save_gradient", "gradient.state/gradient.safetensors", ["--seed", 1]),
    ],
)
def test_what_another_run_finished_is_not_taken_for_its_own(command, name, file, flags, tmp_path, capsys):
    asked = command(name)
    asked.run(tmp_path / "run", at=STOPPED_AT[name], is_after=True)
    asked.run(tmp_path / "other", *flags, at=STOPPED_AT[name], is_after=True)
    shutil.copy(tmp_path / "other" / file, tmp_path / "run" / file)
    status, _ = asked.run(tmp_path / "run", "--resume")
    assert status == 2 and f"{Path(file).name}: broken" in capsys.readouterr().err.splitlines()[-1]


def test_a_model_of_another_run_is_not_taken_for_that_of_a_finished_one(depth, tmp_path, capsys):
    asked = depth(*COUNTS)
    asked.run(tmp_path)
    assert asked.run(tmp_path, "--resume")[0] == 0
    config = tmp_path / "out/config.json"
    config.write_text(config.read_text() + " ")
    assert asked.run(tmp_path, "--resume")[0] == 2
    assert "its model is not there as it was saved" in capsys.readouterr().err


@pytest.mark.parametrize("name", STOPPED_AT)
@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_what_another_run_is_at_work_on_is_left_alone(command, name, flag, tmp_path, refused):
    asked = command(name)
    asked.run(tmp_path / "run", at=STOPPED_AT[name], is_after=True)
    with (asked.state(tmp_path / "run") / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert refused(asked, "another run is at work on it", flag)
    assert asked.run(tmp_path / "run", "--resume")[0] == 0


def test_going_on_needs_the_folder(arguments, monkeypatch, capsys):
    assert run(*arguments[:-2], "--resume", monkeypatch=monkeypatch) == 2
    assert "--resume: needs --output_dir" in capsys.readouterr().err


# Grids ----------------------------------------------------------------------------------------------------------------


def cells_of(folder: Path) -> list[dict]:
    lines = [json.loads(line)["result"] for line in (folder / "run/results.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in DIFFERS} for line in lines]


@pytest.mark.parametrize("flags", [["wanda", "sparsegpt"], ["magnitude", "wanda_alp"]], ids=" ".join)
def test_a_cell_of_weights_that_was_stopped_goes_on_within_the_cell(alp, flags, tmp_path, capsys):
    more = ["--grad_nsamples", 3, "--grad_seqlen", 16] if "wanda_alp" in flags else []
    asked = alp("--prune_method", *flags, *more)
    asked.flags = [flag for flag in asked.flags if flag not in ("--save_model", "out")]
    _, whole = asked.run(tmp_path / "whole")
    layers = [at for at, step in enumerate(whole.steps) if step in ("write", "save")]
    for at in (layers[2], layers[6], layers[-1]):
        folder = tmp_path / f"{at}"
        status, stopped = asked.run(folder, at=at, is_after=True)
        assert status == 130 and capsys.readouterr().err.endswith("of 2 cells are kept, and the same command goes on\n")
        status, rest = asked.run(folder)
        assert status == 0 and not litter_of(folder)
        kinds = ("_prune_part", "summarize")
        done = [sum(one.work.count(kind) for kind in kinds) for one in (stopped, rest, whole)]
        assert done[0] + done[1] == done[2], at
        for one, other in zip(cells_of(folder), cells_of(tmp_path / "whole"), strict=True):
            assert {**one, "peak_memory_bytes": 0} == {**other, "peak_memory_bytes": 0}


def test_a_cell_of_depth_that_was_stopped_goes_on_within_the_cell(depth, tmp_path):
    asked = depth("--method", "shortgpt", "sleb", "blockpruner", "--prune_rate", 0.1)
    asked.flags = [flag for flag in asked.flags if flag not in ("--save_model", "out")]
    status, whole = asked.run(tmp_path / "whole")
    assert status == 0
    for at in range(3, len(whole.steps), 2):
        status, stopped = asked.run(tmp_path / f"{at}", at=at, is_after=True)
        assert status == 130
        status, rest = asked.run(tmp_path / f"{at}")
        done = [one.work.count("_measured") for one in (stopped, rest, whole)]
        assert status == 0 and done[0] + done[1] == done[2] and not litter_of(tmp_path / f"{at}")


def test_a_cell_that_fails_leaves_the_state_to_the_next(alp, tmp_path, monkeypatch):
    asked = alp("--prune_method", "wanda", "magnitude")
    asked.flags = [flag for flag in asked.flags if flag not in ("--save_model", "out")]
    prune = lib.sparsity.layerwise.prune_group
    states = set()

    def fail(group, statistic, pruner, sparsity):
        states.update(path.name for path in (tmp_path / "run").glob("state*"))
        if type(pruner).__name__ == "Wanda":
            raise torch.OutOfMemoryError("no")
        prune(group, statistic, pruner, sparsity)

    with monkeypatch.context() as patches:
        patches.setattr(lib.sparsity.layerwise, "prune_group", fail)
        assert asked.run(tmp_path)[0] == 1
    assert states == {"state"}
    assert asked.run(tmp_path)[0] == 0 and len(cells_of(tmp_path)) == 2 and not litter_of(tmp_path)
