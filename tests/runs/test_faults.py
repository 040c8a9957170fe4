"""Kills at any moment, full disks, too little memory: what is there is whole, and the run goes on to the same end."""

import json
import os
import random
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import alp_prune
import lib.depth.compensation
import lib.engine.activations
import lib.sensitivity.gradients
import lib.sparsity.layerwise
import ppllms
import save_gradient
from lib.heal.training import Training
from lib.models.decoder import Decoder
from lib.storage import resume_state
from lib.storage.atomic import write_json
from tests.command import GOES_ON, Started
from tests.runs.interruption import Command, artefact_of, files_of, litter_of, result_of

# Kills ----------------------------------------------------------------------------------------------------------------

DEPTH = ["--mha_remove_layers", 6, "--ffn_remove_layers", 8, "--nsamples", 3, "--seqlen", 64]
ALP = ["--prune_method", "sparsegpt_alp", "--wbits", 4, "--nsamples", 16, "--seqlen", 64, "--grad_nsamples", 8]
KILLED = {
    "ppllms": [*DEPTH, "--dataset", "{}/text.jsonl", "--eval_datasets", "{}/eval.txt"],
    "alp_prune": [*ALP, "--calibration_dataset", "{}/text.jsonl", "--dataset", "{}/eval.txt"],
    "save_gradient": ["--ngrad", 60, "--grad_seqlen", 64, "--dataset", "{}/text.jsonl", "--output", "gradient.json"],
}
OF_A_RUN = ["--output_dir", "run", "--save_model", "out", "--prompts", "{}/prompt.txt"]


