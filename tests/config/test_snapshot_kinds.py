"""What a name is given as decides which of its files count: those of a model, of a text, or one file."""

import json
from pathlib import Path

import pytest

import lib.config.snapshot
from lib.config.snapshot import FILE, MODEL, TEXT, Snapshot
from lib.errors import InputsChanged


def stamp(kind: str, path: Path) -> str:
    return next(iter(Snapshot.take([(kind, str(path))]).stamps.values()))


@pytest.fixture
def text(tmp_path) -> Path:
    folder = tmp_path / "text"
    (folder / "below").mkdir(parents=True)
    for name in ("config.json", "a.txt", "below/b.txt"):
        (folder / name).write_text("one")
    return folder


def test_a_text_folder_with_a_config_counts_with_all_of_its_text(text):
    before = Snapshot.take([(TEXT, str(text))])
    (text / "below/b.txt").write_text("two")
    assert Snapshot.take([(TEXT, str(text))]).stamps != before.stamps
    with pytest.raises(InputsChanged, match="below/b.txt"):
        before.check([(TEXT, str(text))])


def test_one_folder_may_be_model_and_text(text):
    (text / "model.safetensors").write_text("one")
    both = [(MODEL, str(text)), (TEXT, str(text))]
    before = Snapshot.take(both)
    (text / "below/b.txt").write_text("two")
    before.check(both[:1])
    with pytest.raises(InputsChanged):
        before.check(both)
    assert Snapshot.take(both[:1]).stamps.items() <= before.stamps.items()


def test_what_cannot_be_text_does_not_count_in_a_text_folder(text):
    before = Snapshot.take([(TEXT, str(text))])
    for name in ("notes.pdf", "below/script.py", "below/picture.png"):
        (text / name).write_text("x")
    before.check([(TEXT, str(text))])
    assert Snapshot.take([(TEXT, str(text))]) == before


@pytest.mark.parametrize(
    "name", ["README.md", "a.json.zst", "B.CSV", "x/data-00000-of-00001.arrow", "x/state.json", "dataset_dict.json"]
)
def test_cards_packed_text_and_saved_tables_count_in_a_text_folder(text, name):
    before = stamp(TEXT, text)
    (text / "x").mkdir()
    (text / name).write_text("x")
    assert stamp(TEXT, text) != before


def test_the_demo_text_and_the_demo_model_are_different_inputs():
    stamps = list(Snapshot.take([(MODEL, "demo"), (TEXT, "demo")]).stamps.values())
    assert stamps[0] != stamps[1] and stamps[1].startswith("demo, Python 3.")


def test_a_folder_that_is_named_like_a_task_is_not_the_task(text, monkeypatch):
    monkeypatch.chdir(text)
    assert stamp(FILE, Path("below")) == "below"


@pytest.mark.parametrize(
    "named", ["dataset_path: rows", "dataset_kwargs: {data_dir: 'rows'}", "dataset_kwargs:\n  data_dir: ROOT/rows\n"]
)
def test_a_folder_of_rows_that_a_task_reads_counts(tmp_path, named):
    (tmp_path / "rows/below").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("rows/below/a.jsonl", "other/a.jsonl"):
        (tmp_path / name).write_text("one")
    task = tmp_path / "mine.yaml"
    task.write_text(f"task: mine\n{named}\ndoc_to_text: '/ . other'\n".replace("ROOT", str(tmp_path)))
    before = stamp(FILE, task)
    (tmp_path / "other/a.jsonl").write_text("two")
    assert stamp(FILE, task) == before
    (tmp_path / "rows/below/a.jsonl").write_text("two")
    assert stamp(FILE, task) != before


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loaded, others",
    [
        (["model.safetensors"], ["pytorch_model.bin", "consolidated.safetensors", "model-00001-of-00001.safetensors"]),
        (["part-1.safetensors", "below/part-2.safetensors"], ["part-3.safetensors", "pytorch_model.bin"]),
    ],
)
def test_weights_that_are_not_loaded_do_not_count(tmp_path, loaded, others):
    (tmp_path / "below").mkdir()
    for name in (*loaded, *others, "config.json"):
        (tmp_path / name).write_text("{}")
    if len(loaded) > 1:
        index = {"weight_map": {str(number): name for number, name in enumerate(loaded)}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    before = stamp(MODEL, tmp_path)
    for name in others:
        (tmp_path / name).write_text("changed")
        assert stamp(MODEL, tmp_path) == before, name
    for name in loaded:
        (tmp_path / name).write_text("changed")
        assert stamp(MODEL, tmp_path) != before, name
        before = stamp(MODEL, tmp_path)


def test_what_takes_long_to_read_is_told(text, monkeypatch):
    told: list[str] = []
    Snapshot.take([(TEXT, str(text))], tell=told.append)
    assert not told
    monkeypatch.setattr(lib.config.snapshot, "_MANY", 5)
    Snapshot.take([(TEXT, str(text))], tell=told.append)
    assert len(told) == 1 and told[0].startswith("Reading     0 GB of models and texts")


def test_of_several_processes_the_first_reads(text, monkeypatch):
    of_first = Snapshot.take([(TEXT, str(text))])
    monkeypatch.setattr(lib.config.snapshot, "_look", None)
    found = Snapshot.take([(TEXT, str(text))], lambda function: {"stamps": of_first.stamps, "files": of_first.files})
    assert found == of_first
