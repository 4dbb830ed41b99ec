"""The editing step of LLaDA2.1 against its reference, and its bound on steps."""

from __future__ import annotations

import random

import pytest
import torch

from sglang_llada.config import DecodeConfig
from sglang_llada.decode import joint_threshold
from sglang_llada.decode.contract import BlockRows, Params, Scores, State, Tokens
from sglang_llada.llada2.editing import JointBlock

MASK, VOCAB, T = 9, 5, 32


def test_random_rows_equal_the_rule_and_do_not_depend_on_their_neighbours() -> None:
    """20,000 blocks with many ties, prompts inside, and literal mask tokens among what is fixed."""
    rng = random.Random(0)
    torch.manual_seed(0)
    rows = 20_000
    prob = (torch.randint(0, 40, (rows, T)) / 39).float()
    token = torch.randint(0, VOCAB, (rows, T))
    ids = torch.where(torch.rand(rows, T) < 0.05, MASK, torch.randint(0, VOCAB, (rows, T)))
    agree = torch.rand(rows, 1) < 0.3  # rows whose tokens are mostly what the network would put there
    ids = torch.where(agree & (torch.rand(rows, T) < 0.97), token, ids)
    given = torch.arange(T) < torch.randint(0, T, (rows, 1)) * (torch.rand(rows, 1) < 0.4)
    is_open = ~given & (torch.rand(rows, T) < torch.rand(rows, 1) * (torch.rand(rows, 1) < 0.7))
    ids = ids.masked_fill(is_open, MASK)
    editable = ~given & ~is_open
    at = torch.tensor([rng.choice([0.0, 20 / 39, 0.7, 1.0]) for _ in range(rows)])
    edit_at = torch.tensor([rng.choice([0.0, 20 / 39, 0.9, 1.0]) for _ in range(rows)])
    budget = torch.tensor([rng.choice([0, 1, 4, 16]) for _ in range(rows)])
    edits = torch.tensor([rng.randint(0, int(budget[r])) for r in range(rows)])
    made = torch.randint(0, T, (rows,))
    tensors = (ids, is_open, editable, token, prob, made, edits, at, edit_at, budget)

    def run(order: torch.Tensor) -> object:
        i, o, e, t, p, m, d, a, ea, b = (x[order] for x in tensors)
        return joint_threshold.step(
            BlockRows(i, o, e), Scores(t, p), State(m, d), Params(a, torch.ones_like(b), ea, b, b > b, Tokens(MASK))
        )

    before = [x.clone() for x in tensors]
    out = run(torch.arange(rows))
    assert all(map(torch.equal, before, tensors)), "an argument was changed"
    lists = [x.tolist() for x in tensors]
    finished = 0
    for r in range(rows):
        i, o, e, t, p, _, d, a, ea, b = (x[r] for x in lists)
        block = JointBlock([], T, MASK, threshold=a, edit_threshold=ea, max_post_edit_steps=b)
        block.fixed = [not (x or y) for x, y in zip(o, e, strict=True)]
        block.ids, block.open, block.post_edit_steps = i, o, d
        done = block.step([[best, best] for best in zip(t, p, strict=True)])
        want = (block.ids, block.open, block.post_edit_steps, done)
        assert (out.ids[r].tolist(), out.open[r].tolist(), int(out.state.edits[r]), bool(out.done[r])) == want
        finished += done
    assert rows * 0.05 < finished < rows * 0.95
    assert torch.equal(out.state.step, made + 1)
    order = torch.randperm(rows)
    alone = run(order)
    assert torch.equal(alone.ids, out.ids[order]) and torch.equal(alone.done, out.done[order])


@pytest.mark.parametrize("scores", ["constant", "oscillating", "random"])
@pytest.mark.parametrize("budget", [0, 1, 16])
def test_a_block_ends_within_its_bound(scores: str, budget: int) -> None:
    torch.manual_seed(1)
    config = DecodeConfig.defaults(T, "joint_threshold").replaced({"mode": "speed", "max_post_edit_steps": budget})
    params = Params(
        threshold=torch.tensor([1.0]),  # one position a step: the slowest
        steps=torch.tensor([T]),
        edit_threshold=torch.tensor([config.edit_threshold]),
        max_post_edit_steps=torch.tensor([budget]),
        cumulative_budget=torch.tensor([False]),
        tokens=Tokens(MASK),
    )
    ids, is_open, state = torch.full((1, T), MASK), torch.ones(1, T, dtype=torch.bool), State(*torch.zeros(2, 1).long())
    for step in range(1, config.most_steps + 1):
        token = {
            "constant": torch.ones(1, T).long(),
            "oscillating": torch.full((1, T), step % 2),
            "random": torch.randint(0, VOCAB, (1, T)),
        }[scores]
        out = joint_threshold.step(
            BlockRows(ids, is_open, ~is_open), Scores(token, torch.full((1, T), 0.5)), state, params
        )
        if out.done:
            assert not out.open.any()
            break
        ids, is_open, state = out.ids, out.open, out.state
    assert out.done
    assert step == config.most_steps or scores == "constant"


def test_a_budget_of_nothing_edits_in_the_steps_that_decide() -> None:
    one = torch.ones(1)
    params = Params(one * 0.5, one.long(), one * 0.5, one.long() * 0, one > 2, Tokens(MASK))
    ids, is_open = torch.tensor([[1, 2, MASK, MASK]]), torch.tensor([[False, False, True, True]])
    state = State(*torch.zeros(2, 1).long())
    scores = Scores(torch.tensor([[1, 3, 4, 4]]), torch.tensor([[0.9, 0.9, 0.9, 0.1]]))
    out = joint_threshold.step(BlockRows(ids, is_open, ~is_open), scores, state, params)
    assert (out.ids.tolist(), out.done.tolist()) == ([[1, 3, 4, MASK]], [False])
    out = joint_threshold.step(BlockRows(out.ids, out.open, ~out.open), scores, out.state, params)
    assert (out.ids.tolist(), out.done.tolist()) == ([[1, 3, 4, 4]], [True])
