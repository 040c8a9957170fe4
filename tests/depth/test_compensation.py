"""Compensation brings hidden states back to those of the dense model, by changed output projections alone."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lib.depth.refit
import ppllms
from lib.config.plan import Mode, Plan
from lib.depth.compensation import Refit, compensate, held_out, steps_of
from lib.depth.refit import FULL, Moments
from lib.engine.finite import final_hidden_states
from lib.models.decoder import Decoder
from lib.models.residual_writers import output_projections
from lib.models.weight_deltas import Changes
from lib.runtime.batching import Batcher
from tests.command import run
from tests.families import FAMILIES, tiny_model, tiny_windows
from tests.models.test_residual_writers import POST_NORM

WRITING = [family for family in FAMILIES if family not in POST_NORM]
PLAN = Plan(4, (1, 2), (2,))  # gaps after a whole layer's attention, and over a whole layer


def test_one_window_of_eight_is_held_out_and_at_least_one():
    assert held_out(17).nonzero().flatten().tolist() == [7, 15]
    assert [held_out(count).sum().item() for count in (2, 7, 8, 15, 16)] == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("family", ["Llama", "Phi"])
def test_a_step_is_a_sublayer_or_a_parallel_layer(family):
    first, steps = steps_of(Decoder(tiny_model(family)), Plan(4, (0, 2), (0, 2, 3)))
    whole, attention, ffn = Mode(), Mode(ffn=False), Mode(attention=False)
    if family == "Phi":
        assert first == [(0, whole)]
        assert [(step.pruned, step.dense) for step in steps] == [
            ((1, whole), ((1, whole), (2, whole))),
            ((3, attention), ((3, whole),)),
        ]
    else:
        assert first == [(0, attention), (0, ffn)]
        assert [(step.pruned, step.dense) for step in steps] == [
            ((1, attention), ((1, attention),)),
            ((1, ffn), ((1, ffn), (2, attention), (2, ffn))),
            ((3, attention), ((3, attention), (3, ffn))),
        ]
    assert [step.is_gap for step in steps] == ([True, True] if family == "Phi" else [False, True, True])


# The walk -------------------------------------------------------------------------------------------------------------


def compensated(family: str, mode: str, folder: Path, batcher: Batcher, plan: Plan = PLAN, count: int = 80):
    """The decoder after a compensation, the refits, and the errors of the last hidden states before and after."""
    decoder, windows = Decoder(tiny_model(family)), tiny_windows(count)
    unseen = torch.randint(3, 96, (40, 16), generator=torch.Generator().manual_seed(2))
    states = partial(final_hidden_states, decoder, unseen)
    dense, before = states(decoder.given_modes), states(plan.modes)
    refits = compensate(decoder, plan, windows, mode, batcher, Changes(folder))
    after = states(plan.modes)
    return decoder, refits, [(dense - found).square().sum().item() for found in (before, after)]


@pytest.mark.parametrize("family", WRITING)
def test_hidden_states_of_unseen_tokens_come_back_in_every_family(family, tmp_path, batcher):
    errors = {}
    for mode in ("nearest", "all"):
        _, refits, (before, errors[mode]) = compensated(family, mode, tmp_path / mode, batcher)
        if (family, mode) == ("Mixtral", "nearest"):
            assert refits == []  # before both gaps there are experts
        else:
            assert errors[mode] < before and any(refit.is_changed for refit in refits)
    assert errors["all"] < 1.02 * errors["nearest"]


def literal(model: torch.nn.Module, plan: Plan, windows: torch.Tensor, strength: float) -> dict[str, torch.Tensor]:
    """The projections of a Llama after compensation by `all`, from all tokens at once and with the full form only."""
    decoder = Decoder(model)
    is_held_out = held_out(len(windows))
    dense, inputs = decoder.embed(windows)
    pruned, has_parted, found = dense, False, {}
    sublayers = [(layer, part) for layer in range(4) for part in ("self_attn.o_proj", "mlp.down_proj")]

    def is_kept(layer: int, part: str) -> bool:
        return plan.mode(layer).attention if part.startswith("self") else plan.mode(layer).ffn

    for place, (layer, part) in enumerate(sublayers):
        if not is_kept(layer, part):
            continue
        gap = place + 1
        while gap < len(sublayers) and not is_kept(*sublayers[gap]):
            gap += 1
        for other, other_part in sublayers[place:gap]:
            dense = decoder.run_layer(other, dense, inputs, one_sublayer(other_part))
        has_parted |= gap > place + 1
        seen: list[torch.Tensor] = []
        decoder.set_mode(layer, Mode())
        projection = decoder.layers[layer].get_submodule(part)
        with projection.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0])):
            output = decoder.run_layer(layer, pruned, inputs, one_sublayer(part))
        if has_parted:
            z, r = seen[0][~is_held_out].flatten(0, 1).double(), (dense - output)[~is_held_out].flatten(0, 1).double()
            penalty = strength * (z.T @ z).diagonal().mean() * torch.eye(z.shape[1])
            change = torch.linalg.solve(z.T @ z + penalty, z.T @ r)
            projection.weight += change.T.float()
            found[f"{layer} {part}"] = projection.weight.clone()
            output = decoder.run_layer(layer, pruned, inputs, one_sublayer(part))
        pruned = output
    return found


def one_sublayer(part: str) -> Mode:
    return Mode(ffn=False) if part.startswith("self") else Mode(attention=False)


def test_projections_are_those_of_a_literal_transcription(tmp_path, batcher, monkeypatch):
    monkeypatch.setattr(lib.depth.refit, "STRENGTHS", (0.1,))
    whole = lib.depth.refit._candidates
    monkeypatch.setattr(lib.depth.refit, "_candidates", lambda *args: [next(whole(*args))])
    decoder, refits, _ = compensated("Llama", "all", tmp_path, batcher)
    assert all(refit.form == FULL for refit in refits)
    expected = literal(tiny_model("Llama"), PLAN, tiny_windows(80), 0.1)
    assert [f"{refit.layer} {refit.name}" for refit in refits] == list(expected)
    for refit in refits:
        weight = decoder.layers[refit.layer].get_submodule(refit.name).weight
        torch.testing.assert_close(weight, expected[f"{refit.layer} {refit.name}"], atol=2e-4, rtol=1e-3)


def test_nearest_refits_only_what_is_followed_by_a_gap(tmp_path, batcher):
    _, nearest, _ = compensated("Llama", "nearest", tmp_path / "nearest", batcher)
    _, every, _ = compensated("Llama", "all", tmp_path / "all", batcher)
    assert [(refit.layer, refit.name) for refit in nearest] == [(0, "mlp.down_proj"), (1, "mlp.down_proj")]
    assert [(refit.layer, refit.name) for refit in every] == [
        *[(0, "mlp.down_proj"), (1, "mlp.down_proj")],
        *[(3, "self_attn.o_proj"), (3, "mlp.down_proj")],
    ]


def test_weights_outside_of_the_refitted_projections_stay(tmp_path, batcher):
    decoder, refits, _ = compensated("Llama", "all", tmp_path, batcher)
    changed = {f"{refit.layer}.{refit.name}.weight" for refit in refits if refit.is_changed}
    decoder.apply(Plan(4))
    before = dict(tiny_model("Llama").get_decoder().layers.named_parameters())
    after = dict(decoder.layers.named_parameters())
    assert {name for name in after if not torch.equal(before[name], after[name])} == changed


def test_the_batch_size_changes_nothing_but_rounding(tmp_path):
    one, *others = [compensated("Llama", "all", tmp_path / f"{size}", Batcher(size))[0] for size in (1, 7, 80)]
    for other in others:
        for here, there in zip(output_projections(one), output_projections(other), strict=True):
            torch.testing.assert_close(here.weight, there.weight, atol=1e-4, rtol=1e-3)


def test_a_batch_that_runs_out_of_memory_is_halved_and_seen_once(tmp_path, monkeypatch):
    expected = compensated("Llama", "all", tmp_path / "a", Batcher(4))[0]
    whole, calls = Moments.update, []

    def update(self, *args):
        calls.append(1)
        if len(calls) == 6:
            raise torch.OutOfMemoryError("out of memory")
        return whole(self, *args)

    monkeypatch.setattr(Moments, "update", update)
    batcher = Batcher(4)
    found = compensated("Llama", "all", tmp_path / "b", batcher)[0]
    assert batcher.size == 2
    for here, there in zip(output_projections(expected), output_projections(found), strict=True):
        torch.testing.assert_close(here.weight, there.weight, atol=1e-4, rtol=1e-3)


def test_nan_names_the_layer(tmp_path, batcher):
    decoder = Decoder(tiny_model("Llama"))
    decoder.layers[1].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(lib.depth.refit.RunError, match="layer 1 mlp.down_proj: NaN or infinity"):
        compensate(decoder, PLAN, tiny_windows(10), "all", batcher, Changes(tmp_path))


def test_what_a_refit_says_is_kept_with_the_weights(tmp_path, batcher):
    _, refits, _ = compensated("Llama", "all", tmp_path, batcher)
    kept = Changes(tmp_path)
    assert [Refit(**one) for _, notes in sorted(kept.notes.items()) for one in notes] == refits
    decoder = Decoder(tiny_model("Llama"))
    assert compensate(decoder, PLAN, tiny_windows(80), "all", batcher, kept) == refits
    decoder.apply(Plan(4))
    for refit in refits:
        weight = decoder.layers[refit.layer].get_submodule(refit.name).weight
        assert torch.equal(weight, kept.apply(refit.layer, f"{refit.name}.weight", torch.zeros_like(weight)))


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(arguments, tmp_path, monkeypatch):
    """Runs `ppllms.py --compensate all` on the tiny model; gives the result."""

    def command(*flags, folder: str = "run") -> dict:
        flags = ("--compensate", "all", "--seqlen", 16, "--nsamples", 40, *flags, "--output_dir", tmp_path / folder)
        assert run(*arguments, *flags, "--overwrite", monkeypatch=monkeypatch) == 0
        return json.loads((tmp_path / folder / "result.json").read_text())

    return command


def perplexity_of(result: dict) -> dict[str, float]:
    return next(iter(result["perplexity"].values()))


def test_the_result_says_what_was_refitted_and_what_it_brought(command, capsys):
    result = command()
    found, stages = result["compensation"], perplexity_of(result)
    assert list(stages) == ["dense", "pruned", "compensated"]
    assert found["mode"] == "all" and (found["tokens"], found["held_out_tokens"]) == (560, 80)
    assert {"layer", "name", "unknowns", "form", "strength", "held_out_error", "kept"} == set(found["projections"][0])
    told = capsys.readouterr().out
    assert (
        f"output projections are fitted to {found['tokens']:,} tokens, and chosen by {found['held_out_tokens']:,}"
        in told
    )
    assert f"has up to {max(one['unknowns'] for one in found['projections']):,} unknowns" in told
    assert "; try removing less, more text to compensate on, or python -m lib.heal\n" in told
    command("--compensate", "nearest")
    assert "; try --compensate all\n" in capsys.readouterr().out


def test_a_model_too_far_from_the_dense_one_is_to_lose_less(command, monkeypatch, capsys):
    monkeypatch.setattr("lib.runs.single.FAR", 0.0)
    command("--compensate", "none")
    assert "; try removing less, and --compensate all\n" in capsys.readouterr().out


@pytest.mark.parametrize("save_format", ppllms.SAVE_FORMATS)
def test_every_format_saves_the_changed_projections(command, save_format, tmp_path):
    result = command("--save_model", tmp_path / "out", "--save_format", save_format)  # which compares the logits
    command("--compensate", "none", "--save_model", tmp_path / "plain", "--save_format", save_format, folder="other")
    out, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    changed = {name for name in out if not torch.equal(out[name], plain[name])}
    assert len(changed) == sum(one["kept"] for one in result["compensation"]["projections"])
    assert all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed) and changed


def test_a_saved_model_has_the_perplexity_that_was_measured(command, text_file, tmp_path, monkeypatch):
    result = command("--save_model", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.num_parameters() == result["parameters"]["total"] - result["parameters"]["removed"]
    flags = ["--model_name", tmp_path / "out", "--eval_datasets", text_file, "--seqlen", 16, "--prune_rate", 0.05]
    flags += ["--trust_remote_code", "--method", "random", "--output_dir", tmp_path / "again"]
    assert run(*flags, monkeypatch=monkeypatch) == 0
    again = perplexity_of(json.loads((tmp_path / "again/result.json").read_text()))
    assert again["dense"] == pytest.approx(perplexity_of(result)["compensated"], rel=1e-5)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_an_offloaded_model_is_compensated_alike(command, offload, tmp_path):
    expected = command("--save_model", tmp_path / "a")
    found = command("--offload", offload, "--save_model", tmp_path / "b", folder="offloaded")
    assert perplexity_of(found) == pytest.approx(perplexity_of(expected), rel=1e-5)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-4)


def test_every_cell_of_a_table_begins_with_the_dense_weights(command, tmp_path):
    alone = {seed: perplexity_of(command("--seed", seed, folder=f"{seed}")) for seed in (0, 1)}
    flags = ("--compensate", "all", "--seqlen", 16, "--seed", 0, 1)
    assert command_of_grid(command, flags, tmp_path) == pytest.approx(
        {(seed, stage): value for seed, stages in alone.items() for stage, value in stages.items()}, rel=1e-6
    )


def command_of_grid(command, flags, tmp_path) -> dict:
    with pytest.raises(FileNotFoundError):
        command(*flags, folder="grid")  # a table has no result.json
    assert "ppllms compensated" in (tmp_path / "grid/table.md").read_text()
    found = [json.loads(line) for line in (tmp_path / "grid/results.jsonl").read_text().splitlines()]
    results = [one.get("result", one) for one in found]
    return {(one["seed"], stage): value for one in results for stage, value in perplexity_of(one).items()}


def test_a_plan_is_applied_with_a_compensation_of_its_own(command, arguments, tmp_path, monkeypatch, capsys):
    result = command()
    text = arguments[arguments.index("--dataset") + 1]
    flags = ["--model_name", result["model"], "--apply_plan", tmp_path / "run/result.json", "--eval_datasets", text]
    assert run(*flags, "--output_dir", tmp_path / "plain", monkeypatch=monkeypatch) == 0
    assert "here they stay as they are, and --compensate would refit them" in capsys.readouterr().out
    flags += ["--compensate", "all", "--dataset", text, "--nsamples", 40, "--seqlen", 16]
    assert run(*flags, "--output_dir", tmp_path / "applied", monkeypatch=monkeypatch) == 0
    again = json.loads((tmp_path / "applied/result.json").read_text())
    assert again["compensation"] == result["compensation"] and again["perplexity"] == result["perplexity"]


def test_a_compensation_may_have_more_documents_than_the_search(tiny_folder, text_file, tmp_path, monkeypatch, capsys):
    flags = ["--model_name", tiny_folder, "--dataset", text_file, "--eval_datasets", text_file, "--overwrite"]
    flags += ["--compensate", "all", "--output_dir", tmp_path / "run"]

    def result(*more) -> dict:
        assert run(*flags, *more, monkeypatch=monkeypatch) == 0
        return json.loads((tmp_path / "run/result.json").read_text())

    search = ["--mha_remove_layers", 1, "--ffn_remove_layers", 2, "--nsamples", 4]
    few, more = result(*search), result(*search, "--compensate_nsamples", 12)
    assert few["rounds"] == more["rounds"], "the search is the same"
    assert few["compensation"]["tokens"] < more["compensation"]["tokens"] and more["compensation"]["nsamples"] == 12
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(more))
    flags += ["--apply_plan", plan]
    assert result("--nsamples", 12)["compensation"] == more["compensation"]
    assert result("--compensate_nsamples", 12)["compensation"] == more["compensation"]
    assert run(*flags, "--nsamples", 4, "--compensate_nsamples", 12, monkeypatch=monkeypatch) == 2
    assert "--nsamples: has no meaning with --apply_plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--compensate_dataset", "demo"], "--compensate_dataset: needs --compensate nearest or all"),
        (["--compensate_nsamples", 4], "--compensate_nsamples: needs --compensate nearest or all"),
        (["--compensate", "all", "--compensate_dataset", "no/such.txt"], "no/such.txt"),
        (["--compensate", "all", "--compensate_dataset", "demo", "demo"], "--compensate_dataset: names a text twice"),
        (
            ["--compensate", "all", "--nsamples", 1, "--seqlen", 64],
            "--compensate: needs at least 2 windows of 64 tokens",
        ),
    ],
)
def test_wrong_input_gets_one_line(arguments, flags, problem, tmp_path, monkeypatch, capsys):
    text = tmp_path / "short.txt"
    text.write_text("One window of text. " * 20)
    arguments = [text if one == arguments[arguments.index("--dataset") + 1] else one for one in arguments]
    assert run(*arguments, *flags, monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    assert problem in told and told.count("\n") == 1


@pytest.mark.parametrize("family", POST_NORM)
def test_a_family_whose_projections_are_normalized_is_refused(
    family, tmp_path, text_file, demo_tokenizer, monkeypatch, capsys
):
    tiny_model(family, vocab_size=len(demo_tokenizer)).save_pretrained(tmp_path / "model")
    demo_tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--model_name", tmp_path / "model", "--eval_datasets", text_file, "--dataset", text_file, "--seqlen", 16]
    flags += ["--method", "random", "--prune_rate", 0.1, "--compensate", "all", "--output_dir", tmp_path / "run"]
    assert run(*flags, monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    assert "ends in a projection that writes into the residual stream" in told and told.count("\n") == 1
