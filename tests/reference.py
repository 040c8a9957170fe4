"""What the fast code must agree with: slow, obvious versions that use nothing but the model's own forward."""

import copy

import torch
from torch import nn

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
FFN = ("mlp", "fc2")


class Identity(nn.Module):
    """A layer that passes its input on, in the form that the layer it stands for returns."""

    def __init__(self, returns_tuple: bool):
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states, *args, **kwargs):
        return (hidden_states, None) if self.returns_tuple else hidden_states


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def toggled(model: nn.Module, mha_removed, ffn_removed) -> nn.Module:
    """A copy of the model with the given sublayers' weights all zero; layers in both lists become identities."""
    model = copy.deepcopy(model)
    layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        if index in mha_removed and index in ffn_removed:
            layers[index] = Identity("Falcon" in type(layer).__name__)
            continue
        removed = [ATTENTION] * (index in mha_removed) + [FFN] * (index in ffn_removed)
        for names in removed:
            (name,) = [name for name in names if hasattr(layer, name)]
            for parameter in getattr(layer, name).parameters():
                parameter.zero_()
    return model


@torch.no_grad()
def total_loss(model: nn.Module, windows: torch.Tensor) -> float:
    """Sum over windows of mean token cross-entropy times the window's length, one whole forward a window."""
    total = 0.0
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits.float()
        total += torch.nn.functional.cross_entropy(logits[0, :-1], window[1:]).item() * len(window)
    return total


def greedy(model: nn.Module, windows: torch.Tensor, candidates: list[int], mha_count: int) -> list[tuple[dict, int]]:
    """The second stage of PP-LLMs by toggling layers and running the whole model for each candidate."""
    chosen, rounds = [], []
    for _ in range(mha_count):
        losses = {
            layer: total_loss(toggled(model, [*chosen, layer], candidates), windows)
            for layer in candidates
            if layer not in chosen
        }
        chosen.append(min(losses, key=losses.get))
        rounds.append((losses, chosen[-1]))
    return rounds


@torch.no_grad()
def block_influence(model: nn.Module, windows: torch.Tensor) -> list[float]:
    """BI from hooks on the layers of the model's own forward, one window at a time."""
    cosines = [[] for _ in decoder_layers(model)]

    def look(index):
        def hook(module, args, output):
            x, y = args[0][0].double(), (output[0] if isinstance(output, tuple) else output)[0].double()
            cosines[index].extend((x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1))

        return hook

    hooks = [layer.register_forward_hook(look(index)) for index, layer in enumerate(decoder_layers(model))]
    for window in windows:
        model(input_ids=window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return [1 - torch.stack(values).mean().item() for values in cosines]


def model_window_losses(model: nn.Module):
    """The loss of a causal language model by its own forward, one window at a time: (B, T) ids -> fp32 (B,)."""
    return lambda windows: torch.tensor([total_loss(model, row) / windows.shape[1] for row in windows.split(1)])
