"""Adapters begin without effect, are trained alone, and once merged leave a model that does what it did with them."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lib.config.plan import Plan
from lib.errors import InputError
from lib.heal.adapters import Adapters, find_linears, share_of_zeros
from lib.models.decoder import Decoder
from tests.families import FAMILIES, tiny_model

IDS = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(0))


def adapted(model: nn.Module, keeps_zeros: bool = False, moved: bool = True) -> tuple[Decoder, Adapters]:
    """A model with adapters; `moved`: as a training may leave them."""
    decoder = Decoder(model.requires_grad_(False))
    adapters = Adapters(find_linears(decoder), rank=3, keeps_zeros=keeps_zeros, seed=0)
    if moved:
        generator = torch.Generator().manual_seed(1)
        for adapter in adapters:
            adapter.up.data.copy_(0.05 * torch.randn(adapter.up.shape, generator=generator))
    return decoder, adapters


@torch.no_grad()
def logits(decoder: Decoder) -> torch.Tensor:
    return decoder.model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_adapters_do_what_they_did_before(family):
    untouched = tiny_model(family)
    decoder, _ = adapted(copy.deepcopy(untouched), moved=False)
    before = logits(decoder)
    assert torch.equal(before, logits(Decoder(untouched)))
    decoder, adapters = adapted(copy.deepcopy(untouched))
    with_adapters = logits(decoder)
    adapters.merge()
    assert not torch.allclose(with_adapters, before, atol=1e-3)
    torch.testing.assert_close(logits(decoder), with_adapters, atol=2e-5, rtol=1e-4)
    assert {name for name, _ in decoder.model.named_parameters()} == {name for name, _ in untouched.named_parameters()}


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_an_adapter_is_the_low_rank_change_of_a_weight(family):
    model = tiny_model(family)
    linears = find_linears(Decoder(copy.deepcopy(model)))
    assert {type(linear) for linear in linears.values()} == {Conv1D if family == "GPT2" else nn.Linear}
    decoder, adapters = adapted(model)
    weights = {place: linear.weight.clone() for place, linear in find_linears(decoder).items()}
    adapters.merge()
    for (place, linear), adapter in zip(find_linears(decoder).items(), adapters, strict=True):
        change = 2.0 * adapter.up @ adapter.down
        expected = weights[place] + (change if family == "Llama" else change.T)
        torch.testing.assert_close(linear.weight, expected)


def test_only_adapters_get_gradients():
    decoder, adapters = adapted(tiny_model("Llama"))
    decoder.model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapters.parameters())
    assert not any(parameter.requires_grad for parameter in decoder.model.parameters())


def test_a_module_of_several_layers_is_adapted_once():
    model = tiny_model("Llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    assert len(find_linears(Decoder(model))) == 4 * 7 - 3


def test_a_sparse_model_keeps_its_zeros_and_changes_all_else():
    model = tiny_model("Llama")
    for linear in find_linears(Decoder(model)).values():
        linear.weight.data[:, ::2] = 0
    assert share_of_zeros(find_linears(Decoder(model))) == 0.5
    decoder, adapters = adapted(model, keeps_zeros=True)
    before, with_adapters = {p: one.weight.clone() for p, one in find_linears(decoder).items()}, logits(decoder)
    adapters.merge()
    for place, linear in find_linears(decoder).items():
        assert torch.equal(linear.weight == 0, before[place] == 0)
        assert ((linear.weight != before[place]) == (before[place] != 0)).float().mean() > 0.999
    torch.testing.assert_close(logits(decoder), with_adapters, atol=2e-5, rtol=1e-4)


def test_removed_sublayers_have_no_adapters():
    decoder = Decoder(tiny_model("Llama"))
    decoder.apply(Plan(4, mha_removed=(1, 2), ffn_removed=(2,)))
    assert {(layer, path.partition(".")[0]) for layer, path in find_linears(decoder)} == {
        (0, "self_attn"),
        (0, "mlp"),
        (1, "mlp"),
        (3, "self_attn"),
        (3, "mlp"),
    }


def test_adapters_of_a_model_in_bf16_are_trained_in_fp32_and_merged_to_its_rounding():
    decoder, adapters = adapted(tiny_model("Llama").bfloat16())
    assert {parameter.dtype for parameter in adapters.parameters()} == {torch.float32}
    with_adapters = logits(decoder)
    adapters.merge()
    assert {parameter.dtype for parameter in decoder.model.parameters()} == {torch.bfloat16}
    assert (logits(decoder) - with_adapters).norm() < 0.03 * with_adapters.norm()


def test_a_model_without_linears_is_refused():
    decoder = Decoder(tiny_model("Llama"))
    decoder.apply(Plan(4, mha_removed=(0, 1, 2, 3), ffn_removed=(0, 1, 2, 3)))
    with pytest.raises(InputError, match="has no linears in its layers that could be trained"):
        find_linears(decoder)
