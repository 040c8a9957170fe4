"""Distance of a pruned model to the dense one, and the evaluation of a text, from scores of its windows.

Perplexity is an average that a pruned model can keep while it says other things than the dense model does
(arXiv:2407.09141). The Kullback-Leibler divergence of their next-token distributions shows that.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lib.evaluation.perplexity import Estimate, Span, mean_over_windows, perplexity_of_losses, scored_tokens


@dataclass(frozen=True)
class Distance:
    """How far a model's next-token distributions are from those of the dense model, on the windows of a text."""

    kl_divergence: Estimate  # mean of KL(dense || model) over tokens, in nats
    percentile_99: float  # the divergence that one token of a hundred exceeds
    top1_agreement: Estimate  # share of tokens whose most likely next token is the dense model's
    by_window: tuple[float, ...]  # the mean divergence of each window: for paired differences between models

    def __str__(self) -> str:
        agreement = "".join(f" ± {100 * error:.1f}" for error in self.top1_agreement[1:] if error is not None)
        return (
            f"KL divergence {self.kl_divergence} nats a token, 99th percentile {self.percentile_99:.2f}; "
            f"top-1 agreement {100 * self.top1_agreement.value:.1f}%{agreement}"
        )

    @classmethod
    def none(cls, windows: int) -> Distance:
        """That of the dense model to itself."""
        error = 0.0 if windows > 1 else None
        return cls(Estimate(0.0, error), 0.0, Estimate(1.0, error), (0.0,) * windows)


@dataclass(frozen=True)
class Evaluation:
    """What was measured on one text; the dense model has no distance."""

    perplexity: Estimate
    distance: Distance | None = None


def evaluation_of(spans: list[Span], scores: Sequence[torch.Tensor]) -> Evaluation:
    """The evaluation from the scores (n, 1) or (n, 2 + scored) of each span, see `tail_scores`; NaN: not measured.

    It has no distance where none was measured.

    Raises `RunError` if the perplexity is not finite.
    """
    scored = scored_tokens(spans)
    perplexity = perplexity_of_losses(torch.cat([rows[:, 0] for rows in scores]), scored)
    if scores[0].shape[1] == 1:
        return Evaluation(perplexity)
    is_same = torch.cat([rows[:, 1] for rows in scores])
    divergences = [window for rows in scores for window in rows[:, 2:]]
    chosen = ~is_same.isnan()
    if not chosen.any():
        return Evaluation(perplexity)
    tokens = torch.cat([window for window, is_chosen in zip(divergences, chosen, strict=True) if is_chosen])
    by_window = torch.stack([window.double().mean() for window in divergences])[chosen]
    distance = Distance(
        mean_over_windows(by_window, scored[chosen]),
        tokens.kthvalue(len(tokens) - len(tokens) // 100).values.item(),
        mean_over_windows(is_same[chosen], scored[chosen]),
        tuple(by_window.tolist()),
    )
    return Evaluation(perplexity, distance)


def packed(scores: torch.Tensor) -> str:
    """Scores (n, columns) in fp32 as text, to the bit; rows of NaN take next to no room."""
    return base64.b64encode(zlib.compress(scores.float().numpy().tobytes(), level=1)).decode()


def unpacked(text: str, columns: int) -> torch.Tensor:
    """The scores (n, columns) that `packed` made a text of."""
    return torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(text))), dtype=torch.float32).view(-1, columns)


def as_fields(found: Mapping[str, Mapping[str, Evaluation]]) -> dict[str, dict]:
    """Fields of result.json for {text: {stage: evaluation}}: perplexities of all, distances of all but the dense."""
    perplexities = {text: {stage: one.perplexity for stage, one in stages.items()} for text, stages in found.items()}
    distances = {
        text: {stage: one.distance for stage, one in stages.items() if one.distance} for text, stages in found.items()
    }
    divergences = _each(distances, lambda one: one.kl_divergence)
    agreements = _each(distances, lambda one: one.top1_agreement)
    return {
        "perplexity": _each(perplexities, lambda one: one.value),
        "perplexity_standard_error": _each(perplexities, lambda one: one.standard_error),
        "kl_divergence": _each(divergences, lambda one: one.value),
        "kl_divergence_standard_error": _each(divergences, lambda one: one.standard_error),
        "kl_divergence_99th_percentile": _each(distances, lambda one: one.percentile_99),
        "kl_divergence_by_window": _each(distances, lambda one: list(one.by_window)),
        "top1_agreement": _each(agreements, lambda one: one.value),
        "top1_agreement_standard_error": _each(agreements, lambda one: one.standard_error),
    }


def _each(found: Mapping[str, Mapping[str, object]], function) -> dict[str, dict]:
    return {text: {stage: function(one) for stage, one in stages.items()} for text, stages in found.items()}


FIELDS = tuple(as_fields({}))  # of result.json, each with values by text
