"""The tensor part of a step: records in one table, and the same decisions however much of the forward is looked at."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from sglang_llada.config import DecodeConfig
from sglang_llada.decode import threshold
from sglang_llada.decode.contract import BlockRows, Params, Scores, State, StepOut
from sglang_llada.decode.decide import decide, idle, record, unpack
from sglang_llada.decode.select import Head, select

T, V, WIDTH, MASK = 6, 50, 8, 9


def step(rows: list[list[int]], hidden: torch.Tensor, ids: torch.Tensor, head: Head, count: int) -> StepOut:
    """One call with a table of these records."""
    return decide(hidden, ids, torch.tensor(rows), count, head=head, mask_id=MASK, algorithm="threshold")


def random_rows(rng: random.Random, count: int) -> list[list[int]]:
    """Records of rows that decide and rows that do not."""
    rows = []
    for _ in range(count):
        params = replace(DecodeConfig.defaults(T), threshold=rng.choice([0.05, 0.3, 0.95]), steps=rng.randint(1, T))
        opens = [rng.random() < 0.5 for _ in range(T)]
        rows.append(record(opens, rng.randint(0, T - 1), params) if rng.random() < 0.7 else idle(T))
    return rows


def test_a_record_comes_back_as_it_was() -> None:
    params = replace(DecodeConfig.defaults(T), threshold=0.123456789, steps=4)
    opens = [True, False, True, False, False, True]
    block, state, given = unpack(torch.arange(2 * T), torch.tensor([record(opens, 3, params), idle(T)]))
    assert block.ids.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert block.open.tolist() == [opens, [False] * T]
    assert state.step.tolist() == [3, 0]
    assert given.steps.tolist() == [4, 1]
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
    block, state, params = unpack(ids, table)
    best = select(hidden, head, MASK)
    want = threshold.step(block, Scores(best.token.view(-1, T), best.prob.view(-1, T)), state, params)
    for count in (int(block.open.sum()), 7 * T):
        got = step(rows, hidden, ids, head, count)
        assert torch.equal(got.ids, want.ids) and torch.equal(got.open, want.open)


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
