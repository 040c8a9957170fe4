"""A resume state is taken as it was written, or refused; and only the files of a state are deleted."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib.errors import InputError
from lib.files import canonical
from lib.models.sealed_tensors import Sealed, save_sealed
from lib.storage.results_jsonl import ResultsFile
from lib.storage.resume_state import State, is_unfinished
from lib.storage.state_folder import FILE, check_state_folder, discard

KEY = {"a": 1}


@pytest.fixture
def folder(tmp_path):
    """A state that a killed run left, with a value and the weights of a layer."""
    path = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        state = State(path, KEY)
        with state.session({}):
            state.put("losses", {"x": 1.25, "2": [1, None]})
            (path / "pruned").mkdir()
            save_sealed(path / "pruned/layer-00000.safetensors", {"w": torch.ones(3)}, "a run")
            raise KeyboardInterrupt
    return path


def test_a_state_is_read_as_it_was_written(folder):
    assert State(folder, KEY, resume=True).get("losses") == {"x": 1.25, "2": [1, None]} and is_unfinished(folder)


@pytest.mark.parametrize("old, new", [("1.25", "1.26"), ('"x"', '"y"'), ("null", "0"), ("losses", "scores")])
def test_a_state_in_which_anything_was_changed_is_refused(folder, old, new):
    path = folder / FILE
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match="state.json: broken, so that run cannot go on .its digest does not match"):
        State(folder, KEY, resume=True)


def test_only_the_files_of_a_state_are_deleted_and_what_is_left_is_no_state(folder):
    theirs = [folder / name for name in ("mine.txt", "mine.safetensors", "pruned/mine.safetensors", "sub/layer-1.txt")]
    (folder / "sub").mkdir()
    (folder / "empty").mkdir()
    for path in theirs:
        path.write_text("mine")
    (folder / "pruned/.layer-00001.safetensors.partial-7").touch()
    discard(folder)
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted([folder / "lock", *theirs])
    for path in theirs:
        path.unlink()
    (folder / "sub").rmdir()
    (folder / "empty").rmdir()
    discard(folder)
    assert not folder.exists()


def test_a_folder_of_somebody_else_is_no_state(tmp_path):
    theirs = tmp_path / "state"
    theirs.mkdir()
    check_state_folder(theirs, "--output_dir")  # empty: a run was killed as it made it
    for name, content in (("notes.txt", "mine"), ("state.json", "{}"), ("lock", "mine")):
        (theirs / name).write_text(content)
        for refuse in (lambda: check_state_folder(theirs, "--output_dir"), lambda: discard(theirs)):
            with pytest.raises(InputError, match="no state of a run, so it is not replaced"):
                refuse()
        assert (theirs / name).read_text() == content
        (theirs / name).unlink()


def test_a_link_to_a_state_is_no_state(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(InputError, match="no state of a run"):
        check_state_folder(tmp_path / "link", "--output_dir")


def test_a_part_of_a_run_gets_a_folder_of_its_own_beside_one_that_is_no_state(tmp_path):
    class Alone:
        is_first = True

        def agree(self, function):
            return function()

    (tmp_path / "state").mkdir()
    (tmp_path / "state/notes.txt").write_text("mine")
    state = State.of_cell(tmp_path / "state", KEY, Alone())
    with state.session({}):
        state.put("x", 1)
    assert [path.name for path in tmp_path.rglob("*")] == ["state", "notes.txt"]


# Tensors --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sealed(tmp_path):
    path = tmp_path / "layer-00001.safetensors"
    values = torch.arange(6, dtype=torch.bfloat16).view(2, 3).T.contiguous()
    save_sealed(path, {"a": values, "b": torch.tensor(3)}, "a run", {"list": [1.5]})
    return path


def test_tensors_are_read_as_they_were_written(sealed):
    file = Sealed(sealed, "a run")
    assert torch.equal(file.tensor("a"), torch.arange(6, dtype=torch.bfloat16).view(2, 3).T)
    assert file.tensor("b") == 3 and file.content == {"list": [1.5]}


def change(sealed, tensors=None, metadata=None) -> None:
    with safe_open(sealed, "pt") as file:
        found = file.metadata()
    save_file(load_file(sealed) if tensors is None else tensors, sealed, {**found, **(metadata or {})})


def read_all(path) -> None:
    file = Sealed(path, "a run")
    for name in file.names:
        file.tensor(name)


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_tensor_with_a_bit_flipped_is_refused(sealed, name):
    tensors = load_file(sealed)
    tensors[name].view(-1).view(torch.uint8)[0] ^= 1
    change(sealed, tensors)
    with pytest.raises(InputError, match=f"the digest of {name} does not match"):
        read_all(sealed)


def test_a_tensor_that_is_missing_or_was_added_is_refused(sealed):
    for tensors in ({"a": load_file(sealed)["a"]}, {**load_file(sealed), "c": torch.ones(1)}):
        change(sealed, tensors)
        with pytest.raises(InputError, match="its digest does not match"):
            Sealed(sealed, "a run")


def test_a_file_of_another_run_is_refused(sealed):
    with pytest.raises(InputError, match="its digest does not match"):
        Sealed(sealed, "another run")


def test_other_content_another_name_and_no_digests_are_refused(sealed):
    sealed.with_name("layer-00002.safetensors").write_bytes(sealed.read_bytes())
    with pytest.raises(InputError, match="layer-00002.*broken"):
        Sealed(sealed.with_name("layer-00002.safetensors"), "a run")
    change(sealed, metadata={"content": '{"list": [2.5]}'})
    with pytest.raises(InputError, match="broken"):
        Sealed(sealed, "a run")
    save_file({"a": torch.ones(1)}, sealed)
    with pytest.raises(InputError, match="broken"):
        Sealed(sealed, "a run")


# Results of grids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old, new", [("1.25", "1.26"), ('"seed": 3', '"seed": 4')])
def test_a_line_of_results_in_which_anything_was_changed_is_refused(tmp_path, old, new):
    ResultsFile(tmp_path).add(canonical({"seed": 3}), {"perplexity": 1.25})
    path = tmp_path / "results.jsonl"
    assert ResultsFile(tmp_path).find(canonical({"seed": 3})) == {"perplexity": 1.25} and old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match="line 1 is not of a grid's results"):
        ResultsFile(tmp_path)


def test_old_results_stay_until_the_first_new_line(tmp_path):
    ResultsFile(tmp_path).add(canonical({"seed": 1}), {"x": 1})
    anew = ResultsFile(tmp_path, overwrite=True)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1
    for seed in (2, 3):
        anew.add(canonical({"seed": seed}), {"x": seed})
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["result"]["x"] for line in lines] == [2, 3]
