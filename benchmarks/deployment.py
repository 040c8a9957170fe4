"""What pruning buys: size, memory and speed of a dense model and its pruned versions, in every format and runtime.

    python -m benchmarks.deployment                        # a random Llama of 16 layers 768/2048, a quarter removed
    python -m benchmarks.deployment --layers 32 --hidden 4096 --ffn 11008 --vocab 32000          # on a GPU

Pruning removes a quarter of the parameters as sublayers, counted as in PP-LLMs, or sets half of the weights to zero.
Prefill (the prompt) and decode (token by token) are timed in turn for all models of a runtime, in one process. Ratios
are to the dense model in the same runtime and precision. Peak memory is measured in a separate process, beyond what it
used before loading; on an accelerator it is the allocator's. llama.cpp runs on the CPU, if llama-cpp-python and gguf
are installed.
"""

import argparse
import importlib.util
import multiprocessing
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import device, machine, peak_memory, random_llama, seconds, spread
from lib.config.methods import UNSTRUCTURED, Pattern, parse_pattern
from lib.config.plan import Plan
from lib.config.sources import ModelSource
from lib.depth.budget import choose_counts
from lib.depth.prepare import budget_of
from lib.export.huggingface import save_pruned
from lib.models.decoder import Decoder
from lib.models.loading import load_model
from lib.models.matrices import find_matrices
from lib.runtime.setup import quiet_libraries
from lib.sparsity.pruners import Magnitude
from lib.sparsity.semi_structured_kernels import compressed

KERNELS = "half of the weights zero, 2:4 in torch's kernels"


@dataclass(frozen=True)
class Variant:
    """A saved model and its runtime."""

    name: str
    runtime: str
    path: Path
    parameters: int

    @property
    def megabytes(self) -> float:
        files = [self.path] if self.path.is_file() else self.path.glob("*.safetensors")
        return sum(file.stat().st_size for file in files) / 2**20


# Models ---------------------------------------------------------------------------------------------------------------


def build(folder: Path, args: argparse.Namespace) -> list[Variant]:
    """Saves the dense model and its pruned versions; the dense one of each runtime comes first."""
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    make = partial(random_llama, args.layers, args.hidden, args.ffn, args.vocab, dtype=dtype)
    dense = make()
    total, plan = Decoder(dense).total_parameters, plan_for(Decoder(dense), args.rate)
    left = total - Decoder(dense).removed_parameters(plan)
    print(f"plan: attention {list(plan.mha_removed)}, FFN {list(plan.ffn_removed)}; {1 - left / total:.1%} removed")
    variants = []
    for name, save_format, which in (
        ("dense", "hf", Plan(args.layers)),
        ("sublayers removed (hf)", "hf", plan),
        ("sublayers removed (masked)", "masked", plan),
    ):
        save_pruned(Decoder(make()), which, None, folder / name, save_format)
        variants.append(Variant(name, "transformers", folder / name, left if "(hf)" in name else total))
    name = "half of the weights zero"
    save_pruned(Decoder(with_zeros(make())), Plan(args.layers), None, folder / name)
    variants.append(Variant(name, "transformers", folder / name, total))
    if device() == "cuda":  # with the kernels of alp_prune.py --semi_structured
        save_pruned(Decoder(with_zeros(make(), parse_pattern("2:4"))), Plan(args.layers), None, folder / KERNELS)
        variants.append(Variant(KERNELS, "transformers", folder / KERNELS, total))
    return variants + (build_gguf(folder, dense, plan, total) if has_llama_cpp() else [])


def plan_for(decoder: Decoder, rate: float) -> Plan:
    """Removes as many sublayers as PP-LLMs at that rate, from the layers before the last; weights are random anyway."""
    counts, layers = choose_counts(budget_of(decoder), rate), decoder.num_layers
    chosen = range(layers - 1 - counts.ffn, layers - 1)
    return Plan(layers, tuple(chosen[: counts.mha]), tuple(chosen))


@torch.no_grad()
def with_zeros(model: torch.nn.Module, pattern: Pattern = UNSTRUCTURED) -> torch.nn.Module:
    """The model with half of its weights set to zero, by magnitude."""
    pruner = Magnitude(pattern)
    for layer in find_matrices(Decoder(model)):
        for matrix in layer.values():
            matrix.weight.copy_(pruner.prune([matrix.weight], None, 0.5)[0])
    return model


def has_llama_cpp() -> bool:
    return all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))


def build_gguf(folder: Path, dense: torch.nn.Module, plan: Plan, total: int) -> list[Variant]:
    """GGUF files of the dense model, and the same files pruned by the plan."""
    from lib.export.gguf import apply_plan
    from tests.export.gguf_writer import write_gguf

    variants = []
    for kind in ("F32", "Q8_0"):
        path = write_gguf(dense, folder / f"{kind}.gguf", kind=kind)
        found = apply_plan(path, folder / f"{kind}-pruned.gguf", plan)
        variants.append(Variant(f"dense {kind}", f"llama.cpp {kind}", path, total))
        parameters = total - found.before.parameters + found.after.parameters
        pruned = folder / f"{kind}-pruned.gguf"
        variants.append(Variant(f"sublayers removed {kind}", f"llama.cpp {kind}", pruned, parameters))
    return variants


