"""The side of `benchmarks.peers` that runs in llm-compressor's environment: prunes as it is told on stdin."""

import ctypes
import gc
import os
import sys
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


def prune(model, tokenizer, windows: torch.Tensor, method: str, sparsity: float) -> None:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    modifier = {"Wanda": WandaPruningModifier, "SparseGPT": SparseGPTModifier}[method]
    rows = [{"input_ids": window[None], "attention_mask": torch.ones_like(window[None])} for window in windows]
    loader = torch.utils.data.DataLoader(rows, batch_size=None)
    recipe = modifier(sparsity=sparsity, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"])
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=loader,
        recipe=recipe,
        pipeline="sequential",
        num_calibration_samples=len(windows),
    )


def status(field: str) -> float:
    """MiB of a field of this process's status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))


def main() -> None:
    folder, answers = Path(sys.argv[1]), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints, from its import on, is no answer
    import llmcompressor

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    windows = load_file(folder / "windows.safetensors")["windows"]
    linears = {name: m for name, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    dense = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    versions = [f"{module.__name__} {module.__version__}" for module in (llmcompressor, torch, transformers)]
    print(", ".join(versions), file=answers, flush=True)
    for line in sys.stdin:
        method, sparsity = line.split()
        with torch.no_grad():
            for name, linear in linears.items():
                linear.weight.copy_(dense[name])
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before, start = status("VmRSS"), time.perf_counter()
        prune(model, tokenizer, windows, method, float(sparsity))
        taken = time.perf_counter() - start
        memory = status("VmHWM") - before
        masks = {name: (linear.weight == 0).to(torch.uint8) for name, linear in linears.items()}
        save_file(masks, folder / "masks.safetensors")
        print(taken, memory, file=answers, flush=True)


if __name__ == "__main__":
    main()
