"""Masks have the count, the places and the ties that the methods define."""

import pytest
import torch

from lib.sparsity.masks import smallest_of_groups, smallest_overall, smallest_per_row, smallest_share_of_row_sum

SCORES = torch.rand(7, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.3, 0.5, 0.97])
def test_per_row_prunes_the_smallest_of_every_row(sparsity):
    mask = smallest_per_row(SCORES, sparsity)
    assert (mask.sum(dim=1) == int(24 * sparsity)).all()
    for row, scores in zip(mask, SCORES, strict=True):
        assert not row.any() or scores[row].max() < scores[~row].min()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.97])
def test_overall_prunes_up_to_the_score_at_the_place(sparsity):
    mask, place = smallest_overall(SCORES, sparsity), int(SCORES.numel() * sparsity)
    assert mask.sum() == (place + 1 if place else 0)
    assert not mask.any() or SCORES[mask].max() == SCORES.flatten().sort().values[place]


def test_equal_scores_go_by_index_as_in_a_stable_sort():
    scores = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 2.0], [3.0, 3.0, 3.0, 3.0, 3.0, 3.0]])
    mask = smallest_per_row(scores, 0.5)
    assert mask.tolist() == [[True, True, False, False, True, False], [True, True, True, False, False, False]]
    assert smallest_of_groups(scores, 1, 3).tolist()[1] == [True, False, False, True, False, False]


@pytest.mark.parametrize("n, m", [(2, 4), (1, 2), (5, 8), (1, 24), (7, 12), (2, 3)])
def test_groups_lose_exactly_n_of_every_m(n, m):
    groups = smallest_of_groups(SCORES, n, m).view(7, 24 // m, m)
    assert (groups.sum(dim=-1) == n).all()
    scores = SCORES.view(7, 24 // m, m)
    kept, gone = scores.masked_fill(groups, 9), scores.masked_fill(~groups, -9)
    assert (gone.amax(dim=-1) < kept.amin(dim=-1)).all()


@pytest.mark.parametrize("n, m", [(1, 2), (2, 4), (3, 8), (15, 16), (12, 24), (1, 48)])
def test_equal_scores_of_groups_go_by_index_as_in_a_stable_sort(n, m):
    scores = torch.randint(5, (6, 2 * 48), generator=torch.Generator().manual_seed(0)).float()
    scores[1] = torch.inf
    places = scores.view(6, -1, m).sort(dim=-1, stable=True).indices[..., :n]
    expected = torch.zeros(6, 2 * 48 // m, m, dtype=torch.bool).scatter_(-1, places, True)
    assert torch.equal(smallest_of_groups(scores, n, m), expected.view(6, 2 * 48))


def test_groups_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="24 columns"):
        smallest_of_groups(SCORES, 2, 5)


@pytest.mark.parametrize("columns", [10, 40, 1000, 2560, 5120])
def test_a_sparsity_that_went_through_a_density_loses_no_weight(columns):
    scores = torch.rand(2, columns)
    for percent in range(0, 100, 10):
        sparsity = 1 - (1 - percent / 100)
        assert (smallest_per_row(scores, sparsity).sum(dim=1) == columns * percent // 100).all(), percent


def test_the_variant_prunes_nothing_at_0():
    assert not smallest_share_of_row_sum(SCORES, 0.0).any()


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7, 0.95])
def test_the_variant_prunes_one_share_of_every_rows_sum(sparsity):
    scores = torch.rand(40, 500, generator=torch.Generator().manual_seed(1)) ** 3
    mask = smallest_share_of_row_sum(scores, sparsity)
    assert mask.float().mean() == pytest.approx(sparsity, abs=0.002)
    shares = (scores * mask).sum(dim=1) / scores.sum(dim=1)
    assert shares.max() - shares.min() < 0.02
    for row, row_scores in zip(mask, scores, strict=True):
        assert row_scores[row].max() <= row_scores[~row].min()
