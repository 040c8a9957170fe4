"""Several processes that share a run's windows come to what one process comes to; here two, over gloo on the CPU."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

import alp_prune
import ppllms
import save_gradient
from lib.cli.exit_status import INTERRUPTED
from lib.runtime.distributed import ALONE, Ranks
from tests.command import DIFFERS, Started, run
from tests.runs.interruption import Interruption, files_of

NOT_COMPARED = DIFFERS | {"saved_model", "saved"}
ALIKE = {"OMP_NUM_THREADS": "1"}  # sums depend on the number of threads

pytestmark = pytest.mark.samples  # those of other processes have their whole length


@pytest.fixture
def one(tmp_path, monkeypatch) -> Callable[..., None]:
    """Runs a script as one process, this one."""

    def run_alone(*arguments, script: ModuleType = ppllms, status: int = 0) -> None:
        monkeypatch.chdir(tmp_path)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in `ALIKE`
        try:
            assert run(*arguments, monkeypatch=monkeypatch, script=script) == status
        finally:
            torch.set_num_threads(threads)

    return run_alone


@pytest.fixture
def two(tmp_path) -> Callable[..., str]:
    """Runs a script as two processes, as `torchrun` would start them; gives what they say."""

    def run_both(*arguments, script: ModuleType = ppllms, status: int = 0) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        alike = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        name = Path(script.__file__).name
        ranks = [{**ALIKE, **alike, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        processes = [Started(name, *arguments, folder=tmp_path, environment=rank) for rank in ranks]
        try:
            said = [b"".join(process.communicate(timeout=180)) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [status] * 2, said
        return b"".join(said).decode()

    return run_both


def torchrun(folder: Path, *arguments) -> str:
    """Runs ppllms.py as two processes by `torchrun` itself; gives what they say."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ppllms.__file__]
    command = [sys.executable, *map(str, [*launcher, *arguments])]
    environment = {**os.environ, **ALIKE}
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout + found.stderr


def result_in(folder: Path) -> dict:
    found = json.loads((folder / "result.json").read_text())
    return {name: value for name, value in found.items() if name not in NOT_COMPARED}


@pytest.fixture
def evaluation(tmp_path) -> list:
    """Little of it: 9 windows of each text, and a single prompt."""
    (tmp_path / "prompt.txt").write_text("The layer 3")
    return ["--eval_windows", 9, "--prompts", tmp_path / "prompt.txt"]


@pytest.fixture
def depth(tiny_folder, text_file, evaluation) -> list:
    text = ["--dataset", text_file, "--eval_datasets", text_file, "--nsamples", 7, "--seqlen", 16, "--batch_size", 2]
    return ["--model_name", tiny_folder, *text, *evaluation]


@pytest.fixture
def sparsity(tiny_folder, text_file, evaluation) -> list:
    text = ["--calibration_dataset", text_file, "--dataset", text_file, "--nsamples", 7, "--seqlen", 16]
    return ["--model", tiny_folder, *text, "--batch_size", 2, "--grad_seqlen", 16, *evaluation]


def test_depth_pruning_is_that_of_one_process_to_the_bit(one, two, depth, tmp_path):
    counts = ["--mha_remove_layers", 2, "--ffn_remove_layers", 3]
    one(*depth, *counts, "--output_dir", "one", "--save_model", "m1")
    said = two(*depth, *counts, "--output_dir", "two", "--save_model", "m2")
    assert result_in(tmp_path / "two") == result_in(tmp_path / "one")
    assert files_of(tmp_path / "m1") == files_of(tmp_path / "m2")
    assert said.count("MHA removal layers") == said.count("Samples: ") == 1, "one process speaks"


@pytest.mark.parametrize("nsamples", [1, 7])
def test_the_models_own_text_is_that_of_one_process(one, two, depth, nsamples, tmp_path):
    flags = [*depth, "--dataset", "self", "--nsamples", nsamples, "--prune_rate", 0.1, "--mha_ffn_ratio", 1]
    one(*flags, "--output_dir", "one")
    two(*flags, "--output_dir", "two")
    assert result_in(tmp_path / "two") == result_in(tmp_path / "one")


def test_fewer_windows_than_processes_share_the_trials(one, two, depth, tmp_path):
    flags = [*depth, "--nsamples", 1, "--method", "blockpruner", "--prune_rate", 0.1]
    one(*flags, "--output_dir", "one")
    two(*flags, "--output_dir", "two")
    assert result_in(tmp_path / "two") == result_in(tmp_path / "one")


