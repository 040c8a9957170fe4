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

from benchmarks.common import add_shape_flags, device, machine, peak_memory, random_llama, seconds
from lib.batching import Batcher, automatic_batch_size, keep_freed_memory
from lib.bi import block_influence
from lib.evaluate import perplexity
from lib.gradients import connection_sensitivity
from lib.linears import input_groups
from lib.model import Decoder
from lib.plan import Plan
from lib.prune import prune_layers
from lib.pruners import Pruner, SparseGpt, Wanda
from lib.search import greedy_search
from lib.stream import plan_window_losses
from lib.sweep import Modes, Sweep

SHAPES = {  # layers, hidden, ffn, vocabulary, heads, windows, seqlen, windows of a search and of an evaluation
    "cuda": (32, 4096, 11008, 32000, 32, 128, 2048, 30, 166),
    "cpu": (8, 512, 1376, 2048, 8, 8, 512, 4, 8),
}
FLAGS = ("layers", "hidden", "ffn", "vocab", "heads", "windows", "seqlen", "search_windows", "eval_windows")
GRADIENT_WINDOWS, GRADIENT_SEQLEN = 10, 64
CANDIDATES, ROUNDS = 10, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_flags(parser, **dict(zip(FLAGS, SHAPES[device()], strict=True)), runs=3)
    parser.add_argument("--dtype", default="bfloat16" if device() == "cuda" else "float32")
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


class Need:
    """The floating-point operations of one token that a part of the work cannot do without."""

    def __init__(self, args: argparse.Namespace):
        self.attention = 8 * args.hidden**2 + 2 * 2 * args.seqlen / 2 * args.hidden  # causal
        self.ffn, self.head = 6 * args.hidden * args.ffn, 2 * args.hidden * args.vocab
        layer, down = self.attention + self.ffn, 2 * args.hidden * args.ffn
        self.layers = args.layers * layer
        self.passes = 2 * self.layers - args.layers * down - layer  # one ends before `down`, one before the last layer
        self.hessians = args.layers * (3 * args.hidden**2 + args.ffn**2)  # symmetric, so half of them

    def search(self, models: set[Modes]) -> float:
        """Each layer once under all the modes of layers below it that some model has, and the heads."""
        walks = {modes[:end] for modes in models for end in range(1, len(modes) + 1)}
        layers = sum(walk[-1].attention * self.attention + walk[-1].ffn * self.ffn for walk in walks)
        return layers + len(models) * self.head


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

    def prune(pruner: Pruner) -> None:  # what is pruned already takes as long again
        prune_layers(decoder, groups, pruner, [0.5] * args.layers, windows, Batcher(size))

    def search(rounds: int) -> Sweep:
        sweep = Sweep(decoder, some, Batcher(size))
        greedy_search(sweep, candidates, rounds)
        return sweep

    need = Need(args)
    seen, looked = windows.numel(), some.numel()
    return {
        "bi": (lambda: block_influence(decoder, windows, Batcher(size)), seen, lambda: seen * need.layers),
        "round": (partial(search, 1), looked, lambda: looked * need.search(search(1).asked)),
        "search": (partial(search, ROUNDS), looked, lambda: looked * need.search(search(ROUNDS).asked)),
        "gradients": (
            lambda: connection_sensitivity(decoder, short),
            short.numel(),
            lambda: short.numel() * 4 * need.layers,
        ),
        "wanda": (partial(prune, Wanda()), seen, lambda: seen * need.passes),
        "sparsegpt": (partial(prune, SparseGpt()), seen, lambda: seen * (need.passes + need.hessians)),
        "perplexity": (
            lambda: perplexity(plan_window_losses(decoder, Plan(args.layers), Batcher(size)), text),
            text.numel(),
            lambda: text.numel() * (need.layers + need.head),
        ),
    }


if __name__ == "__main__":
    main()
