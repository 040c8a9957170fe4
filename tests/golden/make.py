"""Makes the figures that tests/test_golden_demo.py holds the code against: `python -m tests.golden.make`.

What lies here, all of it about the bundled demo model:

- `calibration.npy`, `evaluation.npy`: 2,048 and 1,024 token ids, of the docstrings of `lib` and of the README as they
  were when this was begun. They are committed because the demo's own text is that of the Python it runs on. They are
  fixed: this script reads them and does not make them. Each is the tokenization of its own decoded text.
- `expected.json`: Block Influence, the losses and choices of the greedy search, perplexities, ALP's densities, and of
  every way of pruning the sparsity, the perplexity and, for magnitude, a digest of each linear's mask.
- `masks.npz`: for every other way of pruning what a test can hold to on any CPU: of the first layer a digest
  of one byte for each row of its masks, and of all layers every 31st bit of their masks.

Everything comes from the obvious versions in tests/reference.py with the model's weights in fp64, and nothing from the
code under test, so a difference in these two files is one of the reference. The script takes about a minute.
"""

import json
import math
import random
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lib.demo import DEMO_MODEL
from tests import reference

FOLDER = Path(__file__).resolve().parent
SEQLEN, WINDOWS = 128, 8
GRADIENT_SEQLEN, GRADIENT_WINDOWS = 64, 10
MHA_COUNT, FFN_COUNT = 3, 4
GRADIENT_TYPES = ("l2", "l1", "l2_hundred_total")
ALP_SPARSITY, ALPHA = 0.7, 0.15
RUNS = [
    *((method, 0.5, "unstructured") for method in ("magnitude", "wanda", "ria", "sparsegpt")),
    *((method, 0.5, "2:4") for method in ("wanda", "sparsegpt")),
    ("wanda_alp", ALP_SPARSITY, "unstructured"),
]


def run_key(method: str, ratio: float, pattern: str) -> str:
    """The name of a way of pruning in the files, here and in ../shared/golden."""
    return f"{method}-{ratio}-{pattern.replace(':', 'x')}"


# The model's input ----------------------------------------------------------------------------------------------------


def token_ids(name: str) -> torch.Tensor:
    """(length,) ids of `calibration` or `evaluation`."""
    return torch.from_numpy(np.load(FOLDER / f"{name}.npy").astype(np.int64))


def first_windows(name: str) -> torch.Tensor:
    """(8, 128): one after the other, as PP-LLMs takes them of a single text, and as perplexity is measured."""
    return token_ids(name)[: WINDOWS * SEQLEN].view(WINDOWS, SEQLEN)


def drawn_windows(count: int, seqlen: int) -> torch.Tensor:
    """(count, seqlen) of the calibration text at random places, as ALP draws them of a single text with seed 0."""
    ids, draw = token_ids("calibration"), random.Random(0)
    starts = [draw.randint(0, len(ids) - seqlen - 1) for _ in range(count)]
    return torch.stack([ids[start : start + seqlen] for start in starts])


def calibration_windows() -> torch.Tensor:
    """(8, 128), whose activations the pruners look at."""
    return drawn_windows(WINDOWS, SEQLEN)


def gradient_windows() -> torch.Tensor:
    """(10, 64), whose gradients ALP looks at."""
    return drawn_windows(GRADIENT_WINDOWS, GRADIENT_SEQLEN)


# Masks ----------------------------------------------------------------------------------------------------------------

STEP = 31  # between the weights of a sample; prime to every linear's width, so that they are of all columns


def masks(model: nn.Module) -> dict[str, np.ndarray]:
    """{layer.linear: (out, in), True where the weight is 0}"""
    layers = enumerate(reference.layer_linears(model))
    return {f"{index}.{name}": (m.weight == 0).numpy() for index, layer in layers for name, m in layer.items()}


def mask_digest(mask: np.ndarray) -> str:
    """Of a whole mask: 16 hexadecimal digits."""
    return sha256(np.packbits(mask).tobytes()).hexdigest()[:16]


def row_digests(mask: np.ndarray) -> np.ndarray:
    """Of each row (out,): one byte, so that one in 256 wrong rows passes for right."""
    return np.array([sha256(row.tobytes()).digest()[0] for row in np.packbits(mask, axis=1)], dtype=np.uint8)


