"""Wanda and SparseGPT: our engine beside an obvious implementation of the reference loops, and beside two bare passes.

    python -m benchmarks.weight_pruning                 # 8 layers of 512/1376 (27.4M parameters), 32 x 512 tokens
    python -m benchmarks.weight_pruning --dtype bfloat16 --layers 4

The reference loops run one window at a time, keep one statistic for each linear, sort rows and step through columns, as
the published code does. All sides run in one process, in turn, on copies of one model, and must prune the same weights.
"""

import argparse
import statistics
from functools import partial

import torch
from torch import nn

from benchmarks.common import add_shape_flags, machine, peak_memory, random_llama, side_by_side, spread
from lib.batching import Batcher, automatic_batch_size, keep_freed_memory
from lib.linears import InputGroup, input_groups
from lib.model import Decoder
from lib.plan import Mode
from lib.prune import prune_layers
from lib.pruners import SparseGpt, Wanda
from lib.report import timed
from lib.stream import Activations

# The reference's way --------------------------------------------------------------------------------------------------


class WandaLoop:
    """Wanda of one linear: a running mean of squared norms, and a stable sort."""

    def __init__(self, linear: nn.Linear):
        self.linear, self.samples = linear, 0
        self.scaler = torch.zeros(linear.in_features, device=linear.weight.device)

    def add(self, inputs: torch.Tensor) -> None:
        inputs = inputs.reshape(-1, inputs.shape[-1]).t()
        self.scaler *= self.samples / (self.samples + 1)
        self.samples += 1
        self.scaler += torch.norm(inputs.float(), p=2, dim=1) ** 2 / self.samples

    def prune(self, sparsity: float) -> None:
        weight = self.linear.weight
        scores = weight.abs() * torch.sqrt(self.scaler.reshape(1, -1))
        mask = torch.zeros_like(scores, dtype=torch.bool)
        order = torch.sort(scores, dim=-1, stable=True)[1]
        mask.scatter_(1, order[:, : int(scores.shape[1] * sparsity)], True)
        weight[mask] = 0


class SparseGptLoop:
    """SparseGPT of one linear: a running Hessian, two factorizations and an inverse, and a step for each column."""

    def __init__(self, linear: nn.Linear):
        self.linear, self.samples = linear, 0
        self.hessian = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)

    def add(self, inputs: torch.Tensor) -> None:
        inputs = inputs.reshape(-1, inputs.shape[-1]).t()
        self.hessian *= self.samples / (self.samples + 1)
        self.samples += 1
        inputs = (2 / self.samples) ** 0.5 * inputs.float()
        self.hessian += inputs.matmul(inputs.t())

    def prune(self, sparsity: float, damping: float = 0.01, block: int = 128) -> None:
        weight, hessian = self.linear.weight.clone().float(), self.hessian
        columns = weight.shape[1]
        dead = torch.diag(hessian) == 0
        hessian[dead, dead] = 1
        weight[:, dead] = 0
        places = torch.arange(columns)
        hessian[places, places] += damping * torch.mean(torch.diag(hessian))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        inverse = torch.linalg.cholesky(inverse, upper=True)
        for first in range(0, columns, block):
            last = min(first + block, columns)
            part, inner = weight[:, first:last].clone(), inverse[first:last, first:last]
            pruned, errors = torch.zeros_like(part), torch.zeros_like(part)
            scores = part**2 / torch.diag(inner).reshape(1, -1) ** 2
            mask = scores <= torch.sort(scores.flatten())[0][int(scores.numel() * sparsity)]
            for i in range(last - first):
                column = part[:, i]
                kept = column.clone()
                kept[mask[:, i]] = 0
                pruned[:, i] = kept
                error = (column - kept) / inner[i, i]
                part[:, i:] -= error.unsqueeze(1).matmul(inner[i, i:].unsqueeze(0))
                errors[:, i] = error
            weight[:, first:last] = pruned
            weight[:, last:] -= errors.matmul(inverse[first:last, last:])
        self.linear.weight.copy_(weight)


@torch.no_grad()
def reference_loops(decoder: Decoder, windows: torch.Tensor, loop: type, sparsity: float) -> None:
    """One window at a time through each layer, twice; one statistic for each linear."""
    states, inputs = zip(*(decoder.embed(window[None]) for window in windows), strict=True)
    states = list(states)
    for index, layer in enumerate(decoder.layers):
        loops = [loop(module) for module in layer.modules() if isinstance(module, nn.Linear)]
        hooks = [
            one.linear.register_forward_hook(lambda module, args, output, one=one: one.add(args[0])) for one in loops
        ]
        for state, given in zip(states, inputs, strict=True):
            decoder.run_layer(index, state, given, Mode())
        for hook in hooks:
            hook.remove()
        for one in loops:
            one.prune(sparsity)
        states = [decoder.run_layer(index, state, given, Mode()) for state, given in zip(states, inputs, strict=True)]


