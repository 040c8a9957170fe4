"""Lower bounds on run time: the work that cannot be avoided, at the best speed this machine reaches."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.common import VOCABULARY, device, seconds
from lib.depth.trial_losses import Modes


@dataclass(frozen=True)
class Work:
    """Floating-point operations of matrix products, and bytes read from and written to memory."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Speeds:
    """The speeds of this machine in a dtype: operations per second in a product, bytes per second in a copy."""

    flops: float
    bytes: float

    @classmethod
    def measure(cls, dtype: torch.dtype) -> "Speeds":
        """Takes the fastest of several large square products, and of several copies that exceed every cache."""
        size, times = (8192, 10) if device() == "cuda" else (2048, 1)
        left, right = (torch.randn(size, size, dtype=dtype, device=device()) for _ in range(2))
        here, there = (torch.ones(2**28, dtype=torch.uint8, device=device()) for _ in range(2))

        def fastest(function: Callable[[], object]) -> float:
            found: list[float] = []
            while len(found) < 20 and sum(found) < 2:
                found.append(seconds(lambda: [function() for _ in range(times)]))
            return min(found) / times

        product, copy = fastest(lambda: torch.mm(left, right)), fastest(lambda: here.copy_(there))
        return cls(2 * size**3 / product, 2 * here.nbytes / copy)

    def floor(self, work: Work) -> float:
        """The least seconds that the work can take."""
        return max(work.flops / self.flops, work.bytes / self.bytes)

    def __str__(self) -> str:
        return f"{self.flops / 1e12:.2f} TFLOP/s in a large product, {self.bytes / 1e9:.0f} GB/s in a copy"


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama; its methods give the work of each part for a number of tokens.

    Each product counts once, and so do its weights, inputs and outputs.
    """

    layers: int
    hidden: int
    ffn: int
    vocab: int
    seqlen: int
    itemsize: int  # bytes of a number

    @classmethod
    def of(cls, args: argparse.Namespace, dtype: torch.dtype) -> "Shape":
        vocab = getattr(args, "vocab", VOCABULARY)
        return cls(args.layers, args.hidden, args.ffn, vocab, args.seqlen, dtype.itemsize)

    def linear(self, tokens: int, ins: int, outs: int) -> Work:
        return Work(2 * tokens * ins * outs, self.itemsize * (ins * outs + tokens * (ins + outs)))

    def attention(self, tokens: int) -> Work:
        causal = Work(2 * 2 * tokens * self.seqlen / 2 * self.hidden, self.itemsize * 4 * tokens * self.hidden)
        return self.linear(tokens, self.hidden, self.hidden) * 4 + causal

    def down(self, tokens: int) -> Work:
        return self.linear(tokens, self.ffn, self.hidden)

    def feed_forward(self, tokens: int) -> Work:
        return self.linear(tokens, self.hidden, self.ffn) * 2 + self.down(tokens)

    def layer(self, tokens: int) -> Work:
        return self.attention(tokens) + self.feed_forward(tokens)

    def model(self, tokens: int) -> Work:
        """The work of all layers, without the head."""
        return self.layer(tokens) * self.layers

    def head(self, tokens: int) -> Work:
        return Work(2 * tokens * self.hidden * self.vocab, self.itemsize * self.hidden * (self.vocab + tokens))

    def observe_and_advance(self, tokens: int) -> Work:
        """Two passes through each layer; the first stops before the last linear, and the last layer needs only one."""
        return self.model(tokens) * 2 + (self.down(tokens) * self.layers + self.layer(tokens)) * -1

    def hessians(self, tokens: int) -> Work:
        """One Hessian per distinct input (of q, k and v; of o; of gate and up; of down), half of it by symmetry."""
        ins = (self.hidden, self.hidden, self.hidden, self.ffn)
        one_layer = [Work(tokens * width**2, self.itemsize * tokens * width + 4 * width**2) for width in ins]
        return sum(one_layer, Work()) * self.layers

    def search(self, tokens: int, models: set[Modes]) -> Work:
        """Each layer once for every distinct prefix of modes that leads to it, and the head once per model."""
        walks = {modes[:end] for modes in models for end in range(1, len(modes) + 1)}
        last = [walk[-1] for walk in walks]
        attention = self.attention(tokens) * sum(mode.attention for mode in last)
        return attention + self.feed_forward(tokens) * sum(mode.ffn for mode in last) + self.head(tokens) * len(models)


def hessian_speeds(speeds: Speeds, speeds32: Speeds) -> Speeds:
    """The speeds for Hessians: the model's dtype on an accelerator; fp32 on a CPU.

    A CPU has no half-precision products that accumulate in fp32.
    """
    return speeds if device() == "cuda" else speeds32
