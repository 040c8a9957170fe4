"""Commands that can be stopped at each of the steps that they keep."""

from collections.abc import Callable

import pytest

import alp_prune
import lib.heal.__main__
import ppllms
import save_gradient
from tests.command import run
from tests.runs.interruption import RUNS, Command

FEW = ["--eval_windows", 8]  # enough to stop between them


@pytest.fixture
def depth(tiny_folder, text_file, monkeypatch) -> Callable[..., Command]:
    model = ["--model_name", tiny_folder, "--eval_datasets", text_file, *FEW, "--save_model", "out"]
    text = ["--dataset", text_file, "--nsamples", 3]
    return lambda *flags: Command(ppllms, [*model, *(text if "random" not in flags else []), *flags], monkeypatch)


@pytest.fixture
def alp(tiny_folder, text_file, monkeypatch) -> Callable[..., Command]:
    text = ["--calibration_dataset", text_file, "--dataset", text_file, "--nsamples", 4]
    flags = ["--model", tiny_folder, *text, *FEW, "--sparsity_ratio", 0.5, "--save_model", "out"]
    return lambda *more: Command(alp_prune, [*flags, *more], monkeypatch)


@pytest.fixture
def gradient(tiny_folder, text_file, monkeypatch) -> Callable[..., Command]:
    flags = ["--model", tiny_folder, "--dataset", text_file, "--ngrad", 3, "--grad_seqlen", 16]
    return lambda *more: Command(save_gradient, [*flags, *more], monkeypatch)


@pytest.fixture
def heal(tiny_folder, text_file, tmp_path_factory, monkeypatch) -> Callable[..., Command]:
    folder = tmp_path_factory.mktemp("pruned")
    text = ["--eval_datasets", text_file, "--dataset", text_file, "--nsamples", 3]
    prune = ["--model_name", tiny_folder, *text, *FEW, "--prune_rate", 0.1, "--output_dir", folder / "run"]
    assert run(*prune, "--save_model", folder / "model", monkeypatch=monkeypatch) == 0
    flags = ["--model", folder / "model", *text, *FEW, "--save_model", "out", "--train_batch_size", 1]
    return lambda *more: Command(lib.heal.__main__, [*flags, *more], monkeypatch)


@pytest.fixture
def command(request) -> Callable[[str], Command]:
    def of(name: str) -> Command:
        kind, flags = RUNS[name]
        return request.getfixturevalue(kind)(*flags)

    return of
