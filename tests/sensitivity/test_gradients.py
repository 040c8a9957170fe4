"""Sensitivity layer by layer is that of autograd through the whole model; densities are those of ALP."""

import copy

import pytest
import torch

from lib.errors import InputError, RunError
from lib.models.decoder import Decoder
from lib.models.matrices import find_matrices, input_groups
from lib.sensitivity.gradients import LayerSensitivity, Spread, connection_sensitivity, importance, spread
from lib.sparsity.densities import fit_to_target, spread_densities
from tests import reference
from tests.families import LINEAR_FAMILIES, tiny_model, tiny_windows


def check_against_autograd(model, windows, gradient_type="l2", loss="last", rel=1e-5):
    found = connection_sensitivity(Decoder(copy.deepcopy(model)), windows, gradient_type, loss)
    expected = reference.sensitivities(model, windows, gradient_type, loss)
    assert len(found) == len(expected)
    for layer, wanted in zip(found, expected, strict=True):
        assert layer.layer.redundancy == pytest.approx(reference.redundancy(wanted), rel=rel)
        assert set(layer.linears) == set(wanted)
        for name, values in wanted.items():
            one = layer.linears[name]
            assert one.count == values.numel()
            assert (one.mean, one.std) == pytest.approx((values.mean().item(), values.std().item()), rel=rel)


@pytest.mark.parametrize("family", LINEAR_FAMILIES)
def test_sensitivity_is_that_of_whole_model_autograd(family):
    check_against_autograd(tiny_model(family), tiny_windows())


@pytest.mark.parametrize("gradient_type", ["l2", "l1", "l2_hundred_total"])
@pytest.mark.parametrize("loss", ["last", "all"])
def test_every_type_and_loss(gradient_type, loss):
    check_against_autograd(tiny_model("LlamaTied"), tiny_windows(), gradient_type, loss)


def test_windows_of_several_batches(monkeypatch):
    monkeypatch.setattr("lib.sensitivity.gradients._TOKENS_AT_ONCE", 40)
    for gradient_type in ("l2", "l2_hundred_total"):
        check_against_autograd(tiny_model("Gemma3"), tiny_windows(), gradient_type)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_precision_weights_do_not_underflow(dtype):
    """Layers are run in fp32, so scores near those of the fp32 model come out, and the model is left as it was."""
    model = tiny_model("Llama")
    model.lm_head.weight.mul_(1e-4)  # gradients far below what fp16 can hold
    expected = [reference.redundancy(g) for g in reference.sensitivities(model, tiny_windows(), "l2", "last")]
    half = Decoder(model.to(dtype))
    before = {name: p.clone() for name, p in half.model.named_parameters()}
    found = [layer.layer.redundancy for layer in connection_sensitivity(half, tiny_windows())]
    assert found == pytest.approx(expected, rel=0.05)
    assert all(p.dtype == dtype and torch.equal(p, before[name]) for name, p in half.model.named_parameters())


def test_gradients_that_are_not_finite_name_the_layer():
    model = tiny_model("Llama")
    model.model.layers[2].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(RunError, match="NaN or infinity in the gradients of layer"):
        connection_sensitivity(Decoder(model), tiny_windows())


def test_the_model_is_not_left_with_gradients_or_hooks():
    model = tiny_model("Llama")
    connection_sensitivity(Decoder(model), tiny_windows())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_spread_of_equal_values_has_no_redundancy():
    assert spread([torch.full((3, 4), 0.5)]) == Spread(12, 0.5, 0.0, 0.0)


# Matrices -------------------------------------------------------------------------------------------------------------


def test_weights_of_another_kind_are_refused_by_name():
    model = tiny_model("Llama")
    decoder, mlp = Decoder(model), model.model.layers[2].mlp
    mlp.table = torch.nn.Parameter(torch.eye(32))
    mlp.register_forward_hook(lambda mlp, args, output: output @ mlp.table)
    with pytest.raises(InputError, match="layer 2 keeps weights in mlp.table, and only linears and experts can be "):
        input_groups(decoder)
    mlp.mixer = torch.nn.Conv1d(32, 32, 1)
    with pytest.raises(InputError, match=r"layer 2 keeps weights in mlp.mixer.weight \(of a Conv1d\)"):
        find_matrices(decoder)


def test_linears_that_share_an_input_are_found():
    groups = {
        family: [set(group.names) for group in input_groups(Decoder(tiny_model(family)))[1]]
        for family in ("Llama", "Phi", "Falcon", "FalconSerial", "OPT")
    }
    q, k, v, o = (f"self_attn.{name}_proj" for name in "qkvo")
    assert groups["Llama"] == [{q, k, v}, {o}, {"mlp.gate_proj", "mlp.up_proj"}, {"mlp.down_proj"}]
    assert groups["Phi"][0] == {q, k, v, "mlp.fc1"}  # attention and FFN side by side, after one norm
    assert {"self_attention.query_key_value", "mlp.dense_h_to_4h"} in groups["Falcon"]
    assert {"self_attention.query_key_value"} in groups["FalconSerial"]
    assert groups["OPT"] == [{q, k, v}, {"self_attn.out_proj"}, {"fc1"}, {"fc2"}]


# Densities ------------------------------------------------------------------------------------------------------------


def layers_of(redundancies) -> list[LayerSensitivity]:
    return [LayerSensitivity(Spread(10, 0.0, 1.0, redundancy), {}) for redundancy in redundancies]


def mean(densities, sizes) -> float:
    return sum(d * n for d, n in zip(densities, sizes, strict=True)) / sum(sizes)


def test_densities_are_alps_formula_where_nothing_is_clipped():
    scores = importance(layers_of([4.0, 1.0, 2.0, 3.0]))
    assert scores == pytest.approx([0.6, 0.9, 0.8, 0.7])
    shifts = [(s - 0.6) / 0.3 * 2 * 0.15 for s in scores]
    expected = [shift - sum(shifts) / 4 + 0.3 for shift in shifts]
    assert spread_densities(scores, [5, 5, 5, 5], 0.7, 0.15) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.3, 1.0])
def test_densities_stay_in_range_and_meet_the_target_exactly(sparsity, alpha):
    generator = torch.Generator().manual_seed(0)
    for sizes in ([7] * 9, [3, 1, 4, 1, 5, 9, 2, 6, 5]):
        scores = importance(layers_of(torch.rand(9, generator=generator).tolist()))
        densities = spread_densities(scores, sizes, sparsity, alpha)
        assert all(0 < density <= 1 for density in densities)
        assert mean(densities, sizes) == pytest.approx(1 - sparsity, abs=1e-12)
        order = sorted(range(9), key=scores.__getitem__)
        assert all(densities[a] <= densities[b] for a, b in zip(order, order[1:], strict=False))
        if alpha == 0:
            assert densities == pytest.approx([1 - sparsity] * 9, abs=1e-12)


def test_the_clip_gives_to_the_others_alike():
    assert fit_to_target([0.0, 0.2, 0.4], [1, 1, 1], 0.1) == pytest.approx([0.01, 0.045, 0.245])


def test_equal_importance_is_uniform():
    assert spread_densities(importance(layers_of([2.0, 2.0])), [1, 9], 0.6, 0.3) == pytest.approx([0.4, 0.4])
    assert importance(layers_of([0.0, 0.0])) == [1.0, 1.0]
