"""Connection sensitivity: layer by layer compared with autograd through the whole model, for growing depth.

    python -m benchmarks.gradients                          # 4 to 32 layers of 512/1376, 10 windows of 64 tokens
    python -m benchmarks.gradients --plot docs/gradients.png

Both sides are timed in turn in one process. Peak memory is measured in a separate process for each side and depth,
beyond what it used with the model loaded; on an accelerator it is the allocator's. Prints how far the redundancies of
the two sides differ.
"""

import argparse
import multiprocessing
import statistics
from functools import partial

import torch

from benchmarks.common import device, machine, peak_memory, random_llama, side_by_side, spread
from lib.models.decoder import Decoder
from lib.models.matrices import find_matrices
from lib.sensitivity.gradients import connection_sensitivity, summarize

WINDOWS, SEQLEN = 10, 64


def whole_model(model: torch.nn.Module, windows: torch.Tensor) -> list[float]:
    """The method of the reference code: sums squared gradients over backward passes, one window at a time."""
    model.requires_grad_(True)
    matrices = find_matrices(Decoder(model))
    totals = [{name: torch.zeros_like(matrix.weight) for name, matrix in layer.items()} for layer in matrices]
    for window in windows:
        labels = window[None].clone()
        labels[:, :-1] = -100
        model.zero_grad()
        model(input_ids=window[None], labels=labels, use_cache=False).loss.backward()
        for layer, total in zip(matrices, totals, strict=True):
            for name, matrix in layer.items():
                total[name] += matrix.whole.grad**2
    model.zero_grad()
    model.requires_grad_(False)
    return [summarize({name: values.detach() for name, values in layer.items()}).layer.redundancy for layer in totals]


def layer_by_layer(model: torch.nn.Module, windows: torch.Tensor) -> list[float]:
    return [layer.layer.redundancy for layer in connection_sensitivity(Decoder(model), windows)]


SIDES = {"whole model": whole_model, "layer by layer": layer_by_layer}


def problem(layers: int, args: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor]:
    model = random_llama(layers, args.hidden, args.ffn)
    return model, torch.randint(0, 2048, (WINDOWS, SEQLEN)).to(device())


def put_memory(side: str, layers: int, args: argparse.Namespace, results) -> None:
    """Puts (peak MiB beyond the loaded model, MiB of its weights) into `results`."""
    model, windows = problem(layers, args)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    layer_by_layer(model, windows[:1, :8])  # warm-up: loads library code
    results.put((peak_memory(partial(SIDES[side], model, windows)), weights))


def compare(model: torch.nn.Module, windows: torch.Tensor, runs: int) -> tuple[dict, dict]:
    """{side: seconds of each run} and {side: redundancies}."""
    found: dict[str, list[float]] = {}

    def run(side: str) -> None:
        found[side] = SIDES[side](model, windows)

    return side_by_side({side: partial(run, side) for side in SIDES}, runs), found


def measure_memory(side: str, layers: int, args: argparse.Namespace) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=put_memory, args=(side, layers, args, results))
    process.start()
    process.join()
    return results.get()


def draw(path: str, layers: list[int], times: dict, memory: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    for side in SIDES:
        left.plot(layers, memory[side], marker="o", label=side)
        middle = [statistics.median(values) for values in times[side]]
        right.plot(layers, middle, marker="o", label=side)
    left.set(xlabel="layers", ylabel="peak memory beyond\nthe weights, MiB", xlim=(0, None), ylim=(0, None))
    right.set(xlabel="layers", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    left.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1376)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--plot", metavar="PNG", help="draw memory and time against layers")
    args = parser.parse_args()
    print(machine())
    print(f"layers of {args.hidden}/{args.ffn}, {WINDOWS} windows of {SEQLEN} tokens, fp32, {args.runs} runs")
    times: dict[str, list] = {side: [] for side in SIDES}
    memory: dict[str, list] = {side: [] for side in SIDES}
    for layers in args.layers:
        for side in SIDES:
            beyond, weights = measure_memory(side, layers, args)
            memory[side].append(beyond)
        model, windows = problem(layers, args)
        taken, found = compare(model, windows, args.runs)
        worst = max(abs(a / b - 1) for a, b in zip(*found.values(), strict=True))
        print(f"{layers} layers, weights {weights:.0f} MiB; redundancies differ by {worst:.1e} at most")
        for side, values in taken.items():
            times[side].append(values)
            print(f"  {side:14} {spread(values, ' s')}, {memory[side][-1]:.0f} MiB beyond the weights", flush=True)
        ratios = [a / b for a, b in zip(*taken.values(), strict=True)]
        print(f"  whole model / layer by layer: time {spread(ratios)}")
    if args.plot:
        draw(args.plot, args.layers, times, memory)


if __name__ == "__main__":
    main()
