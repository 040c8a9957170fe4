"""What the fast code must agree with: slow, obvious versions that use nothing but the model's own forward."""

import copy
import math

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

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
        logits = model(input_ids=window[None], use_cache=False).logits.double()
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

    def window_losses(windows, scored):
        assert scored == windows.shape[1] - 1
        return torch.tensor([total_loss(model, row) / windows.shape[1] for row in windows.split(1)])

    return window_losses


@torch.no_grad()
def strided_perplexity(model: nn.Module, tokens: torch.Tensor, seqlen: int, stride: int) -> float:
    """Perplexity of tokens (length,), each predicted once: by the window of its first appearance, token by token."""
    losses, seen = [], 1  # the first token is predicted from nothing
    for start in range(0, len(tokens) - seqlen + 1, stride):
        logits = model(input_ids=tokens[None, start : start + seqlen]).logits[0].double().log_softmax(-1)
        for place in range(seen, start + seqlen):
            losses.append(-logits[place - start - 1, tokens[place]].item())
        seen = start + seqlen
    return math.exp(sum(losses) / len(losses))


# Experts --------------------------------------------------------------------------------------------------------------


class UnfusedExperts(nn.Module):
    """Experts with a linear for each matrix, run one after the other; `seen` has the inputs of each, as weighed."""

    def __init__(self, fused: nn.Module):
        super().__init__()
        self.names = ("gate_up_proj" if hasattr(fused, "gate_up_proj") else "up_proj", "down_proj")
        for name in self.names:
            stack, biases = getattr(fused, name), getattr(fused, f"{name}_bias", None)
            stack = stack.mT if fused.is_transposed else stack
            pairs = zip(stack, [None] * len(stack) if biases is None else biases, strict=True)
            self.add_module(name, nn.ModuleList(linear_of(*pair) for pair in pairs))
        self.gate = fused._apply_gate if self.names[0] == "gate_up_proj" else fused.act_fn
        self.seen: dict[str, list[torch.Tensor]] = {}
        self.norms: dict[int, list[float]] = {}  # of the weighed outputs, by expert

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for expert, (gate_up, down) in enumerate(zip(*map(self.get_submodule, self.names), strict=True)):
            for token, place in (top_k_index == expert).nonzero().tolist():
                state, weight = hidden_states[token], top_k_weights[token, place]
                inner = self.gate(gate_up(state))
                output[token] = output[token] + weight * down(inner)
                self.norms.setdefault(expert, []).append(float((weight * down(inner)).detach().norm()))
                for name, inputs in zip(self.names, (state, inner), strict=True):
                    self.seen.setdefault(f"{name}.{expert}", []).append((weight * inputs).detach())
        return output


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """A linear of this weight (out, in)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.weight.data = weight.detach().clone()
    linear.bias = bias if bias is None else nn.Parameter(bias.detach().clone())
    return linear.requires_grad_(False)


def unfused(model: nn.Module) -> nn.Module:
    """A copy whose experts and `Conv1D` are linears of the same names."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                setattr(parent, name, linear_of(child.weight.T, child.bias))
            elif hasattr(child, "down_proj") and isinstance(child.down_proj, nn.Parameter):
                setattr(parent, name, UnfusedExperts(child))
    return model


# ALP ------------------------------------------------------------------------------------------------------------------


def layer_linears(model: nn.Module) -> list[dict[str, nn.Linear]]:
    """The linears of each layer that are pruned: all but the gate of a shared expert, and time steps."""
    return [
        {
            name: module
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear) and module.out_features > 1 and not name.endswith("dt_proj")
        }
        for layer in decoder_layers(model)
    ]


def sensitivities(model: nn.Module, windows: torch.Tensor, gradient_type: str, loss: str) -> list[dict]:
    """G of every linear by autograd through the whole model, one backward a window: [{linear: (out, in)}] by layer."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    linears = layer_linears(model)
    totals = [{name: torch.zeros_like(linear.weight) for name, linear in layer.items()} for layer in linears]
    for number, window in enumerate(windows):
        labels = window[None].clone()
        if loss == "last":
            labels[:, :-1] = -100
        model.zero_grad()
        model(input_ids=window[None], labels=labels, use_cache=False).loss.backward()
        for layer, total in zip(linears, totals, strict=True):
            for name, linear in layer.items():
                if linear.weight.grad is None:  # of an expert that got no token
                    continue
                gradient = linear.weight.grad.detach()
                total[name] += gradient.abs() if gradient_type == "l1" else gradient**2
                if gradient_type == "l2_hundred_total" and number == len(windows) - 1:
                    total[name] += (100 * gradient) ** 2
    return totals


def redundancy(sensitivity: dict[str, torch.Tensor]) -> float:
    """R of a layer: sum of |z| over all its sensitivities, z by their mean and unbiased std."""
    flat = torch.cat([values.flatten() for values in sensitivity.values()]).double()
    return ((flat - flat.mean()) / flat.std()).abs().sum().item()


def densities(sensitivities: list[dict], sparsity: float, alpha: float) -> list[float]:
    """ALP's density of every layer, for layers of one size, where none has to be clipped."""
    redundancies = [redundancy(layer) for layer in sensitivities]
    scores = [1 - one / sum(redundancies) for one in redundancies]
    spread = [(score - min(scores)) / (max(scores) - min(scores)) * 2 * alpha for score in scores]
    found = [one - sum(spread) / len(spread) + 1 - sparsity for one in spread]
    assert all(0 < density <= 1 for density in found)
    return found


