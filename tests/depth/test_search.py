"""The sweep and the greedy search give what toggling layers and running the whole model gives."""

import json

import pytest
import torch

import lib.depth.trial_losses
from lib.config.plan import Mode, Plan
from lib.depth.budget import Budget, Counts, choose_counts
from lib.depth.greedy import choose_candidates, greedy_search
from lib.depth.moves import greedy, sublayers, whole_layers
from lib.depth.trial_losses import Sweep, Trial
from lib.errors import InputError, RunError
from lib.models.decoder import Decoder
from lib.runtime.batching import Batcher
from tests import reference
from tests.families import FAMILIES, tiny_model, tiny_windows


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_search_is_that_of_whole_forwards(family, batcher):
    model, windows, candidates = tiny_model(family), tiny_windows(5), [2, 1, 3]
    expected = reference.greedy(model, windows, candidates, mha_count=2)
    plan, rounds = greedy_search(Sweep(Decoder(model), windows, batcher), candidates, mha_count=2)
    for found, (losses, selected) in zip(rounds, expected, strict=True):
        assert found.selected == selected
        assert found.losses == pytest.approx(losses, rel=1e-5)
    assert plan == Plan(4, tuple(selected for _, selected in expected), (1, 2, 3))


def test_losses_do_not_depend_on_the_batch_size():
    windows, candidates = tiny_windows(5), [0, 2, 3]
    runs = [greedy_search(Sweep(Decoder(tiny_model("Gemma2")), windows, Batcher(n)), candidates, 2) for n in (1, 2, 5)]
    assert len({plan for plan, _ in runs}) == 1
    for _, rounds in runs[1:]:
        assert [r.losses for r in rounds] == [pytest.approx(r.losses, rel=1e-6) for r in runs[0][1]]


def test_the_kept_prefix_is_used_only_under_the_modes_it_was_made_with(batcher):
    decoder, windows = Decoder(tiny_model("Llama")), tiny_windows(4)
    sweep, closed = Sweep(decoder, windows, batcher), Mode(False, False)
    for base in (Plan(4), Plan(4, ffn_removed=(1,)), Plan(4, (0,), (0,)), Plan(4)):
        for layer in (3, 2, 3, 1):
            fresh = Sweep(decoder, windows, batcher).losses(base, [Trial(layer, closed)])
            assert sweep.losses(base, [Trial(layer, closed)]) == pytest.approx(fresh, rel=1e-6)


@pytest.mark.parametrize("moves_of", [whole_layers, sublayers, None])
@pytest.mark.parametrize("states", [0, 1, 2, 5])
def test_with_room_for_few_states_the_losses_are_the_same(states, moves_of, batcher, monkeypatch):
    decoder, windows = Decoder(tiny_model("Llama")), tiny_windows(4)

    def search():
        sweep = Sweep(decoder, windows, batcher)
        return greedy(sweep, moves_of(decoder), 0.35) if moves_of else greedy_search(sweep, [3, 2, 1], 3)

    expected = search()
    size = windows.numel() * decoder.config.hidden_size * 4
    monkeypatch.setattr(
        lib.depth.trial_losses, "free_bytes", lambda device: size * states / lib.depth.trial_losses._ROOM
    )
    monkeypatch.setattr(lib.depth.trial_losses, "free_host_memory", lambda: 0)
    assert search() == expected


def test_no_room_for_states_to_keep_is_no_failure(batcher, monkeypatch):
    decoder, windows = Decoder(tiny_model("Llama")), tiny_windows(4)
    expected = greedy_search(Sweep(decoder, windows, batcher), [3, 2, 1], 3)

    def full(shape, **options):
        raise torch.OutOfMemoryError("out of memory")

    sweep = Sweep(decoder, windows, batcher)
    monkeypatch.setattr(lib.depth.trial_losses.torch, "empty", full)
    assert greedy_search(sweep, [3, 2, 1], 3) == expected
    assert sweep._kept.longest(Plan(4).modes) == ()


def test_hidden_states_that_the_device_has_no_room_for_are_kept_on_the_host_once(batcher, monkeypatch):
    decoder, windows, states = Decoder(tiny_model("Llama")), tiny_windows(4), torch.randn(4, 24, 32)
    monkeypatch.setattr(lib.depth.trial_losses, "free_bytes", lambda device: 0)
    kept = lib.depth.trial_losses._States(decoder.device)
    on, off = Mode(), Mode(False, False)
    kept.begin([(on, on)], slice(0, len(windows)))
    for modes in ((on,), (off,)):
        for rows in (slice(0, 3), slice(3, 4)):
            kept.write(rows, modes, states[rows])
    assert kept.longest((on, on)) == ()  # not all windows' yet, for all that is known
    kept.end()
    assert kept.longest((on, on)) == (on,) and kept.longest((off, on)) == ()
    assert torch.equal(kept.read(slice(1, 4), (on,)), states[1:4])


