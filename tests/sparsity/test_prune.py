"""The engine prunes as the obvious loops do: whole forwards, one window at a time, one statistic for each linear."""

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from lib.config.methods import Pattern
from lib.config.quantization import Quantization
from lib.config.sources import ModelSource
from lib.data.corpora import load_corpus
from lib.data.sampling import sampled_windows
from lib.engine.activations import Activations
from lib.errors import RunError
from lib.models.decoder import Decoder
from lib.models.loading import load_model
from lib.models.matrices import input_groups
from lib.runtime.batching import Batcher
from lib.runtime.distributed import Ranks
from lib.sparsity import layerwise
from lib.sparsity.layerwise import Monitor, count_zeros, prune_layers, share_out
from lib.sparsity.pruners import Admm, InputNorms, Magnitude, Pruner, Ria, Rounded, SparseGpt, Wanda
from tests import reference
from tests.families import LINEAR_FAMILIES, tiny_model, tiny_windows

SPARSITIES = [0.3, 0.5, 0.6, 0.7]
METHODS = {
    "magnitude": (Magnitude(), reference.magnitude),
    "wanda": (Wanda(), reference.wanda),
    "ria": (Ria(), reference.ria),
    "sparsegpt": (SparseGpt(), reference.sparsegpt),
    "admm": (Admm(), reference.admm),
}
REFITS = ("sparsegpt", "admm")  # and so the weights, by which others are chosen, are not the same to the last bit


def pruned(model: nn.Module, pruner: Pruner, sparsities=SPARSITIES, batch_size=2, windows=None, **options) -> nn.Module:
    """A pruned copy of a model."""
    decoder = Decoder(copy.deepcopy(model))
    windows = tiny_windows() if windows is None else windows
    prune_layers(decoder, input_groups(decoder), pruner, sparsities, windows, Batcher(batch_size), **options)
    return decoder.model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    layers = enumerate(reference.layer_linears(model))
    return {f"{index}.{name}": linear.weight for index, layer in layers for name, linear in layer.items()}


def check_same(found: nn.Module, expected: nn.Module, bits: float = 1.0) -> None:
    """Masks equal but for a share of the bits, and weights equal in the rows whose masks are.

    A bit that differs while a mask grows leaves a trace in the weights, even if the bits of the final masks are equal.
    """
    check_same_weights(weights(found), weights(expected), bits)


def check_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bits: float = 1.0) -> None:
    """`check_same` for weights by name."""
    assert found.keys() == expected.keys()
    same = {name: (weight == 0) == (expected[name] == 0) for name, weight in found.items()}
    assert sum(s.sum() for s in same.values()) >= bits * sum(s.numel() for s in same.values())
    for name, weight in found.items():
        rows = same[name].all(dim=1)
        assert torch.allclose(weight[rows], expected[name][rows], rtol=1e-2, atol=1e-3 if bits == 1.0 else 1e-2), name


@pytest.mark.parametrize("family", LINEAR_FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_pruning_is_that_of_the_obvious_loops(family, method):
    model = tiny_model(family)
    pruner, prune = METHODS[method]
    expected = reference.prune_with_hooks(model, tiny_windows(), SPARSITIES, prune)
    check_same(pruned(model, pruner), expected, bits=0.995 if method in REFITS else 1.0)
    others = {n: p for n, p in model.named_parameters() if not any(n.endswith(f"{w}.weight") for w in weights(model))}
    after = dict(pruned(model, pruner).named_parameters())
    assert all(torch.equal(p, after[n]) for n, p in others.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(2, 4)], ids=str)
def test_masks_are_the_same_at_any_batch_size(method, pattern):
    kind = type(METHODS[method][0])
    masks = [
        {
            name: weight == 0
            for name, weight in weights(pruned(tiny_model("Gemma2"), kind(pattern), batch_size=n)).items()
        }
        for n in (1, 2, 3, 5, 64)
    ]
    assert all(torch.equal(mask[name], masks[0][name]) for mask in masks[1:] for name in mask)


