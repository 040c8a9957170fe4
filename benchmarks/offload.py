"""Peak memory and seconds of runs on a resident model, and on one with offloaded layers.

    python -m benchmarks.offload                      # a random Llama of 1.6 GB
    python -m benchmarks.offload --limit 900          # in a control group limited to 900 MiB (as root)

Each run is a command of the scripts in its own process: depth pruning (Block Influence, greedy search) or Wanda, then
perplexity and saving. Memory is the peak of the process's anonymous memory. Mapped pages of files come on top, as far
as the system has room for them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lib.config.sources import ModelSource
from lib.models.loading import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DEPTH = ["--mha_remove_layers", "2", "--ffn_remove_layers", "4", "--eval_datasets", "demo", "--dataset", "demo"]
SPARSITY = ["--prune_method", "wanda", "--calibration_dataset", "demo", "--dataset", "demo"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8, help="calibration windows (default: 8)")
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--modes", nargs="+", choices=["none", "cpu", "disk"], default=["none", "cpu", "disk"])
    parser.add_argument("--limit", type=int, help="MiB of memory that a process may take (as root)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = make_model(Path(folder) / "model", args.layers, args.hidden)
        text = Path(folder) / "text.txt"  # short, for a quick evaluation
        text.write_text(("The layer was removed, and nothing changed. " * 40 + "\n") * args.windows)
        print(
            f"random Llama, {args.layers} layers, hidden {args.hidden}: {size / 2**20:,.0f} MiB of weights, fp32, CPU"
        )
        for tool in ("ppllms.py", "alp_prune.py"):
            for mode in args.modes:
                tell(tool, mode, args, Path(folder), text)


def make_model(folder: Path, layers: int, hidden: int) -> int:
    """Writes a random Llama with the demo's tokenizer; returns the bytes of its weights."""
    tokenizer = load_tokenizer(ModelSource("demo"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=512,
        )
    )
    model.save_pretrained(folder, max_shard_size="500MB")
    tokenizer.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def tell(tool: str, mode: str, args: argparse.Namespace, folder: Path, text: Path) -> None:
    """Runs one script with one offload mode; prints peak memory, seconds and perplexity."""
    name, output = f"{tool}-{mode}", folder / f"{tool}-{mode}"
    flags = DEPTH if tool == "ppllms.py" else SPARSITY
    flags = [str(text) if flag == "demo" else flag for flag in flags]
    model = ["--model_name" if tool == "ppllms.py" else "--model", str(folder / "model")]
    sizes = ["--nsamples", str(args.windows), "--seqlen", str(args.seqlen), "--batch_size", "4"]
    places = ["--offload", mode, "--output_dir", str(output), "--save_model", str(output / "model")]
    command = [sys.executable, str(ROOT / tool), *model, *flags, *sizes, *places]
    start = time.perf_counter()
    status, peak, last = watch(command, args.limit)
    seconds = time.perf_counter() - start
    if status:
        print(f"{name:<20} not possible: {last}")
        return
    result = json.loads((output / "result.json").read_text())
    pruned = list(result["perplexity"].values())[0]["pruned"]
    print(f"{name:<20} peak {peak / 2**20:6,.0f} MiB, {seconds:5.0f} s, perplexity {pruned!r}", flush=True)


def watch(command: list[str], limit: int | None) -> tuple[int, int, str]:
    """Exit status of a process, its peak anonymous memory in bytes, and its last line on stderr."""
    group = control_group(limit) if limit else None
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: group and (group / "cgroup.procs").write_text(str(os.getpid())),
    )
    peak, watched, is_over = 0, psutil.Process(process.pid), threading.Event()

    def sample() -> None:
        nonlocal peak
        while not is_over.wait(0.02):
            try:
                peak = max(peak, sum(one.anonymous + one.swap for one in watched.memory_maps()))
            except (psutil.Error, OSError):
                return

    sampler = threading.Thread(target=sample)
    sampler.start()
    _, output = process.communicate()
    is_over.set()
    sampler.join()
    if group:
        group.rmdir()
    lines = output.strip().splitlines() or [f"killed by signal {-process.returncode}"]
    return process.returncode, peak, lines[-1]


def control_group(limit: int) -> Path:
    """Creates a control group with a memory limit in MiB, page cache included."""
    root, name = Path("/sys/fs/cgroup"), "memory.max"
    if (root / "memory").is_dir():  # version 1
        root, name = root / "memory", "memory.limit_in_bytes"
    group = root / f"benchmark-{os.getpid()}"
    group.mkdir()
    (group / name).write_text(str(limit * 2**20))
    return group


if __name__ == "__main__":
    main()
