"""The policies of other papers choose what toggling sublayers and running the whole model chooses."""

import json
import sys

import pytest

import lib.depth.prepare
import lib.depth.run
from lib.config.methods import DEPTH_METHODS
from lib.config.plan import Plan
from lib.config.sources import ModelSource
from lib.depth.beam import beam
from lib.depth.greedy import greedy_search
from lib.depth.moves import Move, greedy, moves_of, sublayers, whole_layers
from lib.depth.policies import random_layers, shortgpt
from lib.depth.trial_losses import Sweep
from lib.errors import InputError
from lib.export.huggingface import save_pruned
from lib.models.decoder import Decoder
from lib.models.loading import load_model, load_tokenizer
from lib.runtime.batching import Batcher
from tests import reference
from tests.command import run
from tests.families import tiny_model, tiny_windows


def oracle(model, windows, plan, moves):
    """The loss of the model under a plan and each of some moves, by whole forwards of toggled models."""
    plans = {move: move.added_to(plan) for move in moves}
    toggled = {m: reference.toggled(model, after.mha_removed, after.ffn_removed) for m, after in plans.items()}
    return {move: reference.total_loss(each, windows) for move, each in toggled.items()}


def rate_of(decoder, *moves) -> float:
    plan = Plan(4)
    for move in moves:
        plan = move.added_to(plan)
    return decoder.removed_parameters(plan) / decoder.total_parameters


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "OPT", "GPTNeoX", "FalconSerial", "Mixtral"])
@pytest.mark.parametrize("method, offered", [("sleb", whole_layers), ("blockpruner", sublayers)])
def test_greedy_policies_are_those_of_whole_forwards(family, method, offered, batcher):
    model, windows = tiny_model(family), tiny_windows(3)
    decoder = Decoder(tiny_model(family))
    moves = moves_of(DEPTH_METHODS[method], decoder)
    assert moves == offered(decoder)
    whole = [Move(layer, True, True) for layer in (0, 1)]
    plan, steps = greedy(Sweep(decoder, windows, batcher), moves, rate_of(decoder, *whole))
    base = Plan(4)
    for number, step in enumerate(steps):
        expected = oracle(model, windows, base, step.losses)
        assert step.losses == pytest.approx(expected, rel=1e-5)
        assert step.selected == min(expected, key=expected.get)
        assert number or list(step.losses) == moves
        base = step.selected.added_to(base)
    assert len(steps) >= 2 and base == plan


def test_every_move_is_offered_that_comes_nearer_and_no_other(batcher):
    decoder = Decoder(tiny_model("Llama"))
    attention = rate_of(decoder, Move(0, attention=True))
    plan, (step,) = greedy(Sweep(decoder, tiny_windows(2), batcher), sublayers(decoder), attention)
    assert set(step.losses) == {*(Move(i, attention=True) for i in range(4)), *(Move(i, ffn=True) for i in range(4))}
    target = rate_of(decoder, *(Move(i, ffn=True) for i in range(2)))
    plan, steps = greedy(Sweep(decoder, tiny_windows(2), batcher), sublayers(decoder), target)
    removed = decoder.removed_parameters(plan) / decoder.total_parameters
    for move in sublayers(decoder):
        if move.layer not in (plan.mha_removed if move.attention else plan.ffn_removed):
            after = decoder.removed_parameters(move.added_to(plan)) / decoder.total_parameters
            assert abs(after - target) >= abs(removed - target)


def test_shortgpt_takes_the_lowest_block_influence():
    decoder = Decoder(tiny_model("Llama"))
    target = rate_of(decoder, Move(0, True, True), Move(1, True, True))
    plan = shortgpt(decoder, [0.4, 0.1, 0.3, 0.1], target)
    assert plan == Plan(4, (1, 3), (1, 3))


def test_random_layers_follow_the_seed():
    decoder = Decoder(tiny_model("Llama", num_hidden_layers=12))
    plans = [random_layers(decoder, 0.2, seed) for seed in (0, 0, 1, 2)]
    assert plans[0] == plans[1] and len(set(plans)) == 3
    assert all(plan.mha_removed == plan.ffn_removed for plan in plans)


