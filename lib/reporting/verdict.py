"""A verdict on a pruned model, from its distance to the dense one: usable, damaged or broken."""

from typing import NamedTuple


class Threshold(NamedTuple):
    """What a model must keep to on every text for a verdict."""

    verdict: str
    kl_divergence: float  # at most, in nats a token
    top1_agreement: float  # at least


USABLE = Threshold("usable", 0.2, 0.8)
THRESHOLDS = (USABLE, Threshold("damaged", 0.6, 0.6))
WORST = "broken"
FAR = 1.0  # nats a token: from a KL divergence above it, no closed form that we measured came back to `damaged`
LEGEND = "; ".join(
    f"{one.verdict}: a KL divergence of at most {one.kl_divergence:g} nats a token to the dense model, and at least "
    f"{one.top1_agreement:.0%} top-1 agreement with it"
    for one in THRESHOLDS
)
VERDICTS = (*(threshold.verdict for threshold in THRESHOLDS), WORST)


def verdict(kl_divergence: float, top1_agreement: float) -> str:
    """One of `VERDICTS`, for one text."""
    for threshold in THRESHOLDS:
        if kl_divergence <= threshold.kl_divergence and top1_agreement >= threshold.top1_agreement:
            return threshold.verdict
    return WORST


def verdict_of(result: dict) -> str | None:
    """The worst verdict on the texts of a result.json, for its last stage; None where no distance was measured."""
    found = [
        verdict(list(stages.values())[-1], list(result["top1_agreement"][text].values())[-1])
        for text, stages in result["kl_divergence"].items()
        if stages
    ]
    return max(found, key=VERDICTS.index, default=None)


def worst_divergence(result: dict) -> float:
    """The highest KL divergence on a text of a result.json, for its last stage."""
    return max(list(stages.values())[-1] for stages in result["kl_divergence"].values())


def describe(found: str, next_step: str) -> str:
    """The verdict in words; the next step is for a model that is not usable."""
    if found == USABLE.verdict:
        return found
    limits = f"KL divergence at most {USABLE.kl_divergence:g}, top-1 agreement at least {USABLE.top1_agreement:.0%}"
    return f"{found} (usable: {limits}); try {next_step}"
