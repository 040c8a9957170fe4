"""Other tools that prune the same model, each in a process of its own that waits while we work: both ends of the talk.

A process of its own has the library versions of the tool, and the C library's settings as they come.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.common import device, measure

Masks = dict[str, torch.Tensor]  # by the name of a linear within the decoder's layers, such as "0.mlp.up_proj"
Prune = Callable[..., object]  # model, tokenizer, windows (N, T), method, sparsity


def give(folder: Path, model: transformers.PreTrainedModel, windows: torch.Tensor, tokenizer) -> None:
    """Puts what the peers work on into a folder."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")  # some want one, and do not use it
    save_file({"windows": windows}, folder / "windows.safetensors")


class Peer:
    """The other process, which prunes when it is told to."""

    def __init__(self, python: str, module: str, folder: Path, *flags: str):
        self._masks, self._told = (folder / f"{module}{''.join(flags)}.{end}" for end in ("masks", "log"))
        with self._told.open("w") as told:
            self._process = subprocess.Popen(
                [python, "-m", module, str(folder), str(self._masks), *flags],
                cwd=Path(__file__).resolve().parents[1],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=told,
                text=True,
            )
        self.versions = self._answer()

    def prune(self, method: str, sparsity: float) -> tuple[float, float]:
        """Seconds, and MiB beyond the model, of one run."""
        with suppress(BrokenPipeError):  # told below
            print(method, sparsity, file=self._process.stdin, flush=True)
        taken, memory = self._answer().split()
        return float(taken), float(memory)

    def masks(self) -> Masks:
        """What the last run pruned."""
        return {name: mask.bool() for name, mask in load_file(self._masks).items()}

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        answer = self._process.stdout.readline().strip()
        if not answer:
            status, told = self._process.wait(), "".join(self._told.read_text().splitlines(keepends=True)[-5:])
            raise SystemExit(f"{' '.join(self._process.args)}: ended with status {status}\n{told}")
        return answer


def serve(prune: Prune, modules: Sequence[str]) -> None:
    """Loads the model in the folder of the command line, and prunes it anew as often as stdin says.

    `modules` are those whose versions matter.
    """
    folder, masks, answers = Path(sys.argv[1]), sys.argv[2], os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the tool prints is no answer
    versions = [f"{name} {importlib.import_module(name).__version__}" for name in modules]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto").to(device())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    windows = load_file(folder / "windows.safetensors")["windows"]
    linears = {name: m for name, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    dense = {name: linear.weight.detach().cpu().clone() for name, linear in linears.items()}
    print(", ".join(versions), file=answers, flush=True)
    for line in sys.stdin:
        method, sparsity = line.split()
        with torch.no_grad():
            for name, linear in linears.items():
                linear.weight.copy_(dense[name])
        taken, memory = measure(lambda ask=(method, float(sparsity)): prune(model, tokenizer, windows, *ask))
        save_file({name: (linear.weight == 0).to(torch.uint8).cpu() for name, linear in linears.items()}, masks)
        print(taken, memory, file=answers, flush=True)
