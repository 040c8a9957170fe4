"""Nothing that only shows ends a run: what keeps a plot from being drawn is said in a line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib.reporting import plots
from lib.reporting.plots import Point
from lib.runs import grid
from tests.command import ROOT, run

DRAWN = {
    "removals": lambda path: plots.plot_removals(path, [0.1, 0.2, 0.05], [2], [1, 2], "a $title"),
    "sensitivity": lambda path: plots.plot_sensitivity(path, [0.1, 0.2], "a ± title \u4e00"),
    "sparsity": lambda path: plots.plot_sparsity(path, [0.4, 0.6], [0.1, 0.2], 0.5, "title"),
    "grid": lambda path: plots.plot_grid(path, {"wanda_alp": [Point(0.5, 20.0, 1.0)]}, 10.0, "sparsity", "title"),
    "speeds": lambda path: plots.plot_grid(
        path,
        {"ppllms": [Point(0.1, 20.0, 1.0, 1.1), Point(0.3, 30.0, 2.0, 1.4)], "sleb": [Point(0.2, 21.0, None, 0.9)]},
        10.0,
        "x",
        "title",
        2**24,
    ),
    "dots": lambda path: plots.plot_grid(path, {"ppllms": [Point(0.5, 20.0, 1.0, 1.2)]}, 10.0, "x", "title", 2**24),
    "lines": lambda path: plots.plot_grid(
        path, {"wanda": [Point(0.5, 20.0), Point(0.6, 30.0, 2.0)], "wanda_alp": [Point(0.5, 19.0)]}, 10.0, "x", "title"
    ),
}
IN_ANOTHER = """
import sys
from pathlib import Path
from lib.reporting import plots
print(plots.plot_sensitivity(Path(sys.argv[1]), [0.1, 0.2], "title"))
"""


@pytest.mark.draws
@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_a_plot_is_an_image_and_leaves_nothing_beside_it(draw, tmp_path):
    pytest.importorskip("matplotlib")
    assert draw(tmp_path / "plot.png") is None
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


@pytest.mark.draws
@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plots.plot_removals(path, [0.1, float("nan")], [], [], "title"),
        lambda path: plots.plot_removals(path, [0.0, -1.0], [0], [0], "title"),
        lambda path: plots.plot_sensitivity(path, [], "title"),
        lambda path: plots.plot_sensitivity(path, [float("nan"), float("inf")], "title"),
        lambda path: plots.plot_sparsity(path, ["x"], None, 0.5, "title"),
        lambda path: plots.plot_grid(path, {"a": [Point("x", None)]}, 10.0, "sparsity", "title"),
        lambda path: plots.plot_grid(path.parent / "no/plot.png", {"a": [Point(0.5, 2.0)]}, 1.0, "sparsity", "title"),
        lambda path: plots.plot_grid(path.parent, {"a": [Point(0.5, 2.0)]}, 1.0, "sparsity", "title"),
    ],
    ids=["nan", "not positive", "nothing", "infinite", "no number", "no point", "no folder", "a folder"],
)
def test_no_fault_in_drawing_is_raised_or_leaves_half_a_file(draw, tmp_path):
    pytest.importorskip("matplotlib")
    told = draw(tmp_path / "plot.png")
    assert told is None or (told.startswith("no plot: ") and told.isprintable() and len(told) < 500)
    assert [path.name for path in tmp_path.iterdir()] == ([] if told else ["plot.png"])


BROKEN = {
    "not importable": "raise ImportError('libfreetype.so.6: cannot open shared object file')",
    "another ABI": "raise RuntimeError('module compiled against ABI version 0x1000009\\nbut this is another')",
    "other attributes": "",
    "an end of the process": "import sys; sys.exit(3)",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_matplotlib_is_told_in_a_line(content, tmp_path):
    (tmp_path / "matplotlib.py").write_text(content)
    done = in_another(tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert done.startswith("no plot: ") and "Traceback" not in done and not list(tmp_path.glob("*.png"))


@pytest.mark.draws
@pytest.mark.parametrize("setting", [{"MPLBACKEND": "bogus"}, {"MPLBACKEND": "TkAgg"}, {"MPLCONFIGDIR": "/dev/null"}])
def test_a_plot_does_not_depend_on_a_backend_or_on_a_cache_of_fonts(setting, tmp_path):
    pytest.importorskip("matplotlib")
    assert in_another(tmp_path, **setting) == "None\n"


@pytest.mark.draws
def test_a_table_of_depth_pruning_is_drawn_with_the_speeds_and_sizes_that_were_measured(
    arguments, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    drawn = {}
    monkeypatch.setattr(grid, "plot_grid", lambda *given: drawn.update(lines=given[1], size=given[5]))
    at = arguments.index("--mha_remove_layers")
    given = [*arguments[:at], "--output_dir", tmp_path / "run", "--method", "shortgpt", "--prune_rate", 0.08, 0.1]
    assert run(*given, monkeypatch=monkeypatch) == 0
    results = [json.loads(line)["result"] for line in (tmp_path / "run/results.jsonl").read_text().splitlines()]
    ratios = [one["tokens_per_second"]["pruned"] / one["tokens_per_second"]["dense"] for one in results]
    assert [point.speed for point in drawn["lines"]["shortgpt"]] == ratios and min(ratios) > 0
    assert drawn["size"] == 4 * results[0]["parameters"]["total"]


def in_another(folder: Path, **environment: str) -> str:
    """What drawing says in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER, folder / "plot.png"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0 and not done.stderr and done.stdout.count("\n") == 1, done.stderr
    return done.stdout


def test_a_run_whose_plot_fails_saves_its_model_and_says_so(arguments, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")

    def fail(*args):
        raise RuntimeError("the renderer\nfell over")

    monkeypatch.setattr(plots, "_blank", fail)
    assert run(*arguments, "--save_model", tmp_path / "out", monkeypatch=monkeypatch) == 0
    assert "no plot: the renderer\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/result.json").read_text())["saved_model"] and (tmp_path / "out").is_dir()
