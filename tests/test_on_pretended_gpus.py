"""The scripts on GPUs that are not there: all of `tests/cases_on_pretended_gpus.py`, in a process of their own."""

import shutil
import subprocess
import sys

import pytest
import torch

from tests.command import ROOT

if not shutil.which("g++") or torch.version.cuda:
    pytest.skip("needs g++, and a build of torch without CUDA", allow_module_level=True)


@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_scripts_run_on_pretended_gpus(marked):
    from tests.pretend_cuda import environment

    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-m", marked, "--tb=short"]
    done = subprocess.run(
        [*command, "tests/cases_on_pretended_gpus.py"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_what_mixes_devices_raises_as_on_a_gpu():
    code = (
        "import torch\n"
        "from tests.pretend_cuda import pretend_cuda\n"
        "def refused(function):\n"
        "    try: function()\n"
        "    except (RuntimeError, TypeError) as error: return str(error)\n"
        "with pretend_cuda(2, limit=2**20) as gpus:\n"
        "    x, y = torch.ones(4, 4, device='cuda'), torch.ones(4, 4)\n"
        "    assert 'same device' in refused(lambda: x + y) and 'same device' in refused(lambda: x @ y.to('cuda:1'))\n"
        "    assert 'numpy' in refused(x.numpy)\n"
        "    assert 'out of memory' in refused(lambda: torch.ones(2**19, device='cuda:1'))\n"
        "    assert 'ordinal' in refused(lambda: x.to('cuda:2'))\n"
        "    assert (x + 1).device.type == 'cuda' and (x + torch.tensor(1.0)).sum().item() == 32\n"
        "    assert torch.equal(x.cpu(), y) and gpus.waits['equal', 'elsewhere'] == 0 and gpus.held[0] == 64\n"
        "    w = torch.ones(4, device='cuda', requires_grad=True); (w * x).sum().backward()\n"
        "    assert w.grad.device.type == 'cuda' and w.grad.tolist() == [4.0] * 4\n"
    )
    from tests.pretend_cuda import environment

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
