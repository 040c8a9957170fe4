"""Distance to the dense model, against both models' own forwards, one window at a time."""

import copy
import math

import pytest
import torch

import lib.engine.activations
import lib.engine.tail
from lib.config.plan import Plan
from lib.engine.activations import Activations
from lib.engine.tail import token_divergences
from lib.engine.window_scores import DenseStates, plan_window_losses, window_scores
from lib.evaluation.distance import Distance, evaluation_of, packed, unpacked
from lib.evaluation.perplexity import spans_of
from lib.models.decoder import Decoder
from lib.reporting.verdict import verdict
from lib.runtime.batching import Batcher
from tests import reference
from tests.families import FAMILIES, tiny_model, tiny_windows

PLAN = Plan(4, (1,), (1, 2))


def evaluate(decoder, plan, windows, stride=None, at_once=None, places=None, batcher=None):
    """The evaluations of the dense and the pruned model."""
    dense = DenseStates(torch.arange(len(windows)) if places is None else places)
    spans = spans_of(len(windows), windows.shape[1], stride, at_once)
    batcher, scores = batcher or Batcher(2), []
    losses = []
    for span in spans:
        keep = lambda rows, states, first=span.rows.start: dense.keep(first + rows.start, states)  # noqa: E731
        window_losses = plan_window_losses(decoder, Plan(4), batcher, keep=keep)
        losses.append(window_losses(windows[span.rows], span.scored)[:, None])
    for span in spans:
        scores.append(window_scores(decoder, plan, windows[span.rows], span.scored, batcher, dense, span.rows.start))
    return evaluation_of(spans, losses), evaluation_of(spans, scores)


@torch.no_grad()
def literal(dense, pruned, windows):
    """KL(dense || pruned) and whether the first choices agree, for each predicted token: (N, T-1) each, in fp64."""
    divergences, agrees = [], []
    for window in windows:
        p, q = (model(input_ids=window[None]).logits[0, :-1].double().log_softmax(-1) for model in (dense, pruned))
        divergences.append((p.exp() * (p - q)).sum(-1))
        agrees.append((p.argmax(-1) == q.argmax(-1)).double())
    return torch.stack(divergences), torch.stack(agrees)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_distance_is_that_of_whole_forwards(family):
    model, windows = tiny_model(family), tiny_windows(5)
    pruned = reference.toggled(copy.deepcopy(model), PLAN.mha_removed, PLAN.ffn_removed)
    divergences, agrees = literal(model, pruned, windows)
    dense, found = evaluate(Decoder(model), PLAN, windows)
    assert dense.distance is None
    distance = found.distance
    assert distance.kl_divergence.value == pytest.approx(divergences.mean().item(), rel=1e-4)
    assert distance.by_window == pytest.approx(divergences.mean(dim=1).tolist(), rel=1e-4)
    assert distance.kl_divergence.standard_error == pytest.approx(
        divergences.mean(dim=1).std().item() / math.sqrt(5), rel=1e-4
    )
    assert distance.top1_agreement.value == pytest.approx(agrees.mean().item())
    assert distance.percentile_99 == pytest.approx(divergences.flatten().sort().values[-1].item(), rel=1e-4)
    assert found.perplexity.value == pytest.approx(math.exp(reference.total_loss(pruned, windows) / windows.numel()))


def test_a_percentile_is_that_of_all_tokens():
    scores = torch.rand(20, 2 + 15, generator=torch.Generator().manual_seed(0))
    found = evaluation_of(spans_of(20, 16), [scores]).distance.percentile_99
    assert (scores[:, 2:] > found).sum() == 3 == 20 * 15 // 100


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("at_once", [None, 1, 2, 4])
def test_parts_and_batches_change_nothing(at_once, batch):
    decoder, windows = Decoder(tiny_model("Llama")), tiny_windows(5)
    whole, parts = (
        evaluate(decoder, PLAN, windows, at_once=size, batcher=batcher)[1]
        for size, batcher in ((None, Batcher(2)), (at_once, Batcher(batch)))
    )
    assert parts.distance.by_window == pytest.approx(whole.distance.by_window, rel=1e-4)
    assert parts.perplexity.value == pytest.approx(whole.perplexity.value, rel=1e-5)


def test_a_batch_that_runs_out_of_memory_is_halved(monkeypatch):
    decoder, windows, calls = Decoder(tiny_model("Llama")), tiny_windows(5), []
    _, whole = evaluate(decoder, PLAN, windows)
    scores = lib.engine.activations.tail_scores

    def fails_once(*args):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return scores(*args)

    monkeypatch.setattr(lib.engine.activations, "tail_scores", fails_once)
    _, found = evaluate(decoder, PLAN, windows, batcher=(batcher := Batcher(4)))
    assert batcher.size == 2
    assert found.distance.by_window == pytest.approx(whole.distance.by_window, rel=1e-4)