def test_the_last_attention_stays(batcher):
    decoder = Decoder(tiny_model("Llama"))
    moves = [Move(layer, attention=True) for layer in range(4)]
    sweep, rate = Sweep(decoder, tiny_windows(1), batcher), rate_of(decoder, *moves)
    plan, _ = greedy(sweep, moves, 0.8 * rate)
    assert len(plan.mha_removed) == 3
    with pytest.raises(InputError, match="cannot be reached"):
        greedy(sweep, moves, rate)


@pytest.mark.parametrize("target", [0.001, 0.99])
def test_a_rate_out_of_reach_is_refused(target):
    with pytest.raises(InputError, match="cannot be reached by this method"):
        shortgpt(Decoder(tiny_model("Llama")), [1, 2, 3, 4], target)


@pytest.mark.parametrize("family", ["Qwen3Next", "Lfm2"])
def test_the_last_full_attention_of_a_hybrid_stays(family):
    """Without it, generation with a cache fails in transformers."""
    decoder = Decoder(tiny_model(family))
    sweep, moves = Sweep(decoder, tiny_windows(2), Batcher(2)), sublayers(decoder)
    plan, _ = greedy(sweep, moves, 0.6)
    assert {1, 3} - set(plan.mha_removed), "layers 1 and 3 have full attention"
    first, _ = greedy_search(sweep, [1, 3], 2)
    assert len(first.mha_removed) == 1 and not decoder.keeps_attention(Plan(4, (1, 3)))
    assert decoder.keeps_attention(Plan(4, (0, 2))) and decoder.keeps_attention(first)


def test_a_model_pruned_before_loses_what_it_has(batcher, tmp_path):
    save_pruned(Decoder(tiny_model("Llama")), Plan(4, (1,), (0,)), None, tmp_path / "out")
    decoder = Decoder(load_model(ModelSource(str(tmp_path / "out"))))
    assert whole_layers(decoder) == [Move(2, True, True), Move(3, True, True)]
    assert Move(0, ffn=True) not in sublayers(decoder) and Move(0, attention=True) in sublayers(decoder)
    plan, _ = greedy(
        Sweep(decoder, tiny_windows(2), Batcher(2)), whole_layers(decoder), rate_of(decoder, Move(2, True, True))
    )
    assert plan.mha_removed in ((2,), (3,))


