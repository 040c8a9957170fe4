"""Each step of the work on one model: seconds, tokens per second, the floor and its share, peak memory.

    python -m benchmarks.large                # on a GPU the Llama-2 7B shape in bf16; else a small one
    python -m benchmarks.large --layers 4     # fewer layers, for less memory; all layers cost the same

Weights are random, which changes neither time nor memory. The floor is the larger of two times: the matrix products
(linears, attention, head, Hessians of SparseGPT), each once, at the speed of a large square product in the model's
dtype; and the bytes of weights, inputs and outputs at the speed of a copy. Both speeds are measured here. Gradients
are computed in fp32, after one pass in the model's dtype. Pruning records its layers on a disk, as a run does.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.common import add_shape_flags, device, machine, peak_memory, random_llama, seconds
from benchmarks.floor import Shape, Speeds, hessian_speeds
from lib.config.plan import Plan
from lib.depth.block_influence import block_influence
from lib.depth.greedy import greedy_search
from lib.depth.trial_losses import Modes, Sweep
from lib.engine.window_scores import plan_window_losses
from lib.evaluation.perplexity import perplexity
from lib.models.decoder import Decoder
from lib.models.matrices import input_groups
from lib.models.weight_deltas import Changes
from lib.runtime.batching import Batcher, automatic_batch_size
from lib.runtime.memory import keep_freed_memory
from lib.sensitivity.gradients import connection_sensitivity
from lib.sparsity.layerwise import prune_layers
from lib.sparsity.pruners import Pruner, SparseGpt, Wanda

SHAPES = {  # the defaults of FLAGS, by device
    "cuda": (32, 4096, 11008, 32000, 32, 128, 2048, 30, 166),
    "cpu": (8, 512, 1376, 2048, 8, 8, 512, 4, 8),
}
FLAGS = ("layers", "hidden", "ffn", "vocab", "heads", "windows", "seqlen", "search_windows", "eval_windows")
GRADIENT_WINDOWS, GRADIENT_SEQLEN = 10, 64
CANDIDATES, ROUNDS = 10, 5
PARTS = ("bi", "round", "search", "gradients", "wanda", "sparsegpt", "perplexity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_flags(parser, **dict(zip(FLAGS, SHAPES[device()], strict=True)), runs=3)
    parser.add_argument("--dtype", default="bfloat16" if device() == "cuda" else "float32")
    parser.add_argument("--record", help="folder on the disk where pruned layers are recorded (default: that of /tmp)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these")
    args = parser.parse_args()
    keep_freed_memory()
    dtype = getattr(torch, args.dtype)
    model = random_llama(args.layers, args.hidden, args.ffn, args.vocab, args.seqlen, args.heads, dtype)
    speeds, speeds32 = Speeds.measure(dtype), Speeds.measure(torch.float32)
    print(machine())
    print(f"{args.layers} layers of {args.hidden}/{args.ffn}, vocabulary {args.vocab}; {args.runs} runs, medians")
    print(f"{args.dtype}: {speeds}; float32: {speeds32}")
    asked: set[Modes] = set()
    for name, (run, tokens) in parts(Decoder(model), args, asked).items():
        if name not in args.parts:
            continue
        run()
        taken = [seconds(run) for _ in range(args.runs)]
        middle, floor = statistics.median(taken), floor_of(name, args, tokens, asked, speeds, speeds32)
        print(
            f"{name:12} {middle:8.2f} s ({min(taken):.2f} - {max(taken):.2f})  {tokens / middle:10,.0f} tokens/s  "
            f"floor {floor:7.2f} s, {floor / middle:4.0%}  {peak_memory(run):8,.0f} MiB beyond the model",
            flush=True,
        )


def parts(decoder: Decoder, args: argparse.Namespace, asked: set[Modes]) -> dict[str, tuple[Callable[[], object], int]]:
    """{step: (function that runs it, tokens it processes)}; each search sets `asked` to the models it measured."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, seqlen: int) -> torch.Tensor:
        return torch.randint(0, args.vocab, (count, seqlen), generator=generator)

    windows = draw(args.windows, args.seqlen)
    some, text = draw(args.search_windows, args.seqlen), draw(args.eval_windows, args.seqlen)
    short = draw(GRADIENT_WINDOWS, GRADIENT_SEQLEN)
    size = automatic_batch_size(decoder.device, args.seqlen, decoder.token_bytes)
    groups = input_groups(decoder)
    last = max(1, args.layers - 2)
    candidates = list(range(max(0, last - CANDIDATES), last))
    all_rounds = min(ROUNDS, len(candidates))

    def prune(pruner: Pruner) -> None:  # pruning an already pruned model takes as long
        with TemporaryDirectory(dir=args.record) as folder:
            changes = Changes(Path(folder))
            prune_layers(decoder, groups, pruner, [0.5] * args.layers, windows, Batcher(size), changes=changes)

    def search(rounds: int) -> None:
        sweep = Sweep(decoder, some, Batcher(size))
        greedy_search(sweep, candidates, rounds)
        asked.clear()
        asked.update(sweep.asked)

    losses = plan_window_losses(decoder, Plan(args.layers), Batcher(size))
    return {
        "bi": (lambda: block_influence(decoder, windows, Batcher(size)), windows.numel()),
        "round": (partial(search, 1), some.numel()),
        "search": (partial(search, all_rounds), some.numel()),
        "gradients": (lambda: connection_sensitivity(decoder, short), short.numel()),
        "wanda": (partial(prune, Wanda()), windows.numel()),
        "sparsegpt": (partial(prune, SparseGpt()), windows.numel()),
        "perplexity": (lambda: perplexity(losses, text), text.numel()),
    }


def floor_of(
    part: str, args: argparse.Namespace, tokens: int, asked: set[Modes], speeds: Speeds, speeds32: Speeds
) -> float:
    """The least seconds that a step can take; `asked` are the models that a search measured."""
    shape = Shape.of(args, getattr(torch, args.dtype))
    if part == "gradients":  # a forward pass; then in fp32 each layer's forward again, and its backward at twice that
        short = replace(shape, seqlen=GRADIENT_SEQLEN)
        again = replace(short, itemsize=torch.float32.itemsize).model(tokens) * 3
        return speeds.floor(short.model(tokens)) + speeds32.floor(again)
    if part in ("round", "search"):
        return speeds.floor(shape.search(tokens, asked))
    if part in ("wanda", "sparsegpt"):
        hessians = hessian_speeds(speeds, speeds32).floor(shape.hessians(tokens))
        return speeds.floor(shape.observe_and_advance(tokens)) + hessians * (part == "sparsegpt")
    return speeds.floor(shape.model(tokens) + shape.head(tokens) * (part == "perplexity"))


if __name__ == "__main__":
    main()
