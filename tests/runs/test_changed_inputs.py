"""A run whose model or text is changed while it works has no result, and nothing of it is gone on with."""

import json
import shutil
from pathlib import Path

import pytest

import lib.depth.run
import lib.depth.searches
import lib.runs.grid
import lib.sensitivity.compute
import lib.sparsity.run
from lib.config import keys
from tests.command import run, run_alp, run_gradient
from tests.runs.interruption import litter_of


@pytest.fixture
def text(text_file, tmp_path) -> Path:
    return Path(shutil.copy(text_file, tmp_path / "own.txt"))


@pytest.fixture
def edit_at(text, monkeypatch):
    """Edits the text when a function is called for the n-th time."""

    def at(owner, name: str, number: int = 1) -> None:
        function, calls = getattr(owner, name), []

        def edited(*args, **options):
            calls.append(name)
            if len(calls) == number:
                text.write_text(text.read_text().replace("layer", "block"))
            return function(*args, **options)

        monkeypatch.setattr(owner, name, edited)

    return at


def told(capsys, path: Path) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{path}: was changed while the run worked" in error
    return error


def test_a_text_that_is_edited_during_a_search_gives_no_result(arguments, text, edit_at, tmp_path, monkeypatch, capsys):
    command = [*arguments, "--dataset", text]
    edit_at(lib.depth.searches, "block_influence")
    assert run(*command, monkeypatch=monkeypatch) == 1
    error = told(capsys, text)
    assert error.endswith("nothing is finished yet, and the same command starts again\n")
    assert not (tmp_path / "run/result.json").exists() and not litter_of(tmp_path)
    assert run(*command, "--resume", monkeypatch=monkeypatch) == 0
    assert "Finished before" not in capsys.readouterr().out


def test_a_text_that_is_edited_during_pruning_gives_no_result(
    alp_arguments, text, edit_at, tmp_path, monkeypatch, capsys
):
    command = [*alp_arguments, "--prune_method", "wanda", "--dataset", text, "--save_model", tmp_path / "out"]
    edit_at(lib.sparsity.run, "prune_layers")
    assert run_alp(*command, monkeypatch=monkeypatch) == 1
    assert "the same command starts again" in told(capsys, text)
    assert not (tmp_path / "run/result.json").exists() and not (tmp_path / "out").exists()
    assert run_alp(*command, "--resume", monkeypatch=monkeypatch) == 0
    assert "Finished before" not in capsys.readouterr().out
    assert run_alp(*command, "--resume", monkeypatch=monkeypatch) == 0
    assert "Finished before" in capsys.readouterr().out


def test_a_model_that_is_edited_while_it_is_saved_is_not_saved(arguments, text, edit_at, tmp_path, monkeypatch, capsys):
    edit_at(lib.depth.run, "save_pruned")
    command = [*arguments, "--eval_datasets", text, "--save_model", tmp_path / "out"]
    assert run(*command, monkeypatch=monkeypatch) == 1
    told(capsys, text)
    assert not (tmp_path / "out").exists() and "saved_model" not in (tmp_path / "run/result.json").read_text()


def test_gradients_of_a_text_that_is_edited_meanwhile_are_not_kept(
    tiny_folder, text, edit_at, tmp_path, monkeypatch, capsys
):
    flags = ["--model", tiny_folder, "--dataset", text, "--grad_seqlen", 16, "--output", tmp_path / "g.json"]
    edit_at(lib.sensitivity.compute, "connection_sensitivity")
    assert run_gradient(*flags, monkeypatch=monkeypatch) == 1
    told(capsys, text)
    assert not list(tmp_path.glob("g.*"))
    assert run_gradient(*flags, monkeypatch=monkeypatch) == 0


def test_a_cell_whose_text_is_edited_is_run_again(alp_arguments, text, edit_at, tmp_path, monkeypatch, capsys):
    command = [*alp_arguments, "--prune_method", "magnitude", "--sparsity_ratio", 0.3, 0.5, "--dataset", text]
    edit_at(lib.sparsity.run, "prune_layers", 2)
    assert run_alp(*command, monkeypatch=monkeypatch) == 1
    error = told(capsys, text)
    assert "1 of 2 cells failed" in error and error.endswith("the same command tries them again\n")
    results = tmp_path / "run/results.jsonl"
    assert len(results.read_text().splitlines()) == 1
    assert run_alp(*command, monkeypatch=monkeypatch) == 0
    assert len(results.read_text().splitlines()) == 3  # the first cell is of the text as it was


# Code and formats -----------------------------------------------------------------------------------------------------


def test_cells_of_other_code_are_run_again_and_their_lines_stay(alp_arguments, tmp_path, monkeypatch, capsys):
    command = [*alp_arguments, "--prune_method", "magnitude", "dense", "--sparsity_ratio", 0.5]
    assert run_alp(*command, monkeypatch=monkeypatch) == 0
    assert "of other code" not in capsys.readouterr().out
    before = (tmp_path / "run/results.jsonl").read_text()
    monkeypatch.setattr(keys, "code_digest", lambda: "corrected")
    assert run_alp(*command, "--nsamples", 5, monkeypatch=monkeypatch) == 0
    assert "2 finished cells there are of other code, and are run again\n" in capsys.readouterr().out
    after = (tmp_path / "run/results.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == 4
    assert run_alp(*command, monkeypatch=monkeypatch) == 0
    assert "2 cells, 2 of them done before" in capsys.readouterr().out


def test_a_finished_run_that_saved_another_format_or_whose_model_is_gone_is_refused(
    arguments, tmp_path, monkeypatch, capsys
):
    saved = [*arguments, "--save_model", tmp_path / "out"]
    assert run(*saved, monkeypatch=monkeypatch) == 0
    assert json.loads((tmp_path / "run/result.json").read_text())["save_format"] == "hf"
    assert run(*saved, "--resume", monkeypatch=monkeypatch) == 0
    for flags, words in (
        ([*saved, "--save_format", "masked"], "--save_format masked: the run is finished and saved hf"),
        (
            [*arguments, "--save_model", tmp_path / "other"],
            "other: the run is finished, and its model is not there as it was saved",
        ),
    ):
        capsys.readouterr()
        assert run(*flags, "--resume", monkeypatch=monkeypatch) == 2
        error = capsys.readouterr().err
        assert words in error and error.endswith("begin anew: --overwrite\n") and error.count("\n") == 1
    shutil.rmtree(tmp_path / "out")
    assert run(*saved, "--resume", monkeypatch=monkeypatch) == 2
    assert "there is no model of it" in capsys.readouterr().err
    assert run(*saved, "--save_format", "masked", "--overwrite", monkeypatch=monkeypatch) == 0