def test_without_a_whole_layer_only_sublayers_can_be_searched(tiny_folder, text_file, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "halves"
    source = ModelSource(str(tiny_folder))
    save_pruned(Decoder(load_model(source)), Plan(4, (0, 2), (1, 3)), load_tokenizer(source), folder)
    flags = ["--model_name", folder, "--dataset", text_file, "--eval_datasets", text_file, "--nsamples", 2]
    flags += ["--prune_rate", 0.1, "--output_dir", tmp_path / "run"]
    assert run(*flags, "--method", "ppllms", monkeypatch=monkeypatch) == 2
    assert "pruning needs at least 2" in capsys.readouterr().err
    assert run(*flags, "--method", "beam", monkeypatch=monkeypatch) == 0


# Beam -----------------------------------------------------------------------------------------------------------------


def every_plan(decoder) -> list[Plan]:
    """All ways to remove sublayers of four layers that leave an attention."""
    return [
        Plan(4, tuple(i for i in range(4) if mask >> i & 1), tuple(i for i in range(4) if mask >> i & 16))
        for mask in range(256)
        if mask & 15 != 15
    ]


def off(decoder, plan, target) -> float:
    """How far a plan ends from a share."""
    return abs(decoder.removed_parameters(plan) / decoder.total_parameters - target)


def nearest(decoder, target) -> list[Plan]:
    """The plans that no removal of one more sublayer would bring nearer to a share, and that were nearing it."""

    plans = every_plan(decoder)
    parents = {plan: [other for other in plans if is_one_more(other, plan)] for plan in plans}
    children = {plan: [other for other in plans if is_one_more(plan, other)] for plan in plans}
    return [
        plan
        for plan in plans
        if all(off(decoder, child, target) >= off(decoder, plan, target) for child in children[plan])
        and any(off(decoder, plan, target) < off(decoder, parent, target) for parent in parents[plan])
    ]


def is_one_more(plan, other) -> bool:
    """True when `other` is `plan` and one sublayer more."""
    less = {*plan.mha_removed, *(10 + i for i in plan.ffn_removed)}
    more = {*other.mha_removed, *(10 + i for i in other.ffn_removed)}
    return less < more and len(more) == len(less) + 1


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Mixtral"])
@pytest.mark.parametrize("target", [0.15, 0.3])
def test_a_wide_beam_finds_the_best_of_all_plans(family, target, batcher):
    model, windows = tiny_model(family), tiny_windows(2)
    decoder = Decoder(tiny_model(family))
    found = beam(Sweep(decoder, windows, batcher), target, 1000, {})
    losses = {}
    for plan in nearest(decoder, target):
        losses[plan.modes] = reference.total_loss(reference.toggled(model, plan.mha_removed, plan.ffn_removed), windows)
    assert found.loss == pytest.approx(min(losses.values()), rel=1e-5)
    assert losses[found.plan.modes] == pytest.approx(found.loss, rel=1e-5) and found.origin == "beam"


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "OPT"])
@pytest.mark.parametrize("target", [0.15, 0.22, 0.35])
def test_the_beam_is_never_worse_than_the_others(family, target, batcher):
    decoder, windows = Decoder(tiny_model(family)), tiny_windows(3)
    sweep = Sweep(decoder, windows, batcher)
    others = {
        "sleb": greedy(sweep, whole_layers(decoder), target)[0],
        "blockpruner": greedy(sweep, sublayers(decoder), target)[0],
        "shortgpt": shortgpt(decoder, [0.3, 0.1, 0.2, 0.4], target),
    }
    found = beam(sweep, target, 1, others)
    assert found.trials == len(sweep.asked) <= found.at_most
    half = max(rate_of(decoder, move) for move in sublayers(decoder)) / 2
    assert off(decoder, found.plan, target) <= half
    compared = []
    for name, plan in others.items():
        completed, _ = greedy(sweep, sublayers(decoder), target, base=plan)
        for one in (plan, completed):
            if off(decoder, one, target) <= half and one in (completed, others["blockpruner"]):
                assert found.loss <= sweep.loss(one), name
                compared.append(one)
    assert compared
    again = beam(Sweep(decoder, windows, batcher), target, 1, others)
    assert (again.plan, again.loss) == (found.plan, found.loss)


def test_a_plan_of_another_method_is_taken_where_it_is_better(batcher):
    decoder = Decoder(tiny_model("Llama"))
    sweep, target = Sweep(decoder, tiny_windows(2), batcher), rate_of(decoder, Move(0, True, True))
    best = min(nearest(decoder, target), key=sweep.loss)
    found = beam(sweep, target, 1, {"sleb": best})
    assert found.loss == sweep.loss(best)


def test_nothing_is_measured_twice(batcher, monkeypatch):
    decoder = Decoder(tiny_model("Llama"))
    sweep, measured = Sweep(decoder, tiny_windows(2), batcher), []
    measure = sweep._measure

    def watched(trials, *args):
        measured.extend(trials)
        return measure(trials, *args)

    monkeypatch.setattr(sweep, "_measure", watched)
    for target in (0.2, 0.3):
        others = {
            "blockpruner": greedy(sweep, sublayers(decoder), target)[0],
            "sleb": greedy(sweep, whole_layers(decoder), target)[0],
        }
        beam(sweep, target, 2, others)
    assert len(measured) == len(set(measured)) == len(sweep.asked)


# The command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def by_rate(arguments):
    """The arguments of a run that goes by the rate alone."""
    at = arguments.index("--mha_remove_layers")
    return [*arguments[:at], *arguments[at + 4 :], "--eval_ppl", "no", "--overwrite", "--prune_rate", 0.1]


