"""Loss of every window, and its distance to the dense model, for a model under a pruning plan."""

from collections.abc import Callable

import torch

from lib.config.plan import Plan
from lib.engine.activations import Activations
from lib.engine.finite import check_finite
from lib.engine.map_windows import Tick, map_windows, waiting_bytes
from lib.models.decoder import Decoder
from lib.runtime.batching import Batcher, Progress

WindowLosses = Callable[[torch.Tensor, int], torch.Tensor]  # ids (N, T), number of last tokens scored -> (N,)


class DenseStates:
    """The dense model's last hidden states on some windows of a text, in host memory and in the model's dtype.

    Pruning leaves the model's tail as it is, so they give the dense model's logits at any later time, without its
    layers. A token takes D numbers, where its distribution takes as many as the vocabulary has.
    """

    def __init__(self, places: torch.Tensor):
        """`places` (K,): the indices of the windows whose states are kept, ascending."""
        self.places = places
        self._chosen = set(places.tolist())
        self._states: dict[int, torch.Tensor] = {}  # (T, D) of the windows of this process, by index

    def keep(self, first: int, hidden_states: torch.Tensor) -> None:
        """Keeps the states (B, T, D) of the windows from `first` on, as far as they are chosen."""
        for place, states in enumerate(hidden_states, first):
            if place in self._chosen:
                self._states[place] = states.cpu()

    def among(self, rows: slice) -> list[int]:
        """Which of the windows `rows` are chosen, from 0."""
        return [place - rows.start for place in range(rows.start, rows.stop) if place in self._chosen]

    def of(self, rows: slice) -> torch.Tensor:
        """The states (K, T, D) of the chosen windows among `rows`, of which there is at least one."""
        return torch.stack([self._states[rows.start + place] for place in self.among(rows)])


def plan_window_losses(
    decoder: Decoder,
    plan: Plan,
    batcher: Batcher,
    progress: Progress | None = None,
    keep: Callable[[slice, torch.Tensor], object] = lambda rows, hidden_states: None,
) -> WindowLosses:
    """The model's loss function under a plan: ids (N, T) -> mean cross-entropy (N,) of the last `scored` tokens.

    `keep` gets the last hidden states (B, T, D) of some windows, and which these are. Raises `RunError` for a loss that
    is not finite, naming the first layer whose output is not.
    """

    def window_losses(windows: torch.Tensor, scored: int) -> torch.Tensor:
        def losses_of(rows: slice, states: Activations) -> torch.Tensor:
            keep(rows, states.hidden_states)
            return states.losses(scored)[:, None]

        return _over_windows(decoder, plan, windows, batcher, losses_of, progress)[:, 0]

    return window_losses


def window_scores(
    decoder: Decoder,
    plan: Plan,
    windows: torch.Tensor,
    scored: int,
    batcher: Batcher,
    dense: DenseStates,
    first: int = 0,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Scores (N, 2 + scored) of windows (N, T) for the model under a plan, as `tail_scores` gives them.

    Windows that have no states in `dense`, where the first of them has the index `first`, have only a loss, and NaN
    after it. Raises as `plan_window_losses` does.
    """

    def scores_of(rows: slice, states: Activations) -> torch.Tensor:
        def of_batch(batch: slice) -> torch.Tensor:  # no more, since both models' states of it are copied
            here = slice(first + rows.start + batch.start, first + rows.start + batch.stop)
            places, count = dense.among(here), batch.stop - batch.start
            others = sorted(set(range(count)) - set(places))
            found = torch.full((count, 2 + scored), torch.nan)
            if places:
                found[places] = states.some(batch, places).scores(dense.of(here), scored)
            if others:
                found[others, 0] = states.some(batch, others).losses(scored)
            return found

        return batcher.map(of_batch, len(states.windows))

    return _over_windows(decoder, plan, windows, batcher, scores_of, progress)


def _over_windows(
    decoder: Decoder,
    plan: Plan,
    windows: torch.Tensor,
    batcher: Batcher,
    function: Callable[[slice, Activations], torch.Tensor],
    progress: Progress | None,
) -> torch.Tensor:
    """What `function` makes of the last hidden states under a plan: a row for each window, whose loss comes first."""

    def of_rows(rows: slice, tick: Tick) -> torch.Tensor:
        states = Activations(decoder, windows[rows], batcher)
        for mode in plan.modes:
            states.step(mode)
            tick()
        found = function(rows, states)
        check_finite(decoder, found[:, 0], windows[rows], plan.modes)
        return found

    size = waiting_bytes(decoder, windows.shape[1], 1)
    return map_windows(decoder, len(windows), batcher, of_rows, size, progress)