# Ours -----------------------------------------------------------------------------------------------------------------


def bare_passes(decoder: Decoder, windows: torch.Tensor, batch_size: int) -> None:
    """Two passes of all windows through every layer, and nothing else."""
    activations = Activations(decoder, windows, Batcher(batch_size))
    for _ in decoder.layers:
        activations.look()
        activations.advance()


def engine(
    decoder: Decoder,
    groups: list[list[InputGroup]],
    windows: torch.Tensor,
    pruner,
    sparsity: float,
    batch_size: int,
    parts: dict[str, float],
) -> None:
    sparsities = [sparsity] * decoder.num_layers
    prune_layers(decoder, groups, pruner, sparsities, windows, Batcher(batch_size), timed=partial(timed, parts))


SIDES = {"Wanda": (WandaLoop, Wanda()), "SparseGPT": (SparseGptLoop, SparseGpt())}


def compare(args: argparse.Namespace) -> None:
    model = random_llama(args.layers, args.hidden, args.ffn, context=args.seqlen, dtype=getattr(torch, args.dtype))
    decoder = Decoder(model)
    groups = input_groups(decoder)
    linears = [linear for layer in groups for group in layer for linear in group.linears]
    dense = [linear.weight.clone() for linear in linears]
    windows = torch.randint(0, 2048, (args.windows, args.seqlen))
    batch_size = args.batch_size or automatic_batch_size(decoder.device, args.seqlen, decoder.token_bytes)
    masks: dict[str, list[torch.Tensor]] = {}

    def on_dense_weights(name: str, function) -> None:
        for linear, weight in zip(linears, dense, strict=True):
            linear.weight.copy_(weight)
        function()
        masks[name] = [linear.weight == 0 for linear in linears]

    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{args.layers} layers of {args.hidden}/{args.ffn} ({parameters / 1e6:.1f}M parameters, {args.dtype}), ", end=""
    )
    print(f"{args.windows} x {args.seqlen} tokens, sparsity {args.sparsity}, {args.runs} runs; our batch {batch_size}")
    for name in args.methods:
        loop, pruner = SIDES[name]
        parts: list[dict[str, float]] = []

        def ours(pruner=pruner, parts=parts) -> None:
            parts.append({})
            engine(decoder, groups, windows, pruner, args.sparsity, batch_size, parts[-1])

        def theirs(loop=loop) -> None:
            reference_loops(decoder, windows, loop, args.sparsity)

        sides = {
            "reference loops": partial(on_dense_weights, "reference loops", theirs),
            "ours": partial(on_dense_weights, "ours", ours),
            "two bare passes": lambda: bare_passes(decoder, windows, batch_size),
        }
        times = side_by_side(sides, args.runs)
        memory = {side: peak_memory(function) for side, function in sides.items()}
        tell(name, times, memory, parts[1:], masks)


def tell(
    name: str,
    times: dict[str, list[float]],
    memory: dict[str, float],
    parts: list[dict[str, float]],
    masks: dict[str, list[torch.Tensor]],
) -> None:
    """Prints what the sides took, and how far their masks agree."""
    print(name)
    for side, values in times.items():
        print(f"  {side:16} {spread(values, ' s')}, {memory[side]:,.0f} MiB beyond the model")
    for side in ("reference loops", "two bare passes"):
        ratios = [other / own for other, own in zip(times[side], times["ours"], strict=True)]
        print(f"  {side} / ours  {spread(ratios)}")
    split = {part: statistics.median(one[part] for one in parts) for part in parts[0]}
    print("  ours, by part: " + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in split.items()))
    pairs = zip(masks["ours"], masks["reference loops"], strict=True)
    equal = sum(int((a == b).sum()) for a, b in pairs) / sum(mask.numel() for mask in masks["ours"])
    print(f"  mask bits equal to the reference loops': {equal:.5%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_flags(parser, layers=8, hidden=512, ffn=1376, windows=32, seqlen=512, runs=3)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--batch_size", type=int, help="ours; default: as alp_prune.py chooses it")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods", nargs="+", choices=SIDES, default=list(SIDES))
    args = parser.parse_args()
    print(machine())
    keep_freed_memory()  # for all sides
    compare(args)


if __name__ == "__main__":
    main()
