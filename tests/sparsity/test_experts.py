"""Mixtures of experts, and `Conv1D`, are pruned as if each matrix were a linear that sees its own tokens."""

import copy
import re
from collections import defaultdict
from functools import partial

import pytest
import torch

from lib.config.methods import Pattern
from lib.config.quantization import Quantization
from lib.errors import InputError
from lib.models.decoder import Decoder
from lib.models.matrices import find_matrices, input_groups
from lib.models.weight_deltas import Changes
from lib.runtime.batching import Batcher
from lib.sensitivity.gradients import connection_sensitivity
from lib.sparsity import layerwise
from lib.sparsity.layerwise import _FEW_TOKENS, Monitor, count_zeros, prune_layers
from lib.sparsity.pruners import Admm, Ria, Rounded, SparseGpt, Wanda
from lib.sparsity.quantization_grid import round_to_nearest
from tests import reference
from tests.families import MOE_FAMILIES, OTHER_FAMILIES, tiny_model, tiny_windows
from tests.sparsity.test_prune import METHODS, REFITS, SPARSITIES, check_same_weights, pruned

MOE = ["Mixtral", *MOE_FAMILIES]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    layers = enumerate(find_matrices(Decoder(model)))
    return {f"{index}.{name}": matrix.weight for index, layer in layers for name, matrix in layer.items()}