# Runtimes -------------------------------------------------------------------------------------------------------------


class InTransformers:
    """A model folder in transformers, on the accelerator if there is one."""

    def __init__(self, path: Path, prompt: int, decoded: int):
        self.model = load_model(ModelSource(str(path)))
        if path.name == KERNELS:
            linears = [one.module for layer in find_matrices(Decoder(self.model)) for one in layer.values()]
            self.kernels = ExitStack()  # in use as long as this runner exists
            self.kernels.enter_context(compressed(linears))
        self.ids = torch.randint(3, 100, (1, prompt), device=device())
        self.decoded = decoded

    @torch.no_grad()
    def prefill(self):
        return self.model(input_ids=self.ids, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def decode(self) -> float:
        cache, token = self.prefill(), self.ids[:, -1:]

        def generate() -> None:
            nonlocal token
            for _ in range(self.decoded):
                token = self.model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(dim=-1)

        return seconds(generate)


class InLlamaCpp:
    """A GGUF file in llama.cpp, on the CPU."""

    def __init__(self, path: Path, prompt: int, decoded: int):
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self.model = Llama(
            str(path), n_ctx=prompt + decoded, n_batch=prompt, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.ids = torch.randint(3, 100, (prompt,)).tolist()
        self.decoded = decoded

    def prefill(self) -> None:
        self.model.reset()
        self.model.eval(self.ids)

    def decode(self) -> float:
        self.prefill()
        start = time.perf_counter()
        for _ in range(self.decoded):
            self.model.eval([7])
        return time.perf_counter() - start


def runner(variant: Variant, args: argparse.Namespace):
    kind = InTransformers if variant.runtime == "transformers" else InLlamaCpp
    return kind(variant.path, args.prompt, args.decoded)


# Measuring ------------------------------------------------------------------------------------------------------------


def measure_speed(variants: list[Variant], args: argparse.Namespace) -> dict[str, tuple[list[float], list[float]]]:
    """{variant: (seconds of each prefill, seconds of each decode)}, measured in turn after one warm-up round."""
    runners = {variant.name: runner(variant, args) for variant in variants}
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runners}
    names = list(runners)
    for number in range(args.runs + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:  # so that no variant is always first
            each = runners[name]
            prefill, decode = seconds(each.prefill), each.decode()
            if number:
                found[name][0].append(prefill)
                found[name][1].append(decode)
    return found


def run_once(variant: Variant, args: argparse.Namespace) -> None:
    each = runner(variant, args)
    each.prefill()
    each.decode()


def memory_of(variant: Variant, args: argparse.Namespace) -> float:
    """Peak memory in MiB of loading, one prefill and one decode, in a separate process."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_put_memory, args=(variant, args, results))
    process.start()
    process.join()
    return results.get()


def _put_memory(variant: Variant, args: argparse.Namespace, results) -> None:
    torch.set_num_threads(args.threads)
    quiet_libraries()
    results.put(peak_memory(partial(run_once, variant, args)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("layers", 16), ("hidden", 768), ("ffn", 2048), ("vocab", 8192)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    for flag, default in (("prompt", 512), ("decoded", 32), ("runs", 5), ("threads", torch.get_num_threads())):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=0.25, help="share of the parameters to remove")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quiet_libraries()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        variants = build(Path(folder), args)
        for runtime in dict.fromkeys(variant.runtime for variant in variants):
            report([variant for variant in variants if variant.runtime == runtime], args)


def report(variants: list[Variant], args: argparse.Namespace) -> None:
    """Prints the table of one runtime; its first variant is the dense model."""
    memory = {variant.name: memory_of(variant, args) for variant in variants}
    speed = measure_speed(variants, args)
    dense = speed[variants[0].name]
    print(f"\n{variants[0].runtime}; prompt {args.prompt}, {args.decoded} tokens decoded, {args.runs} runs in turn")
    print("| | parameters | on disk | peak memory | prefill tokens/s | decode tokens/s | prefill | decode |")
    print("|---|---|---|---|---|---|---|---|")
    for variant in variants:
        prefill, decode = speed[variant.name]
        rates = [args.prompt / statistics.median(prefill), args.decoded / statistics.median(decode)]
        ratios = [[a / b for a, b in zip(*times, strict=True)] for times in ((dense[0], prefill), (dense[1], decode))]
        cells = [f"{variant.parameters / 1e6:.1f}M", f"{variant.megabytes:.0f} MiB", f"{memory[variant.name]:.0f} MiB"]
        cells += [f"{rate:.0f}" for rate in rates] + [spread(ratio) for ratio in ratios]
        print(f"| {variant.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