def first_layer_rows(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{0.linear: digests of its rows (out,)}"""
    return {name: row_digests(mask) for name, mask in found.items() if name.startswith("0.")}


def sample(found: dict[str, np.ndarray]) -> np.ndarray:
    """Every 31st bit of each mask, all in one row."""
    return np.concatenate([mask.flatten()[::STEP] for mask in found.values()])


# The figures ----------------------------------------------------------------------------------------------------------


def demo_model() -> nn.Module:
    """The demo in fp64."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float64)
    return model.eval().requires_grad_(False)


def perplexity(model: nn.Module) -> float:
    windows = first_windows("evaluation")
    return math.exp(reference.total_loss(model, windows) / windows.numel())


def depth_figures(model: nn.Module) -> dict:
    """What PP-LLMs finds, under the names of result.json."""
    windows = first_windows("calibration")
    bi_scores = reference.block_influence(model, windows)
    candidates = sorted(range(len(bi_scores)), key=bi_scores.__getitem__)[:FFN_COUNT]
    rounds = reference.greedy(model, windows, candidates, MHA_COUNT)
    chosen = [layer for _, layer in rounds]
    return {
        "bi_scores": bi_scores,
        "candidates": candidates,
        "rounds": [{"losses": {str(k): v for k, v in losses.items()}, "selected": layer} for losses, layer in rounds],
        "mha_removed": chosen,
        "ffn_removed": sorted(candidates),
        "perplexity": {
            "dense": perplexity(model),
            "pruned": perplexity(reference.toggled(model, chosen, candidates)),
        },
    }


def density_figures(model: nn.Module) -> dict[str, dict[str, list[float]]]:
    """For each gradient type: the redundancy of every layer, and ALP's densities, which its scale does not change."""
    found = {kind: reference.sensitivities(model, gradient_windows(), kind, "last") for kind in GRADIENT_TYPES}
    return {
        "redundancies": {kind: list(map(reference.redundancy, layers)) for kind, layers in found.items()},
        "densities": {kind: reference.densities(layers, ALP_SPARSITY, ALPHA) for kind, layers in found.items()},
    }


def prune(model: nn.Module, windows: torch.Tensor, run: tuple[str, float, str], densities: list[float]) -> nn.Module:
    """A copy pruned the obvious way; `densities` are for methods that end in `_alp`."""
    method, ratio, pattern = run
    function = getattr(reference, method.removesuffix("_alp"))
    if pattern != "unstructured":
        function = partial(function, pattern=tuple(map(int, pattern.split(":"))))
    layers = len(reference.decoder_layers(model))
    sparsities = [1 - density for density in densities] if method.endswith("_alp") else [ratio] * layers
    return reference.prune_with_hooks(model, windows, sparsities, function)


def run_figures(
    model: nn.Module, run: tuple[str, float, str], densities: list[float]
) -> tuple[dict, dict[str, np.ndarray]]:
    """What one way of pruning gives, and its masks."""
    pruned = prune(model, calibration_windows(), run, densities)
    found = masks(pruned)
    zeros = sum(int(mask.sum()) for mask in found.values()) / sum(mask.size for mask in found.values())
    figures = {"sparsity": zeros, "perplexity": perplexity(pruned)}
    if run[0] == "magnitude":
        figures["digests"] = {name: mask_digest(mask) for name, mask in found.items()}
    return figures, found


def rounded(value):
    """The same with numbers of nine digits, which is beyond what any test asks for."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def main() -> None:
    model, kept = demo_model(), {}
    expected = rounded({**depth_figures(model), **density_figures(model), "runs": {}})
    for run in RUNS:
        key = run_key(*run)
        figures, found = run_figures(model, run, expected["densities"]["l2"])
        expected["runs"][key] = rounded(figures)
        if "digests" not in figures:
            kept |= {f"{key}/{name}": digests for name, digests in first_layer_rows(found).items()}
            kept[f"{key}/sample"] = np.packbits(sample(found))
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    np.savez_compressed(FOLDER / "masks.npz", **kept)


if __name__ == "__main__":
    main()
