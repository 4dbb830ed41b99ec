"""The tensor part of a step: records in one table, and the same decisions however much of the forward is looked at."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from sglang_llada.config import DecodeConfig
from sglang_llada.decode import ALGORITHMS
from sglang_llada.decode.contract import BlockRows, Params, Scores, State, StepOut
from sglang_llada.decode.decide import EDITABLE, FIXED, OPEN, decide, idle, record, unpack
from sglang_llada.decode.select import Head, select

T, V, WIDTH, MASK = 6, 50, 8, 9


def step(rows: list[list[int]], hidden: torch.Tensor, ids: torch.Tensor, head: Head, count: int) -> StepOut:
    """One call with a table of these records."""
    return decide(hidden, ids, torch.tensor(rows), count, head=head, mask_id=MASK)


def random_rows(rng: random.Random, count: int) -> list[list[int]]:
    """Records of rows that decide and rows that do not."""
    rows = []
    for _ in range(count):
        params = DecodeConfig.defaults(T, rng.choice(list(ALGORITHMS)))
        params = replace(params, threshold=rng.choice([0.05, 0.3, 0.95]), steps=rng.randint(1, T))
        marks = [rng.choice([FIXED, OPEN, EDITABLE if params.edits else FIXED]) for _ in range(T)]
        made = rng.randint(0, T - 1)
        rows.append(record(marks, made, rng.randint(0, made), params) if rng.random() < 0.7 else idle(T))
    return rows


def test_a_record_comes_back_as_it_was() -> None:
    params = replace(DecodeConfig.defaults(T, "joint_threshold"), threshold=0.123456789, steps=4)
    marks = [OPEN, FIXED, OPEN, EDITABLE, FIXED, OPEN]
    block, state, given, algorithm = unpack(torch.arange(2 * T), torch.tensor([record(marks, 3, 2, params), idle(T)]))
    assert block.ids.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert block.open.tolist() == [[mark == OPEN for mark in marks], [False] * T]
    assert block.editable.tolist() == [[mark == EDITABLE for mark in marks], [False] * T]
    assert (state.step.tolist(), state.edits.tolist()) == ([3, 0], [2, 0])
    assert [list(ALGORITHMS)[code] for code in algorithm.tolist()] == ["joint_threshold", "threshold"]
    assert (given.steps.tolist(), given.max_post_edit_steps.tolist()) == ([4, T], [16, 0])
    assert given.edit_threshold.tolist() == [0.5, 1.0]
    assert given.threshold.dtype == torch.float32
    assert given.threshold[0] == torch.tensor(0.123456789)


@pytest.mark.parametrize("seed", range(5))
def test_decisions_are_those_of_the_step_on_full_scores(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows = random_rows(rng, 7)
    hidden, head = torch.randn(7 * T, WIDTH), Head(torch.randn(V, WIDTH))
    ids = torch.randint(0, V, (7 * T,))
    table = torch.tensor(rows)
    block, state, params, algorithm = unpack(ids, table)
    best = select(hidden, head, MASK)
    scores = Scores(best.token.view(-1, T), best.prob.view(-1, T))
    wants = [each.step(block, scores, state, params) for each in ALGORITHMS.values()]
    for count in (int((block.open | block.editable).sum()), 7 * T):
        got = step(rows, hidden, ids, head, count)
        for r, code in enumerate(algorithm.tolist()):
            want = wants[code]
            assert torch.equal(got.ids[r], want.ids[r]) and torch.equal(got.open[r], want.open[r])
            assert got.done[r] == want.done[r] and got.state.edits[r] == want.state.edits[r]


def test_idle_rows_decide_nothing() -> None:
    ids = torch.randint(0, V, (2 * T,))
    out = step([idle(T), idle(T)], torch.randn(2 * T, WIDTH), ids, Head(torch.randn(V, WIDTH)), 2 * T)
    assert torch.equal(out.ids.flatten(), ids) and not out.open.any() and out.done.all()


def test_hidden_states_of_other_rows_do_not_matter() -> None:
    """A graph's padded rows hold anything."""
    torch.manual_seed(1)
    rows, head = random_rows(random.Random(1), 3), Head(torch.randn(V, WIDTH))
    hidden, ids = torch.randn(3 * T, WIDTH), torch.randint(0, V, (3 * T,))
    alone = step(rows, hidden, ids, head, 3 * T)
    worse = torch.cat((hidden, torch.full((T, WIDTH), float("nan"))))
    beside = step([*rows, [7] * len(idle(T))], worse, torch.cat((ids, ids[:T])), head, 4 * T)
    assert torch.equal(beside.ids[:3], alone.ids) and torch.equal(beside.open[:3], alone.open)
    assert isinstance(alone.state, State) and isinstance(unpack(ids, torch.tensor(rows))[0], BlockRows)
    assert isinstance(unpack(ids, torch.tensor(rows))[2], Params)
