"""The threshold step rule by rule, and against the reference's rule written as a loop."""

from __future__ import annotations

import random

import torch

from sglang_llada.decode import threshold
from sglang_llada.decode.contract import BlockRows, Params, Scores, State, Tokens
from sglang_llada.llada2.editing import ThresholdBlock

MASK = 9


def params(at: torch.Tensor, steps: torch.Tensor) -> Params:
    return Params(
        at,
        steps,
        edit_threshold=torch.zeros_like(at),
        max_post_edit_steps=torch.full_like(steps, 16),
        cumulative_budget=at > 2,
        tokens=Tokens(MASK),
    )


def decide(
    probs: list[float], *, open_: list[bool] | None = None, at: float = 0.9, steps: int | None = None, done: int = 0
) -> list[int]:
    """Positions that one row's step decides; position i would become token i."""
    size = len(probs)
    is_open = torch.tensor([open_ or [True] * size])
    out = threshold.step(
        BlockRows(torch.full((1, size), MASK), is_open, ~is_open),
        Scores(torch.arange(size)[None], torch.tensor([probs])),
        State(torch.tensor([done]), torch.zeros(1, dtype=torch.long)),
        params(torch.tensor([at]), torch.tensor([steps or size])),
    )
    changed = (out.open != is_open)[0].nonzero().flatten().tolist()
    assert out.ids[0].tolist() == [i if i in changed else MASK for i in range(size)]
    assert out.done.item() == (not out.open.any())
    assert out.state.step.item() == done + 1
    return changed


def test_everything_above_the_threshold_is_taken() -> None:
    assert decide([0.95, 0.2, 0.91, 0.5]) == [0, 2]


def test_threshold_is_strict() -> None:
    exact = 0.5  # representable
    assert decide([exact, 0.6, 0.1, 0.1], at=exact) == [1]


def test_below_the_threshold_the_most_confident_is_forced() -> None:
    assert decide([0.3, 0.1, 0.6, 0.5]) == [2]


def test_of_equally_confident_positions_the_earliest_is_forced() -> None:
    assert decide([0.1, 0.6, 0.6, 0.6]) == [1]


def test_fixed_positions_do_not_compete() -> None:
    assert decide([0.99, 0.1, 0.2, 0.3], open_=[False, True, True, True]) == [3]


def test_the_quota_grows_when_steps_are_few() -> None:
    assert decide([0.4, 0.3, 0.2, 0.1], steps=2) == [0, 1]


def test_the_first_steps_take_the_remainder() -> None:
    assert decide([0.5, 0.4, 0.3, 0.2, 0.1], steps=2, done=0) == [0, 1, 2]
    assert decide([0.5, 0.4, 0.3, 0.2, 0.1], steps=2, done=1) == [0, 1]


def test_sure_positions_fewer_than_the_quota_do_not_replace_it() -> None:
    assert decide([0.95, 0.3, 0.2, 0.4], steps=2) == [0, 3]


def test_nothing_open_changes_nothing() -> None:
    assert decide([0.95] * 4, open_=[False] * 4) == []


def test_random_rows_equal_the_reference_rule_and_do_not_depend_on_their_neighbours() -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    size, rows = 32, 12_000
    prob = (torch.randint(0, 40, (rows, size)) / 39).float()  # many ties, some at a threshold
    token, ids = torch.randint(0, 8, (rows, size)), torch.full((rows, size), MASK)
    is_open = torch.rand(rows, size) < torch.rand(rows, 1)
    at = torch.tensor([rng.choice([0.0, 20 / 39, 0.95, 1.0]) for _ in range(rows)])
    steps = torch.tensor([rng.choice([1, 2, 5, 16, 31, 32]) for _ in range(rows)])
    made = torch.tensor([rng.randrange(32) for _ in range(rows)])
    nothing = torch.zeros(rows, dtype=torch.long)
    arguments = (BlockRows(ids, is_open, ~is_open), Scores(token, prob), State(made, nothing), params(at, steps))
    before = [t.clone() for t in (ids, is_open, token, prob, made, at, steps)]
    out = threshold.step(*arguments)
    assert all(map(torch.equal, before, (ids, is_open, token, prob, made, at, steps))), "an argument was changed"
    for r in range(rows):
        block = ThresholdBlock([], size, MASK, threshold=at[r].item(), steps=int(steps[r]))
        block.open, block.step_index = is_open[r].tolist(), int(made[r])
        done = block.step([[(t, p), (t, p)] for t, p in zip(token[r].tolist(), prob[r].tolist(), strict=True)])
        assert (out.ids[r].tolist(), out.open[r].tolist(), bool(out.done[r])) == (block.ids, block.open, done)
        assert done or block.open != is_open[r].tolist()
    order = torch.randperm(rows)
    alone = threshold.step(
        BlockRows(ids[order], is_open[order], ~is_open[order]),
        Scores(token[order], prob[order]),
        State(made[order], nothing),
        params(at[order], steps[order]),
    )
    assert torch.equal(alone.ids, out.ids[order]) and torch.equal(alone.open, out.open[order])