def test_only_the_chosen_windows_have_a_distance_and_all_a_loss():
    decoder, windows = Decoder(tiny_model("Llama")), tiny_windows(5)
    _, whole = evaluate(decoder, PLAN, windows)
    _, some = evaluate(decoder, PLAN, windows, places=torch.tensor([0, 3]))
    expected = [whole.distance.by_window[place] for place in (0, 3)]
    assert some.distance.by_window == pytest.approx(expected, rel=1e-4)
    assert some.perplexity.value == pytest.approx(whole.perplexity.value, rel=1e-6)


def test_the_states_of_both_models_are_copied_batch_by_batch(monkeypatch):
    """Those of a model that is offloaded take much of the host's memory once; there is no room for them twice."""
    decoder, windows, copied = Decoder(tiny_model("Llama")), tiny_windows(5), []
    _, whole = evaluate(decoder, PLAN, windows)
    some = Activations.some

    def counted(states: Activations, rows: slice, places: list[int]) -> Activations:
        copied.append(len(places))
        return some(states, rows, places)

    monkeypatch.setattr(Activations, "some", counted)
    monkeypatch.setattr(Decoder, "is_offloaded", True)
    _, found = evaluate(decoder, PLAN, windows)
    assert copied == [2, 2, 1]
    assert found.distance.by_window == pytest.approx(whole.distance.by_window, rel=1e-4)


def test_with_a_stride_the_distance_is_over_the_scored_tokens():
    model, tokens = tiny_model("Llama"), tiny_windows(3).flatten()
    windows = tokens.unfold(0, 16, 5)
    pruned = reference.toggled(copy.deepcopy(model), PLAN.mha_removed, PLAN.ffn_removed)
    divergences, _ = literal(model, pruned, windows)
    scored = torch.cat([divergences[0], divergences[1:, -5:].flatten()])
    _, found = evaluate(Decoder(model), PLAN, windows, stride=5)
    assert found.distance.kl_divergence.value == pytest.approx(scored.mean().item(), rel=1e-4)


def test_a_model_has_no_distance_to_itself():
    decoder, windows = Decoder(tiny_model("Llama")), tiny_windows(3)
    dense, same = evaluate(decoder, Plan(4), windows)
    assert same.perplexity.value == pytest.approx(dense.perplexity.value, rel=1e-6)
    # Of differences between windows, where the rounding of the losses, 5e-7 in fp32, counts for more
    assert same.perplexity.standard_error == pytest.approx(dense.perplexity.standard_error, rel=1e-5)
    assert same.distance.top1_agreement.value == 1
    assert same.distance.by_window == pytest.approx(Distance.none(3).by_window, abs=1e-6)


def test_tokens_that_the_dense_model_rules_out_count_nothing():
    dense, other = torch.tensor([1.0, 2.0, -torch.inf]), torch.tensor([2.0, 1.0, -torch.inf])
    p, q = dense[:2].softmax(0), other[:2].softmax(0)
    assert token_divergences(dense, other).item() == pytest.approx((p * (p / q).log()).sum().item())


def test_the_tail_with_two_models_sees_no_more_logits_than_allowed(monkeypatch):
    decoder, windows = Decoder(tiny_model("Gemma2")), tiny_windows(4)
    _, whole = evaluate(decoder, PLAN, windows)
    sizes, logits = [], decoder.logits
    monkeypatch.setattr(decoder, "logits", lambda states: (sizes.append(states[..., 0].numel()), logits(states))[1])
    monkeypatch.setattr(lib.engine.tail, "_LOGITS_AT_ONCE", 96 * 10)
    _, pieces = evaluate(decoder, PLAN, windows)
    assert pieces.distance.by_window == pytest.approx(whole.distance.by_window, rel=1e-4)
    dense, pruned = sizes[: -2 * 4 * 3], sizes[-2 * 4 * 3 :]  # of 4 windows, which take 3 pieces each for two models
    assert sum(dense) == 4 * 15 and sum(pruned) == 2 * 4 * 15
    assert max(dense) <= 10 and max(map(sum, zip(pruned[::2], pruned[1::2], strict=True))) <= 10


def test_scores_are_kept_to_the_bit():
    scores = torch.randn(3, 5)
    scores[1] = torch.nan
    assert torch.equal(unpacked(packed(scores), 5).nan_to_num(7), scores.nan_to_num(7))


@pytest.mark.parametrize(
    "divergence, agreement, word",
    [
        (0.0, 1.0, "usable"),
        (0.2, 0.8, "usable"),
        (0.21, 0.9, "damaged"),
        (0.1, 0.79, "damaged"),
        (0.61, 0.9, "broken"),
        (0.3, 0.5, "broken"),
    ],
)
def test_a_verdict_goes_by_both_distances(divergence, agreement, word):
    assert verdict(divergence, agreement) == word
