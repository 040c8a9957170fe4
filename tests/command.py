"""Runs a script's command line in this process, or in one that is stopped."""

import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import alp_prune
import ppllms
import save_gradient
from lib.cli.exit_status import run_script

ROOT = Path(__file__).resolve().parents[1]
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


def stopped(script: str, *arguments, at: bytes, kind: signal.Signals) -> tuple[int, bytes]:
    """The status and stderr of a script that is sent a signal once it has printed a line with `at`."""
    command = list(map(str, [sys.executable, ROOT / script, *arguments]))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def listen() -> None:  # to Ctrl-C, which is ignored in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, **pipes, preexec_fn=listen) as process:
        try:
            assert any(at in line for line in process.stdout), process.stderr.read()
            process.send_signal(kind)
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, told