@torch.no_grad()
def prune_with_hooks(model: nn.Module, windows: torch.Tensor, sparsities: list[float], prune) -> nn.Module:
    """A pruned copy: for each layer in turn the whole model runs on one window after the other, and a hook on each
    linear keeps all its inputs; then `prune(weight, inputs (N, T, in), sparsity)` gives the new weight."""
    model = copy.deepcopy(model)
    for layer, sparsity in zip(layer_linears(model), sparsities, strict=True):
        inputs = {name: [] for name in layer}
        hooks = [
            linear.register_forward_pre_hook(lambda module, args, seen=inputs[name]: seen.append(args[0]))
            for name, linear in layer.items()
        ]
        for window in windows:
            model(input_ids=window[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, linear in layer.items():
            seen = torch.stack([x.reshape(windows.shape[1], -1) for x in inputs[name]])
            linear.weight.copy_(prune(linear.weight.clone(), seen, sparsity))
    return model


def gptq(weight, inputs, bits, size, damping=0.01):
    """GPTQ in fp64 with a grid for each `size` columns, taken when the pass reaches them; zeros of the weight stay."""
    w = weight.double().clone()
    hessian = 2 / len(inputs) * sum(x.double().T @ x.double() for x in inputs)
    hessian[hessian.diagonal() == 0, hessian.diagonal() == 0] = 1
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian)).T
    for j in range(w.shape[1]):
        if j % size == 0:
            group = w[:, j : j + size]
            least, most = group.amin(dim=1).clamp(max=0), group.amax(dim=1).clamp(min=0)
            scale = (most - least) / (2**bits - 1)
            zero = (-least / scale).round()
        rounded = scale * (((w[:, j] / scale).round() + zero).clamp(0, 2**bits - 1) - zero)
        rounded[weight[:, j] == 0] = 0
        lost = (w[:, j] - rounded) / inverse[j, j]
        w[:, j:] -= lost[:, None] * inverse[j, j:]
        w[:, j] = rounded
    return w.to(weight.dtype)


def magnitude(weight, inputs, sparsity):
    threshold = weight.abs().flatten().sort().values[int(weight.numel() * sparsity)]
    return weight * (weight.abs() > threshold)


def smallest_of_each_row(weight, scores, count):
    for row in range(len(weight)):
        weight[row, scores[row].sort(stable=True).indices[:count]] = 0
    return weight


def wanda(weight, inputs, sparsity, pattern=None):
    norms = (inputs.double() ** 2).sum(dim=1).mean(dim=0).sqrt()
    scores = weight.abs() * norms
    if pattern is None:
        return smallest_of_each_row(weight, scores, int(weight.shape[1] * sparsity))
    n, m = pattern
    places = scores.view(-1, m).argsort(dim=1, stable=True).argsort(dim=1)
    return weight.masked_fill((places < n).view_as(weight), 0)


def ria(weight, inputs, sparsity, a=0.5):
    norms = (inputs.double() ** 2).sum(dim=1).mean(dim=0).sqrt()
    size = weight.abs().double()
    scores = (size / size.sum(dim=0) + size / size.sum(dim=1, keepdim=True)) * norms**a
    return smallest_of_each_row(weight, scores, int(weight.shape[1] * sparsity))


def sparsegpt(weight, inputs, sparsity, block=128, damping=0.01, pattern=None):
    """SparseGPT in fp64: after each column, what it lost is spread at once over all columns that follow."""
    w = weight.double().clone()
    hessian = 2 / len(inputs) * sum(x.double().T @ x.double() for x in inputs)
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    w[:, dead] = 0
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian)).T  # upper
    d = inverse.diagonal()
    columns = w.shape[1]
    mask = torch.zeros_like(w, dtype=torch.bool)
    for j in range(columns):
        if pattern is None and j % block == 0:
            scores = (w[:, j : j + block] / d[j : j + block]) ** 2
            mask[:, j : j + block] = scores <= scores.flatten().sort().values[int(scores.numel() * sparsity)]
        elif pattern is not None and j % pattern[1] == 0:
            n, m = pattern
            scores = (w[:, j : j + m] / d[j : j + m]) ** 2
            mask[:, j : j + m] = scores.argsort(dim=1, stable=True).argsort(dim=1) < n
        lost = w[:, j] * mask[:, j]
        w[:, j:] -= (lost / d[j])[:, None] * inverse[j, j:]
        w[mask[:, j], j] = 0
    return w.to(weight.dtype)


def admm(weight, inputs, sparsity, pattern=None, iterations=20, growth=18, damping=0.03, rho=1.0):
    """ADMM in fp64, step by step as in its paper, on the weight times the norms of its inputs."""
    x = inputs.double().flatten(0, 1)
    norms = x.norm(dim=0)
    norms[norms == 0] = 1
    h = (x / norms).T @ (x / norms)
    h += damping * torch.eye(len(h))
    target = (weight.double() * norms).T  # (in, out)
    target[h.diagonal() < 0.5] = 0  # of inputs that are always zero
    inverse = torch.linalg.inv(h + rho * torch.eye(len(h)))
    w, u = target.clone(), torch.zeros_like(target)
    for step in range(iterations):
        if step < growth:
            share = 1 - (1 - (step + 1) / growth) ** 3
            scores = (w + u).abs().T
            if pattern is not None:
                n, m = pattern
                places = scores.reshape(-1, m).argsort(dim=1, stable=True).argsort(dim=1)
                scores = scores.masked_fill((places >= n).view_as(scores), torch.inf)
                sparsity = n / m
            threshold = scores.flatten().sort().values[int(scores.numel() * sparsity * share + 1e-6)]
            mask = ((scores <= threshold) & scores.isfinite()).T
        z = (w + u) * ~mask
        u = u + w - z
        w = inverse @ (h @ target + rho * (z - u))
    return (((w + u) * ~mask).T / norms).to(weight.dtype)