def obvious(model: torch.nn.Module, prune, sparsities=SPARSITIES) -> dict[str, torch.Tensor]:
    """The weights after pruning the model with a linear for each matrix, whole forwards, one window at a time."""
    model = reference.unfused(model)
    found = {}
    for index, (layer, sparsity) in enumerate(zip(reference.decoder_layers(model), sparsities, strict=True)):
        linears, inputs = reference.layer_linears(model)[index], defaultdict(list)
        experts = {n: m for n, m in layer.named_modules() if isinstance(m, reference.UnfusedExperts)}
        hooks = [
            linear.register_forward_pre_hook(partial(lambda seen, _, args: seen.append(args[0]), inputs[name]))
            for name, linear in linears.items()
        ]
        for one in experts.values():
            one.seen.clear()
        for window in tiny_windows():
            model(input_ids=window[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        for path, one in experts.items():
            inputs |= {f"{path}.{name}": [torch.stack(seen)] for name, seen in one.seen.items()}
        for name, linear in linears.items():
            seen = torch.stack([x.reshape(-1, x.shape[-1]) for x in inputs.get(name, [])] or [torch.zeros(0)])
            is_expert = any(name.startswith(f"{path}.") for path in experts)
            by = reference.magnitude if is_expert and seen.shape[1:2].numel() < _FEW_TOKENS else prune
            linear.weight.copy_(by(linear.weight.clone(), seen, sparsity))
            found[f"{index}.{name}"] = linear.weight
    return found


def test_an_unfused_model_is_the_same_function():
    for family in OTHER_FAMILIES:
        model = tiny_model(family)
        logits = [one(input_ids=tiny_windows(2)).logits for one in (model, reference.unfused(model))]
        assert torch.allclose(*logits, atol=1e-4), family


@pytest.mark.parametrize("family", OTHER_FAMILIES)
@pytest.mark.parametrize(
    "method",
    [name if name in ("wanda", "sparsegpt") else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_pruning_is_that_of_a_linear_for_each_matrix(family, method):
    model = tiny_model(family)
    pruner, prune = METHODS[method]
    after = pruned(model, pruner)
    check_same_weights(weights(after), obvious(model, prune), bits=0.99 if method in REFITS else 0.999)
    touched = {matrix.whole.data_ptr() for layer in find_matrices(Decoder(after)) for matrix in layer.values()}
    before = dict(model.named_parameters())
    for name, parameter in after.named_parameters():
        assert parameter.data_ptr() in touched or torch.equal(parameter, before[name]), f"{name} was changed"


@pytest.mark.parametrize("family", MOE)
def test_routers_and_gates_are_left_and_all_other_matrices_are_pruned(family):
    decoder = Decoder(tiny_model(family))
    for layer, matrices in zip(decoder.layers, find_matrices(decoder), strict=True):
        pruned_paths = {matrix.whole.data_ptr() for matrix in matrices.values()}
        left = [n for n, one in layer.named_parameters() if one.dim() > 1 and one.data_ptr() not in pruned_paths]
        assert all(re.search(r"((gate|router)\.weight|correction_bias)$", name) for name in left), left
        assert bool(left) == any(matrix.expert is not None for matrix in matrices.values())


def test_a_shared_expert_with_as_many_rows_as_there_are_experts_is_no_router():
    decoder = Decoder(tiny_model("Qwen2Moe", shared_expert_intermediate_size=4))
    assert {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")} < find_matrices(decoder)[0].keys()


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_sensitivity_is_that_of_autograd_through_the_unfused_model(family):
    model = tiny_model(family)
    found = connection_sensitivity(Decoder(copy.deepcopy(model)), tiny_windows(3))
    expected = reference.sensitivities(reference.unfused(model), tiny_windows(3), "l2", "last")
    for layer, wanted in zip(found, expected, strict=True):
        assert set(layer.linears) == set(wanted)
        assert layer.layer.redundancy == pytest.approx(reference.redundancy(wanted), rel=1e-4)


def test_experts_that_got_next_to_no_tokens_are_pruned_by_magnitude_and_named():
    model, windows = tiny_model("Qwen3Moe"), tiny_windows(1, 4)  # eight calls of experts in all, too few for any
    for pruner in (Wanda(), Ria(), SparseGpt(), Admm()):
        told: list[str] = []
        found = weights(pruned(model, pruner, windows=windows, monitor=Monitor(print=told.append)))
        counts = {
            f"{one[1]}.{one[2]}": int(one[3])
            for line in told
            if (one := re.match(r"layer (\d) (\S+): (\d+) tokens came to it", line))
        }
        assert counts.keys() == {name for name in found if ".experts." in name}
        assert sum(counts.values()) == 4 * 2 * 8, "of four layers, two matrices each"
        for name in counts:
            expected = reference.magnitude(weights(model)[name], None, SPARSITIES[int(name[0])])
            assert torch.equal(found[name], expected), name


def test_an_expert_without_tokens_is_rounded_to_nearest():
    model, windows = tiny_model("Qwen3Moe"), tiny_windows(1, 4)
    quantization = Quantization(4, is_compensated=True)
    rounded = weights(pruned(model, Rounded(quantization), windows=windows))
    both = weights(pruned(model, SparseGpt(quantization=quantization), windows=windows))
    for name, before in weights(model).items():
        if ".experts." in name:
            assert torch.equal(rounded[name], round_to_nearest(before, quantization)), name
            zeros = reference.magnitude(before, None, SPARSITIES[int(name[0])])
            assert torch.equal(both[name], round_to_nearest(zeros, quantization)), name


def test_experts_that_multiply_in_another_way_are_refused(monkeypatch):
    """Or all of them would seem to get no tokens."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        inner = self._apply_gate(torch.einsum("td,eid->tei", hidden_states, self.gate_up_proj))
        return torch.einsum("tei,edi->td", inner, self.down_proj)

    model = tiny_model("Mixtral")
    monkeypatch.setattr(type(model.model.layers[0].mlp.experts), "forward", forward)
    told = "layer 0 multiplies with mlp.experts.down_proj in a way that is not known"
    with pytest.raises(InputError, match=told):
        input_groups(Decoder(model))


def test_a_stack_that_is_multiplied_from_the_other_side_is_refused():
    model = tiny_model("Mixtral")
    model.set_experts_implementation("eager")  # the fused kernels go by the mark
    for layer in model.model.layers:
        layer.mlp.experts.is_transposed = True  # which it is not
    with pytest.raises(InputError, match="is multiplied from the other side"):
        input_groups(Decoder(model))


@pytest.mark.parametrize("family", ["Mixtral", "DeepseekV3", "GPT2"])
def test_a_restored_layer_has_the_weights_that_were_written(family, tmp_path):
    model = tiny_model(family)
    for pruner in (Wanda(), SparseGpt()):
        folder = tmp_path / type(pruner).__name__
        once = pruned(model, pruner, changes=Changes(folder))
        again = pruned(model, pruner, changes=Changes(folder))  # all layers are taken from the files
        assert all(torch.equal(one, other) for one, other in zip(once.parameters(), again.parameters(), strict=True))
        decoder = Decoder(copy.deepcopy(model))
        for index, layer in enumerate(decoder.layers):
            for name, parameter in layer.named_parameters():
                parameter.copy_(Changes(folder).apply(index, name, parameter))
        assert all(torch.equal(p, q) for p, q in zip(once.parameters(), decoder.model.parameters(), strict=True))


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8)], ids=str)
def test_n_of_m_holds_in_every_expert(pattern):
    for family in ("Mixtral", "GraniteMoe"):
        found = weights(pruned(tiny_model(family), SparseGpt(pattern)))
        for name, weight in found.items():
            zeros = (weight == 0).reshape(len(weight), -1, pattern.m).sum(dim=-1)
            assert (zeros == pattern.n).all(), name


def test_experts_are_rounded():
    model = tiny_model("Mixtral")
    for quantization in (Quantization(4), Quantization(4, is_compensated=True)):
        for name, weight in weights(pruned(model, Rounded(quantization))).items():
            assert max(len(row.unique()) for row in weight) <= 16, name


def test_experts_are_counted():
    decoder = Decoder(pruned(tiny_model("Mixtral"), Wanda(), [0.5] * 4))
    for zeros, total in count_zeros(decoder, input_groups(decoder)):
        attention, experts = 32 * 32 * 2 + 16 * 32 * 2, 3 * (96 * 32 + 32 * 48)
        assert total == attention + experts and zeros == total / 2


@pytest.mark.parametrize("family", ["Mixtral", "DeepseekV3"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_experts_whose_statistics_do_not_fit_together_are_pruned_in_parts_alike(family, method, monkeypatch):
    model, pruner = tiny_model(family), METHODS[method][0]
    whole, parts = weights(pruned(model, pruner)), []
    monkeypatch.setattr(layerwise, "free_bytes", lambda device: 0)
    observe = layerwise.observe
    monkeypatch.setattr(layerwise, "observe", lambda a, groups, p: parts.append(len(groups)) or observe(a, groups, p))
    in_parts = weights(pruned(model, pruner))
    assert len(parts) > 4 and parts[-1] > parts[-2] == 2, "one expert at a time, and the rest with the last"
    assert all(torch.equal(weight, in_parts[name]) for name, weight in whole.items())


def test_the_model_runs_its_experts_as_before_afterwards():
    model = tiny_model("Mixtral")
    before = model.config._experts_implementation
    decoder = Decoder(model)
    prune_layers(decoder, input_groups(decoder), Wanda(), SPARSITIES, tiny_windows(), Batcher(2))
    connection_sensitivity(decoder, tiny_windows(2))
    assert model.config._experts_implementation == before
    assert not any(parameter.requires_grad for parameter in model.parameters())
