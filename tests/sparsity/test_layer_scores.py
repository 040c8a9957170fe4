"""The densities of OWL, DLP and ATP are those of their formulas, written down plainly."""

import json

import numpy as np
import pytest
import torch

from lib.models.decoder import Decoder
from lib.models.matrices import input_groups
from lib.sparsity.densities import spread_densities
from lib.sparsity.outlier_scores import layer_scores, median, median_share, outlier_share
from tests import reference
from tests.command import run_alp
from tests.families import LINEAR_FAMILIES, tiny_model, tiny_windows


def metrics_of(family: str, windows: torch.Tensor) -> list[np.ndarray]:
    """Every layer's |W| * sqrt(mean over windows of the sum over tokens of x^2), from hooks on whole forwards."""
    model = tiny_model(family)
    layers = reference.layer_linears(model)
    squares = {id(linear): 0 for layer in layers for linear in layer.values()}

    def hook(linear, args):
        squares[id(linear)] = squares[id(linear)] + args[0].reshape(-1, linear.in_features).double().square().sum(dim=0)

    hooks = [linear.register_forward_pre_hook(hook) for layer in layers for linear in layer.values()]
    for window in windows:
        model(input_ids=window[None], use_cache=False)
    for each in hooks:
        each.remove()
    metric = [[w.weight.abs() * (squares[id(w)] / len(windows)).sqrt() for w in layer.values()] for layer in layers]
    return [np.concatenate([part.numpy().ravel() for part in parts]) for parts in metric]


def owl(metrics, sparsity, lamda=0.08, m=5):
    """As OWL's code computes the densities of layers: outliers in percent, scaled to 2 lambda, about the target."""
    ratios = np.array([(metric > metric.mean() * m).sum() / metric.size * 100 for metric in metrics])
    ratios = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * lamda * 2)
    return ratios - ratios.mean() + (1 - sparsity)


def dlp(metrics, sparsity, alpha=0.15):
    """As DLP's code computes them: 1 - the share of the medians, scaled to 2 alpha, about the target."""
    medians = np.array([np.sort(metric)[(metric.size - 1) // 2] for metric in metrics])
    importance = 1 - medians / medians.sum()
    scaled = (importance - importance.min()) * (1 / (importance.max() - importance.min()) * alpha * 2)
    return scaled - scaled.mean() + (1 - sparsity)


@pytest.mark.parametrize("family", LINEAR_FAMILIES)
def test_densities_are_those_of_the_formulas(family, batcher):
    windows = tiny_windows(5)
    decoder, metrics = Decoder(tiny_model(family)), metrics_of(family, windows)
    groups, sizes = input_groups(decoder), [metric.size for metric in metrics]
    outliers = layer_scores(decoder, groups, windows, batcher, outlier_share(3.0))
    assert spread_densities(outliers, sizes, 0.6, 0.08) == pytest.approx(owl(metrics, 0.6, m=3.0), abs=2e-3)
    medians = layer_scores(decoder, groups, windows, batcher, median)
    assert spread_densities(median_share(medians), sizes, 0.6, 0.15) == pytest.approx(dlp(metrics, 0.6), abs=1e-4)


def test_the_summaries_are_what_they_say():
    scores = torch.tensor([1.0, 1.0, 1.0, 9.0, 3.0, 0.0])  # mean 2.5
    assert outlier_share(3.0)(scores) == pytest.approx(1 / 6) and outlier_share(1.0)(scores) == pytest.approx(2 / 6)
    assert median(scores) == 1.0 and median_share([1.0, 3.0]) == [0.75, 0.25]
    assert median_share([0.0, 0.0]) == [1.0, 1.0]


def test_flags_reach_the_allocators(alp_arguments, tmp_path, monkeypatch, capsys):
    def densities(*flags):
        assert run_alp(*alp_arguments, "--sparsity_ratio", 0.5, "--overwrite", *flags, monkeypatch=monkeypatch) == 0
        result = json.loads((tmp_path / "run/result.json").read_text())
        return result["layer_density"], result["alpha"]

    base, alpha = densities("--prune_method", "wanda_owl")
    assert alpha == 0.08 and max(base) - min(base) == pytest.approx(0.16)
    assert "owl densities, alpha 0.08, M 5" in capsys.readouterr().out
    wide, alpha = densities("--prune_method", "wanda_owl", "--alpha", 0.2)
    assert alpha == 0.2 and max(wide) - min(wide) == pytest.approx(0.4)
    assert densities("--prune_method", "magnitude_owl", "--owl_m", 2)[0] != base
    found, alpha = densities("--prune_method", "magnitude_dlp")
    assert alpha == 0.15 and max(found) - min(found) == pytest.approx(0.3)


def test_atp_is_an_arithmetic_progression_that_reads_no_text(alp_arguments, tmp_path, monkeypatch, capsys):
    def result(*flags):
        method = ("--prune_method", "magnitude_atp", "--sparsity_ratio", 0.5, "--overwrite")
        assert run_alp(*alp_arguments, *method, *flags, monkeypatch=monkeypatch) == 0
        return json.loads((tmp_path / "run/result.json").read_text())

    found = result()
    assert found["layer_density"] == pytest.approx([0.58, 0.58 - 0.16 / 3, 0.58 - 0.32 / 3, 0.42])
    assert found["alpha"] == 0.08 and found["importance"] == [1.0, 0.75, 0.5, 0.25]
    assert "Calibration" not in capsys.readouterr().out
    assert result("--alpha", 0.3)["layer_density"] == pytest.approx([0.8, 0.6, 0.4, 0.2])
