"""Best token and probability of a position, from logits."""

from __future__ import annotations

import torch

from sglang_llada.decode.select import CHUNK, best, select

MASK = 3


def test_probability_counts_the_mask_but_never_chooses_it() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 50.0]])
    out = best(logits, MASK)
    assert out.token.tolist() == [2]
    assert torch.allclose(out.prob, logits.softmax(-1)[:, 2])


def test_of_equal_logits_the_lowest_id_wins() -> None:
    assert best(torch.tensor([[1.0, 5.0, 5.0, 0.0]]), MASK).token.tolist() == [1]


def test_logits_that_are_not_finite_are_reported_for_their_position_only() -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = float("nan")
    out = best(logits, MASK)
    assert out.token.tolist() == [0, -1, 0]
    assert out.prob[1] == 0


def test_logits_are_left_as_they_are() -> None:
    logits = torch.randn(2, 5)
    before = logits.clone()
    best(logits, MASK)
    assert torch.equal(logits, before)


def test_chunks_change_nothing() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(2 * CHUNK + 7, 8), torch.randn(50, 8)
    whole = best(hidden @ head.T, MASK)
    out = select(hidden, lambda h: h @ head.T, MASK)
    assert torch.equal(out.token, whole.token)
    assert torch.allclose(out.prob, whole.prob)


def test_no_positions_give_no_scores() -> None:
    out = select(torch.zeros(0, 8), lambda h: h @ torch.zeros(8, 50), MASK)
    assert out.token.shape == out.prob.shape == (0,)
