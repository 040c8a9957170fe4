"""The evaluation texts of a run: measured on the dense model, then on each pruned one, in parts that are kept."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lib.config.plan import Plan
from lib.data.sampling import evenly_spread
from lib.engine.map_windows import waiting_bytes
from lib.engine.window_scores import DenseStates, plan_window_losses, window_scores
from lib.evaluation.answers import DENSE
from lib.evaluation.distance import Distance, Evaluation, evaluation_of, packed, unpacked
from lib.evaluation.perplexity import Span, spans_of
from lib.reporting.console import Report
from lib.runtime.batching import Progress
from lib.runtime.memory import free_host_memory

if TYPE_CHECKING:
    from lib.runs.single import Workspace

_PARTS = 8  # of an evaluation, kept one by one
_DISTANCE_TOKENS = 2**18  # of each text, whose distance to the dense model is measured
_ROOM = 0.25  # share of the free host memory, for their hidden states


class TextStages:
    """Evaluates the model of a workspace at each stage of one run: `dense` first, then `stages` in order."""

    def __init__(
        self, report: Report, workspace: "Workspace", stages: Sequence[str], stride: int | None, others_follow: bool
    ):
        """`others_follow`: later runs on the workspace need the dense model's hidden states too."""
        self._report, self._workspace, self._stride = report, workspace, stride
        self._stages, self._others_follow = (DENSE, *stages), others_follow

    def measure(self, stage: str, text: str, plan: Plan | None = None) -> Evaluation:
        """Evaluates the model as it is, under a plan if given, on one text; the dense model once for all runs on it.

        Each part is kept in the state, so that a stopped run goes on where it was.
        """
        workspace, batcher = self._workspace, self._workspace.batcher
        if stage == DENSE and text in workspace.dense:
            return workspace.dense[text]
        windows, decoder = workspace.eval_windows[text], workspace.decoder
        at_once = batcher.first_size * batcher.ranks.count  # the same for all stages and processes
        at_once *= -(-len(windows) // (at_once * (1 if decoder.is_offloaded else _PARTS)))
        spans = spans_of(len(windows), windows.shape[1], self._stride, at_once)
        with self._report.timed("evaluate"), self._report.progress(len(windows), f"{stage} on {text}") as progress:
            scores = [self._scores(stage, text, span, plan or Plan(decoder.num_layers), progress) for span in spans]
        found = evaluation_of(spans, scores)
        if stage == DENSE:
            workspace.dense[text] = found
        return found

    def unchanged(self, text: str) -> Evaluation:
        """The evaluation of a model of which nothing was pruned."""
        return Evaluation(self._workspace.dense[text].perplexity, Distance.none(len(self._dense_states(text).places)))

    def _scores(self, stage: str, text: str, span: Span, plan: Plan, progress: Progress) -> torch.Tensor:
        """The scores (n, 1) of some windows for the dense model, or (n, 2 + scored) for another stage."""
        decoder, batcher, state = self._workspace.decoder, self._workspace.batcher, self._workspace.state
        windows, dense, first = self._workspace.eval_windows[text][span.rows], self._dense_states(text), span.rows.start
        content = f"{dense.among(span.rows)}".encode() + windows.numpy().tobytes()
        digest = hashlib.sha256(content).hexdigest()[:16]
        names = {one: f"{one}: last {span.scored} tokens of {digest}" for one in self._stages}
        known = state.get(names[stage])
        if stage == DENSE and (self._others_follow or not all(map(state.get, names.values()))):
            known = None  # its hidden states are needed
        if known is not None:
            progress(len(windows))
            return unpacked(known, 1 if stage == DENSE else 2 + span.scored)
        if stage == DENSE:

            def keep(rows: slice, hidden_states: torch.Tensor) -> None:
                dense.keep(first + rows.start, hidden_states)

            scores = plan_window_losses(decoder, plan, batcher, progress, keep)(windows, span.scored)[:, None]
        else:
            scores = window_scores(decoder, plan, windows, span.scored, batcher, dense, first, progress)
        state.put(names[stage], packed(scores))
        return scores

    def _dense_states(self, text: str) -> DenseStates:
        """What the distances on a text are measured to: evenly spread windows of it, as many as are kept."""
        workspace, windows = self._workspace, self._workspace.eval_windows[text]
        if text not in workspace.dense_states:
            bytes_per_token = waiting_bytes(workspace.decoder, 1, 0)
            fitting = workspace.batcher.ranks.agree(lambda: int(free_host_memory() * _ROOM / bytes_per_token))
            most = max(1, min(_DISTANCE_TOKENS, fitting) // windows.shape[1])
            places = evenly_spread(len(windows), most) if workspace.has_dense else torch.arange(0)
            workspace.dense_states[text] = DenseStates(places)
        return workspace.dense_states[text]
