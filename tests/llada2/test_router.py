"""route() equals a loop over tokens, ties included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sglang_llada.llada2.router import PARTS, products, route, route_blocks, split, summed


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
    got = route(logits, bias, num_groups=groups, top_groups=top_groups, top_k=k, normalise=False)
    assert got.ids.tolist() == ids
    assert torch.equal(got.weights, weights)


def test_of_equal_experts_the_lowest_ids_win() -> None:
    got = route(torch.zeros(1, 8), torch.zeros(8), num_groups=4, top_groups=2, top_k=3, normalise=False)
    assert got.ids.tolist() == [[0, 1, 2]]


def test_bias_chooses_but_does_not_weigh() -> None:
    bias = torch.tensor([0.0, 0.0, 9.0, 9.0])
    logits = torch.tensor([[3.0, 2.0, -1.0, -2.0]])
    got = route(logits, bias, num_groups=1, top_groups=1, top_k=2, normalise=False)
    assert got.ids.tolist() == [[2, 3]]
    assert torch.equal(got.weights, logits.sigmoid()[:, 2:])


def test_a_group_counts_by_its_two_best() -> None:
    """Group 0 has the best expert, group 1 the best three, group 2 the best pair."""
    scores = torch.tensor([[0.9, 0.1, 0.1, 0.6, 0.6, 0.6, 0.8, 0.7, 0.0]])
    got = route(scores.logit(eps=1e-6), torch.zeros(9), num_groups=3, top_groups=1, top_k=2, normalise=False)
    assert got.ids.tolist() == [[6, 7]]


def test_weights_are_normalised() -> None:
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    plain, normal = (
        route(logits, torch.zeros(8), num_groups=2, top_groups=2, top_k=3, normalise=n).weights for n in (False, True)
    )
    torch.testing.assert_close(normal, plain / plain.sum(-1, keepdim=True))


# --- block routing ----------------------------------------------------------------------------------------------------


def naive_blocks(logits: Tensor, bias: Tensor, block_size: int, capacity: int, k: int) -> list[list[int]]:
    """Ids, block by block and token by token."""
    all_ids = []
    for block in (logits.sigmoid() + bias).split(block_size):
        merit = block.amax(0).tolist()
        pool = sorted(range(len(merit)), key=lambda e: (-merit[e], e))[:capacity]
        all_ids += [sorted(pool, key=lambda e: (-token[e], e))[:k] for token in block.tolist()]
    return all_ids


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("block_size", "capacity", "k"), [(8, 6, 3), (32, 4, 4), (1, 5, 2), (4, 16, 8)])
def test_block_routing_equals_a_loop_over_blocks(ties: bool, block_size: int, capacity: int, k: int) -> None:
    random = torch.Generator().manual_seed(capacity)
    logits, bias = torch.randn(3 * block_size, 16, generator=random), torch.randn(16, generator=random) * 0.1
    if ties:
        logits, bias = torch.where(logits < 0, 0.0, 100.0), torch.randint(3, (16,), generator=random) / 4
    got = route_blocks(logits, bias, block_size=block_size, capacity=capacity, top_k=k, normalise=False)
    assert got.ids.tolist() == naive_blocks(logits, bias, block_size, capacity, k)
    assert torch.equal(got.weights, logits.sigmoid().gather(-1, got.ids))


def test_blocks_do_not_see_each_other() -> None:
    random = torch.Generator().manual_seed(1)
    logits, bias = torch.randn(24, 16, generator=random), torch.zeros(16)
    options = {"block_size": 8, "capacity": 5, "top_k": 3, "normalise": True}
    whole = route_blocks(logits, bias, **options)
    alone = route_blocks(logits[8:16], bias, **options)
    assert torch.equal(whole.ids[8:16], alone.ids) and torch.equal(whole.weights[8:16], alone.weights)


def test_three_parts_of_bf16_are_the_weight() -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=random) * torch.logspace(-6, 3, 64)[:, None]
    parts = split(weight)
    assert parts.dtype == torch.bfloat16
    assert torch.equal(parts.float().unflatten(0, (PARTS, -1)).sum(0), weight)
    x = torch.randn(5, 128, generator=random).bfloat16()
    torch.testing.assert_close(summed(products(x, parts)), x.float() @ weight.T, rtol=1e-4, atol=1e-4)