def test_random_looks_at_no_text(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lib.depth.prepare, "load_corpus", None)
    command = ["--model_name", tiny_folder, "--method", "random", "--prune_rate", 0.1, "--eval_ppl", "no"]
    assert run(*command, "--output_dir", tmp_path / "run", monkeypatch=monkeypatch) == 0
    assert "Calibration" not in capsys.readouterr().out
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["seed"] == 0 and not {"dataset", "nsamples", "windows"} & set(result)
    assert run(*command, "--dataset", "demo", monkeypatch=monkeypatch) == 2
    assert "--dataset: --method random has no use for it" in capsys.readouterr().err


def test_the_beam_tells_what_it_measured(by_rate, tmp_path, monkeypatch, capsys):
    assert run(*by_rate, "--method", "beam", "--beam_width", 2, monkeypatch=monkeypatch) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    found, trials = result["beam"], result["trials"]
    assert found["width"] == 2 and set(found["others"]) <= {"shortgpt", "ppllms", "sleb", "blockpruner"}
    assert found["loss"] <= found["others"]["blockpruner"]["loss"] and 8 < trials["measured"] <= trials["at_most"]
    said = capsys.readouterr().out
    assert f"{trials['measured']:,} models measured" in said and f"chosen: loss {found['loss']:.2f} with" in said


@pytest.mark.parametrize("method", ["shortgpt", "sleb", "blockpruner"])
def test_a_run_prunes_by_each_method(by_rate, tmp_path, monkeypatch, method):
    command = [*by_rate, "--method", method, "--save_model", tmp_path / "out"]
    assert run(*command, monkeypatch=monkeypatch) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["method"] == method and result["parameters"]["actual_rate"] == pytest.approx(0.1, abs=0.03)
    assert ("bi_scores" in result) == (method == "shortgpt")
    saved = load_model(ModelSource(str(tmp_path / "out")))
    left = result["parameters"]["total"] - result["parameters"]["removed"]
    assert sum(parameter.numel() for parameter in saved.parameters()) == left
    for step in result.get("rounds", []):
        assert step["loss"] == min(step["losses"].values()) == step["losses"][step["selected"]]
    assert bool(result.get("rounds")) == (method in ("sleb", "blockpruner"))


def test_the_plan_of_a_method_is_applied_again(by_rate, tmp_path, monkeypatch):
    assert run(*by_rate, "--method", "blockpruner", monkeypatch=monkeypatch) == 0
    found = json.loads((tmp_path / "run/result.json").read_text())
    command = ["--apply_plan", tmp_path / "run/result.json", "--eval_ppl", "no", "--output_dir", tmp_path / "applied"]
    assert run(*command, monkeypatch=monkeypatch) == 0
    applied = json.loads((tmp_path / "applied/result.json").read_text())
    assert [applied[name] for name in ("mha_removed", "ffn_removed")] == [found["mha_removed"], found["ffn_removed"]]


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--method", "sleb", "--mha_remove_layers", 1], "--mha_remove_layers: is of --method ppllms"),
        (["--method", "sleb", "--bi_windows", 1], "--bi_windows: --method sleb has no use for it"),
        (["--method", "shortgpt", "--prune_rate", 0.9], "--prune_rate 0.9 cannot be reached by this method"),
        (["--method", "sleb", "--beam_width", 2], "--beam_width: --method sleb has no use for it"),
        (["--method", "beam", "--ffn_remove_layers", 1], "--ffn_remove_layers: is of --method ppllms"),
        (["--method", "wanda"], "--method: invalid choice: 'wanda'"),
    ],
)
def test_flags_that_do_not_fit_a_method_are_refused(by_rate, tmp_path, monkeypatch, capsys, flags, problem):
    with pytest.raises(SystemExit) as ended:
        sys.exit(run(*by_rate, *flags, monkeypatch=monkeypatch))
    assert ended.value.code == 2 and problem in capsys.readouterr().err and not (tmp_path / "run").exists()
