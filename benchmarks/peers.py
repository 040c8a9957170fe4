"""Peers: other tools that prune the same model, each in its own process that waits for commands. Both ends of the pipe.

A separate process has the library versions of the tool and glibc's default settings.
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

Masks = dict[str, torch.Tensor]  # {name of a linear within the layers, such as "0.mlp.up_proj": True where pruned}
Prune = Callable[..., object]  # (model, tokenizer, windows (N, T), method, sparsity)


def give(folder: Path, model: transformers.PreTrainedModel, windows: torch.Tensor, tokenizer) -> None:
    """Writes the model, tokenizer and windows for the peers into a folder."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")  # some require one without using it
    save_file({"windows": windows}, folder / "windows.safetensors")


class Peer:
    """The parent's end: starts the other process and tells it what to prune."""

    def __init__(self, python: str, module: str, folder: Path, *flags: str):
        self._masks, self._stderr = (folder / f"{module}{''.join(flags)}.{end}" for end in ("masks", "log"))
        with self._stderr.open("w") as output:
            self._process = subprocess.Popen(
                [python, "-m", module, str(folder), str(self._masks), *flags],
                cwd=Path(__file__).resolve().parents[1],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        self.versions = self._answer()

    def prune(self, method: str, sparsity: float) -> tuple[float, float]:
        """Seconds and MiB beyond the model of one run."""
        with suppress(BrokenPipeError):  # `_answer` reports it
            print(method, sparsity, file=self._process.stdin, flush=True)
        taken, memory = self._answer().split()
        return float(taken), float(memory)

    def masks(self) -> Masks:
        """The masks of the last run."""
        return {name: mask.bool() for name, mask in load_file(self._masks).items()}

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        answer = self._process.stdout.readline().strip()
        if not answer:
            status, output = self._process.wait(), "".join(self._stderr.read_text().splitlines(keepends=True)[-5:])
            raise SystemExit(f"{' '.join(self._process.args)}: ended with status {status}\n{output}")
        return answer


def serve(prune: Prune, modules: Sequence[str]) -> None:
    """The child's end: loads the model, then prunes it from its dense weights once for each line of stdin.

    Reports the versions of `modules`.
    """
    folder, masks, answers = Path(sys.argv[1]), sys.argv[2], os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # sends what the tool prints to stderr, away from the answers
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
