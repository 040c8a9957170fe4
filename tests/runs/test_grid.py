"""Grids: every cell is what a run of its own gives, models are loaded once, and what is finished stays finished."""

import gc
import json
import shutil
import sys
import time
import weakref
from pathlib import Path

import pytest

import alp_prune
import lib.depth.prepare
import lib.depth.searches
import lib.runs.texts
import lib.sensitivity.compute
import lib.sparsity.prepare
import lib.sparsity.run
import ppllms
from lib.config.sources import ModelSource
from lib.errors import InputError, RunError
from lib.files import canonical
from lib.models.loading import load_model
from lib.reporting.plots import has_matplotlib
from lib.sparsity.run import SparsityRun
from lib.storage.output_folder import RESULTS as FILE
from lib.storage.results_jsonl import ResultsFile
from tests.command import DIFFERS, Started, run, run_alp

TABLES = ("table.md", "table.csv")


@pytest.fixture
def alp_grid(alp_arguments, tmp_path, monkeypatch):
    """Runs a grid of alp_prune.py; gives the lines of its results."""
    at = alp_arguments.index("--output_dir")

    def grid(*flags, status=0, folder=tmp_path / "grid") -> list[dict]:
        command = [*alp_arguments[:at], *alp_arguments[at + 2 :], "--output_dir", folder, *flags]
        assert run_alp(*command, monkeypatch=monkeypatch) == status
        return lines_of(folder)

    return grid


@pytest.fixture
def depth_grid(arguments, tmp_path, monkeypatch):
    """Runs a grid of ppllms.py; gives the lines of its results."""
    at = arguments.index("--mha_remove_layers")

    def grid(*flags, status=0, folder=tmp_path / "grid") -> list[dict]:
        command = [*arguments[:at], "--output_dir", folder, *flags]
        assert run(*command, monkeypatch=monkeypatch) == status
        return lines_of(folder)

    return grid


def lines_of(folder) -> list[dict]:
    path = folder / FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tables_of(folder) -> list[bytes]:
    return [(folder / name).read_bytes() for name in TABLES]


