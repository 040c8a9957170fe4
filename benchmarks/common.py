"""Shared by the benchmarks: random models of a given shape, and measurements of time and memory."""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers

from lib.runtime.memory import release_memory

VOCABULARY = 2048  # tokens; for models whose head does not matter


def random_llama(
    layers: int,
    hidden: int,
    ffn: int,
    vocab: int = VOCABULARY,
    context: int = 2048,
    heads: int = 8,
    dtype=torch.float32,
) -> torch.nn.Module:
    """A Llama with random weights, on the accelerator if there is one."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
    )
    with torch.device(device()):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def add_shape_flags(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Adds integer flags with defaults, such as the sizes of a model and its windows."""
    for flag, value in defaults.items():
        parser.add_argument(f"--{flag}", type=int, default=value, help=f"default: {value}")


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, with the accelerator's work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds of one call, and its peak memory in MiB beyond what was in use before.

    Memory is that of the accelerator's allocator, or without one that of this process.
    """
    release_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        taken = seconds(function)
        most = torch.cuda.max_memory_allocated()
        release_memory()  # for the processes that run next
        return taken, (most - before) / 2**20
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = _status("VmRSS")
    taken = seconds(function)
    return taken, _status("VmHWM") - before


def peak_memory(function: Callable[[], object]) -> float:
    """Peak memory of a call in MiB, beyond what was in use before."""
    return measure(function)[1]


def _status(field: str) -> float:
    """A field of /proc/self/status, in MiB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))


def side_by_side(functions: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Times several functions in turn, after one warm-up round: {name: seconds of each run}."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(runs + 1):
        for name, function in functions.items():
            taken = seconds(function)
            if number:
                times[name].append(taken)
    return times


def spread(values: list[float], unit: str = "") -> str:
    """`median (min - max)`."""
    return f"{statistics.median(values):.2f}{unit} ({min(values):.2f} - {max(values):.2f})"


def machine() -> str:
    """One line on the device and the library versions."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{device()} ({name}), {torch.get_num_threads()} threads, {versions}"