@pytest.mark.parametrize("fails_at", range(1, 7))
def test_running_out_of_memory_anywhere_changes_no_loss(fails_at, fails_once):
    """Candidates apart from each other, so that the kept prefix moves up over layers that are not closed."""
    windows, candidates = tiny_windows(4), [0, 3]
    _, expected = greedy_search(Sweep(Decoder(tiny_model("Llama")), windows, Batcher(2)), candidates, 2)

    calls = fails_once(fails_at)
    _, found = greedy_search(Sweep(Decoder(tiny_model("Llama")), windows, Batcher(2)), candidates, 2)
    assert len(calls) > fails_at
    assert [r.selected for r in found] == [r.selected for r in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-6)


def test_a_layer_runs_once_for_all_models_that_are_the_same_up_to_it(monkeypatch, batcher):
    decoder, calls, windows = Decoder(tiny_model("Llama", num_hidden_layers=16)), [], tiny_windows(2)
    run_layer = decoder.run_layer
    monkeypatch.setattr(decoder, "run_layer", lambda *args: calls.append(args[0]) or run_layer(*args))
    sweep = Sweep(decoder, windows, batcher)
    greedy_search(sweep, list(range(10, 14)), 3)
    walks = {model[:end] for model in sweep.asked for end in range(1, 17)}
    batches = -(-len(windows) // batcher.size)
    assert len(calls) == batches * sum(walk[-1].attention or walk[-1].ffn for walk in walks)
    assert len(calls) < batches * (4 + 3 + 2) * 16 / 3


def test_a_loss_that_is_not_finite_stops_the_search_and_names_the_layer(batcher):
    model = tiny_model("Llama")
    model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(RunError, match="layer 2"):
        greedy_search(Sweep(Decoder(model), tiny_windows(2), batcher), [3], 1)


def test_equal_losses_choose_the_lower_block_influence(batcher):
    model = tiny_model("Llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    _, rounds = greedy_search(Sweep(Decoder(model), tiny_windows(2), batcher), [2, 1, 3], 1)
    assert rounds[0].selected == 2


def test_candidates_are_the_lowest_ascending_ties_by_index():
    assert choose_candidates([0.5, 0.1, 0.3, 0.1, 0.2], 4) == [1, 3, 4, 2]


# The budget


def _llama2(hidden: int, ffn: int, layers: int, vocab: int = 32000) -> Budget:
    mha, ffn = 4 * hidden * hidden, 3 * hidden * ffn
    return Budget(layers, mha, ffn, 2 * vocab * hidden + layers * (mha + ffn + 2 * hidden) + hidden)


def test_counts_are_the_references(shared):
    models = {"llama-2-7b": _llama2(4096, 11008, 32), "llama-2-13b": _llama2(5120, 13824, 40)}
    cases = json.loads((shared / "golden/budget.json").read_text())
    assert len(cases) == 30
    for case in cases:
        budget = models[case["config"]]
        counts = choose_counts(budget, case["prune_rate"], case["mha_ffn_ratio"] or budget.natural_ratio)
        assert counts == (case["mha"], case["ffn"])
        assert budget.rate(*counts) == pytest.approx(case["actual"], abs=1e-6)


def test_llama2_7b_at_a_quarter():
    assert choose_counts(_llama2(4096, 11008, 32), 0.25) == Counts(mha=5, ffn=10)


def test_a_count_that_is_given_is_kept_and_the_other_is_searched():
    budget = _llama2(4096, 11008, 32)
    given_mha, given_ffn = choose_counts(budget, 0.25, mha=2), choose_counts(budget, 0.25, ffn=10)
    assert given_mha.mha == 2 and given_ffn == Counts(5, 10)
    for other in range(2, 33):
        assert abs(budget.rate(*given_mha) - 0.25) <= abs(budget.rate(2, other) - 0.25)


def test_a_rate_out_of_reach_names_the_nearest():
    with pytest.raises(InputError, match=r"--prune_rate 0.9 cannot be reached: the nearest is 0\.5\d+ .*MHA"):
        choose_counts(_llama2(4096, 11008, 32), 0.9)
    with pytest.raises(InputError, match="no pair of counts"):
        choose_counts(Budget(2, 10, 20, 100), 0.25, ratio=9.0)


def test_greedy_never_chooses_more_attentions_than_candidates(batcher):
    plan, rounds = greedy_search(Sweep(Decoder(tiny_model("Llama")), tiny_windows(1), batcher), [1, 2], 2)
    assert sorted(plan.mha_removed) == [1, 2] and len(rounds[1].losses) == 1
    assert torch.tensor([r.loss for r in rounds]).isfinite().all()