def test_compensation_is_that_of_one_process(one, two, depth, tmp_path):
    """Sums over windows are added in another order."""
    flags = [*depth, "--method", "random", "--prune_rate", 0.1, "--nsamples", 40, "--compensate", "all"]
    one(*flags, "--output_dir", "one", "--save_model", "m1")
    two(*flags, "--output_dir", "two", "--save_model", "m2")
    weights, others = (load_file(tmp_path / name / "model.safetensors") for name in ("m1", "m2"))
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, atol=1e-4, rtol=1e-3)
    one, two = (result_in(tmp_path / name)["perplexity"].popitem()[1]["compensated"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("method", [pytest.param("wanda_alp", marks=pytest.mark.slow), "sparsegpt_owl", "admm"])
def test_masks_are_those_of_one_process(one, two, method, sparsity, tmp_path):
    """Sums over windows are added in another order: densities to 1e-6, masks all but never another, weights to 1e-4."""
    flags = [*sparsity, "--prune_method", method]
    one(*flags, "--output_dir", "one", "--save_model", "m1", script=alp_prune)
    (tmp_path / "gradients").exists() and (tmp_path / "gradients").rename(tmp_path / "gradients of one")
    two(*flags, "--output_dir", "two", "--save_model", "m2", script=alp_prune)
    results = [result_in(tmp_path / name) for name in ("one", "two")]
    assert results[1]["layer_density"] == pytest.approx(results[0]["layer_density"], abs=1e-6)
    weights, others = (load_file(tmp_path / name / "model.safetensors") for name in ("m1", "m2"))
    different = sum(int(((others[name] == 0) != (weight == 0)).sum()) for name, weight in weights.items())
    assert different <= 1e-3 * sum(weight.numel() for weight in weights.values())
    for name, weight in weights.items():
        kept = (weight != 0) & (others[name] != 0)
        assert torch.allclose(others[name][kept], weight[kept], atol=1e-4), name
    if method == "wanda_alp":
        assert different == 0 and all(torch.equal(others[name], weight) for name, weight in weights.items())
        assert results[0]["perplexity"] == results[1]["perplexity"]
    assert not (tmp_path / "two/state").exists()


def test_sensitivities_are_those_of_one_process(one, two, tiny_folder, text_file, tmp_path):
    flags = ["--model", tiny_folder, "--dataset", text_file, "--ngrad", 70, "--grad_seqlen", 16]
    one(*flags, "--output", "one.json", script=save_gradient)
    two(*flags, "--output", "two.json", script=save_gradient)
    found = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    assert found[0]["fingerprint"] == found[1]["fingerprint"]
    for layer, other in zip(found[0]["layers"], found[1]["layers"], strict=True):
        assert other["layer"] == pytest.approx(layer["layer"], rel=1e-5)


def test_a_grid_and_offloading_work_with_several_processes(one, two, depth, tmp_path):
    flags = depth[: depth.index("--prompts")]  # tables have none
    flags += ["--method", "ppllms", "shortgpt", "--prune_rate", 0.1, "--mha_ffn_ratio", 1, "--offload", "disk"]
    one(*flags, "--output_dir", "one")
    two(*flags, "--output_dir", "two")
    assert (tmp_path / "two/table.md").read_text() == (tmp_path / "one/table.md").read_text()


def test_a_wrong_input_is_told_once_and_a_stopped_run_goes_on(one, two, depth, tmp_path):
    """By `torchrun` itself, which is slow to start, to the same end."""
    flags = [*depth, "--mha_remove_layers", 2, "--ffn_remove_layers", 3]
    assert two(*depth, "--mha_remove_layers", 9, status=2).count("ppllms.py: error: --mha") == 1
    one(*flags, "--output_dir", "one")
    with pytest.MonkeyPatch.context() as patches:
        Interruption(patches, at=("put", 2), is_after=True)
        one(*flags, "--output_dir", "run", status=INTERRUPTED)
    assert torchrun(tmp_path, *flags, "--output_dir", "run", "--resume").count("MHA removal layers") == 1
    assert two(*flags, "--output_dir", "run", "--resume").count("Finished before") == 1
    assert result_in(tmp_path / "run") == result_in(tmp_path / "one")


def test_several_processes_take_no_device_map(depth, monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert run(*depth, "--device_map", "auto", monkeypatch=monkeypatch) == 2
    assert "several processes have a device each" in capsys.readouterr().err


# Shares


@pytest.mark.parametrize("total, unit, count", [(13, 4, 2), (13, 4, 3), (3, 4, 2), (1, 4, 3), (128, 16, 8), (5, 1, 4)])
def test_shares_are_all_windows_once_in_order_at_bounds_of_batches(total, unit, count):
    shares = [Ranks(rank, count).share(total, unit) for rank in range(count)]
    assert [w for share in shares for w in range(total)[share]] == list(range(total))
    if -(-total // unit) >= count:
        assert all(share.start % unit == 0 for share in shares)


def test_alone_everything_is_as_it_was():
    rows = torch.arange(6).view(3, 2)
    assert ALONE.share(13, 4) == slice(0, 13) and torch.equal(ALONE.gather(rows), rows)
    ALONE.add(rows)
    ALONE.send(rows, 0)
    assert torch.equal(rows, torch.arange(6).view(3, 2)) and ALONE.agree(lambda: {"a": 1}) == {"a": 1}
    assert ALONE.tell("x", 0) == "x" and ALONE.is_first
