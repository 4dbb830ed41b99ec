"""route() equals a loop over tokens, ties included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sglang_llada.llada2.router import route


def naive(logits: Tensor, bias: Tensor, groups: int, top_groups: int, k: int) -> tuple[list[list[int]], Tensor]:
    """Ids and unbiased, unnormalised weights, token by token."""
    scores = logits.sigmoid()
    all_ids = []
    for biased in (scores + bias).tolist():
        size = len(biased) // groups
        merit = [sum(sorted(biased[g * size : (g + 1) * size], reverse=True)[:2]) for g in range(groups)]
        best = sorted(range(groups), key=lambda g: (-merit[g], g))[:top_groups]
        allowed = [e for e in range(len(biased)) if e // size in best]
        all_ids.append(sorted(allowed, key=lambda e: (-biased[e], e))[:k])
    return all_ids, scores.gather(-1, torch.tensor(all_ids))


@pytest.mark.parametrize("levels", [None, 2, 4])
@pytest.mark.parametrize(("groups", "top_groups", "k"), [(4, 2, 5), (1, 1, 4), (8, 8, 16), (2, 1, 8)])
def test_equals_a_loop_over_tokens(levels: int | None, groups: int, top_groups: int, k: int) -> None:
    """With `levels`, scores take so few values, all exact in binary, that most choices are ties."""
    random = torch.Generator().manual_seed(groups)
    if levels is None:
        logits, bias = torch.randn(64, 16, generator=random), torch.randn(16, generator=random) * 0.1
    else:
        logits = torch.where(torch.rand(64, 16, generator=random) < 0.5, 0.0, 100.0)  # sigmoid 0.5 and 1
        bias = torch.randint(levels, (16,), generator=random) / 4
    ids, weights = naive(logits, bias, groups, top_groups, k)
    got = route(logits, bias, num_groups=groups, top_groups=top_groups, top_k=k, normalise=False, scale=1.0)
    assert got.ids.tolist() == ids
    assert torch.equal(got.weights, weights)


def test_of_equal_experts_the_lowest_ids_win() -> None:
    got = route(torch.zeros(1, 8), torch.zeros(8), num_groups=4, top_groups=2, top_k=3, normalise=False, scale=1.0)
    assert got.ids.tolist() == [[0, 1, 2]]


def test_bias_chooses_but_does_not_weigh() -> None:
    bias = torch.tensor([0.0, 0.0, 9.0, 9.0])
    logits = torch.tensor([[3.0, 2.0, -1.0, -2.0]])
    got = route(logits, bias, num_groups=1, top_groups=1, top_k=2, normalise=False, scale=1.0)
    assert got.ids.tolist() == [[2, 3]]
    assert torch.equal(got.weights, logits.sigmoid()[:, 2:])


def test_a_group_counts_by_its_two_best() -> None:
    """Group 0 has the best expert, group 1 the best three, group 2 the best pair."""
    scores = torch.tensor([[0.9, 0.1, 0.1, 0.6, 0.6, 0.6, 0.8, 0.7, 0.0]])
    got = route(scores.logit(eps=1e-6), torch.zeros(9), num_groups=3, top_groups=1, top_k=2, normalise=False, scale=1.0)
    assert got.ids.tolist() == [[6, 7]]


def test_weights_are_normalised_then_scaled() -> None:
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_groups": 2, "top_groups": 2, "top_k": 3}
    plain = route(logits, torch.zeros(8), **options, normalise=False, scale=1.0).weights
    scaled = route(logits, torch.zeros(8), **options, normalise=True, scale=2.5).weights
    torch.testing.assert_close(scaled.sum(-1), torch.full((5,), 2.5))
    torch.testing.assert_close(scaled, plain / plain.sum(-1, keepdim=True) * 2.5)
