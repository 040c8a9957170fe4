"""What --help says of texts and choices is what is taken, and a folder that results could not name is refused."""

import os
import re
import subprocess
import sys

import pytest

import alp_prune
import ppllms
import save_gradient
from lib.config.sources import PACKINGS, TEXT_KINDS
from tests.command import ROOT

SCRIPTS = (ppllms, alp_prune, save_gradient)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_names_every_kind_of_text(script):
    words = set(script.build_parser().format_help().replace(",", " ").split())
    assert words >= {*TEXT_KINDS, *PACKINGS, "`:CONFIG`", "`::COLUMN`"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_of_a_choice_names_its_default(script):
    for action in script.build_parser()._actions:
        if action.choices and action.default is not None:
            assert "default: " in action.help, action.dest


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_working_folder_that_is_not_utf8_is_refused_at_once(script, tmp_path):
    folder = os.fsencode(tmp_path) + b"/a\xff"
    os.mkdir(folder)
    done = subprocess.run([sys.executable, ROOT / f"{script.__name__}.py"], cwd=folder, capture_output=True, text=True)
    told = f"{script.__name__}.py: error: {tmp_path}/a\\udcff: a name that is not UTF-8; rename it\n"
    assert (done.returncode, done.stderr, os.listdir(folder)) == (2, told, [])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_version_is_told_and_nothing_else_is_done(script, capsys):
    with pytest.raises(SystemExit) as ended:
        script.build_parser().parse_args(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"\S+ \d+\.\d+\.\d+(, commit [0-9a-f]{40}(\+changes)?)?\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("script", "flags", "same"),
    [
        (ppllms, ["--model", "demo", "--calibration_dataset", "c4"], ["--model_name", "demo", "--dataset", "c4"]),
        (alp_prune, ["--eval_datasets", "c4", "wikitext2"], ["--dataset", "c4", "wikitext2"]),
        (save_gradient, ["--calibration_dataset", "c4"], ["--dataset", "c4"]),
    ],
)
def test_one_name_for_each_thing_is_taken_by_all_scripts_beside_their_own(script, flags, same):
    assert vars(script.build_parser().parse_args(flags)) == vars(script.build_parser().parse_args(same))
