"""A peer of `benchmarks.weight_pruning`: a straightforward version of the loops in the published code.

One window at a time, one statistic per linear, full sorts, and one step per column.
"""

import sys

import torch
from torch import nn

from benchmarks.peers import serve
from lib.config.plan import Mode
from lib.models.decoder import Decoder
from lib.runtime.memory import keep_freed_memory


class WandaLoop:
    """Wanda for one linear: a running mean of squared norms, and a stable sort."""

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
    """SparseGPT for one linear: a running Hessian, two factorizations and an inverse, and one step per column."""

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
    """Runs each layer twice on one window at a time: to collect statistics, then to get the pruned layer's output."""
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


KEEP = "--keep_freed_memory"  # the allocator setting of our runs
LOOPS = {"Wanda": WandaLoop, "SparseGPT": SparseGptLoop}


def prune(model: nn.Module, tokenizer, windows: torch.Tensor, method: str, sparsity: float) -> None:
    reference_loops(Decoder(model), windows, LOOPS[method], sparsity)


if __name__ == "__main__":
    if KEEP in sys.argv:
        keep_freed_memory()
    serve(prune, ("torch", "transformers"))
