"""Other tools that prune the same model, each in a process of its own that waits while we work: both ends of the talk.

A process of its own has the library versions, and the settings of the C library, that the tool's users have.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.common import device, measure

Masks = dict[str, torch.Tensor]  # by the name of a linear within the decoder's layers, such as "0.mlp.up_proj"
Prune = Callable[[torch.nn.Module, torch.Tensor, str, float], object]  # model, windows (N, T), method, sparsity


def give(folder: Path, model: transformers.PreTrainedModel, windows: torch.Tensor, tokenizer) -> None:
    """Puts what the peers work on into a folder."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")  # some want one, and do not use it
    save_file({"windows": windows}, folder / "windows.safetensors")


class Peer:
    """The other process, which prunes when it is told to."""

    def __init__(self, python: str, module: str, folder: Path):
        self._folder = folder
        self._process = subprocess.Popen(
            [python, "-m", module, str(folder)],
            cwd=Path(__file__).resolve().parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.versions = self._ask()

    def prune(self, method: str, sparsity: float) -> tuple[float, float]:
        """Seconds, and MiB beyond the model, of one run."""
        print(method, sparsity, file=self._process.stdin, flush=True)
        taken, memory = self._ask().split()
        return float(taken), float(memory)

    def masks(self) -> Masks:
        """What the last run pruned."""
        return {name: mask.bool() for name, mask in load_file(self._folder / _mask_file(self.versions)).items()}

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _ask(self) -> str:
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise SystemExit(f"{' '.join(self._process.args)}: ended with status {self._process.wait()}")
        return answer


def serve(prune: Prune, modules: Sequence[str]) -> None:
    """Loads the model in the folder of the command line, and prunes it anew as often as stdin says.

    `modules` are those whose versions matter.
    """
    folder, answers = Path(sys.argv[1]), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the tool prints is no answer
    versions = ", ".join(f"{name} {importlib.import_module(name).__version__}" for name in modules)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto").to(device())
    windows = load_file(folder / "windows.safetensors")["windows"]
    linears = {name: m for name, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    dense = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    print(versions, file=answers, flush=True)
    for line in sys.stdin:
        method, sparsity = line.split()
        with torch.no_grad():
            for name, linear in linears.items():
                linear.weight.copy_(dense[name])
        taken, memory = measure(lambda ask=(method, float(sparsity)): prune(model, windows, *ask))
        masks = {name: (linear.weight == 0).to(torch.uint8) for name, linear in linears.items()}
        save_file(masks, folder / _mask_file(versions))
        print(taken, memory, file=answers, flush=True)


def _mask_file(versions: str) -> str:
    return f"masks of {versions}.safetensors"
