"""The systems compose: what one of them saved, either of them prunes on."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lib.config.plan import Mode, Plan
from lib.config.sources import ModelSource
from lib.depth.block_influence import block_influence
from lib.depth.prepare import budget_of
from lib.engine.finite import final_hidden_states
from lib.errors import InputError
from lib.export.huggingface import save_pruned, save_weights
from lib.models.decoder import Decoder
from lib.models.loading import load_config, load_model, load_outline, load_tokenizer
from lib.models.matrices import find_matrices
from lib.runtime.batching import Batcher
from tests import reference
from tests.command import run, run_alp, run_gradient
from tests.families import FAMILIES, tiny_model, tiny_windows

FIRST = Plan(4, mha_removed=(1,), ffn_removed=(0,))
SECOND = Plan(4, mha_removed=(3,), ffn_removed=(1, 3))  # layer 1 loses what it still had, layer 3 all
BOTH = Plan(4, mha_removed=(1, 3), ffn_removed=(0, 1, 3))


def pruned_in(folder, family, plan):
    """Saves a family's tiny model under a plan; the folder loaded as the scripts load it."""
    save_pruned(Decoder(tiny_model(family)), plan, None, folder)
    return load_model(ModelSource(str(folder)))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_two_plans_in_turn_are_one_plan(family, tmp_path):
    ids, at_once = tiny_windows(2), Decoder(tiny_model(family))
    at_once.apply(BOTH)
    expected = at_once.model(input_ids=ids, use_cache=False).logits
    decoder = Decoder(pruned_in(tmp_path / "one", family, FIRST))
    assert decoder.whole_layers == [2, 3] and decoder.complete(SECOND).removed_layers == [1, 3]
    left = decoder.total_parameters - decoder.removed_parameters(SECOND)
    assert left == at_once.total_parameters - at_once.removed_parameters(BOTH)
    save_pruned(decoder, SECOND, None, tmp_path / "two")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "two", trust_remote_code=True).eval()
    assert torch.equal(saved(input_ids=ids, use_cache=False).logits, expected)
    assert sum(parameter.numel() for parameter in saved.parameters()) == left


def test_a_pruned_model_runs_no_code_of_its_folder(tmp_path):
    pruned_in(tmp_path / "out", "Llama", FIRST)
    (tmp_path / "out/modeling_pruned.py").write_text("raise SystemError('was run')")
    for trust in False, True:
        model = load_model(ModelSource(str(tmp_path / "out"), trust_remote_code=trust))
        assert type(model).__name__ == "LlamaForCausalLM"
        assert [mode.is_whole for mode in Decoder(model).given_modes] == [False, False, True, True]


