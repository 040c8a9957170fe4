"""Expert removal: what an expert adds, which experts go, and the smaller model that is left."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lib.depth.searches
from lib.config.plan import Plan
from lib.depth.reap import check_experts, expert_saliency, remove_least
from lib.errors import InputError
from lib.models.decoder import Decoder
from lib.runtime.batching import Batcher
from tests import reference
from tests.command import run
from tests.families import MOE_FAMILIES, tiny_model, tiny_windows

FAMILIES = ["Mixtral", *MOE_FAMILIES, "GptOss", "Qwen3Next", "Jamba"]


@pytest.fixture
def moe_folder(tmp_path, demo_tokenizer) -> Path:
    """A checkpoint on disk: a tiny Qwen3 MoE with the demo's tokenizer."""
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), demo_tokenizer.eos_token_id)
    tiny_model("Qwen3Moe", vocab_size=len(demo_tokenizer), num_experts=6, **ends).save_pretrained(tmp_path / "moe")
    demo_tokenizer.save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


@pytest.fixture
def flags(moe_folder, text_file, tmp_path) -> list:
    evaluated = ["--model_name", moe_folder, "--eval_datasets", text_file, "--seqlen", 32]
    search = ["--dataset", text_file, "--nsamples", 3, "--method", "reap", "--prune_rate", 0.1]
    return [*evaluated, *search, "--output_dir", tmp_path / "run"]


def plan_of(decoder: Decoder, removed: tuple[int, ...]) -> Plan:
    return Plan(4, experts_removed=tuple(removed if experts else () for experts in decoder.experts))


@pytest.mark.parametrize("family", FAMILIES)
def test_saliency_is_the_mean_norm_of_what_an_expert_adds_to_the_tokens_it_gets(family):
    model, windows = tiny_model(family), tiny_windows()
    found = expert_saliency(Decoder(model), windows, Batcher(2))
    slow = reference.unfused(model)
    for window in windows:
        slow(input_ids=window[None], use_cache=False)
    for layer, saliency in zip(reference.decoder_layers(slow), found, strict=True):
        experts = [one for one in layer.modules() if isinstance(one, reference.UnfusedExperts)]
        norms = experts[0].norms if experts else {}
        expected = [sum(norms.get(i, [0])) / len(norms.get(i, [0])) for i in range(len(saliency))]
        assert saliency == pytest.approx(expected, rel=1e-4) and bool(saliency) == bool(experts)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_under_a_plan_is_the_stock_model_of_fewer_experts_with_their_weights(family):
    model, ids = tiny_model(family), tiny_windows(2)
    decoder, dense = Decoder(model), model(input_ids=ids).logits
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count = next(experts.count for experts in decoder.experts if experts)
    kept = [expert for expert in range(count) if expert != 1]
    with decoder.under(plan_of(decoder, (1,))):
        found = model(input_ids=ids, use_cache=False).logits
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    names = [name for name in counts if name in model.config.to_dict()]
    smaller = tiny_model(family, **dict.fromkeys(names, len(kept)))
    cut = dict(whole)
    for name, tensor in whole.items():
        if tensor.shape != shapes[name]:
            cut[name] = tensor.index_select([*tensor.shape].index(count), torch.tensor(kept))
    smaller.load_state_dict(cut)
    assert torch.equal(smaller(input_ids=ids, use_cache=False).logits, found)
    assert torch.equal(model(input_ids=ids).logits, dense), "afterwards the model is as it was"
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())
    gone = decoder.removed_parameters(plan_of(decoder, (1,)))
    assert gone == sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in smaller.parameters())


def test_the_experts_of_lowest_saliency_go_and_ties_go_to_the_first():
    assert remove_least([[3, 1, 2, 1], [], [5, 4, 0, 0]], 2) == Plan(3, experts_removed=((1, 3), (), (2, 3)))


def test_a_run_saves_a_stock_model_without_the_least_experts(flags, tmp_path, monkeypatch, capsys):
    assert run(*flags, "--save_model", tmp_path / "out", monkeypatch=monkeypatch) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["experts_removed"] == [
        sorted(sorted(range(6), key=saliency.__getitem__)[:2]) for saliency in result["expert_saliency"]
    ]
    assert "2 of 6 experts go in each of 4 layers" in capsys.readouterr().out
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.config.num_experts == 4 and not list((tmp_path / "out").glob("*.py"))
    left = result["parameters"]["total"] - result["parameters"]["removed"]
    assert sum(parameter.numel() for parameter in saved.parameters()) == left

    again = [*flags[:6], "--apply_plan", tmp_path / "run", "--output_dir", tmp_path / "again"]
    assert run(*again, monkeypatch=monkeypatch) == 0
    applied = json.loads((tmp_path / "again/result.json").read_text())
    assert applied["perplexity"] == result["perplexity"] and applied["experts_removed"] == result["experts_removed"]


