"""Block Influence and perplexity, against one window at a time through the model's own forward."""

import math

import pytest
import torch

import lib.engine.activations
import lib.engine.finite
import lib.engine.tail
from lib.config.plan import Plan
from lib.depth.block_influence import block_influence
from lib.engine.tail import tail_losses, token_losses
from lib.engine.window_scores import plan_window_losses
from lib.errors import RunError
from lib.evaluation.perplexity import perplexity
from lib.models.decoder import Decoder
from lib.runtime.batching import Batcher
from tests import reference
from tests.families import FAMILIES, tiny_model, tiny_windows


@pytest.mark.parametrize("family", FAMILIES)
def test_block_influence_is_that_of_the_hooked_model(family, batcher):
    model, windows = tiny_model(family), tiny_windows(5)
    assert block_influence(Decoder(model), windows, batcher) == pytest.approx(
        reference.block_influence(model, windows), abs=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_that_of_whole_forwards(family, batcher):
    model, windows = tiny_model(family), tiny_windows(5)
    expected = math.exp(reference.total_loss(model, windows) / windows.numel())
    found = perplexity(plan_window_losses(Decoder(model), Plan(4), batcher), windows).value
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "OPT", "GPTNeoX"])
@pytest.mark.parametrize("stride", [1, 5, 15, 16])
def test_a_stride_measures_every_token_once_with_more_before_it(family, stride):
    model, tokens = tiny_model(family), tiny_windows(3).flatten()
    windows = tokens.unfold(0, 16, stride)
    found = perplexity(plan_window_losses(Decoder(model), Plan(4), Batcher(2)), windows, stride)
    expected = reference.strided_perplexity(model, tokens, 16, stride if stride < 16 else 15)
    if stride == 16:  # windows side by side, whose first tokens nothing predicts
        expected = math.exp(reference.total_loss(model, windows) / windows.numel())
    assert found.value == pytest.approx(expected, rel=1e-5)


def test_the_standard_error_is_that_of_resampled_windows():
    """The deviation of perplexities of texts drawn anew, by the bootstrap."""
    generator = torch.Generator().manual_seed(0)
    losses = 2 + 0.5 * torch.randn(400, generator=generator)
    found = perplexity(lambda rows, scored: losses[rows[:, 0]], torch.arange(400)[:, None].expand(-1, 9))
    drawn = losses[torch.randint(0, 400, (4000, 400), generator=generator)].double().mean(dim=1).exp()
    assert found.value == pytest.approx(losses.double().mean().exp().item())
    assert found.standard_error == pytest.approx(drawn.std().item(), rel=0.05)
    literal = losses.double().std().item() / math.sqrt(400) * found.value
    assert found.standard_error == pytest.approx(literal)


def test_one_window_has_no_standard_error():
    found = perplexity(lambda rows, scored: torch.ones(len(rows)), tiny_windows(1))
    assert found.standard_error is None and str(found) == "2.718"


def test_token_losses_are_taken_in_fp32():
    logits, labels = torch.randn(2, 3, 50).bfloat16(), torch.randint(0, 50, (2, 3))
    losses = token_losses(logits, labels)
    assert losses.dtype == torch.float32 and losses.shape == (2, 3)
    expected = -logits.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    assert torch.allclose(losses.double(), expected, atol=1e-5)


def test_the_tail_never_sees_more_logits_than_allowed(monkeypatch):
    decoder, ids = Decoder(tiny_model("Gemma2")), tiny_windows(4)
    hidden_states = lib.engine.finite.final_hidden_states(decoder, ids, Plan(4).modes)
    whole = tail_losses(decoder, hidden_states, ids)
    sizes, logits = [], decoder.logits
    monkeypatch.setattr(decoder, "logits", lambda x: sizes.append(x.shape[0] * x.shape[1] * 96) or logits(x))
    monkeypatch.setattr(lib.engine.tail, "_LOGITS_AT_ONCE", 96 * 7)
    assert torch.allclose(tail_losses(decoder, hidden_states, ids), whole, rtol=1e-5)
    assert max(sizes) <= 96 * 7 and sum(sizes) == 96 * 4 * 15


def test_a_layer_that_gives_nan_or_infinity_is_named(batcher):
    for bad in (float("nan"), float("inf")):
        model = tiny_model("Llama")
        model.model.layers[1].mlp.down_proj.weight[0, 0] = bad
        with pytest.raises(RunError, match="layer 1;"):
            block_influence(Decoder(model), tiny_windows(2), batcher)
        with pytest.raises(RunError, match="layer 1;"):
            perplexity(plan_window_losses(Decoder(model), Plan(4), batcher), tiny_windows(2))


def test_a_head_that_gives_nan_is_told_from_the_layers(batcher):
    model = tiny_model("Llama")
    model.lm_head.weight[5, 5] = float("nan")
    with pytest.raises(RunError, match="in the loss"):
        perplexity(plan_window_losses(Decoder(model), Plan(4), batcher), tiny_windows(2))


def test_the_batch_halves_when_memory_runs_out_and_results_stay():
    windows, tried = tiny_windows(7), []

    def means(rows: slice) -> torch.Tensor:
        tried.append(rows.stop - rows.start)
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("out of memory")
        return windows[rows].float().mean(dim=1)

    batcher = Batcher(7)
    assert torch.equal(batcher.map(means, 7), windows.float().mean(dim=1))
    assert tried == [7, 3, 1, 1, 1, 1, 1, 1, 1] and batcher.size == 1


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_running_out_of_memory_changes_no_perplexity(fails_at, fails_once):
    """Also where the walk up the layers, which is a map within a map, is at its end."""
    model, windows = tiny_model("Llama"), tiny_windows(7)
    expected = perplexity(plan_window_losses(Decoder(model), Plan(4), Batcher(4)), windows)

    calls = fails_once(fails_at)
    batcher = Batcher(2 if fails_at == 3 else 4)
    found = perplexity(plan_window_losses(Decoder(model), Plan(4), batcher), windows)
    assert len(calls) > fails_at and found.value == pytest.approx(expected.value, rel=1e-6)


def test_out_of_memory_with_one_window_is_raised():
    def losses(rows):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    with pytest.raises(RuntimeError, match="can't allocate"):
        Batcher(4).map(losses, 4)


def test_other_errors_are_not_taken_for_missing_memory():
    def losses(rows):
        raise RuntimeError("shapes do not match")

    batcher = Batcher(4)
    with pytest.raises(RuntimeError, match="shapes"):
        batcher.map(losses, 4)
    assert batcher.size == 4


def test_progress_counts_every_window_once():
    seen = []
    Batcher(3).map(lambda rows: torch.zeros(rows.stop - rows.start), 8, seen.append)
    assert seen == [3, 3, 2]


def test_a_map_within_a_map_halves_no_further_than_it_must():
    """What the outer slice holds fits for 4 windows; what the batch within needs fits for as many as there are."""
    batcher, seen = Batcher(16), []

    def outer(rows: slice) -> torch.Tensor:
        count = rows.stop - rows.start

        def inner(within: slice) -> torch.Tensor:
            if count + (within.stop - within.start) > 8:
                raise torch.OutOfMemoryError("out of memory")
            seen.extend(range(rows.start + within.start, rows.start + within.stop))
            return torch.zeros(within.stop - within.start)

        return batcher.map(inner, count)

    assert len(batcher.map(outer, 32)) == 32 and batcher.size >= 2
    assert sorted(set(seen)) == list(range(32))