def test_its_outline_lacks_the_same(tmp_path):
    model = pruned_in(tmp_path / "out", "Qwen3", FIRST)
    outline = load_outline(load_config(ModelSource(str(tmp_path / "out"))))
    assert type(outline) is type(model)
    assert {n: p.shape for n, p in outline.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


@torch.no_grad()
def test_the_engine_streams_a_pruned_model(tmp_path):
    model, ids = pruned_in(tmp_path / "out", "Gemma2", FIRST), tiny_windows(2)
    decoder = Decoder(model)
    hidden_states = final_hidden_states(decoder, ids, Plan(4).modes)
    assert torch.equal(decoder.logits(hidden_states), model(input_ids=ids, use_cache=False).logits)
    assert decoder.given_modes[:2] == [Mode(ffn=False), Mode(attention=False)]


def test_when_only_whole_layers_are_left_the_checkpoint_is_stock_again(tmp_path):
    decoder = Decoder(pruned_in(tmp_path / "one", "Llama", Plan(4, ffn_removed=(2,))))
    save_pruned(decoder, Plan(4, mha_removed=(2,)), None, tmp_path / "two")
    config = json.loads((tmp_path / "two/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and not {"auto_map", "per_layer_config"} & set(config)
    assert not list((tmp_path / "two").glob("*.py"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "two").config.num_hidden_layers == 3


def test_weights_of_a_pruned_model_are_saved_as_what_they_came_from(tmp_path):
    model, ids = pruned_in(tmp_path / "one", "OPT", FIRST), tiny_windows(1)
    decoder = Decoder(model)
    for layer in find_matrices(decoder):
        for linear in layer.values():
            linear.weight.data.mul_(0.5)
    save_weights(decoder, None, tmp_path / "two")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "two", trust_remote_code=True).eval()
    assert torch.equal(saved(input_ids=ids).logits, model(input_ids=ids).logits)


# The command lines ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pruned(arguments, tmp_path, monkeypatch):
    """The folder of the tiny model without the attention of one of its four layers and the FFN of two."""
    assert run(*arguments, "--save_model", tmp_path / "pruned", monkeypatch=monkeypatch) == 0
    return tmp_path / "pruned"


def test_ppllms_prunes_on(arguments, pruned, text_file, tmp_path, monkeypatch, capsys):
    again = [*arguments, "--overwrite", "--model_name", pruned, "--save_model", tmp_path / "twice"]
    assert run(*again, "--ffn_remove_layers", 3, monkeypatch=monkeypatch) == 2  # of three layers, two are whole
    assert "--ffn_remove_layers 3: " in capsys.readouterr().err
    assert run(*again, "--ffn_remove_layers", 1, monkeypatch=monkeypatch) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    before = json.loads((pruned / "config.json").read_text())
    partial = [int(layer) for layer in before["per_layer_config"]]
    assert result["num_layers"] == before["num_hidden_layers"] == 3 and len(result["bi_scores"]) == 3
    assert not set(partial) & {*result["candidates"], *result["mha_removed"]}
    saved = load_model(ModelSource(str(tmp_path / "twice")))
    parameters = result["parameters"]
    assert sum(p.numel() for p in saved.parameters()) == parameters["total"] - parameters["removed"]
    assert f"{result['num_layers']} layers, 2 of them whole" in (tmp_path / "run/log.txt").read_text()


@pytest.mark.parametrize("method", ["wanda_alp", "sparsegpt", "magnitude_alp"])
def test_alp_prunes_on(alp_arguments, tiny_folder, tmp_path, monkeypatch, method):
    source = ModelSource(str(tiny_folder))
    save_pruned(Decoder(load_model(source)), FIRST, load_tokenizer(source), tmp_path / "pruned")
    on_pruned = [*alp_arguments, "--model", tmp_path / "pruned", "--prune_method", method, "--sparsity_ratio", 0.5]
    if method == "wanda_alp":
        assert run_gradient(*gradient_flags(on_pruned), monkeypatch=monkeypatch) == 0
    assert run_alp(*on_pruned, "--save_model", tmp_path / "sparse", monkeypatch=monkeypatch) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["sparsity"] == pytest.approx(0.5, abs=0.02)
    saved = load_model(ModelSource(str(tmp_path / "sparse")))
    assert Decoder(saved).given_modes == [Mode(ffn=False), Mode(attention=False), Mode(), Mode()]
    linears = [linear.weight for layer in find_matrices(Decoder(saved)) for linear in layer.values()]
    zeros = sum(int((weight == 0).sum()) for weight in linears) / sum(weight.numel() for weight in linears)
    assert zeros == pytest.approx(result["sparsity"])


def gradient_flags(flags: list) -> list:
    """The flags of save_gradient.py that make what a run of alp_prune.py looks for."""
    value = dict(zip(flags[::2], flags[1::2], strict=True))
    wanted = {"--model": "--model", "--ngrad": "--grad_nsamples", "--grad_seqlen": "--grad_seqlen"}
    wanted["--dataset"] = "--calibration_dataset"
    return [part for flag, name in wanted.items() for part in (flag, value[name])]


def test_block_influence_of_a_pruned_model_counts_what_is_left(tmp_path):
    windows, toggled = tiny_windows(3), reference.toggled(tiny_model("Llama"), (1,), (0,))
    found = block_influence(Decoder(pruned_in(tmp_path / "out", "Llama", FIRST)), windows, Batcher(2))
    assert found == pytest.approx(reference.block_influence(toggled, windows), abs=1e-5)


def test_automatic_counts_are_those_of_the_layers_that_are_whole(tmp_path):
    decoder = Decoder(pruned_in(tmp_path / "out", "Llama", FIRST))
    budget = budget_of(decoder)
    assert budget.num_layers == 2 and (budget.mha_parameters, budget.ffn_parameters) == decoder.sublayer_parameters(2)


def test_masked_cannot_hold_what_lacks_sublayers_already(arguments, pruned, tmp_path, monkeypatch, capsys):
    flags = ["--model_name", pruned, "--ffn_remove_layers", 1, "--save_model", tmp_path / "out", "--overwrite"]
    assert run(*arguments, *flags, "--save_format", "masked", monkeypatch=monkeypatch) == 2
    assert "has lost sublayers before" in capsys.readouterr().err


def test_a_config_that_names_another_class_runs_as_what_it_is(tmp_path):
    pruned_in(tmp_path / "out", "Llama", FIRST)
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    for architectures in ([None], ["PrunedLlamaModel"], ["PrunedPreTrainedModel"], [3]):
        path.write_text(json.dumps(config | {"architectures": architectures}))
        with pytest.raises(InputError):
            load_model(ModelSource(str(tmp_path / "out")))
