"""Runs a script's command line in this process, or in one of its own that can be stopped."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import torch

import alp_prune
import ppllms
import save_gradient
from lib.cli.exit_status import run_script

ROOT = Path(__file__).resolve().parents[1]
DIFFERS = {"seconds", "tokens_per_second", "prune_seconds", "peak_memory_bytes", "environment"}  # from run to run
GOES_ON = "the same command with --resume goes on\n"


def run(*arguments, monkeypatch, script=ppllms) -> int:
    """The exit status of a script, ppllms.py unless another is given, run in this process."""
    program = Path(script.__file__).name
    monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
    return run_script(program, script.main)


def gradient_path(model: Path, text: Path) -> Path:
    """Where the sensitivities of the tests' runs are kept: by last parts of paths, and digests of the whole."""
    names = [f"{path.name}-{sha256(str(path.resolve()).encode()).hexdigest()[:6]}" for path in (model, text)]
    return Path(f"gradients/{names[0]}-l2-3x16-last-{names[1]}-seed0.json")


def run_alp(*arguments, monkeypatch) -> int:
    return run(*arguments, monkeypatch=monkeypatch, script=alp_prune)


def run_gradient(*arguments, monkeypatch) -> int:
    return run(*arguments, monkeypatch=monkeypatch, script=save_gradient)


_NOTHING: Mapping[str, str] = {}
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    "alp_prune ppllms save_gradient lib.depth.run lib.depth.searches lib.runs.grid lib.sensitivity.run "
    "lib.sparsity.run lib.sparsity.pruners transformers.models.llama.modeling_llama accelerate datasets "
    "matplotlib.pyplot".split()
)


class Started:
    """A script in a process of its own, forked from one that has imported all that it needs.

    It behaves like the script started by Python, but for the seconds that the imports take.
    """

    def __init__(self, script: str, *arguments, folder: Path | None = None, environment: Mapping[str, str] = _NOTHING):
        pipes = [_SERVER.Pipe(duplex=False) for _ in range(2)]
        words, ends = list(map(str, arguments)), [theirs for _, theirs in pipes]
        given = script, words, folder or Path.cwd(), {**os.environ, **environment}
        self._process = _SERVER.Process(target=_be_script, args=(*given, *ends))
        self._process.start()
        for end in ends:
            end.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(ours.fileno()), "rb") for ours, _ in pipes)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        """Waits for the end; what the script then has written, as far as it was not read, which must fit a pipe.

        Raises `subprocess.TimeoutExpired` after some seconds.
        """
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0)
        return self.stdout.read(), self.stderr.read()

    def send_signal(self, kind: signal.Signals) -> None:
        assert self._process.pid
        os.kill(self._process.pid, kind)

    def kill(self) -> None:
        self._process.kill()


def _be_script(script: str, arguments: list[str], folder: Path, environment: dict[str, str], out, err) -> None:
    """What a forked process does."""
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    os.chdir(folder)
    os.environ.clear()  # of what the server had as it started
    os.environ |= environment
    sys.argv = [script, *arguments]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import_module(Path(script).stem).command()


def stopped(script: str, *arguments, at: bytes, kind: signal.Signals) -> tuple[int, bytes]:
    """The status and stderr of a script that is sent a signal once it has printed a line with `at`."""
    process = Started(script, *arguments)
    try:
        assert any(at in line for line in process.stdout), process.stderr.read()
        process.send_signal(kind)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode is not None
    return process.returncode, told
