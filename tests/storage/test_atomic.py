"""A file or folder is there as a whole: the old one or the new one, whatever fails and wherever a process is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lib.errors import InputError
from lib.storage import atomic
from lib.storage.atomic import atomic_file, atomic_folder, clear_drafts
from lib.storage.model_folder import check_holds_none_of, check_model_target, signature
from tests.command import ROOT


def content_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def no_exchange(monkeypatch):
    """A system that cannot swap two folders in one step."""

    def missing(*args, **options):
        raise OSError("no such library")

    monkeypatch.setattr(atomic.ctypes, "CDLL", missing)


def write_folder(folder: Path, text: str) -> None:
    with atomic_folder(folder) as draft:
        (draft / "a").write_text(text)


@pytest.mark.parametrize("system", ["exchange", "no_exchange"])
def test_a_folder_replaces_another_whole(tmp_path, request, system):
    if system == "no_exchange":
        request.getfixturevalue(system)
    write_folder(tmp_path / "out", "old")
    (tmp_path / "out/b").write_text("old")
    write_folder(tmp_path / "out", "new")
    assert content_of(tmp_path) == {"out/a": "new"}


def test_two_folders_change_places_in_one_step_on_linux(tmp_path, monkeypatch):
    write_folder(tmp_path / "out", "old")
    steps = []
    monkeypatch.setattr(Path, "rename", lambda *args: steps.append(args))
    write_folder(tmp_path / "out", "new")
    assert not steps and content_of(tmp_path) == {"out/a": "new"}


def test_a_folder_is_put_back_when_the_second_step_fails(tmp_path, monkeypatch, no_exchange):
    write_folder(tmp_path / "out", "old")
    rename, names = Path.rename, []

    def fail_at_second(self, target):
        names.append(self.name)
        if len(names) == 2:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_at_second)
    with pytest.raises(OSError, match="Input/output error"):
        write_folder(tmp_path / "out", "new")
    assert content_of(tmp_path) == {"out/a": "old"} and len(names) == 3


def test_a_folder_that_a_kill_left_aside_is_put_back_by_the_next_write(tmp_path):
    write_folder(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.partial-abcd_123-draft-aside")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert content_of(tmp_path) == {"out/a": "old"}


@pytest.mark.parametrize("is_there", [False, True])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, is_there):
    if is_there:
        write_folder(tmp_path / "out", "old")
    before = content_of(tmp_path)
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out") as draft:
        (draft / "half").write_text("new")
        raise ZeroDivisionError
    assert content_of(tmp_path) == before and (tmp_path / "out").exists() == is_there


def test_a_link_to_a_folder_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for text in "12":
        write_folder(tmp_path / "link", text)
        assert (tmp_path / "folder/a").read_text() == text and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link"]


WRITER = """
import sys, time
from pathlib import Path
from lib.storage.atomic import atomic_file, atomic_folder
kind, path = sys.argv[1], Path(sys.argv[2])
with (atomic_file if kind == "file" else atomic_folder)(path) as draft:
    (draft if kind == "file" else draft / "a").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_drafts_of_killed_processes_are_deleted_by_the_next_write_and_those_of_living_ones_are_not(tmp_path, kind):
    path = tmp_path / "out"
    command = [sys.executable, "-c", WRITER, kind, path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        clear_drafts(path)
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.iterdir())) == 1
    if kind == "file":
        with atomic_file(path) as draft:
            draft.write_text("whole")
    else:
        write_folder(path, "whole")
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_what_only_looks_like_a_draft_is_not_touched(tmp_path):
    names = (".out.partial-mine", ".out.partial-1", ".out.partial-old-aside", ".out.partial-abcd_123-draft")
    for name in names[:3]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("mine")
    (tmp_path / names[3]).write_text("mine")
    os.mkfifo(tmp_path / ".out.partial-2")
    write_folder(tmp_path / "out", "new")
    with atomic_file(tmp_path / "out") as draft:
        draft.write_text("x")
        (tmp_path / "out/a").unlink()
        (tmp_path / "out").rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, ".out.partial-2", "out"])


RACER = """
import sys
from pathlib import Path
from lib.storage.atomic import atomic_file
for number in range(400):
    with atomic_file(Path(sys.argv[1])) as draft:
        draft.write_text("whole " * 1000)
"""


def test_two_processes_may_write_one_file_at_once(tmp_path):
    command = [sys.executable, "-c", RACER, tmp_path / "table.md"]
    racers = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) for _ in range(2)]
    told = [racer.communicate()[1] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], told
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


def test_a_link_that_leads_nowhere_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "none/there")
    for path in (tmp_path / "link", tmp_path / "link/below"):
        with pytest.raises(InputError, match="is a link that leads nowhere"):
            atomic.check_writable(path, "--output_dir")


# Folders of models ----------------------------------------------------------------------------------------------------


def make_model(folder: Path, *more: str) -> Path:
    for name in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json", *more):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_a_model_is_replaced_when_asked_and_a_new_or_empty_folder_always(tmp_path):
    check_model_target(tmp_path / "new", False)
    check_model_target(tmp_path, False)
    more = ("modeling_pruned.py", "additional_chat_templates/x.jinja", "merges.txt", "generation_config.json")
    check_model_target(make_model(tmp_path / "model", *more), True)
    with pytest.raises(InputError, match="add --overwrite"):
        check_model_target(tmp_path / "model", False)


@pytest.mark.parametrize(
    "foreign", [".git/HEAD", "notes.txt", "README.md", "data/a.jsonl", "model.gguf", "my/config.json"]
)
def test_a_folder_that_holds_more_than_a_model_is_not_replaced(tmp_path, foreign):
    with pytest.raises(InputError, match=f"holds {foreign} beside a model"):
        check_model_target(make_model(tmp_path / "model", foreign), True)


def test_a_folder_without_a_model_is_not_replaced(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="holds no model"):
        check_model_target(tmp_path, True)
    make_model(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds empty beside a model"):
        check_model_target(tmp_path, True)


def test_a_folder_that_holds_what_the_run_uses_is_not_replaced(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for folder in ("a", "a/b", "link", "a/../a", "."):
        with pytest.raises(InputError, match="would replace .*, which this run uses"):
            check_holds_none_of(tmp_path / folder, [tmp_path / "a/b"], [])
    check_holds_none_of(tmp_path / "a/b/c", [tmp_path / "a/b"], [])


def test_a_folder_whose_files_a_model_links_to_is_not_replaced(tmp_path):
    store, model = make_model(tmp_path / "store"), tmp_path / "model"
    model.mkdir()
    for file in store.iterdir():
        (model / file.name).symlink_to(file)
    with pytest.raises(InputError, match="would replace .*model/.*, which this run uses"):
        check_holds_none_of(store, [], [model])


def test_what_finder_leaves_in_a_folder_does_not_count(tmp_path):
    model = make_model(tmp_path / "model")
    before = signature(model)
    (model / ".DS_Store").touch()
    check_model_target(model, True)
    assert signature(model) == before


def test_the_signature_of_a_folder_goes_with_it_and_changes_with_its_files(tmp_path):
    model = make_model(tmp_path / "model")
    before = signature(model)
    model = model.rename(tmp_path / "moved")
    assert signature(model) == before and signature(tmp_path / "none") is None
    os.utime(model / "config.json", ns=(0, 0))
    assert signature(model) != before
