"""Nothing is deleted, replaced or written through that is not our own: it is refused before the work, by its name."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import alp_prune
import ppllms
import save_gradient
from lib.cli.exit_status import INTERRUPTED
from lib.errors import InputError
from lib.runtime.launcher import Launch, launched
from lib.storage import output_folder
from lib.storage.output_folder import MARK, check_output_folder, claim
from tests.command import ROOT, run
from tests.runs.interruption import COUNTS, files_of

OURS = (
    *("result.json", "log.txt", "block_influence.png", "sparsity.png", "results.jsonl", "table.md", "table.csv"),
    *("samples.md", "perplexity-words.png", "state/notes.txt"),
)


@pytest.fixture
def refused(capsys):
    """Whether a command is refused with one line of some words, and leaves a folder as it is."""

    def is_refused(here: Path, words: str, *flags, script, monkeypatch) -> bool:
        before = files_of(here)
        status = run(*flags, script=script, monkeypatch=monkeypatch)
        told = capsys.readouterr().err
        assert (status, told.count("\n")) == (2, 1) and words in told, told
        return files_of(here) == before

    return is_refused


# Output folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--overwrite", "--resume", None])
@pytest.mark.parametrize("name", OURS)
def test_files_of_our_names_in_a_folder_without_our_mark_are_not_touched(
    arguments, tmp_path, monkeypatch, refused, name, flag
):
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text("mine")
    words = f"holds {Path(name).parts[0]}; it has no run.json of ours"
    assert refused(tmp_path, words, *arguments, *filter(None, [flag]), script=ppllms, monkeypatch=monkeypatch)
    grid = [*arguments, *filter(lambda flag: flag == "--overwrite", [flag]), "--seed", 0, 1]
    assert refused(tmp_path, words, *grid, script=ppllms, monkeypatch=monkeypatch)


def test_a_mark_of_something_else_is_not_taken_for_ours(tmp_path):
    for content in ("mine", "[]", '{"format": "output/1"}', '{"format": "output/1", "holds": "all"}'):
        (tmp_path / MARK).write_text(content)
        with pytest.raises(InputError, match="run.json there is not of this version"):
            check_output_folder(tmp_path, "run")
        assert (tmp_path / MARK).read_text() == content


@pytest.mark.parametrize("name", ["log.txt", "result.json", "state", "run.json"])
def test_links_are_not_written_through(arguments, tmp_path, monkeypatch, refused, name):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    claim(folder, "run")
    (folder / name).unlink(missing_ok=True)
    elsewhere.mkdir() if name == "state" else elsewhere.write_text("mine")
    (folder / name).symlink_to(elsewhere)
    command = [*arguments, "--overwrite"]
    assert refused(tmp_path, f"{name} is a link", *command, script=ppllms, monkeypatch=monkeypatch)
    assert not (elsewhere.is_dir() and any(elsewhere.iterdir()))


@pytest.mark.parametrize("kind", ["pipe", "folder", "hard link"])
def test_what_is_no_file_of_its_own_is_refused_in_a_marked_folder_too(arguments, tmp_path, monkeypatch, refused, kind):
    claim(tmp_path / "run", "run")
    log = tmp_path / "run/log.txt"
    if kind == "hard link":
        (tmp_path / "theirs.txt").write_text("mine")
        os.link(tmp_path / "theirs.txt", log)
    else:
        log.mkdir() if kind == "folder" else os.mkfifo(log)
    words = "has another name too" if kind == "hard link" else "is no regular file"
    assert refused(tmp_path, f"log.txt {words}", *arguments, script=ppllms, monkeypatch=monkeypatch)


@pytest.mark.parametrize("name", ["state", "result.json", "log.txt", "block_influence.png", "state/model"])
def test_a_model_is_not_saved_under_a_name_of_the_output_folder(arguments, tmp_path, monkeypatch, refused, name):
    command = [*arguments, "--save_model", tmp_path / "run" / name]
    assert refused(tmp_path, "own files", *command, script=ppllms, monkeypatch=monkeypatch)


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_the_cache_of_the_hub_is_not_saved_to(arguments, tmp_path, monkeypatch, refused, variable):
    monkeypatch.setenv(variable, str(tmp_path / "hf"))
    command = [*arguments, "--save_model", tmp_path / "hf/hub/models--a--b/snapshots/c", "--overwrite"]
    assert refused(tmp_path, "lies in the cache of the hub", *command, script=ppllms, monkeypatch=monkeypatch)


def test_files_of_our_names_in_runs_do_not_concern_a_run_in_a_folder_of_its_own(
    arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/log.txt").write_text("mine")
    assert run(*arguments[:-2], monkeypatch=monkeypatch) == 0 and Path("runs/log.txt").read_text() == "mine"


def test_nothing_is_written_among_the_text(alp_arguments, tiny_folder, text_file, tmp_path, monkeypatch, refused):
    texts = tmp_path / "texts"
    texts.mkdir()
    shutil.copy(text_file, texts)
    log = [*alp_arguments, "--dataset", texts, "--save", texts]
    assert refused(tmp_path, "--save", *log, script=alp_prune, monkeypatch=monkeypatch)
    monkeypatch.chdir(texts)
    gradients = ["--model", tiny_folder, "--dataset", texts]
    assert refused(tmp_path, "--output gradients", *gradients, script=save_gradient, monkeypatch=monkeypatch)
    used = [*alp_arguments, "--calibration_dataset", texts]
    assert refused(tmp_path, "gradients gradients", *used, script=alp_prune, monkeypatch=monkeypatch)


def test_a_log_that_is_a_link_is_not_written_through(alp_arguments, tmp_path, monkeypatch, refused):
    (tmp_path / "logs").mkdir()
    (tmp_path / "theirs.tsv").touch()
    (tmp_path / "logs/log.tsv").symlink_to(tmp_path / "theirs.tsv")
    command = [*alp_arguments, "--save", tmp_path / "logs"]
    assert refused(tmp_path, "log.tsv is a link", *command, script=alp_prune, monkeypatch=monkeypatch)


def test_other_files_in_an_output_folder_stay(arguments, tmp_path, monkeypatch):
    (tmp_path / "run/data").mkdir(parents=True)
    for name in ("notes.txt", "data/state.json"):
        (tmp_path / "run" / name).write_text("mine")
    for flags in ([], ["--overwrite"]):
        assert run(*arguments, *flags, monkeypatch=monkeypatch) == 0
        assert (tmp_path / "run/notes.txt").read_text() == (tmp_path / "run/data/state.json").read_text() == "mine"


def test_a_folder_of_the_users_beside_a_gradient_file_is_not_taken_for_its_state(
    tiny_folder, text_file, tmp_path, monkeypatch, refused
):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", tiny_folder, "--dataset", text_file, "--ngrad", 2, "--grad_seqlen", 16]
    (tmp_path / "X.state").mkdir()
    (tmp_path / "X.state/notes.txt").write_text("mine")
    for more in (["--overwrite"], ["--resume"], []):
        given = [*flags, "--output", "X.json", *more]
        assert refused(tmp_path, "X.state is there", *given, script=save_gradient, monkeypatch=monkeypatch)
    state = save_gradient.parse(list(map(str, flags))).output.with_suffix(".state")
    shutil.copytree(tmp_path / "X.state", state)
    asked = ["--model", tiny_folder, "--calibration_dataset", text_file, "--dataset", text_file]
    asked += ["--grad_nsamples", 2, "--grad_seqlen", 16, "--output_dir", "run"]
    assert refused(tmp_path, f"{state.name} is there", *asked, script=alp_prune, monkeypatch=monkeypatch)


@pytest.mark.draws
@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_a_picture_beside_a_gradient_file_is_replaced_only_if_it_is_a_plot_of_ours(
    tiny_folder, text_file, tmp_path, monkeypatch, refused, flag
):
    flags = ["--model", tiny_folder, "--dataset", text_file, "--ngrad", 2, "--grad_seqlen", 16]
    flags += ["--output", tmp_path / "X.json"]
    (tmp_path / "X.png").write_text("mine")
    assert refused(tmp_path, "X.png is no plot of ours", *flags, flag, script=save_gradient, monkeypatch=monkeypatch)
    (tmp_path / "X.png").unlink()
    for more in ([], ["--overwrite"]):
        assert run(*flags, *more, script=save_gradient, monkeypatch=monkeypatch) == 0


def test_default_folders_of_one_second_are_two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output_folder.time, "strftime", lambda pattern: "now")
    with output_folder.chosen(None, "x") as one, output_folder.chosen(None, "x") as two:
        assert one != two and one.is_dir() and two.is_dir()
        (one / "a").touch()
    assert [path.name for path in Path("runs").iterdir()] == [one.name]


def test_a_folder_that_was_chosen_and_not_used_is_gone(tmp_path, monkeypatch, tiny_folder, text_file):
    monkeypatch.chdir(tmp_path)
    flags = ["--model_name", tiny_folder, "--dataset", text_file, "--eval_datasets", text_file, "--seqlen", 10**6]
    assert run(*flags, monkeypatch=monkeypatch) == 2 and not any(tmp_path.iterdir())
    Path("runs").mkdir()
    assert run(*flags, monkeypatch=monkeypatch) == 2 and Path("runs").is_dir()


# Models ---------------------------------------------------------------------------------------------------------------


def test_what_is_no_saved_model_alone_is_not_replaced(arguments, tiny_folder, tmp_path, monkeypatch, refused):
    project = tmp_path / "project"
    (project / ".git").mkdir(parents=True)
    (project / ".git/HEAD").write_text("mine")
    shutil.copy(tiny_folder / "config.json", project)
    command = [*arguments, "--save_model", project, "--overwrite"]
    assert refused(tmp_path, "holds .git/HEAD beside a model", *command, script=ppllms, monkeypatch=monkeypatch)


def test_a_folder_that_holds_what_the_run_uses_is_not_replaced(
    arguments, alp_arguments, tiny_folder, text_file, tmp_path, monkeypatch, refused
):
    models = tmp_path / "models"
    shutil.copytree(tiny_folder, models / "one")
    shutil.copy(text_file, models / "words.txt")
    shutil.copytree(tiny_folder, models, dirs_exist_ok=True)
    for name in ("plan.json", "gradients.json"):
        (models / name).write_text("{}")
    monkeypatch.chdir(models)
    save = ["--save_model", models, "--overwrite"]
    elsewhere = [*arguments, *save]
    for more in (["--model_name", models / "one"], ["--eval_datasets", models / "words.txt"], []):  # or just from here
        assert refused(tmp_path, "would replace", *elsewhere, *more, script=ppllms, monkeypatch=monkeypatch)
    monkeypatch.chdir(tmp_path)
    elsewhere = [*alp_arguments, *save, "--prune_method", "wanda_alp"]
    for more in (
        ["--gradients", models / "gradients.json"],
        ["--save", models / "log"],
        ["--output_dir", models / "o"],
    ):
        assert refused(tmp_path, "would replace", *elsewhere, *more, script=alp_prune, monkeypatch=monkeypatch)


@pytest.mark.parametrize("name", ["ppllms", "wanda_alp"])
def test_a_model_that_somebody_puts_there_after_a_kill_is_not_replaced(command, name, tmp_path, capsys):
    asked = command(name)
    _, whole = asked.run(tmp_path / "whole")
    saving = len(whole.steps) - 1 - whole.steps[::-1].index("put")
    for at, is_after in ((saving, False), (saving, True), (len(whole.steps) - 1, True)):
        folder = tmp_path / f"{at}-{is_after}"
        assert asked.run(folder, at=at, is_after=is_after)[0] == INTERRUPTED
        is_saved = (folder / "out").exists()
        theirs = folder / "out/config.json"
        theirs.parent.mkdir(exist_ok=True)
        theirs.write_text('{"of": "somebody else"}')
        if not (folder / "run/state").exists():
            continue
        assert asked.run(folder, "--resume")[0] == 2, (at, is_after, is_saved)
        assert "add --overwrite" in capsys.readouterr().err
        assert theirs.read_text() == '{"of": "somebody else"}'
        assert asked.run(folder, "--resume", "--overwrite")[0] == 0
        assert asked.found(folder) == asked.found(tmp_path / "whole")


# An old result until the new one --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["random", "wanda_alp", "save_gradient"])
def test_wherever_a_run_that_replaces_another_is_stopped_there_is_a_whole_result(command, name, tmp_path):
    asked, seed = command(name), ["--seed", 1]
    asked.run(tmp_path / "old")
    _, whole = asked.run(tmp_path / "new", *seed)
    either = [asked.found(tmp_path / "old"), asked.found(tmp_path / "new")]
    for at in range(0, len(whole.steps), 1 if len(whole.steps) < 12 else 4):
        for is_after in (False, True):
            folder = tmp_path / f"{at}{is_after}"
            shutil.copytree(tmp_path / "old", folder)
            status, stopped = asked.run(folder, *seed, "--overwrite", at=at, is_after=is_after)
            result, model = asked.found(folder)
            assert status == (INTERRUPTED if at < len(stopped.steps) else 0)  # gradients may be there already
            assert result in [found[0] for found in either]
            assert model in [found[1] for found in either]
            assert asked.run(folder, *seed, "--overwrite", "--resume")[0] == 0
            assert asked.found(folder) == either[1]


def test_measured_work_is_gone_on_with_and_not_thrown_away(depth, tmp_path, capsys):
    asked = depth(*COUNTS)
    _, whole = asked.run(tmp_path / "whole")
    folder = tmp_path / "run"
    asked.run(folder)
    assert asked.run(folder, "--seed", 1, "--overwrite", at=whole.steps.index("save_pruned"))[0] == INTERRUPTED
    capsys.readouterr()
    assert asked.run(folder, "--seed", 1)[0] == 2 and "add --resume to go on" in capsys.readouterr().err
    status, tried = asked.run(folder, "--seed", 1, "--resume")
    assert status == 2 and not tried.steps and "add --overwrite" in capsys.readouterr().err  # before the work
    assert asked.run(folder, "--seed", 1, "--resume", "--overwrite")[0] == 0


def test_a_grid_that_fails_leaves_the_tables_of_the_one_before(depth, text_file, tmp_path):
    asked = depth("--method", "random", "--prune_rate", 0.08, 0.1)
    asked.flags = [flag for flag in asked.flags if flag not in ("--save_model", "out")]
    assert asked.run(tmp_path)[0] == 0
    before = files_of(tmp_path / "run")
    (tmp_path / "short.txt").write_text("short")
    assert asked.run(tmp_path, "--eval_datasets", tmp_path / "short.txt", "--overwrite")[0] == 2
    left = files_of(tmp_path / "run")
    assert left.pop("log.txt").startswith(before.pop("log.txt")) and left == before


def test_a_table_in_the_folder_of_an_unfinished_run_is_refused(depth, tmp_path, capsys):
    asked = depth(*COUNTS)
    asked.run(tmp_path, at=3)
    before = files_of(tmp_path)
    asked.flags = [flag for flag in asked.flags if flag not in ("--save_model", "out")]
    assert asked.run(tmp_path, "--seed", 0, 1)[0] == 2
    assert "holds a single run" in capsys.readouterr().err and files_of(tmp_path) == before


# Several processes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch):
    def set_to(**values) -> None:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_to


def test_only_the_number_of_processes_says_that_there_are_several(environment):
    environment()
    assert launched() == Launch(0, 1)
    environment(RANK="3", LOCAL_RANK="3")
    assert launched() == Launch(0, 1) and launched().is_first
    environment(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="29500")
    assert launched() == Launch(1, 2, 1) and launched().are_several and not launched().is_first


@pytest.mark.parametrize(
    "values, words",
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc: is no number from 1"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1: is no number from 1"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "not below"),
    ],
)
def test_an_environment_that_no_launcher_sets_is_told(arguments, environment, monkeypatch, capsys, values, words):
    environment(**values)
    assert run(*arguments, monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1


def test_a_rank_without_a_number_of_processes_skips_no_check(arguments, environment, tmp_path, monkeypatch, refused):
    environment(RANK="1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.txt").write_text("mine")
    command = [*arguments, "--overwrite"]
    assert refused(tmp_path, "holds log.txt", *command, script=ppllms, monkeypatch=monkeypatch)


# What only shows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding, to", [("ascii", "| cat"), ("utf-8", ">&-"), ("utf-8", "| true")])
def test_a_terminal_that_lacks_characters_or_is_closed_ends_no_run(tiny_folder, text_file, tmp_path, encoding, to):
    text = ["--dataset", text_file, "--eval_datasets", text_file, "--eval_windows", 3, "--nsamples", 3]
    command = [
        sys.executable,
        ROOT / "ppllms.py",
        "--model_name",
        tiny_folder,
        *text,
        *COUNTS,
        "--output_dir",
        tmp_path / "run",
    ]
    shell = f"set -o pipefail; {' '.join(map(str, command))} {to}"
    done = subprocess.run(
        ["bash", "-c", shell], env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert json.loads((tmp_path / "run/result.json").read_text())["perplexity"]
    log = (tmp_path / "run/log.txt").read_text()
    assert "±" in log and "MHA removal layers" in log and "±" not in done.stdout
