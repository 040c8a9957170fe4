"""The greedy search: the shared-prefix sweep compared with toggling layers and running the whole model.

    python -m benchmarks.greedy_search                  # the comparison: a narrow 32-layer Llama, candidates 20-29
    python -m benchmarks.greedy_search --growth out.png # time against layers, width, candidates and windows

Both sides run in one process, in turn, on the same model, windows and batch size, and must choose the same layers.
"""

import argparse
import statistics

import torch

from benchmarks.common import VOCABULARY, add_shape_flags, machine, random_llama, seconds, side_by_side, spread
from benchmarks.floor import Shape, Speeds
from lib.config.plan import Plan
from lib.depth.greedy import greedy_search
from lib.depth.trial_losses import Modes, Sweep
from lib.engine.tail import token_losses
from lib.models.decoder import Decoder
from lib.runtime.batching import Batcher
from lib.runtime.memory import keep_freed_memory


@torch.no_grad()
def toggling_search(
    decoder: Decoder, windows: torch.Tensor, candidates: list[int], rounds: int, batch_size: int
) -> list[int]:
    """The method of the reference code: for each candidate of each round, run the whole model on all windows."""
    chosen: list[int] = []
    for _ in range(rounds):
        losses = {}
        for layer in candidates:
            if layer in chosen:
                continue
            decoder.apply(Plan(decoder.num_layers, (*chosen, layer), tuple(candidates)))
            losses[layer] = 0.0
            for batch in windows.to(decoder.device).split(batch_size):
                logits = decoder.model(input_ids=batch, use_cache=False).logits
                losses[layer] += token_losses(logits[:, :-1], batch[:, 1:]).mean(dim=1).sum().item()
        chosen.append(min(losses, key=losses.get))
    decoder.apply(Plan(decoder.num_layers))
    return chosen


def sweep_search(
    decoder: Decoder, windows: torch.Tensor, candidates: list[int], rounds: int, batch_size: int
) -> tuple[list[int], set[Modes]]:
    """The chosen layers, and the models (as modes of their layers) whose losses the search measured."""
    sweep = Sweep(decoder, windows, Batcher(batch_size))
    plan, _ = greedy_search(sweep, candidates, rounds)
    return list(plan.mha_removed), sweep.asked


def compare(args: argparse.Namespace) -> None:
    """Prints the times of both methods, their ratio, and the floor."""
    speeds, shape = Speeds.measure(torch.float32), Shape.of(args, torch.float32)
    decoder = Decoder(random_llama(args.layers, args.hidden, args.ffn, context=args.seqlen))
    windows = torch.randint(0, VOCABULARY, (args.windows, args.seqlen))
    candidates = list(range(args.first, args.first + args.candidates))
    problem = (decoder, windows, candidates, args.rounds, args.batch_size)
    chosen, asked = {}, set()

    def sweep() -> None:
        nonlocal asked
        chosen["sweep"], asked = sweep_search(*problem)

    times = side_by_side(
        {
            "toggling": lambda: chosen.update(toggling=toggling_search(*problem)),
            "sweep": sweep,
        },
        args.runs,
    )
    print(f"{args.layers} layers of {args.hidden}/{args.ffn}, candidates {candidates[0]}-{candidates[-1]}, ", end="")
    print(f"{args.rounds} rounds, {args.windows} x {args.seqlen} tokens, batch {args.batch_size}, {args.runs} runs")
    for name, values in times.items():
        print(f"  {name:9} {spread(values, ' s')}")
    ratios = [slow / fast for slow, fast in zip(times["toggling"], times["sweep"], strict=True)]
    print(f"  toggling / sweep  {spread(ratios)}")
    floor, middle = speeds.floor(shape.search(windows.numel(), asked)), statistics.median(times["sweep"])
    print(f"  floor of the models that the search asks for {floor:.2f} s, {floor / middle:.0%} of the sweep; {speeds}")
    print(f"  same choices: {chosen['toggling'] == chosen['sweep']} {chosen['sweep']}")


GROWTH = {
    "layers": [16, 32, 48, 64],
    "width": [64, 128, 192, 256],
    "candidates": [4, 8, 12, 16],
    "windows": [2, 4, 8, 16],
}
BASE = {"layers": 32, "width": 128, "candidates": 8, "windows": 4}


def growth(args: argparse.Namespace) -> None:
    """Times one round for growing values of each quantity, with the others fixed, and draws the result."""
    measured = {quantity: [] for quantity in GROWTH}
    for quantity, values in GROWTH.items():
        for value in values:
            size = {**BASE, quantity: value}
            width = size["width"]
            decoder = Decoder(random_llama(size["layers"], width, width * 43 // 16, context=args.seqlen))
            windows = torch.randint(0, VOCABULARY, (size["windows"], args.seqlen))
            last = size["layers"] - 3
            candidates = list(range(last - size["candidates"] + 1, last + 1))
            problem = (decoder, windows, candidates, 1, args.batch_size)
            sweep_search(*problem)
            times = [seconds(lambda p=problem: sweep_search(*p)) for _ in range(args.runs)]
            measured[quantity].append(times)
            print(f"{quantity} {value}: {spread(times, ' s')}", flush=True)
    draw_growth(args.growth, measured)


def draw_growth(path: str, measured: dict[str, list[list[float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, row = plt.subplots(1, len(measured), figsize=(11, 2.8), layout="constrained", sharey=True)
    for axes, (quantity, runs) in zip(row, measured.items(), strict=True):
        middle = [statistics.median(times) for times in runs]
        axes.errorbar(
            GROWTH[quantity],
            middle,
            yerr=[
                [m - min(times) for m, times in zip(middle, runs, strict=True)],
                [max(times) - m for m, times in zip(middle, runs, strict=True)],
            ],
            marker="o",
            capsize=3,
        )
        axes.set(xlabel=quantity, xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    row[0].set(ylabel="seconds for one round", ylim=(0, None))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_flags(parser, layers=32, hidden=128, ffn=344, windows=8, seqlen=256, batch_size=4, rounds=5, runs=3)
    add_shape_flags(parser, first=20, candidates=10)  # the lowest candidate layer, and how many
    parser.add_argument("--growth", metavar="PNG", help="draw time against each quantity instead")
    args = parser.parse_args()
    print(machine())
    keep_freed_memory()  # for both sides
    growth(args) if args.growth else compare(args)


if __name__ == "__main__":
    main()