@dataclass
class Killed:
    """A script on the demo model, run as a process in folders of its own; what it gives when it is left alone."""

    name: str
    folder: Path
    start_seconds: float = 0.0  # until it is at work
    work_seconds: float = 0.0

    def start(self, folder: Path, *more) -> Started:
        flags = [*KILLED[self.name], *(OF_A_RUN if self.name != "save_gradient" else []), *more]
        return Started(f"{self.name}.py", *(str(word).format(self.folder) for word in flags), folder=folder)

    def found(self, folder: Path) -> tuple[dict, dict[str, bytes]]:
        """The result in a folder, and the files of the saved model."""
        if self.name == "save_gradient":
            return artefact_of(folder / "gradient.json"), {}
        return result_of(folder / "run"), files_of(folder / "out")

    def new_folder(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        return folder

    def write_texts(self) -> None:
        """The texts that the commands name, beside the folders in which they run."""
        rows = [" ".join(str(i * j % 97) for j in range(120)) for i in range(64)]
        (self.folder / "text.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
        (self.folder / "prompt.txt").write_text("Layer 3 of")
        (self.folder / "eval.txt").write_text("".join(f"Layer {i} of {i * 7 % 31} was removed. " for i in range(100)))

    def state(self, folder: Path) -> Path:
        return folder / ("gradient.state" if self.name == "save_gradient" else "run/state")


def is_at_work(process: Started) -> bool:
    """Waits for the first line of a run that is at work; false for one that ends without."""
    return any(line.startswith(b"Model") for line in process.stdout)


def kill(process: Started, seconds: float) -> None:
    """Kills a process after some seconds, if it has not ended by then."""
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Callable[[str], Killed]:
    made: dict[str, Killed] = {}

    def of(name: str) -> Killed:
        if name not in made:
            made[name] = Killed(name, tmp_path_factory.mktemp(name))
            made[name].write_texts()
            begin, process = time.monotonic(), made[name].start(made[name].new_folder("whole"))
            assert is_at_work(process)
            made[name].start_seconds = time.monotonic() - begin
            _, told = process.communicate()
            assert process.returncode == 0, told
            made[name].work_seconds = time.monotonic() - begin - made[name].start_seconds
        return made[name]

    return of


def check_killed(run: Killed, number: int) -> bool:
    """Kills a run at a random moment, and what goes on with it perhaps too; whether work was unfinished then."""
    chance, folder, whole = random.Random(f"{run.name} {number}"), run.new_folder(f"{number}"), run.folder / "whole"
    is_unfinished = False
    for more in ([], ["--resume"])[: 1 + number % 2]:
        process = run.start(folder, *more)
        if number % 3 == 2:
            kill(process, chance.uniform(0, run.start_seconds))
        elif is_at_work(process):
            begin = time.monotonic()
            kill(process, chance.uniform(0, 1.1 * run.work_seconds))
            if process.returncode == 0 and not more:  # the machine is less busy than it was
                run.work_seconds = min(run.work_seconds, time.monotonic() - begin)
        else:
            process.communicate()
        assert process.returncode in (0, -9)
        is_unfinished |= resume_state.is_unfinished(run.state(folder))
        check_whole(run, folder, whole)
    process = run.start(folder, "--resume")
    _, told = process.communicate()
    assert process.returncode == 0, told
    assert run.found(folder) == run.found(whole) and not litter_of(folder)
    return is_unfinished


def check_whole(run: Killed, folder: Path, whole: Path) -> None:
    """What is there has all that it is to have: result or artefact, saved model, state."""
    for name in ("run/result.json", "gradient.json", "run/state/state.json", "gradient.state/state.json"):
        if (folder / name).exists():
            json.loads((folder / name).read_text())
    if (folder / "out").exists():
        assert files_of(folder / "out") == files_of(whole / "out")


@pytest.mark.parametrize("number", range(1))
@pytest.mark.parametrize("name", KILLED)
def test_a_run_that_is_killed_goes_on_to_the_same_result(killed, name, number):
    check_killed(killed(name), number)


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_runs_that_are_killed_at_twenty_moments_go_on_to_the_same_result(killed, name):
    unfinished = [check_killed(killed(name), number) for number in range(100, 120)]
    assert sum(unfinished) >= 5, "most kills came too early or too late to show anything"


# Full disks -----------------------------------------------------------------------------------------------------------


class Disk:
    """A small file system that can be filled up, and made larger."""

    def __init__(self, folder: Path):
        self.folder = folder

    def fill(self, left: int = 0) -> None:
        """Leaves so many bytes."""
        with (self.folder / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        os.truncate(self.folder / "filler", max(0, (self.folder / "filler").stat().st_size - left))

    def enlarge(self) -> None:
        subprocess.run(["mount", "-o", "remount,size=64m", self.folder], check=True)


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        subprocess.run(mounting, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here ({error})")
    yield Disk(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def commands(tiny_folder, text_file, monkeypatch) -> dict[str, Command]:
    text = ["--calibration_dataset", text_file, "--dataset", text_file, "--nsamples", 4, "--sparsity_ratio", 0.5]
    gradients = ["--grad_nsamples", 3, "--grad_seqlen", 16]
    depth = ["--model_name", tiny_folder, "--dataset", text_file, "--eval_datasets", text_file, "--nsamples", 3]
    depth += ["--mha_remove_layers", 2, "--ffn_remove_layers", 3, "--eval_windows", 8, "--save_model", "out"]
    alp = ["--model", tiny_folder, *text, *gradients, "--eval_windows", 8, "--save_model", "out"]
    ngrad = ["--model", tiny_folder, "--dataset", text_file, "--ngrad", 3, "--grad_seqlen", 16]
    return {
        "ppllms": Command(ppllms, depth, monkeypatch),
        "alp_prune": Command(alp_prune, [*alp, "--prune_method", "ria_alp"], monkeypatch),
        "save_gradient": Command(save_gradient, ngrad, monkeypatch),
    }


FULL_AT = [  # the kind of step, which of them, and the bytes that are left
    ("ppllms", "put", 0, 0),
    ("ppllms", "put", 2, 0),
    ("ppllms", "result.json", 0, 0),
    ("ppllms", "save_pruned", 0, 0),
    ("ppllms", "save_pruned", 0, 300_000),
    ("ppllms", "result.json", 1, 0),
    ("alp_prune", "save", 1, 0),
    ("alp_prune", "write", 0, 0),  # the gradients
    ("alp_prune", "write", 1, 0),
    ("alp_prune", "write", 4, 0),
    ("alp_prune", "result.json", 0, 0),
    ("alp_prune", "save_weights", 0, 300_000),
    ("save_gradient", "save", 0, 0),
    ("save_gradient", "save", 2, 4096),
    ("save_gradient", "write", 0, 0),
]


@pytest.mark.parametrize("name, step, which, left", FULL_AT)
def test_a_full_disk_is_told_and_with_more_room_the_run_goes_on(
    commands, name, step, which, left, tmp_path, disk, capsys
):
    asked, folder = commands[name], disk.folder / "here"
    _, whole = asked.run(tmp_path / "whole")
    at = [number for number, kind in enumerate(whole.steps) if kind == step][which]
    before: dict[str, bytes] = {}

    def fill() -> None:
        before.update(files_of(folder))
        disk.fill(left)

    capsys.readouterr()
    status, stopped = asked.run(folder, at=at, act=fill)
    told = capsys.readouterr().err
    assert status == 1 and told.count("\n") == 1 and "no space left to write " in told and "free some" in told, told
    is_nothing = "nothing is finished yet, and the same command starts again\n"
    assert told.endswith(f"what is finished is kept: {GOES_ON}" if at else is_nothing)
    kept = {path: content for path, content in files_of(folder).items() if "state" in path}
    assert not at or before.items() >= kept.items() and any("state.json" in path for path in kept)
    assert not any("partial" in path for path in files_of(folder))
    assert (folder / "out").exists() == ((step, which) == ("result.json", 1))  # the second is after the model
    capsys.readouterr()
    disk.enlarge()
    status, rest = asked.run(folder, "--resume")
    assert status == 0 and asked.found(folder) == asked.found(tmp_path / "whole"), capsys.readouterr().err
    assert len(stopped.work) + len(rest.work) <= len(whole.work) + 1 and not litter_of(folder)


def test_a_disk_that_is_full_from_the_start_is_told(commands, disk, capsys):
    (disk.folder / "here").mkdir()
    disk.fill()
    saving, no_space = commands["ppllms"], (1, "no space left.*free some")
    unsaved = replace(saving, flags=[flag for flag in saving.flags if flag not in ("--save_model", "out")])
    no_room = (2, "MB, and the disk has 0 left")
    for command, (status, problem) in (saving, no_room), (unsaved, no_space), (commands["save_gradient"], no_space):
        assert command.run(disk.folder / "here")[0] == status
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and re.search(problem, told)
        assert not [
            path
            for path in (disk.folder / "here").rglob("*")
            if path.is_file() and path.name not in ("log.txt", "run.json")
        ]


def test_a_file_that_does_not_fit_leaves_the_one_before(disk):
    path = disk.folder / "result.json"
    write_json(path, {"found": 1})
    disk.fill(left=8192)
    with pytest.raises(Exception, match="no space left to write .*result.json; free some, or name a folder on another"):
        write_json(path, {"found": list(range(100_000))})
    assert json.loads(path.read_text()) == {"found": 1} and len(list(disk.folder.iterdir())) == 2


# Out of memory --------------------------------------------------------------------------------------------------------


def limit_batches(monkeypatch, most: int, from_call: int) -> list[int]:
    """From some call on, layers run out of memory with more windows than `most`; the batches that went well."""
    sizes, run_layer, calls = [], Decoder.run_layer, []

    def limited(self, layer, hidden_states, *args):
        calls.append(layer)
        if len(calls) >= from_call and len(hidden_states) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        sizes.append(len(hidden_states))
        return run_layer(self, layer, hidden_states, *args)

    monkeypatch.setattr(Decoder, "run_layer", limited)
    return sizes


def alike(found, other) -> bool:
    """Whether two results are the same but for the last bits of numbers."""
    if isinstance(found, dict):
        return found.keys() == other.keys() and all(alike(found[name], other[name]) for name in found)
    if isinstance(found, list):
        return len(found) == len(other) and all(map(alike, found, other))
    return found == pytest.approx(other, rel=1e-4) if isinstance(found, float) else found == other


@pytest.mark.parametrize("name", KILLED)
@pytest.mark.parametrize("most", [1, 2])
def test_when_memory_runs_out_the_batch_halves_and_the_run_goes_on(commands, name, most, tmp_path, monkeypatch):
    asked = commands[name]
    asked.run(tmp_path / "whole")
    sizes = limit_batches(monkeypatch, most, from_call=6)
    assert asked.run(tmp_path / "run")[0] == 0
    assert max(sizes) > most >= max(sizes[10:])
    (found, _), (expected, _) = asked.found(tmp_path / "run"), asked.found(tmp_path / "whole")
    if name != "save_gradient":
        assert found.pop("batch_size") <= most < expected.pop("batch_size")
    assert alike(found, expected)


@pytest.mark.parametrize(
    "name, owner, function",
    [
        ("sparsegpt", lib.sparsity.layerwise, "prune_group"),
        ("sparsegpt", lib.sparsity.layerwise, "difference"),
        ("sparsegpt", lib.engine.activations, "tail_losses"),
        ("wanda_alp", lib.sensitivity.gradients, "summarize"),
        ("compensated", lib.depth.compensation, "fit"),
        ("compensated", lib.depth.compensation, "difference"),
        ("ppllms", lib.engine.activations, "tail_losses"),
        ("heal", Training, "_accumulate"),
    ],
)
def test_what_no_smaller_batch_helps_is_tried_once_more_when_what_is_cached_is_freed(
    command, name, owner, function, tmp_path, monkeypatch
):
    """At every third call memory runs out, in batches of one window; the results are the same to the bit."""
    asked, calls, original = command(name), [], getattr(owner, function)

    def fails(*args, **options):
        calls.append(function)
        if len(calls) % 3 == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*args, **options)

    assert asked.run(tmp_path / "whole", "--batch_size", 1)[0] == 0
    with monkeypatch.context() as patches:
        patches.setattr(owner, function, fails)
        assert asked.run(tmp_path / "run", "--batch_size", 1)[0] == 0
    assert len(calls) > 2 and asked.found(tmp_path / "run") == asked.found(tmp_path / "whole")


@pytest.mark.parametrize("name", KILLED)
def test_without_memory_for_one_window_it_says_what_to_lower_and_keeps_what_is_finished(
    commands, name, tmp_path, monkeypatch, capsys
):
    asked = commands[name]
    _, whole = asked.run(tmp_path / "whole")
    with monkeypatch.context() as patches:
        sizes = limit_batches(patches, 100, from_call=1000)
        assert asked.run(tmp_path / "counted")[0] == 0
    capsys.readouterr()
    with monkeypatch.context() as patches:
        limit_batches(patches, 0, from_call=len(sizes) * 3 // 4)
        status, stopped = asked.run(tmp_path / "run")
    told = capsys.readouterr().err
    advice = "batches were made smaller where that helps; lower --seqlen (of gradients --grad_seqlen), "
    advice += "use --dtype bfloat16, or (but for healing) --offload cpu or disk"
    assert status == 1 and told.count("\n") == 1 and f"out of memory, though {advice}" in told
    assert told.endswith(f"what is finished is kept: {GOES_ON}")
    status, rest = asked.run(tmp_path / "run", "--resume")
    assert status == 0 and asked.found(tmp_path / "run") == asked.found(tmp_path / "whole")
    assert stopped.work and len(stopped.work) + len(rest.work) <= len(whole.work) + 1
