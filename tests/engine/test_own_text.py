"""Text that a model makes is drawn from its own distribution, however it is batched; it depends on the seed."""

from functools import wraps

import pytest
import torch

import lib.engine.own_text
from lib.engine.own_text import sample_windows
from lib.errors import InputError, RunError
from lib.models.decoder import Decoder
from tests.families import FAMILIES, tiny_model

FIRST = torch.tensor([1, 1, 2, 1, 2])


def plain(model, first: torch.Tensor, seqlen: int, seed: int) -> torch.Tensor:
    """The same windows without a cache, token by token: the first whose cumulated probability is above the draw."""
    draws = torch.rand(len(first), seqlen - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    windows = []
    for token, row in zip(first.tolist(), draws.tolist(), strict=True):
        tokens = [token]
        for draw in row:
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
            tokens.append(int((logits.double().softmax(dim=0).cumsum(dim=0) <= draw).sum()))
        windows.append(tokens)
    return torch.tensor(windows)


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_are_those_of_the_whole_forward(family):
    """Longer than the sliding window of the families that have one."""
    model = tiny_model(family)
    assert torch.equal(sample_windows(Decoder(model), FIRST[:2], 12, 3), plain(model, FIRST[:2], 12, 3))


def test_the_seed_and_the_row_decide_and_not_the_batch(monkeypatch):
    decoder = Decoder(tiny_model("Llama"))
    state = torch.get_rng_state()
    found = sample_windows(decoder, FIRST, 16, 0)
    assert torch.equal(found, sample_windows(decoder, FIRST, 16, 0)) and torch.equal(found[:, 0], FIRST)
    other = sample_windows(decoder, FIRST, 16, 1)
    assert (found[:, 1:] != other[:, 1:]).float().mean() > 0.8
    monkeypatch.setattr(lib.engine.own_text, "_AT_ONCE", 2)
    assert torch.equal(found, sample_windows(decoder, FIRST, 16, 0))
    assert torch.equal(state, torch.get_rng_state()), "the draws of others are as they were"


def test_the_loss_of_sampled_tokens_is_the_entropy_of_the_model():
    """The mean of -log p over tokens drawn from p is the entropy of p, within its standard error."""
    model = tiny_model("Llama")
    windows = sample_windows(Decoder(model), torch.ones(200, dtype=torch.long), 32, 0)
    chances = model(input_ids=windows).logits[:, :-1].double().log_softmax(dim=-1)
    losses = -chances.gather(-1, windows[:, 1:, None]).squeeze(-1)
    entropies = -(chances.exp() * chances).sum(dim=-1)
    difference = losses - entropies
    assert difference.mean().abs() < 3 * difference.std() / difference.numel() ** 0.5
    assert losses.std() > 0.3 and (windows == 2).any(dim=1).sum() > 20, "the end of a text ends no window"


def test_a_batch_that_runs_out_of_memory_is_halved(monkeypatch):
    decoder, tried = Decoder(tiny_model("Llama")), []
    expected, go_on = sample_windows(decoder, FIRST, 8, 0), lib.engine.own_text._continue

    def scarce(decoder, first, draws):
        tried.append(len(first))
        if len(first) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return go_on(decoder, first, draws)

    monkeypatch.setattr(lib.engine.own_text, "_continue", scarce)
    assert torch.equal(sample_windows(decoder, FIRST, 8, 0), expected) and tried == [5, 2, 2, 1]


def test_a_model_that_makes_nan_is_told_with_its_layer():
    model = tiny_model("Llama")
    model.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="NaN or infinity in the output of layer 2"):
        sample_windows(Decoder(model), FIRST, 8, 0)


def test_a_model_without_a_cache_is_refused(monkeypatch):
    model = tiny_model("Llama")
    decoder, forward = Decoder(model), model.forward
    monkeypatch.setattr(model, "forward", wraps(forward)(lambda **inputs: forward(**{**inputs, "use_cache": False})))
    with pytest.raises(InputError, match="LlamaForCausalLM keeps no keys and values; name a text"):
        sample_windows(decoder, FIRST, 8, 0)