def lowest_layers(count: int) -> nn.Module:
    """The lower part of the demo model: what lies above it changes nothing there."""
    model = load_model(ModelSource("demo"))
    model.config.num_hidden_layers, model.model.layers = count, model.model.layers[:count]
    return model


@pytest.mark.parametrize(
    "method", ["sparsegpt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wanda", "admm"))]
)
def test_masks_of_a_trained_model_are_the_same_at_any_batch_size(method, demo_tokenizer):
    windows, model = sampled_windows(load_corpus("demo", "train"), demo_tokenizer, 7, 96, 0), lowest_layers(6)
    one, *others = (
        weights(pruned(model, METHODS[method][0], [0.6] * 6, batch_size=n, windows=windows)) for n in (1, 3, 7)
    )
    for other in others:
        different = sum(int(((other[name] == 0) != (weight == 0)).sum()) for name, weight in one.items())
        assert different <= 1e-6 * sum(weight.numel() for weight in one.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n, m", [(2, 4), (4, 8), (1, 16)])
def test_n_of_m_holds_in_every_group(method, n, m):
    found = weights(pruned(tiny_model("Qwen3"), type(METHODS[method][0])(Pattern(n, m))))
    for name, weight in found.items():
        assert ((weight == 0).view(len(weight), -1, m).sum(dim=-1) == n).all(), name


def test_the_variant_of_wanda_prunes_to_the_ratio_by_other_masks():
    model = tiny_model("Llama")
    found, plain = (weights(pruned(model, Wanda(use_variant=v), [0.5] * 4)) for v in (True, False))
    for name, weight in found.items():
        zeros = weight == 0
        assert zeros.float().mean() == pytest.approx(0.5, abs=0.02)
        assert zeros.sum(dim=1).unique().numel() > 1 and not torch.equal(zeros, plain[name] == 0)


def test_the_power_of_ria_counts():
    model = tiny_model("Llama")
    check_same(
        pruned(model, Ria(power=2.0)),
        reference.prune_with_hooks(model, tiny_windows(), SPARSITIES, lambda *args: reference.ria(*args, a=2.0)),
    )
    assert any(
        not torch.equal(weight == 0, other == 0)
        for weight, other in zip(
            weights(pruned(model, Ria(power=2.0))).values(), weights(pruned(model, Ria())).values(), strict=True
        )
    )


def test_features_that_are_never_on_and_empty_columns_are_no_obstacle():
    model = tiny_model("Llama")
    model.model.layers[1].input_layernorm.weight[:4] = 0
    model.model.layers[2].mlp.up_proj.weight[:, 3] = 0
    model.model.layers[2].mlp.up_proj.weight[5] = 0
    for pruner, _ in METHODS.values():
        assert all(weight.isfinite().all() for weight in weights(pruned(model, pruner)).values())


def test_quantizing_afterwards_looks_at_what_quantized_layers_give_and_holds_the_zeros():
    sparse = pruned(tiny_model("Llama"), Wanda())
    for quantization in (Quantization(4), Quantization(4, is_compensated=True)):
        found = pruned(sparse, Rounded(quantization))
        for name, weight in weights(found).items():
            assert ((weights(sparse)[name] == 0) <= (weight == 0)).all()
            assert all(len(row.unique()) <= 16 for row in weight)
    changed = copy.deepcopy(sparse)
    changed.model.layers[0].mlp.down_proj.weight.mul_(3)
    later = "3.mlp.down_proj"  # another first layer gives the last one other inputs, and so other roundings
    of_changed = weights(pruned(changed, Rounded(Quantization(4, is_compensated=True))))[later]
    assert not torch.equal(of_changed, weights(found)[later])


def test_half_precision_models_are_pruned_in_their_dtype():
    model = tiny_model("Llama").to(torch.bfloat16)
    for method, (pruner, prune) in METHODS.items():
        found = pruned(model, pruner, batch_size=1)
        assert all(weight.dtype == torch.bfloat16 for weight in weights(found).values())
        if method not in REFITS:  # scores and norms in fp32: of the reference's masks no bit differs
            expected = weights(reference.prune_with_hooks(model, tiny_windows(), SPARSITIES, prune))
            assert all(torch.equal(w == 0, expected[name] == 0) for name, w in weights(found).items())


def fail_for_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_running_out_of_memory_halves_the_batch_and_counts_no_window_twice(monkeypatch):
    expected = pruned(tiny_model("Llama"), Wanda(), batch_size=1)
    run_layer, batches = Decoder.run_layer, []

    def sometimes(self, index, hidden_states, inputs, mode):
        batches.append((index, len(hidden_states)))
        output = run_layer(self, index, hidden_states, inputs, mode)  # hooks see these windows
        if (index, len(hidden_states)) in ((1, 5), (2, 2)):
            fail_for_memory()
        return output

    decoder = Decoder(copy.deepcopy(tiny_model("Llama")))
    groups, batcher = input_groups(decoder), Batcher(64)
    update = InputNorms.update
    seen = []
    monkeypatch.setattr(Decoder, "run_layer", sometimes)

    def second_observation_fails(self, inputs):
        seen.append(len(inputs))
        update(self, inputs)
        if len(seen) == 6:  # layer 1, its second input
            fail_for_memory()

    monkeypatch.setattr(InputNorms, "update", second_observation_fails)
    prune_layers(decoder, groups, Wanda(), SPARSITIES, tiny_windows(), batcher)
    assert [size for index, size in batches if index == 1][:5] == [5, 2, 2, 1, 2]  # begun anew with half of the five
    assert batcher.size == 1  # after layer 2
    check_same(decoder.model, expected)


def test_running_out_of_memory_after_the_layer_advances_no_window_twice(monkeypatch):
    decoder = Decoder(tiny_model("Llama"))
    clean, activations = (Activations(decoder, tiny_windows(), Batcher(4)) for _ in range(2))
    clean.advance()
    total, calls = torch.Tensor.sum, []

    def once(self, *args, **kwargs):
        calls.append(1)
        return fail_for_memory() if len(calls) == 1 else total(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "sum", once)
    activations.advance()
    assert len(calls) > 2 and torch.allclose(activations.hidden_states, clean.hidden_states, atol=1e-5)


def test_outputs_that_are_large_but_finite_are_no_error():
    model = tiny_model("Llama")
    model.model.layers[0].mlp.down_proj.weight.mul_(1e37)
    activations = Activations(Decoder(model), tiny_windows(), Batcher(2))
    activations.advance()
    assert activations.hidden_states.abs().amax() > 1e35 and not activations.hidden_states.sum().isfinite()


def test_numbers_that_are_not_finite_name_the_layer():
    for pruner in (Wanda(), SparseGpt()):
        model = tiny_model("Llama")
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
        with pytest.raises(RunError, match="NaN or infinity in the output of layer 1 on calibration window 0"):
            pruned(model, pruner, [0.0] * 4)
        model = tiny_model("Llama")
        model.model.layers[2].self_attn.v_proj.weight[0, 0] = float("inf")
        with pytest.raises(RunError, match=r"layer 2 self_attn.o_proj: NaN or infinity in the layer's inputs"):
            pruned(model, pruner)


def test_what_a_pruner_remarks_is_said_with_its_place(monkeypatch):
    said = []
    monkeypatch.setattr(SparseGpt, "remark", lambda self, statistic: "look here")
    pruned(tiny_model("Llama"), SparseGpt(), monitor=Monitor(print=said.append))
    assert said[:2] == [
        "layer 0 self_attn.q_proj, self_attn.k_proj, self_attn.v_proj: look here",
        "layer 0 self_attn.o_proj: look here",
    ]


def test_the_last_linear_is_not_run_for_its_statistics_and_inputs_are_seen_once(monkeypatch):
    """The observing pass ends before `down_proj`, and collects four statistics in a Llama layer, not seven."""
    calls, statistics = [], []
    model = tiny_model("Llama")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers.0." in name:
            module.register_forward_hook(lambda module, args, output, name=name: calls.append(name.split(".")[-1]))
    make = Wanda.statistic
    monkeypatch.setattr(Wanda, "statistic", lambda self, *args: statistics.append(args) or make(self, *args))
    pruned(model, Wanda(), windows=tiny_windows()[:1])
    assert len(statistics) == 4 * 4
    in_checks = 3  # two by the first checks of the model, and the search for shared inputs
    assert calls.count("up_proj") - calls.count("down_proj") == 1
    assert calls.count("down_proj") - 1 <= in_checks


class InThread(Ranks):
    """One of two processes, as a thread: whatever they exchange is in `slots`, and what it is, in `events`."""

    slots: list = [None, None]
    events: tuple[list, list] = ([], [])
    barrier = threading.Barrier(2, timeout=60)

    def exchange(self, mine):
        self.barrier.wait()
        self.slots[self.rank] = mine
        self.barrier.wait()
        return list(self.slots)

    def add(self, tensor):
        tensor.copy_(sum(self.exchange(tensor.clone())))

    def tell(self, found, owner):
        return json.loads(json.dumps(self.exchange(found)[owner]))

    def send(self, tensor, owner):
        self.events[self.rank].append(tensor.dtype if self.rank == owner else "waits")
        tensor.copy_(self.exchange(tensor.clone())[owner])


@pytest.mark.parametrize(
    "pruner, sent", [(Magnitude(), torch.bool), (Wanda(), torch.bool), (SparseGpt(), torch.float32)]
)
def test_processes_prune_the_groups_of_a_layer_at_the_same_time(pruner, sent, monkeypatch):
    """A process first prunes its groups; only then does it wait for those of others. Masks are sent as masks."""
    of_thread = threading.local()

    def prune_group(group, *rest):
        InThread.events[of_thread.rank].append("+".join(group.names))
        return do_prune(group, *rest)

    def prune_share(rank: int) -> list[torch.Tensor]:
        of_thread.rank = rank
        InThread.events[rank].clear()
        decoder = Decoder(copy.deepcopy(model))
        groups = input_groups(decoder)[:1]
        prune_layers(decoder, groups, pruner, [0.5], tiny_windows(), Batcher(2, InThread(rank, 2)))
        return [matrix.weight for group in groups[0] for matrix in group.matrices]

    do_prune, model = layerwise.prune_group, tiny_model("Llama")
    decoder = Decoder(copy.deepcopy(model))
    (groups,) = input_groups(decoder)[:1]
    prune_layers(decoder, [groups], pruner, [0.5], tiny_windows(), Batcher(2))
    monkeypatch.setattr(layerwise, "prune_group", prune_group)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(prune_share, range(2)))
    pruned_by = []
    for events in InThread.events:
        own = [event for event in events if event != "waits" and event != sent]
        assert own and events[: len(own)] == own and {"waits", sent} == set(events[len(own) :])
        pruned_by += own
    assert sorted(pruned_by) == sorted("+".join(group.names) for group in groups)
    for of_process in found:
        torch.testing.assert_close(of_process, [matrix.weight for group in groups for matrix in group.matrices])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_work_is_shared_out_evenly():
    work = [3, 1, 4, 1, 5]
    assert share_out(work, 1) == [0] * 5
    owners = share_out(work, 2)
    assert [sum(one for one, owner in zip(work, owners, strict=True) if owner == rank) for rank in range(2)] == [7, 7]
    assert sorted(share_out([2, 2], 3)) == [0, 1] and share_out([], 2) == []


def test_zeros_are_counted_by_layer():
    decoder = Decoder(pruned(tiny_model("Llama"), Magnitude(), [0.0, 0.5, 0.25, 0.9]))
    counts = count_zeros(decoder, input_groups(decoder))
    size = sum(linear.weight.numel() for linear in reference.layer_linears(decoder.model)[0].values())
    assert [n for _, n in counts] == [size] * 4
    assert [zeros / n for zeros, n in counts] == pytest.approx([0.0, 0.5, 0.25, 0.9], abs=0.002)
