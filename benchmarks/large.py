"""Every part of the work on one model: seconds, tokens per second, share of the measured matmul peak, peak memory.

    python -m benchmarks.large                # on a GPU the Llama-2 7B shape in bf16; else a small one
    python -m benchmarks.large --layers 4     # fewer layers, for less memory; the others of a deep model cost the same

Weights are random, which changes neither time nor memory. The peak is that of a large square product in the model's
dtype, measured here. The share of it counts the products of the decoder's linears, of attention, of the head, and of
SparseGPT's Hessians, each once: more is not needed. Gradients are in fp32, and measured by its peak.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.common import device, machine, peak_memory, random_llama, seconds
from lib.batching import Batcher, automatic_batch_size, keep_freed_memory
from lib.bi import block_influence
from lib.evaluate import perplexity
from lib.gradients import connection_sensitivity
from lib.linears import input_groups
from lib.model import Decoder
from lib.plan import Plan
from lib.prune import prune_layers
from lib.pruners import Pruner, SparseGpt, Wanda
from lib.search import Sweep, greedy_search
from lib.stream import plan_window_losses

SHAPES = {  # layers, hidden, ffn, vocabulary, heads, windows, seqlen, windows of a search and of an evaluation
    "cuda": (32, 4096, 11008, 32000, 32, 128, 2048, 30, 166),
    "cpu": (8, 512, 1376, 2048, 8, 8, 512, 4, 8),
}
FLAGS = ("layers", "hidden", "ffn", "vocab", "heads", "windows", "seqlen", "search_windows", "eval_windows")
GRADIENT_WINDOWS, GRADIENT_SEQLEN = 10, 64
CANDIDATES, ROUNDS = 10, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, value in zip(FLAGS, SHAPES[device()], strict=True):
        parser.add_argument(f"--{flag}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--dtype", default="bfloat16" if device() == "cuda" else "float32")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--parts", nargs="+", help="only these")
    args = parser.parse_args()
    keep_freed_memory()
    dtype = getattr(torch, args.dtype)
    model = random_llama(args.layers, args.hidden, args.ffn, args.vocab, args.seqlen, args.heads, dtype)
    peak, peak32 = matmul_peak(dtype), matmul_peak(torch.float32)
    print(machine())
    print(
        f"{args.layers} layers of {args.hidden}/{args.ffn}, vocabulary {args.vocab}, {args.dtype}; "
        f"matmul peak {peak / 1e12:.2f} TFLOP/s, {peak32 / 1e12:.2f} in fp32; {args.runs} runs, medians"
    )
    for name, (run, tokens, products) in parts(Decoder(model), args).items():
        if args.parts and name not in args.parts:
            continue
        run()
        taken = [seconds(run) for _ in range(args.runs)]
        middle, needed = statistics.median(taken), products() / (peak32 if name == "gradients" else peak)
        print(
            f"{name:12} {middle:8.2f} s ({min(taken):.2f} - {max(taken):.2f})  {tokens / middle:10,.0f} tokens/s  "
            f"{needed / middle:6.1%} of the peak, floor {needed:7.2f} s  "
            f"{peak_memory(run):8,.0f} MiB beyond the model",
            flush=True,
        )


def matmul_peak(dtype: torch.dtype) -> float:
    """FLOP/s of a large square product."""
    size = 8192 if device() == "cuda" else 2048
    left, right = (torch.randn(size, size, dtype=dtype, device=device()) for _ in range(2))
    torch.mm(left, right)
    fastest = min(seconds(lambda: [torch.mm(left, right) for _ in range(10)]) for _ in range(3))
    return 2 * size**3 * 10 / fastest


def parts(
    decoder: Decoder, args: argparse.Namespace
) -> dict[str, tuple[Callable[[], object], int, Callable[[], float]]]:
    """{part of the work: (what runs it, the tokens it goes over, the floating-point operations that it needs)}"""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, seqlen: int) -> torch.Tensor:
        return torch.randint(0, args.vocab, (count, seqlen), generator=generator)

    windows = draw(args.windows, args.seqlen)
    some, text = draw(args.search_windows, args.seqlen), draw(args.eval_windows, args.seqlen)
    short = draw(GRADIENT_WINDOWS, GRADIENT_SEQLEN)
    size = automatic_batch_size(decoder.device, args.seqlen, decoder.token_bytes)
    groups = input_groups(decoder)
    last = args.layers - 2
    candidates = list(range(max(1, last - CANDIDATES), last))
    attention = 8 * args.hidden**2 + 2 * 2 * args.seqlen / 2 * args.hidden  # products for a token, causal
    ffn, head = 6 * args.hidden * args.ffn, 2 * args.hidden * args.vocab
    layer, layers = attention + ffn, args.layers * (attention + ffn)
    hessians = args.layers * (3 * args.hidden**2 + args.ffn**2)  # for a token; symmetric, so half of them

    def prune(pruner: Pruner) -> None:  # what is pruned already takes as long again
        prune_layers(decoder, groups, pruner, [0.5] * args.layers, windows, Batcher(size))

    def search(rounds: int) -> Sweep:
        sweep = Sweep(decoder, some, Batcher(size))
        greedy_search(sweep, candidates, rounds)
        return sweep

    def products_of_search(rounds: int) -> float:
        """Of a token: each layer once under all the modes of layers below it that some trial has, and the heads."""
        models = search(rounds).asked
        walks = {modes[:end] for modes in models for end in range(1, args.layers + 1)}
        return sum(walk[-1].attention * attention + walk[-1].ffn * ffn for walk in walks) + len(models) * head

    seen, looked = windows.numel(), some.numel()
    passes = 2 * layers - args.layers * 2 * args.hidden * args.ffn - layer  # down_proj is not looked at; the last is
    return {
        "bi": (lambda: block_influence(decoder, windows, Batcher(size)), seen, lambda: seen * layers),
        "round": (partial(search, 1), looked, lambda: looked * products_of_search(1)),
        "search": (partial(search, ROUNDS), looked, lambda: looked * products_of_search(ROUNDS)),
        "gradients": (
            lambda: connection_sensitivity(decoder, short),
            short.numel(),
            lambda: short.numel() * 4 * layers,
        ),
        "wanda": (partial(prune, Wanda()), seen, lambda: seen * passes),
        "sparsegpt": (partial(prune, SparseGpt()), seen, lambda: seen * (passes + hessians)),
        "perplexity": (
            lambda: perplexity(plan_window_losses(decoder, Plan(args.layers), Batcher(size)), text),
            text.numel(),
            lambda: text.numel() * (layers + head),
        ),
    }


if __name__ == "__main__":
    main()