def test_a_table_has_the_runs_of_reap_beside_those_of_other_methods(flags, tmp_path, monkeypatch):
    axes = ["--method", "reap", "shortgpt", "--prune_rate", 0.06, 0.1]
    assert run(*flags, *axes, monkeypatch=monkeypatch) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/results.jsonl").read_text().splitlines()]
    for row in (row["result"] for row in rows):
        alone = ["--method", row["method"], "--prune_rate", row["parameters"]["target_rate"]]
        assert run(*flags, *alone, "--output_dir", tmp_path / "alone", "--overwrite", monkeypatch=monkeypatch) == 0
        assert json.loads((tmp_path / "alone/result.json").read_text())["perplexity"] == row["perplexity"]


def test_a_run_that_was_stopped_measures_no_saliency_again(flags, monkeypatch):
    def stop(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr(lib.depth.searches, "remove_least", stop)
        assert run(*flags, monkeypatch=stopping) == 130
    monkeypatch.setattr(lib.depth.searches, "expert_saliency", lambda *_: pytest.fail("measured again"))
    assert run(*flags, "--resume", monkeypatch=monkeypatch) == 0


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--model_name", "demo"], "--method reap: .* has no experts that could be removed"),
        (["--prune_rate", 0.9], "--prune_rate 0.9 cannot be reached by this method: it removes 0.0.* to 0.*"),
        (["--compensate", "all"], "--compensate: has no meaning where experts are removed; leave it out"),
        (["--save_model", "out", "--save_format", "masked"], "--save_format masked: cannot hold a model with fewer .*"),
        (["--offload", "cpu"], "--method reap: needs the whole model on its devices; leave --offload and .* out"),
    ],
)
def test_what_cannot_lose_experts_is_told_in_one_line(more, reason, flags, monkeypatch, capsys):
    assert run(*flags, *more, monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(f"ppllms.py: error: {reason}\n", told), told


def test_groups_of_experts_and_routers_that_are_not_understood_are_refused():
    with pytest.raises(InputError, match="has its experts in 2 groups"):
        check_experts(Decoder(tiny_model("DeepseekV3", n_group=2, topk_group=1, num_experts_per_tok=1)), 0.05)
    decoder = Decoder(tiny_model("Qwen3Moe"))
    decoder.config.num_experts_per_tok = 1  # so that there are twice as many calls of experts as it says
    with pytest.raises(InputError, match="how the router of Qwen3MoeForCausalLM weighs experts is not seen"):
        check_experts(decoder, 0.2)


def test_a_plan_of_other_experts_is_refused(flags, moe_folder, tmp_path, monkeypatch, capsys):
    total = AutoModelForCausalLM.from_pretrained(moe_folder).num_parameters()
    plan = {"tool": "ppllms", "num_layers": 4, "model": str(moe_folder), "parameters": {"total": total}}
    plan |= {"mha_removed": [], "ffn_removed": []}
    applying = [*flags[:6], "--apply_plan", tmp_path / "plan.json", "--output_dir", tmp_path / "run"]
    for removed, reason in (
        ([[9]] * 4, "layer 0 has no expert 9"),
        ([[0, 1, 2, 3, 4]] * 4, "fewer than are picked"),
        ([[0], [], [0], [0]], "different numbers of experts"),
        ([[0]] * 3, "an entry for each of 4 layers"),
        ([0] * 4, "has another type"),
    ):
        (tmp_path / "plan.json").write_text(json.dumps(plan | {"experts_removed": removed}))
        assert run(*applying, monkeypatch=monkeypatch) == 2
        told = capsys.readouterr().err
        assert reason in told and told.count("\n") == 1


def test_a_plan_of_experts_is_not_applied_to_a_gguf_file(flags, tmp_path, monkeypatch, capsys):
    assert run(*flags, monkeypatch=monkeypatch) == 0
    (tmp_path / "in.gguf").touch()
    gguf = ["--apply_plan", tmp_path / "run", "--gguf", tmp_path / "in.gguf", tmp_path / "out.gguf"]
    assert run(*gguf, monkeypatch=monkeypatch) == 2
    assert "--gguf: the plan removes experts" in capsys.readouterr().err and not (tmp_path / "out.gguf").exists()
