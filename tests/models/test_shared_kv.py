"""Layers that read keys and values of layers before them (Gemma 4 E2B): run layer by layer they are the model."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lib.config.plan import Plan
from lib.depth.block_influence import block_influence
from lib.depth.greedy import greedy_search
from lib.depth.moves import greedy, sublayers, whole_layers
from lib.depth.policies import random_layers
from lib.depth.trial_losses import Sweep
from lib.engine.activations import Activations
from lib.errors import InputError
from lib.export.huggingface import save_pruned
from lib.models.decoder import Decoder
from lib.runtime.batching import Batcher
from tests import reference
from tests.command import ROOT, run
from tests.families import tiny_model, tiny_windows
from tests.sensitivity.test_gradients import check_against_autograd

LAYERS, WRITERS = 6, [2, 3]  # 0 and 1 keep their keys and values to themselves, 4 and 5 read those of 2 and 3
PLANS = [Plan(LAYERS), Plan(LAYERS, (4,), (1, 4)), Plan(LAYERS, (5, 0), (2, 5)), Plan(LAYERS, (1,), (3,))]
FLAGS = ["--dataset", ROOT / "README.md", "--nsamples", 2, "--seqlen", 16, "--eval_ppl", "no"]


def shared(**changes) -> torch.nn.Module:
    kinds = ["sliding_attention", "full_attention"] * 3
    sizes = {"num_hidden_layers": LAYERS, "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "layer_types": kinds}
    return tiny_model("Gemma4", **{**sizes, **changes})


def test_the_attentions_that_are_read_are_those_of_the_config():
    decoder = Decoder(shared())
    assert decoder.read_attentions == WRITERS
    assert decoder.state_width == 32 + 2 * 2 * 8 + 2 * 2 * 16  # 2 heads of size 8 and of size 16, keys and values
    assert Decoder(tiny_model("Gemma4")).state_width == Decoder(tiny_model("Llama")).state_width == 32


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_walked_layer_by_layer_it_is_the_model(plan):
    model, windows = shared(), tiny_windows(5)
    decoder = Decoder(model)
    walk = Activations(decoder, windows, Batcher(2))  # batches that do not divide the windows
    for mode in plan.modes:
        walk.step(mode)
    found = decoder.logits(walk.states(slice(0, 5)))
    with decoder.under(plan):
        assert torch.equal(found, model(input_ids=windows, use_cache=False).logits)
        cached, uncached = (
            model.generate(windows[:2], max_new_tokens=10, do_sample=False, eos_token_id=None, use_cache=use)
            for use in (True, False)
        )
    assert torch.equal(cached, uncached)


def test_block_influence_and_losses_leave_what_is_carried_out():
    model, windows = shared(), tiny_windows(3)
    expected = reference.block_influence(copy.deepcopy(model), windows)
    assert block_influence(Decoder(model), windows, Batcher(2)) == pytest.approx(expected, abs=1e-6)
    loss = Sweep(Decoder(model), windows, Batcher(2)).loss(Plan(LAYERS))
    assert loss == pytest.approx(reference.total_loss(model, windows), rel=1e-5)


def test_no_search_removes_what_others_read():
    decoder, windows = Decoder(shared()), tiny_windows(2)
    assert {move.layer for move in whole_layers(decoder)} == {0, 1, 4, 5}
    assert {move.layer for move in sublayers(decoder) if move.attention} == {0, 1, 4, 5}
    sweep = Sweep(decoder, windows, Batcher(2))
    plan, _ = greedy_search(sweep, list(range(LAYERS)), LAYERS)
    assert set(plan.mha_removed).isdisjoint(WRITERS) and len(plan.mha_removed) == 4
    for seed in range(4):
        assert set(random_layers(decoder, 0.2, seed).mha_removed).isdisjoint(WRITERS)
    plan, _ = greedy(sweep, sublayers(decoder), 0.3)
    assert set(plan.mha_removed).isdisjoint(WRITERS)


@torch.no_grad()
@pytest.mark.parametrize("save_format", ["hf", "masked"])
@pytest.mark.parametrize("plan", PLANS[1:], ids=str)
def test_saved_and_loaded_again_it_is_the_pruned_model(plan, save_format, tmp_path):
    model, ids = shared(), tiny_windows(3)
    decoder = Decoder(model)
    with decoder.under(plan):
        expected = model(input_ids=ids, use_cache=False).logits
    left = decoder.total_parameters - decoder.removed_parameters(plan)
    save_pruned(decoder, plan, None, tmp_path / "out", save_format)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert torch.equal(reloaded(input_ids=ids).logits, expected)
    if save_format == "hf":
        assert sum(parameter.numel() for parameter in reloaded.parameters()) == left
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    cached, uncached = (reloaded.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_sensitivities_flow_through_the_keys_and_values_that_are_read():
    check_against_autograd(shared(), tiny_windows(), rel=1e-4)


def test_a_plan_that_removes_what_is_read_is_refused(tmp_path, demo_tokenizer, monkeypatch, capsys):
    model = shared(vocab_size=len(demo_tokenizer), vocab_size_per_layer_input=len(demo_tokenizer))
    model.save_pretrained(tmp_path / "model")
    demo_tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--model_name", tmp_path / "model", *FLAGS, "--output_dir", tmp_path / "run"]
    assert run(*flags, "--mha_remove_layers", 1, "--ffn_remove_layers", 2, monkeypatch=monkeypatch) == 0
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"mha_removed": [3], "ffn_removed": [3]}))
    apply = ["--model_name", tmp_path / "model", "--apply_plan", tmp_path / "plan.json", "--eval_ppl", "no"]
    assert run(*apply, monkeypatch=monkeypatch) == 2
    assert "other layers read the keys and values of layer 3; they must stay" in capsys.readouterr().err


def test_layers_of_several_hidden_states_a_token_are_refused():
    with pytest.raises(InputError, match="its layers pass on several hidden states for each token"):
        Decoder(_gemma3n())


def _gemma3n() -> torch.nn.Module:
    import transformers

    kinds = ["sliding_attention", "full_attention"] * 2
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "vocab_size_per_layer_input": 96}
    sizes |= {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "layer_types": kinds, "laurel_rank": 8}
    config = transformers.Gemma3nTextConfig(**sizes, activation_sparsity_pattern=[0.0] * 4)
    return AutoModelForCausalLM.from_config(config).eval()