def counted(monkeypatch, module, name) -> list:
    """The calls of a function of a module, from now on."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(args) or function(*args, **kwargs))
    return calls


# Cells ----------------------------------------------------------------------------------------------------------------


def test_a_cell_of_weights_is_a_run_of_its_own(alp_grid, alp_arguments, tmp_path, monkeypatch):
    axes = ["--prune_method", "dense", "wanda_alp", "sparsegpt", "magnitude_owl", "--sparsity_ratio", 0.4, 0.6]
    lines = alp_grid(*axes, "--sparsity_type", "unstructured", "2:4", "--seed", 0, 1)
    cells = [line["result"] for line in lines]
    # dense once; of 2:4, where owl is not used and magnitude looks at no text, one cell for both seeds
    assert len(cells) == 1 + 2 * (2 * 3) + (2 + 2 + 1)
    for method, ratio, pattern, seed in (("wanda_alp", 0.6, "unstructured", 1), ("sparsegpt", 0.5, "2:4", 0)):
        command = [*alp_arguments, "--overwrite", "--prune_method", method, "--sparsity_ratio", ratio]
        assert run_alp(*command, "--sparsity_type", pattern, "--seed", seed, monkeypatch=monkeypatch) == 0
        alone = json.loads((tmp_path / "run/result.json").read_text())
        asked = {"prune_method": method, "sparsity_ratio": ratio, "sparsity_type": pattern, "seed": seed}
        (cell,) = [one for one in cells if asked.items() <= one.items()]
        for name in alone.keys() - {
            "samples",
            "seconds",
            "tokens_per_second",
            "prune_seconds",
            "peak_memory_bytes",
            "environment",
        }:
            assert cell[name] == alone[name], name


def test_a_cell_of_depth_is_a_run_of_its_own(depth_grid, tiny_folder, text_file, tmp_path, monkeypatch):
    methods = ["ppllms", "shortgpt", "sleb", "blockpruner", "random", "beam"]
    lines = depth_grid("--method", *methods, "--prune_rate", 0.08, 0.1, "--seed", 0, 1)
    assert len(lines) == 6 * 2 * 2
    for method in methods:
        text = [] if method == "random" else ["--dataset", text_file, "--nsamples", 3]
        command = ["--model_name", tiny_folder, *text, "--eval_datasets", text_file, "--method", method]
        command += ["--prune_rate", 0.1, "--seed", 1, "--output_dir", tmp_path / "run", "--overwrite"]
        assert run(*command, monkeypatch=monkeypatch) == 0
        alone = json.loads((tmp_path / "run/result.json").read_text())
        (cell,) = [
            one
            for one in (line["result"] for line in lines)
            if (one["method"], one["seed"], one["parameters"]["target_rate"]) == (method, 1, 0.1)
        ]
        for name in alone.keys() - {"samples"} - DIFFERS:
            assert cell[name] == alone[name], (method, name)


def test_a_model_is_loaded_and_its_text_tokenized_once(alp_grid, depth_grid, tmp_path, monkeypatch):
    names = ("load_model", "sampled_windows", "evaluation_windows")
    loaded, drawn, evaluated = (counted(monkeypatch, lib.sparsity.prepare, name) for name in names)
    measured = counted(monkeypatch, lib.runs.texts, "evaluation_of")
    taken = counted(monkeypatch, lib.sensitivity.compute, "connection_sensitivity")
    axes = ["--prune_method", "wanda_alp", "ria_alp", "--sparsity_ratio", 0.4, 0.6, "--seed", 0, 1]
    assert len(alp_grid(*axes)) == 8
    assert (len(loaded), len(drawn), len(evaluated), len(taken)) == (1, 2, 1, 1)  # gradients have a seed of their own
    assert len(measured) == 1 + 8  # dense once
    loaded, drawn = (
        counted(monkeypatch, lib.depth.prepare, "load_model"),
        counted(monkeypatch, lib.depth.prepare, "calibration_windows"),
    )
    influence = counted(monkeypatch, lib.depth.searches, "block_influence")
    measured = counted(monkeypatch, lib.runs.texts, "evaluation_of")
    depth_grid("--method", "ppllms", "shortgpt", "sleb", "--prune_rate", 0.08, 0.1, folder=tmp_path / "depth")
    assert (len(loaded), len(drawn), len(influence), len(measured)) == (1, 1, 1, 1 + 6)


# Going on -------------------------------------------------------------------------------------------------------------


def test_what_is_finished_is_not_done_again(alp_grid, tmp_path, monkeypatch, capsys):
    axes = ["--prune_method", "wanda", "magnitude", "--sparsity_ratio", 0.4, 0.6]
    first = alp_grid(*axes)
    tables = tables_of(tmp_path / "grid")
    monkeypatch.setattr(lib.sparsity.prepare, "load_model", None)
    assert alp_grid(*axes) == first and tables_of(tmp_path / "grid") == tables
    assert "4 cells, 4 of them done before" in capsys.readouterr().out
    fewer = alp_grid("--prune_method", "wanda", "--sparsity_ratio", 0.6, 0.4)
    assert fewer == first and "magnitude" not in (tmp_path / "grid/table.md").read_text()
    monkeypatch.undo()


def test_what_a_cell_depends_on_makes_another_cell(alp_grid, text_file, tmp_path):
    text = shutil.copy(text_file, tmp_path / "own.txt")
    axes = ["--prune_method", "wanda", "magnitude", "--calibration_dataset", text]
    assert len(alp_grid(*axes)) == 2
    assert len(alp_grid(*axes, "--nsamples", 3)) == 3  # magnitude looks at no text
    assert len(alp_grid(*axes, "--a", 0.7, "--alpha", 0.3)) == 3  # of RIA, and of allocators
    assert len(alp_grid(*axes, "--eval_stride", 64)) == 5
    (tmp_path / "own.txt").write_text(text_file.read_text() + "More.")
    assert len(alp_grid(*axes)) == 6
    assert len(alp_grid(*axes, "--overwrite")) == 2


def test_the_ratio_of_ppllms_is_part_of_a_beam(depth_grid):
    axes = ["--method", "beam", "random", "--prune_rate", 0.1]
    assert len(depth_grid(*axes)) == 2
    assert len(depth_grid(*axes, "--mha_ffn_ratio", 1)) == 3


def test_a_preset_may_be_changed_to_a_pattern(tmp_path, monkeypatch, text_file):
    monkeypatch.chdir(tmp_path)
    small = ["--nsamples", 2, "--seqlen", 64, "--dataset", text_file, "--prune_method", "magnitude"]
    command = ["--preset", "demo", *small, "--sparsity_type", "2:4", "--output_dir", "out"]
    assert run_alp(*command, monkeypatch=monkeypatch) == 0
    assert "|  | 2:4 |" in (tmp_path / "out/table.md").read_text()


@pytest.mark.parametrize("script", [alp_prune, pytest.param(ppllms, marks=pytest.mark.slow)])
def test_a_killed_grid_goes_on_to_the_same_tables(script, tiny_folder, text_file, tmp_path, monkeypatch):
    if script is ppllms:
        axes = ["--method", "blockpruner", "sleb", "beam", "--prune_rate", "0.1", "0.15"]
        text = ["--model_name", tiny_folder, "--dataset", text_file, "--eval_datasets", text_file]
    else:
        axes = ["--prune_method", "wanda_alp", "sparsegpt", "--sparsity_ratio", "0.3", "0.5", "0.7"]
        text = ["--model", tiny_folder, "--calibration_dataset", text_file, "--dataset", text_file]
    flags = [*text, *axes, "--nsamples", "4", "--output_dir", "out"]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    assert run(*flags, script=script, monkeypatch=monkeypatch) == 0
    monkeypatch.chdir(tmp_path / "killed")
    killed, results = tmp_path / "killed/out", tmp_path / "killed/out" / FILE
    for lines in (1, 3):
        process = Started(Path(script.__file__).name, *flags)
        while process.returncode is None and len(lines_of(killed)) < lines:
            time.sleep(0.01)
        process.kill()
        process.communicate()
    assert 3 <= len(lines_of(killed)) < 6
    with results.open("a") as file:
        file.write('{"key": {"cut off')  # as power may leave it
    assert run(*flags, script=script, monkeypatch=monkeypatch) == 0
    assert tables_of(killed) == tables_of(tmp_path / "whole/out")
    assert len(lines_of(killed)) == 6


def test_a_stopped_grid_says_what_is_kept(alp_grid, tmp_path, monkeypatch, capsys):
    prune, seen = SparsityRun.prune_stage, []

    def stopped(*args):
        seen.append(args)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return prune(*args)

    monkeypatch.setattr(SparsityRun, "prune_stage", stopped)
    alp_grid("--prune_method", "wanda", "--sparsity_ratio", 0.3, 0.5, 0.7, status=130)
    assert "stopped; 1 of 3 cells are kept, and the same command goes on" in capsys.readouterr().err
    assert "30%" in (tmp_path / "grid/table.md").read_text()


def test_a_cell_that_fails_does_not_stop_the_others(alp_grid, tmp_path, monkeypatch, capsys):
    prune = SparsityRun.prune_stage

    def failing(run, *args):
        if run.settings.sparsity_ratio == 0.5:
            raise RunError("NaN in layer 2")
        return prune(run, *args)

    monkeypatch.setattr(SparsityRun, "prune_stage", failing)
    axes = ["--prune_method", "wanda", "--sparsity_ratio", 0.3, 0.5, 0.7]
    assert len(alp_grid(*axes, status=1)) == 2
    told = capsys.readouterr()
    assert "failed: 2/3 wanda 0.5 unstructured seed 0: NaN in layer 2" in told.out
    assert "1 of 3 cells failed (NaN in layer 2); the same command tries them again" in told.err
    monkeypatch.setattr(SparsityRun, "prune_stage", prune)
    assert len(alp_grid(*axes)) == 3
    whole = alp_grid(*axes, folder=tmp_path / "whole")
    assert len(whole) == 3 and tables_of(tmp_path / "grid") == tables_of(tmp_path / "whole")


def test_without_a_folder_the_same_command_goes_on(alp_arguments, tmp_path, monkeypatch):
    at = alp_arguments.index("--output_dir")
    command = [*alp_arguments[:at], *alp_arguments[at + 2 :], "--prune_method", "wanda", "--sparsity_ratio", 0.3, 0.5]
    for _ in range(2):
        assert run_alp(*command, monkeypatch=monkeypatch) == 0
    (folder,) = (tmp_path / "here/runs").iterdir()
    assert folder.name.startswith("alp_prune-grid-") and len(lines_of(folder)) == 2
    assert run_alp(*command, "--nsamples", 3, monkeypatch=monkeypatch) == 0
    assert len(list((tmp_path / "here/runs").iterdir())) == 2


def test_several_models_stand_side_by_side(alp_grid, tiny_folder, tmp_path):
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    lines = alp_grid("--model", tiny_folder, other, "--prune_method", "dense", "wanda")
    assert len(lines) == 4
    assert "|  | tiny-llama | other |" in (tmp_path / "grid/table.md").read_text()


def test_models_and_texts_of_the_same_name_are_told_apart(alp_grid, tiny_folder, text_file, tmp_path):
    other = shutil.copytree(tiny_folder, tmp_path / "more" / tiny_folder.name)
    same = shutil.copy(text_file, tmp_path / "more")
    alp_grid("--model", tiny_folder, other, "--dataset", text_file, same, "--prune_method", "magnitude")
    table = (tmp_path / "grid/table.md").read_text()
    assert f"| {tiny_folder} | {other} |" in table
    assert f"## Perplexity on {text_file}, 70%" in table and f"## Perplexity on {same}, 70%" in table
    assert not has_matplotlib() or len(list((tmp_path / "grid").glob("*.png"))) == 4


def test_a_model_may_have_results_in_its_folder(alp_grid, tiny_folder, tmp_path):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    axes = ["--model", model, "--prune_method", "magnitude", "--sparsity_ratio", 0.3, 0.5]
    assert len(alp_grid(*axes, folder=model / "runs/grid")) == len(alp_grid(*axes, folder=model / "runs/grid")) == 2
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    assert len(alp_grid(*axes, folder=model / "runs/grid")) == 4


def test_models_of_the_same_name_have_gradients_of_their_own(alp_grid, tiny_folder, tmp_path):
    other = shutil.copytree(tiny_folder, tmp_path / "more" / tiny_folder.name)
    model = load_model(ModelSource(str(tiny_folder)))
    model.model.layers[0].mlp.up_proj.weight.mul_(2)
    model.save_pretrained(other)
    assert len(alp_grid("--model", tiny_folder, other, "--prune_method", "magnitude_alp")) == 2


def test_the_same_model_written_otherwise_is_the_same_table(alp_grid, tiny_folder, text_file, tmp_path):
    axes = ["--prune_method", "magnitude", "--sparsity_ratio", 0.3, 0.5]
    alp_grid(*axes)
    model, text = (f"{path.parent}/./{path.name}" for path in (tiny_folder, text_file))
    assert len(alp_grid(*axes, 0.6, "--model", model, "--dataset", text)) == 3
    rows = [line for line in (tmp_path / "grid/table.md").read_text().splitlines() if line.startswith("| magnitude")]
    assert len(rows) == 3 and "-" not in rows[0]  # of perplexity, KL divergence and top-1 agreement


def test_overwriting_takes_the_place_of_what_is_there_with_the_first_cell(alp_grid, tmp_path, monkeypatch, capsys):
    axes = ["--prune_method", "magnitude", "--sparsity_ratio", 0.3, 0.5]
    first = alp_grid(*axes)
    prune = SparsityRun.prune_stage
    monkeypatch.setattr(SparsityRun, "prune_stage", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert alp_grid(*axes, "--overwrite", status=130) == first
    assert "0 of 2 cells are kept, and the same command without --overwrite goes on" in capsys.readouterr().err
    monkeypatch.setattr(SparsityRun, "prune_stage", prune)
    again = alp_grid(*axes, "--overwrite")
    assert len(again) == 2 and again != first and [c["key"] for c in again] == [c["key"] for c in first]


def test_a_failed_cell_keeps_nothing_of_its_model(alp_grid, tiny_folder, tmp_path, monkeypatch):
    other, alive = shutil.copytree(tiny_folder, tmp_path / "other"), []
    load = lib.sparsity.prepare.load_model

    def watched(source):
        gc.collect()
        alive.append([model() is not None for model in models])
        model = load(source)
        models.append(weakref.ref(model))
        return model

    def failing(run, *args):
        try:
            raise ValueError(run.decoder.model)
        except ValueError as error:
            raise RunError("NaN") from error

    models: list = []
    monkeypatch.setattr(lib.sparsity.prepare, "load_model", watched)
    monkeypatch.setattr(SparsityRun, "prune_stage", failing)
    alp_grid("--model", tiny_folder, other, "--prune_method", "magnitude", "--sparsity_ratio", 0.3, 0.5, status=1)
    assert alive == [[], [False]]


def test_a_grid_of_counts(depth_grid, tmp_path):
    depth_grid("--mha_remove_layers", 1, "--ffn_remove_layers", 2, "--seed", 0, 1)
    assert "|  | 1 MHA, 2 FFN |" in (tmp_path / "grid/table.md").read_text()


def test_a_grid_of_quantized_models(alp_grid, tmp_path):
    cells = alp_grid("--prune_method", "dense", "wanda", "sparsegpt", "--sparsity_ratio", 0.5, "--wbits", 4)
    assert len(cells) == 3
    table = (tmp_path / "grid/table.md").read_text()
    for method, value in (("wanda", "pruned"), ("wanda quantized", "quantized"), ("sparsegpt", "pruned")):
        (result,) = [c["result"] for c in cells if c["result"]["prune_method"] == method.split()[0]]
        (found,) = result["perplexity"].values()
        assert f"| {method} | - | {found[value]:.2f}" in table
    assert "| dense quantized | " in table and "| dense |" not in table


@pytest.mark.draws
def test_tables_plots_and_log(alp_grid, text_file, tmp_path, capsys):
    lines = alp_grid("--prune_method", "wanda", "wanda_owl", "--sparsity_ratio", 0.4, 0.6, "--seed", 0, 1, "--save_log")
    folder, text = tmp_path / "grid", str(text_file)
    values = [
        line["result"]["perplexity"][text]["pruned"]
        for line in lines
        if (line["result"]["prune_method"], line["result"]["sparsity_ratio"]) == ("wanda_owl", 0.6)
    ]
    mean, spread = sum(values) / 2, abs(values[0] - values[1]) / 2**0.5
    table = (folder / "table.md").read_text()
    row, *distances = [line for line in table.splitlines() if line.startswith("| wanda_owl |")]
    assert len(distances) == 2 and row.split(" | ")[2].startswith(f"{mean:.2f} ± {spread:.2f}")
    rows = (folder / "table.csv").read_text().splitlines()
    assert len(rows) == 1 + 1 + 3 * 8 and rows[1].startswith(
        f"{lines[0]['result']['model']},dense,,0.000000,0,perplexity"
    )
    assert table in capsys.readouterr().out
    kept = (folder / "log.txt").read_text()
    assert kept.count("Importance and density by layer") == 4 and kept.count("Sparsity measured by layer") == 8
    assert len((tmp_path / "here/results/log.tsv").read_text().splitlines()) == 9
    if has_matplotlib():
        assert (folder / "perplexity-tiny-llama-words.txt.png").stat().st_size > 10_000


# Presets --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_preset_of_weights_in_a_small_form(tmp_path, monkeypatch, text_file):
    monkeypatch.chdir(tmp_path)
    small = ["--nsamples", 2, "--seqlen", 64, "--dataset", text_file, "--sparsity_ratio", 0.5, 0.6]
    assert run_alp("--preset", "demo", *small, "--output_dir", "out", monkeypatch=monkeypatch) == 0
    rows = [line for line in (tmp_path / "out/table.md").read_text().splitlines() if line.startswith("| ")]
    assert rows[0] == "|  | 50% | 60% |" and len(rows) == 3 * (1 + 16) and "| - |" not in "".join(rows)


@pytest.mark.draws
def test_the_demo_preset_of_depth_in_a_small_form(tmp_path, monkeypatch, text_file):
    monkeypatch.chdir(tmp_path)
    small = ["--nsamples", 2, "--seqlen", 64, "--eval_datasets", text_file, "--eval_windows", 3, "--prune_rate", 0.25]
    assert run("--preset", "demo", *small, "--output_dir", "out", monkeypatch=monkeypatch) == 0
    rows = [line for line in (tmp_path / "out/table.md").read_text().splitlines() if line.startswith("| ")]
    assert rows[0] == "|  | 25% |" and len(rows) == 3 * (1 + 12)


# Wrong input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--sparsity_ratio", 0.5, 0.6, "--save_model", "out"], "--save_model: saves one model"),
        (["--sparsity_ratio", 0.5, 1.6], "--sparsity_ratio: '1.6' is not a number"),
        (["--prune_method", "wanda", "wanda-alp"], "--prune_method wanda-alp: no such method; did you mean wanda_alp"),
        (
            ["--prune_method", "wanda", "ria", "--seed", 0, 1, "--gradients", "x.json"],
            "--gradients: wanda ria unstructured does not use",
        ),
        (["--model", "demo", "no/such/model/here"], "model no/such/model/here: no such folder"),
        (["--model", "demo", "demo2", "--model_name", "x"], "--model_name: is the name of one model"),
        (["--prune_method", "wanda", "ria", "--sparsity_type", "3:7"], "--sparsity_type 3:7"),
        (["--preset", "alp-table3"], "--preset: invalid choice: 'alp-table3'"),
        (["--sparsity_ratio", 0.5, 0.6, "--eval_stride", 4096], "--eval_stride 4096: is more than the"),
        (["--eval_stride", 0], "--eval_stride: '0' is not a whole number of at least 1"),
    ],
)
def test_a_bad_grid_of_weights_is_one_line(alp_grid, tmp_path, capsys, flags, problem):
    with pytest.raises(SystemExit) as ended:
        alp_grid(*flags, status=2)
        sys.exit(2)
    told = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and problem in told and "\n" not in told
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--prune_rate", 0.1, 0.2, "--eval_ppl", "no"], "--eval_ppl no: a table of runs is one of perplexities"),
        (["--prune_rate", 0.1, 0.99], "--prune_rate 0.99 cannot be reached"),
        (["--prune_rate", 0.1, 0.2, "--mha_remove_layers", 1, "--ffn_remove_layers", 2], "--prune_rate: with both"),
        (["--method", "sleb", "beam", "--save_model", "out"], "--save_model: saves one model"),
        (["--method", "sleb", "shortened"], "--method: invalid choice: 'shortened'"),
    ],
)
def test_a_bad_grid_of_depth_is_one_line(depth_grid, tmp_path, capsys, flags, problem):
    with pytest.raises(SystemExit) as ended:
        depth_grid(*flags, status=2)
        sys.exit(2)
    told = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and problem in told and "\n" not in told
    assert not (tmp_path / "grid").exists()


def test_an_output_folder_among_text_is_refused(alp_grid, text_file, tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    shutil.copy(text_file, text)
    alp_grid("--dataset", text, "--sparsity_ratio", 0.3, 0.5, status=2, folder=text / "runs")
    assert f"--output_dir {text / 'runs'}: lies in the folder of text {text}" in capsys.readouterr().err
    alp_grid("--dataset", text, "--save_model", text / "out", status=2)
    assert f"--save_model {text / 'out'}: lies in the folder of text {text}" in capsys.readouterr().err


def test_folders_of_runs_and_of_grids_are_not_mixed(alp_grid, alp_arguments, tmp_path, monkeypatch, capsys):
    assert run_alp(*alp_arguments, "--prune_method", "magnitude", monkeypatch=monkeypatch) == 0
    alp_grid("--sparsity_ratio", 0.5, 0.6, status=2, folder=tmp_path / "run")
    assert "holds a single run" in capsys.readouterr().err
    alp_grid("--prune_method", "magnitude", "--sparsity_ratio", 0.5, 0.6)
    command = [*alp_arguments[: alp_arguments.index("--output_dir")], "--output_dir", tmp_path / "grid", "--overwrite"]
    assert run_alp(*command, monkeypatch=monkeypatch) == 2
    assert "holds a grid of results" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["no json\n", "[1]\n", '{"key": {}}\n', '{"result": {}}\n', "\n"])
def test_results_of_something_else_are_refused(tmp_path, line):
    (tmp_path / FILE).write_text(line)
    with pytest.raises(InputError, match="line 1 is not of a grid's results"):
        ResultsFile(tmp_path)


def test_a_line_that_has_no_figures_is_refused_though_its_digest_is_right(alp_grid, tmp_path, capsys):
    axes = ["--prune_method", "magnitude", "--sparsity_ratio", 0.4, 0.6]
    (line, _) = alp_grid(*axes)
    path = tmp_path / "grid" / FILE
    path.unlink()
    ResultsFile(tmp_path / "grid").add(canonical(line["key"]), {})
    alp_grid(*axes, status=2)
    assert "no result of a run" in capsys.readouterr().err


def test_a_grid_of_two_runs_at_once_keeps_all_lines(tmp_path):
    keys = [canonical({"cell": number, "a": 0.1}) for number in range(3)]
    one, two = ResultsFile(tmp_path), ResultsFile(tmp_path)
    one.add(keys[0], {"x": 1.5})
    two.add(keys[1], {"x": None})
    found = ResultsFile(tmp_path)
    assert [found.find(key) for key in keys] == [{"x": 1.5}, {"x": None}, None]
    assert canonical({"a": 0.1, "cell": 0}) == keys[0]
