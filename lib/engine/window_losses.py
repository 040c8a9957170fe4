"""Loss of every window, for a model under a pruning plan."""

from collections.abc import Callable

import torch

from lib.config.plan import Plan
from lib.engine.activations import Activations
from lib.engine.finite import check_finite
from lib.engine.map_windows import Tick, map_windows, waiting_bytes
from lib.models.decoder import Decoder
from lib.runtime.batching import Batcher, Progress

WindowLosses = Callable[[torch.Tensor, int], torch.Tensor]  # ids (N, T), number of last tokens scored -> (N,)


def plan_window_losses(
    decoder: Decoder, plan: Plan, batcher: Batcher, progress: Progress | None = None
) -> WindowLosses:
    """The model's loss function under a plan: ids (N, T) -> mean cross-entropy (N,) of the last `scored` tokens.

    It raises `RunError` for a loss that is not finite, naming the first layer whose output is not.
    """

    def window_losses(windows: torch.Tensor, scored: int) -> torch.Tensor:
        def losses_of(rows: slice, tick: Tick) -> torch.Tensor:
            states = Activations(decoder, windows[rows], batcher)
            for mode in plan.modes:
                states.step(mode)
                tick()
            losses = states.losses(scored)
            check_finite(decoder, losses, windows[rows], plan.modes)
            return losses

        size = waiting_bytes(decoder, windows.shape[1], 1)
        return map_windows(decoder, len(windows), batcher, losses_of, size, progress)

    return window_losses
