"""What a key says of models, texts and tasks goes by what their files hold, of all files that are read."""

import json
import os
import shutil
from pathlib import Path

import pytest

import lib.config.snapshot
from lib.config.snapshot import FILE, MODEL, TEXT, Input, Snapshot
from lib.errors import InputError, InputsChanged


def stamp(path: Path) -> str:
    return next(iter(Snapshot.take([given(path)]).stamps.values()))


def given(path: Path) -> Input:
    is_model = (path / "config.json").is_file()
    return (MODEL if is_model else FILE if path.suffix in (".yaml", ".json") else TEXT), str(path)


def rewrite(path: Path, content: str | bytes) -> None:
    """Changes a file in place; its time stays."""
    times = path.stat()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def model(tiny_folder, tmp_path) -> Path:
    """A model with shards in a subfolder and code of its own."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "shards").mkdir()
    (folder / "model.safetensors").rename(folder / "shards/one.safetensors")
    index = {"weight_map": {"a": "shards/one.safetensors", "b": "shards/missing.safetensors", "c": 3}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "code").mkdir()
    for name in ("modeling.py", "code/part.py", "merges.txt"):
        (folder / name).write_text("one")
    return folder


def test_a_text_that_is_edited_in_place_with_the_same_time_is_another(text_file, tmp_path):
    text = Path(shutil.copy(text_file, tmp_path / "own.txt"))
    before = stamp(text)
    rewrite(text, text.read_text().replace("layer", "LAYER"))
    assert stamp(text) != before
    shutil.copy(text_file, text)
    assert stamp(text) == before  # whatever its time


@pytest.mark.parametrize(
    "file", ["shards/one.safetensors", "tokenizer.json", "merges.txt", "modeling.py", "code/part.py", "config.json"]
)
def test_every_file_that_loading_reads_counts(model, file):
    before, content = stamp(model), (model / file).read_bytes()
    rewrite(model / file, content[:-1] + bytes([content[-1] ^ 1]))
    assert stamp(model) != before
    rewrite(model / file, content)
    assert stamp(model) == before


def test_what_loading_does_not_read_does_not_count(model):
    before = stamp(model)
    (model / "runs/grid").mkdir(parents=True)
    (model / "saved").mkdir()
    for name in (".hidden", "README.md", "log.txt", "result.json", "runs/grid/results.jsonl", "model.gguf"):
        (model / name).write_text("x")
    for name in ("config.json", "modeling_pruned.py"):  # a model in the model's folder
        (model / "saved" / name).write_text("{}")
    assert stamp(model) == before


def test_texts_in_a_folder_count_but_hidden_ones_and_shards_of_c4_that_are_not_read(tmp_path):
    for name in ("a.txt", "b/c.txt", ".cache/x", "b/.d", "en/c4-train.00001-of-01024.json.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    before = stamp(tmp_path)
    for name in (".cache/x", "b/.d", "en/c4-train.00001-of-01024.json.gz"):
        (tmp_path / name).write_text("two")
    assert stamp(tmp_path) == before
    (tmp_path / "b/c.txt").write_text("two")
    assert stamp(tmp_path) != before


def test_a_task_counts_with_what_its_file_includes_calls_and_reads(tmp_path):
    (tmp_path / "tasks").mkdir()
    task = tmp_path / "tasks/mine.yaml"
    task.write_text(
        "include: ../base.yaml\ntask: mine\nprocess_docs: !function utils.clean\n"
        "dataset_kwargs:\n  data_files: {test: rows.jsonl}\n"
    )
    (tmp_path / "base.yaml").write_text("include: tasks/mine.yaml\nmetric: acc\n")
    for name in ("tasks/utils.py", "tasks/rows.jsonl", "tasks/other.yaml"):
        (tmp_path / name).write_text("one")
    before = stamp(task)
    (tmp_path / "tasks/other.yaml").write_text("two")
    assert stamp(task) == before
    for name in ("base.yaml", "tasks/utils.py", "tasks/rows.jsonl", "tasks/mine.yaml"):
        content = (tmp_path / name).read_text()
        rewrite(tmp_path / name, content + "# changed")
        assert stamp(task) != before, name
        rewrite(tmp_path / name, content)
    assert stamp(task) == before


def test_names_that_are_not_here_stand_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    names = ["allenai/c4", "wikitext2", str(loop), str(tmp_path / "no.txt")]
    for kind in (MODEL, TEXT, FILE):
        assert list(Snapshot.take((kind, name) for name in names).stamps.values()) == names


def test_links_in_a_circle_end(model, tmp_path):
    for folder in (model, tmp_path / "text"):
        folder.mkdir(exist_ok=True)
        (folder / "up").symlink_to(folder)
        (folder / "self").symlink_to(folder / "self")
        assert stamp(folder) == stamp(folder)


def test_a_path_that_is_no_utf8_has_a_key(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.txt")
    path.write_text("one")
    before = stamp(path)
    path.write_text("two")
    assert stamp(path) != before
    json.dumps(before).encode()


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("one")
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(InputError, match="a.txt: cannot be read .Permission denied.; make it readable$"):
        stamp(tmp_path / "a.txt")


def test_each_file_is_read_once_for_all_that_is_asked(tiny_folder, text_file, monkeypatch):
    look, seen = lib.config.snapshot._look, []
    monkeypatch.setattr(lib.config.snapshot, "_look", lambda path: seen.append(path) or look(path))
    models = [(MODEL, name) for name in (str(tiny_folder), f"{tiny_folder}/.", "demo")]
    Snapshot.take([*models, (TEXT, str(text_file)), (FILE, str(text_file)), (TEXT, "demo")])
    assert len(seen) == len(set(seen)) > 5


# Changes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "a.txt").write_text("two"),
        lambda folder: rewrite(folder / "a.txt", "two"),
        lambda folder: (folder / "a.txt").unlink(),
        lambda folder: (folder / "b.txt").write_text("more"),
    ],
    ids=["written", "written in place", "gone", "new"],
)
def test_a_change_is_found_and_named(tmp_path, change):
    (tmp_path / "a.txt").write_text("one")
    before = Snapshot.take([given(tmp_path)])
    before.check([given(tmp_path)])
    change(tmp_path)
    with pytest.raises(InputsChanged, match=r"/[ab]\.txt: was changed while the run worked"):
        before.check([given(tmp_path)])


def test_what_is_linked_or_has_other_rights_is_no_change(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = Snapshot.take([given(path)])
    os.link(path, tmp_path / "b.txt")
    path.chmod(0o600)
    before.check([given(path)])


def test_files_that_runs_write_in_the_folder_of_a_model_are_no_change(model):
    before = Snapshot.take([given(model)])
    (model / "gradients.json").write_text("{}")
    before.check([given(model)])
    rewrite(model / "shards/one.safetensors", "x")
    with pytest.raises(InputsChanged, match="one.safetensors"):
        before.check([given(model)])
