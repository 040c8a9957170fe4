"""Wanda and SparseGPT: our engine compared with the reference loops, llm-compressor, two bare passes, and the floor.

ADMM, which no peer has, is compared with our SparseGPT.

    python -m benchmarks.weight_pruning                 # 8 layers of 512/1376 (27.4M parameters), 32 x 512 tokens
    python -m benchmarks.weight_pruning --dtype bfloat16 --layers 4
    python -m venv PEER && PEER/bin/pip install llmcompressor
    python -m benchmarks.weight_pruning --llm_compressor PEER/bin/python

The sides take turns on copies of one model. Each peer runs in its own process, one window at a time. The reference
loops run twice: with glibc's default settings, and with freed memory kept for reuse, as in our runs. Times include
set-up, but not loading. Memory is beyond the model's weights.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import VOCABULARY, add_shape_flags, machine, measure, random_llama, spread
from benchmarks.floor import Shape, Speeds, hessian_speeds
from benchmarks.peer_reference_loops import KEEP
from benchmarks.peers import Masks, Peer, give
from lib.config.sources import ModelSource
from lib.engine.activations import Activations
from lib.models.decoder import Decoder
from lib.models.loading import load_tokenizer
from lib.models.matrices import find_matrices, input_groups
from lib.reporting.console import timed
from lib.runtime.batching import Batcher, automatic_batch_size
from lib.runtime.memory import keep_freed_memory
from lib.sparsity.layerwise import Monitor, prune_layers
from lib.sparsity.pruners import Admm, Pruner, SparseGpt, Wanda

PRUNERS = {"Wanda": Wanda(), "SparseGPT": SparseGpt(), "ADMM": Admm()}
OURS, BARE, OURS_BESIDE = "ours", "two bare passes", "our SparseGPT"


class Engine:
    """Our engine on one model and its windows (N, T)."""

    def __init__(self, model: torch.nn.Module, windows: torch.Tensor, batch_size: int | None):
        self._model, self._windows, decoder = model, windows, Decoder(model)
        self.batch_size = batch_size or automatic_batch_size(decoder.device, windows.shape[1], decoder.token_bytes)
        layers = enumerate(find_matrices(decoder))
        self._matrices = {f"{i}.{name}": matrix for i, layer in layers for name, matrix in layer.items()}
        self._dense = {name: matrix.weight.cpu().clone() for name, matrix in self._matrices.items()}

    def prune(self, pruner: Pruner, sparsity: float, parts: dict[str, float]) -> tuple[float, float]:
        """Seconds and MiB beyond the model of one run; adds the seconds of each part to `parts`."""
        for name, matrix in self._matrices.items():
            matrix.weight.copy_(self._dense[name])

        def run() -> None:
            decoder, batcher = Decoder(self._model), Batcher(self.batch_size)
            groups, sparsities = input_groups(decoder), [sparsity] * decoder.num_layers
            prune_layers(
                decoder, groups, pruner, sparsities, self._windows, batcher, Monitor(timed=partial(timed, parts))
            )

        return measure(run)

    def pass_twice(self) -> tuple[float, float]:
        """Seconds and MiB of two passes of all windows through every layer, without any pruning."""

        def run() -> None:
            decoder = Decoder(self._model)
            activations = Activations(decoder, self._windows, Batcher(self.batch_size))
            for _ in decoder.layers:
                activations.look()
                activations.advance()

        return measure(run)

    def masks(self) -> Masks:
        return {name: matrix.weight == 0 for name, matrix in self._matrices.items()}


def compare(method: str, engine: Engine, peers: dict[str, Peer], floor: float, args: argparse.Namespace) -> None:
    """Runs one method on all sides in turn; prints times, memory and the agreement of the masks."""
    parts: list[dict[str, float]] = []

    def ours() -> tuple[float, float]:
        parts.append({})
        return engine.prune(PRUNERS[method], args.sparsity, parts[-1])

    sides: dict[str, Callable[[], tuple[float, float]]] = {OURS: ours, BARE: engine.pass_twice}
    if method == "ADMM":
        peers = {}
        sides[OURS_BESIDE] = partial(engine.prune, PRUNERS["SparseGPT"], args.sparsity, {})
    sides |= {name: partial(peer.prune, method, args.sparsity) for name, peer in peers.items()}
    times: dict[str, list[float]] = {side: [] for side in sides}
    memory: dict[str, float] = dict.fromkeys(sides, 0.0)
    for number in range(args.runs + 1):
        for side, run in sides.items():
            taken, most = run()
            if number:  # the first round is a warm-up
                times[side].append(taken)
                memory[side] = max(memory[side], most)
    print(f"{method}: floor {floor:.2f} s, {floor / statistics.median(times[OURS]):.0%} of ours")
    for side, values in times.items():
        ratios = [other / own for other, own in zip(values, times[OURS], strict=True)]
        ratio = "" if side == OURS else f", {spread(ratios)} times ours"
        print(f"  {side:16} {spread(values, ' s')}, {memory[side]:,.0f} MiB{ratio}")
    split = {part: statistics.median(one[part] for one in parts[1:]) for part in parts[0]}
    print("  ours, by part: " + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in split.items()))
    found = engine.masks()
    for name, peer in peers.items():
        print(f"  bits of masks equal to those of {name}: {share_equal(found, peer.masks()):.4%}", flush=True)


def share_equal(one: Masks, other: Masks) -> float:
    """The share of mask elements that are equal."""
    equal = sum(int((one[name] == other[name].to(one[name].device)).sum()) for name in one)
    return equal / sum(mask.numel() for mask in one.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_flags(parser, layers=8, hidden=512, ffn=1376, heads=8, windows=32, seqlen=512, runs=3)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--batch_size", type=int, help="ours; default: as alp_prune.py chooses it")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods", nargs="+", choices=PRUNERS, default=list(PRUNERS))
    parser.add_argument("--llm_compressor", metavar="PYTHON", help="of an environment that has llmcompressor")
    args = parser.parse_args()
    keep_freed_memory()  # as our runs do
    dtype = getattr(torch, args.dtype)
    model = random_llama(args.layers, args.hidden, args.ffn, context=args.seqlen, heads=args.heads, dtype=dtype)
    windows = torch.randint(0, VOCABULARY, (args.windows, args.seqlen))
    speeds, shape = Speeds.measure(dtype), Shape.of(args, dtype)
    floor = speeds.floor(shape.observe_and_advance(windows.numel()))
    hessians = hessian_speeds(speeds, Speeds.measure(torch.float32)).floor(shape.hessians(windows.numel()))
    floors = {"Wanda": floor, "SparseGPT": floor + hessians, "ADMM": floor + hessians}
    engine = Engine(model, windows, args.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        give(Path(folder), model, windows, load_tokenizer(ModelSource("demo")))
        loops = (sys.executable, "benchmarks.peer_reference_loops", Path(folder))
        peers = {"reference loops": Peer(*loops), "loops that keep": Peer(*loops, KEEP)}
        if args.llm_compressor:
            peers["llm-compressor"] = Peer(args.llm_compressor, "benchmarks.peer_llm_compressor", Path(folder))
        print(f"{machine()}; {speeds}")
        for name, peer in peers.items():
            print(f"{name}: {peer.versions}")
        parameters = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters"
        print(f"{args.layers} layers of {args.hidden}/{args.ffn} ({parameters}, {args.dtype}), ", end="")
        print(f"{args.windows} x {args.seqlen} tokens, sparsity {args.sparsity}, {args.runs} runs; ", end="")
        print(f"our batch {engine.batch_size}", flush=True)
        for method in args.methods:
            compare(method, engine, peers, floors[method], args)
        for peer in peers.values():
            peer.end()


if __name__ == "__main__":
    main()
