"""The training of adapters: towards the dense model's next-token distributions, or without one on the text itself.

The loss is KL(dense || model) of each token, the distance that evaluations measure. Its mean on windows that are held
out of the training decides which adapters are kept, and when it ends.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lib.engine.tail import token_divergences, token_losses
from lib.errors import RunError
from lib.models.decoder import Decoder
from lib.models.sealed_tensors import Sealed, save_sealed
from lib.runtime.batching import Batcher, Progress

CHECKS = 10  # of the held-out windows at most, evenly spread over the steps, beside the one before them
PATIENCE = 3  # checks without a new best that end the training
MOST_HELD_OUT = 16  # windows
_WARM_UP = 10  # steps
_LARGEST_NORM = 1.0  # of all gradients together
_KEPT_EVERY = 60  # seconds


@dataclass(frozen=True)
class Check:
    """What was measured after some steps: the mean loss of those since the last check, and on held-out windows."""

    step: int
    loss: float | None  # None before the first step
    held_out_loss: float
    held_out_perplexity: float


class Settings(NamedTuple):
    """How adapters are trained."""

    steps: int
    batch_size: int  # windows in a step
    learning_rate: float
    seed: int


class Training:
    """The training of some adapters of a model, which goes on where a stopped run kept it."""

    def __init__(
        self,
        student: Decoder,
        teacher: Decoder | None,
        adapters: nn.Module,
        windows: torch.Tensor,
        held_out: torch.Tensor,
        settings: Settings,
        batcher: Batcher,
    ):
        """`windows` (N, T) to train on, and others `held_out` (M, T); the adapters are in use in the student."""
        self.student, self.teacher, self.windows, self.held_out = student, teacher, windows, held_out
        self.settings, self.batcher = settings, batcher
        self.parameters = list(adapters.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, settings.learning_rate, weight_decay=0.0)
        self.step = 0
        self.checks: list[Check] = []
        self._recent: list[float] = []  # the losses of the steps since the last check
        self._best = [parameter.detach().clone() for parameter in self.parameters]

    # What is kept

    def save(self, path: Path, owner: str) -> None:
        """Keeps all that the rest of the training depends on."""
        tensors = {f"parameter.{i}": one.detach() for i, one in enumerate(self.parameters)}
        tensors |= {f"best.{i}": one for i, one in enumerate(self._best)}
        for i, parameter in enumerate(self.parameters):
            tensors |= {f"{name}.{i}": value for name, value in self.optimizer.state[parameter].items()}
        content = {"step": self.step, "recent": self._recent, "checks": list(map(asdict, self.checks))}
        save_sealed(path, tensors, owner, content)

    def restore(self, path: Path, owner: str) -> None:
        """Goes back to what `save` kept. Raises `InputError` for a broken file."""
        kept = Sealed(path, owner)
        self.step, self._recent = kept.content["step"], kept.content["recent"]
        self.checks = [Check(**one) for one in kept.content["checks"]]
        with torch.no_grad():
            for i, (parameter, best) in enumerate(zip(self.parameters, self._best, strict=True)):
                parameter.copy_(kept.tensor(f"parameter.{i}"))
                best.copy_(kept.tensor(f"best.{i}"))
                names = [name for name in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{i}" in kept.names]
                state = {name: kept.tensor(f"{name}.{i}") for name in names}
                self.optimizer.state[parameter] = {
                    name: value if name == "step" else value.to(parameter.device) for name, value in state.items()
                }

    # Training

    def run(self, keep: Callable[[], object], show: Callable[[Check], object], progress: Progress) -> None:
        """Trains, and puts the best adapters in place. `keep` is called every minute, `show` with every check.

        Raises `RunError` for a loss or gradient that is not finite.
        """
        if not self.checks:
            self._check(show)
        progress(self.step)
        kept = time.monotonic()
        while self.step < self.settings.steps and not self.is_stale:
            self._recent.append(self._take_step())
            self.step += 1
            is_check = self.step == self.settings.steps or self.step % -(-self.settings.steps // CHECKS) == 0
            if is_check:
                self._check(show)
            if is_check or time.monotonic() - kept > _KEPT_EVERY:
                keep()
                kept = time.monotonic()
            progress(1)
        with torch.no_grad():
            for parameter, best in zip(self.parameters, self._best, strict=True):
                parameter.copy_(best)

    @property
    def best(self) -> Check:
        """The check of lowest loss on the held-out windows."""
        return min(self.checks, key=lambda check: check.held_out_loss)

    @property
    def is_stale(self) -> bool:
        """True when the last checks found nothing better than what was found before them."""
        return self.best in self.checks[:-PATIENCE]

    def _take_step(self) -> float:
        ids = self.windows[rows_of(self.step, len(self.windows), self.settings.batch_size, self.settings.seed)]
        loss, norm = self.batcher.retry_smaller(lambda: self._find_gradients(ids), len(ids))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            advice = "--overwrite with a lower --learning_rate, or --dtype bfloat16 or float32"
            raise RunError(f"step {self.step + 1} of the training: its loss or gradient is not finite; try {advice}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * rate(self.step, self.settings.steps)
        self.optimizer.step()
        return loss

    def _find_gradients(self, ids: torch.Tensor) -> tuple[float, float]:
        """The mean loss of windows (N, T), and the norm of its gradient, which is then no longer than allowed."""
        loss = self._accumulate(ids)
        with_gradients = [parameter for parameter in self.parameters if parameter.grad is not None]
        return loss, float(torch.nn.utils.clip_grad_norm_(with_gradients, _LARGEST_NORM))

    def _accumulate(self, ids: torch.Tensor) -> float:
        """The mean loss of windows (N, T), and its gradient, from parts that fit into memory."""
        self.optimizer.zero_grad()
        total = 0.0
        for part in ids.split(self.batcher.size):
            loss = self._losses(part, _logits(self.student, part)).sum()
            loss.backward()  # of the sum over tokens: in fp16 the gradients of a mean would vanish
            total += loss.item()
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= ids[:, 1:].numel()
        return total / ids[:, 1:].numel()

    def _losses(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The loss of each predicted token (N, T - 1) of windows (N, T), for which the student has these logits."""
        if not self.teacher:
            return _entropies(ids, logits)
        with torch.no_grad():
            dense_logits = _logits(self.teacher, ids)
        return token_divergences(dense_logits.to(logits.device), logits)

    def _check(self, show: Callable[[Check], object]) -> None:
        """Measures on the held-out windows, and keeps adapters that are better than all before."""

        @torch.no_grad()
        def means(rows: slice) -> torch.Tensor:
            ids = self.held_out[rows]
            logits = _logits(self.student, ids)
            return torch.stack([self._losses(ids, logits).mean(dim=1), _entropies(ids, logits).mean(dim=1)], dim=1)

        loss, entropy = self.batcher.map(means, len(self.held_out)).mean(dim=0).tolist()
        if not math.isfinite(loss):
            raise RunError(f"step {self.step} of the training: the loss is not finite; try a lower --learning_rate")
        before = sum(self._recent) / len(self._recent) if self._recent else None
        self.checks.append(Check(self.step, before, loss, math.exp(entropy)))
        self._recent = []
        if self.best is self.checks[-1]:
            for parameter, best in zip(self.parameters, self._best, strict=True):
                best.copy_(parameter.detach())
        show(self.checks[-1])


def _logits(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """The logits (N, T - 1, V) of all but the last token."""
    return decoder.model(input_ids=ids.to(decoder.device), use_cache=False).logits[:, :-1]


def _entropies(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return token_losses(logits, ids[:, 1:].to(logits.device))


def rate(step: int, steps: int) -> float:
    """The share of the learning rate at a step: up over the first ones, then down along a cosine."""
    warm_up = min(_WARM_UP, steps // 4)
    return min(1.0, (step + 1) / (warm_up + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def rows_of(step: int, count: int, batch_size: int, seed: int) -> list[int]:
    """The windows, of `count`, that a step takes: all in a random order, then all in another."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [_order(place // count, count, seed)[place % count] for place in places]


@lru_cache(maxsize=2)
def _order(epoch: int, count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed + 1_000_003 * epoch)).tolist()


def split(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (N, T) to train on, and those held out: one of eight, evenly spread, at least one and at most 16."""
    count = len(windows)
    held = min(MOST_HELD_OUT, max(1, count // 8))
    places = torch.arange(held) * count // held
    is_held_out = torch.zeros(count, dtype=torch.bool)
    is_held_out[places] = True
    return windows[~is_held_out], windows[is_held_out]
