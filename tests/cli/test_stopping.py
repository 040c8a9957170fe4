"""Ctrl-C is one line and status 130 wherever it comes, and a package that is missing or does not fit is one line."""

import os
import signal
import subprocess
import sys
import time

import pytest

from lib.cli.exit_status import run_script
from lib.errors import PACKAGES, RunError, describe_failure
from tests.command import ROOT

SLOW = """
import os, time
open(os.environ["READY"], "w").close()
{meanwhile}
"""
IN_PYTHON = "for _ in range(600): time.sleep(0.05)"
IN_AN_EXTENSION = """
import ctypes
callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(lambda *_: time.sleep(0.05) or 0)
for _ in range(600):  # an exception in the callback would be printed and lost
    ctypes.CDLL(None).qsort((ctypes.c_int * 2)(2, 1), 2, 4, callback)
"""


def listen() -> None:
    """Before a script starts: a job in the background of a shell ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("meanwhile", [IN_PYTHON, IN_AN_EXTENSION], ids=["python", "extension"])
@pytest.mark.parametrize("script", ["ppllms.py", "alp_prune.py", "save_gradient.py"])
def test_ctrl_c_while_packages_are_imported_is_one_line(script, meanwhile, tmp_path):
    (tmp_path / "torch.py").write_text(SLOW.format(meanwhile=meanwhile))
    ready = tmp_path / "ready"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "READY": str(ready)}

    command, pipe = [sys.executable, ROOT / script], subprocess.PIPE
    with subprocess.Popen(command, env=environment, stderr=pipe, cwd=tmp_path, preexec_fn=listen) as process:
        while not ready.exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=60)[1].decode()
    assert (process.returncode, told) == (130, f"{script}: stopped\n")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["ready", "torch.py"]


@pytest.mark.parametrize("script", ["ppllms", "alp_prune", "save_gradient"])
def test_ctrl_c_while_a_script_imports_its_own_modules_is_one_line(script, tmp_path):
    """Which a module of argparse's name stands for, as it is the first that all of them import."""
    (tmp_path / "argparse.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    installed = tmp_path / script.replace("_", "-")  # as pip writes it
    installed.write_text(f"from {script} import command\ncommand()\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    for program in (ROOT / f"{script}.py", installed):
        command, options = [sys.executable, program], {"env": environment, "capture_output": True, "text": True}
        done = subprocess.run(command, **options, preexec_fn=listen)
        assert (done.returncode, done.stderr) == (130, f"{program.name}: stopped\n")


def test_scripts_that_are_imported_leave_ctrl_c_as_it_is():
    check = "import ppllms, alp_prune, save_gradient, signal; print(signal.getsignal(signal.SIGINT).__name__)"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, preexec_fn=listen)
    assert done.stdout == "default_int_handler\n"


def test_a_run_that_is_stopped_ends_with_the_status_of_an_interrupt(capsys):
    def main() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise RunError("stopped; 2 cells are kept") from error

    assert run_script("x.py", main) == 130
    assert capsys.readouterr().err == "x.py: stopped; 2 cells are kept\n"


# Packages -------------------------------------------------------------------------------------------------------------


def test_the_packages_are_those_of_the_requirements():
    required = [line.partition(">")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert sorted(required) == sorted(PACKAGES)


@pytest.mark.parametrize(
    "package, content, words",
    [
        *((package, None, "is not installed") for package in ("torch", "transformers", "safetensors")),
        ("safetensors", "", "does not fit this program"),
    ],
)
def test_a_package_that_is_missing_or_too_old_is_one_line_with_the_command(package, content, words, tmp_path):
    """Too old: without what is imported from it."""
    refusal = f"raise ModuleNotFoundError('No module named {package}', name='{package}')\n"
    (tmp_path / f"{package}.py").write_text(refusal if content is None else content)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / "ppllms.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    told = done.stderr
    assert done.returncode == 1 and told.count("\n") == 1, told
    assert told.startswith(f"ppllms.py: failed: the package {package} {words}")
    assert told.endswith("pip install -r requirements.txt -c constraints.txt\n")


def test_a_library_that_names_the_missing_package_in_its_cause_is_understood():
    missing = ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers")
    error = ModuleNotFoundError("Could not import module 'X'. Are this object's requirements defined correctly?")
    error.__cause__ = missing
    assert "the package tokenizers is not installed" in describe_failure(error)


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'lib.nothing'", name="lib.nothing"),
        ModuleNotFoundError("No module named 'somewhere'", name="somewhere"),
        ImportError("cannot import name 'x' from 'lib.errors'", name="lib.errors"),
        ImportError("no name"),
    ],
)
def test_a_module_that_is_missing_by_our_fault_stays_a_traceback(error):
    assert describe_failure(error) is None
