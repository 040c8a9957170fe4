"""--dry_run checks what the run would check, tells what it would take, and writes nothing."""

import json
import re

import pytest

from lib.runs import outline
from tests.command import ROOT, run, run_alp

WORDS = ROOT / "README.md"  # a text that is read at once
DEPTH = ["--dataset", WORDS, "--nsamples", 4, "--eval_datasets", WORDS, "--seqlen", 64, "--eval_windows", 3]
ALP = ["--calibration_dataset", WORDS, "--nsamples", 4, "--dataset", WORDS, "--seqlen", 64, "--eval_windows", 3]


def parts_of(told: str) -> dict[str, tuple[float, str]]:
    """{part: (passes, what is said of it)}."""
    rows = re.findall(r"^  ([\w ]+): ([\d,]+)(.*)$", told, re.M)
    return {name: (float(passes.replace(",", "")), note) for name, passes, note in rows}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_parts_of_a_search(here, monkeypatch, capsys):
    flags = ["--mha_remove_layers", 2, "--ffn_remove_layers", 4, "--compensate", "all", "--save_model", "out"]
    assert run(*DEPTH, *flags, "--dry_run", monkeypatch=monkeypatch) == 0
    told = capsys.readouterr().out
    found = parts_of(told)
    assert found["Block Influence"][0] == 4
    trials = 4 + 3
    assert found["search"] == (round(outline.TRIAL * trials * 4), f" ({trials} trials on 4 windows)")
    assert found["evaluation"] == (3 * 3, " (3 windows, 3 models)")
    assert re.search(r"^Time +about \d+ s: a pass takes [\d.e-]+ s, measured on \d at once$", told, re.M)
    assert re.search(r"^Memory +weights 16 MB; [\d,]+ MB left", told, re.M)
    assert re.search(r"^Disk +1\d MB for the model at least; [\d,]+ MB free$", told, re.M)
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("shortgpt", {"Block Influence"}),
        ("sleb", {"search"}),
        ("beam", {"Block Influence", "search"}),
    ],
)
def test_each_method_has_its_parts(method, expected, monkeypatch, capsys):
    assert run(*DEPTH, "--method", method, "--prune_rate", 0.2, "--dry_run", monkeypatch=monkeypatch) == 0
    assert parts_of(capsys.readouterr().out).keys() - {"evaluation", "samples"} == expected


def test_a_beam_search_measures_at_most_what_is_told(here, tiny_folder, text_file, monkeypatch, capsys):
    flags = ["--model_name", tiny_folder, "--dataset", text_file, "--nsamples", 3, "--eval_ppl", "no"]
    flags += ["--method", "beam", "--prune_rate", 0.1, "--mha_ffn_ratio", 1]
    assert run(*flags, "--dry_run", monkeypatch=monkeypatch) == 0
    told = re.search(r"^  search: [\d,]+ \(at most ([\d,]+) trials", capsys.readouterr().out, re.M)
    assert run(*flags, "--output_dir", here / "run", monkeypatch=monkeypatch) == 0
    trials = json.loads((here / "run/result.json").read_text())["trials"]
    assert told and 0 < trials["measured"] <= trials["at_most"] <= int(told[1].replace(",", ""))


def test_the_parts_of_weight_pruning(here, monkeypatch, capsys):
    flags = ["--prune_method", "sparsegpt_alp", "--grad_nsamples", 2, "--grad_seqlen", 16, "--wbits", 8]
    assert run_alp(*ALP, *flags, "--dry_run", monkeypatch=monkeypatch) == 0
    found = parts_of(capsys.readouterr().out)
    assert found["gradients"][0] == round(3 * 2 * 16 / 64) and found["pruning"][0] == 2 * 4
    assert " besides" in found["pruning"][1] and "quantization" in found
    assert found["evaluation"] == (3 * 3, " (3 windows, 3 models)")
    assert not list(here.iterdir())


def test_what_the_run_would_refuse_is_refused(here, monkeypatch, capsys):
    assert run(*DEPTH, "--prune_rate", 0.99, "--dry_run", monkeypatch=monkeypatch) == 2
    assert "cannot be reached" in capsys.readouterr().err
    assert run(*DEPTH, "--prune_rate", 0.1, 0.2, "--dry_run", monkeypatch=monkeypatch) == 2
    assert "--dry_run: is of a single run" in capsys.readouterr().err
    assert not list(here.iterdir())


def test_a_duration_in_words():
    assert [outline.duration(seconds) for seconds in (0.4, 99, 100, 5000, 7000)] == [
        "0 s",
        "99 s",
        "2 min",
        "83 min",
        "1.9 h",
    ]
