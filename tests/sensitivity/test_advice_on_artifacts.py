"""What is said of a file of gradients that does not fit never destroys a good one, and it is read once."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

import alp_prune
import lib.files
import lib.runtime.distributed
import save_gradient
from lib.errors import InputError
from lib.sensitivity import artifact
from tests.command import run


@pytest.fixture
def made(tiny_folder, text_file, tmp_path, monkeypatch):
    """A file of gradients of a tiny model, and the flags that made it."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "good.json"
    flags = ["--model", tiny_folder, "--dataset", text_file, "--ngrad", 2, "--grad_seqlen", 16, "--output", path]
    assert run(*flags, script=save_gradient, monkeypatch=monkeypatch) == 0
    return path, flags


def of_another_model(path) -> None:
    artifact.write(path, replace(artifact.read(path), fingerprint="0"))


def test_the_advice_on_a_given_file_of_another_model_leaves_it_alone(made, tiny_folder, text_file, monkeypatch, capsys):
    path, _ = made
    of_another_model(path)
    flags = ["--model", tiny_folder, "--calibration_dataset", text_file, "--dataset", text_file, "--gradients", path]
    assert run(*flags, "--output_dir", "run", script=alp_prune, monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    assert "made for another model" in told and "give the file of this model, or leave --gradients out" in told
    assert "delete" not in told and "--overwrite" not in told


def test_the_advice_on_an_output_of_another_model_is_another_name(made, monkeypatch, capsys):
    path, flags = made
    of_another_model(path)
    assert run(*flags, "--resume", script=save_gradient, monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    assert "name another --output, or replace the file with --overwrite" in told and "delete" not in told


def test_a_broken_file_of_ours_may_be_deleted_and_is_read_once(made, monkeypatch):
    path, _ = made
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "x"}))
    read, read_file = [], lib.files.read_file
    monkeypatch.setattr(lib.files, "read_file", lambda path, *rest: read.append(path) or read_file(path, *rest))
    with pytest.raises(InputError, match="broken .*make it again with save_gradient.py --overwrite, or delete it"):
        artifact.read(path)
    assert read == [path]


def test_only_the_first_process_reads_all_weights_for_the_fingerprint(made, monkeypatch):
    path, flags = made
    asked: list = []
    agree = lib.runtime.distributed.Ranks.agree
    monkeypatch.setattr(
        lib.runtime.distributed.Ranks,
        "agree",
        lambda ranks, function: asked.append(getattr(function, "func", None)) or agree(ranks, function),
    )
    assert run(*flags, "--overwrite", script=save_gradient, monkeypatch=monkeypatch) == 0
    assert artifact.fingerprint in asked


def test_importing_the_package_starts_no_git():
    code = "import subprocess; subprocess.run = None; import lib.version as e; print(e.version)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0
