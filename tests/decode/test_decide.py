"""The tensor part of a step: records in one table, and the same decisions however much of the forward is looked at."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from sglang_llada.config import RUN, DecodeConfig, Sampling
from sglang_llada.decode import ALGORITHMS, levenshtein
from sglang_llada.decode import decide as decide_module
from sglang_llada.decode.contract import BlockRows, Params, Scores, State, StepOut, Tokens
from sglang_llada.decode.decide import decide
from sglang_llada.decode.head import Head
from sglang_llada.decode.layout import CODES, STAYS, fresh, idle, number, numbers, pack, record, repeated, unpack
from sglang_llada.decode.select import best
from sglang_llada.decode.whole import Group
from tests.sets import set_of

T, V, WIDTH, MASK = 6, 50, 8, 9
PLAIN, INDEL = Tokens(MASK), Tokens(MASK, delete=11, split=12)


def step(
    rows: list[list[int]], hidden: torch.Tensor, ids: torch.Tensor, head: Head, count: int, tokens: Tokens
) -> StepOut:
    """One call with a table of these records."""
    return decide(hidden, ids, torch.tensor(rows), count, head=head, block_size=T, tokens=tokens)


def params_of(name: str, tokens: Tokens) -> DecodeConfig:
    """The recommended parameters of an algorithm."""
    if name == RUN:
        return DecodeConfig.defaults(T).from_left_to_right
    return DecodeConfig.defaults(T, name, indel=tokens.indel)


def random_rows(rng: random.Random, count: int, tokens: Tokens) -> list[list[int]]:
    """Records of rows that decide and rows that do not."""
    rows = []
    names = [name for name, each in ALGORITHMS.items() if tokens.indel or not each.indel]
    for _ in range(count):
        name = rng.choice(names)
        params = params_of(name, tokens)
        params = replace(params, threshold=rng.choice([0.05, 0.3, 0.95]), steps=rng.randint(1, T))
        params = replace(params, penalty_lambda=rng.choice([0.0, 3.0]) if name == "joint_threshold" else 0.0)
        is_open = rng.randrange(1 << T)
        editable = rng.randrange(1 << T) & ~is_open if params.edits else 0
        made = rng.randint(0, T - 1)
        state = [made, rng.randint(0, made), *fresh(T, tokens)[2:]]
        rows.append(record(is_open, editable, numbers(params), state) if rng.random() < 0.7 else idle(T, tokens))
    return rows


@pytest.mark.parametrize("tokens", [PLAIN, INDEL])
def test_a_record_comes_back_as_it_was(tokens: Tokens) -> None:
    params = replace(DecodeConfig.defaults(T, "joint_threshold"), threshold=0.123456789, steps=4)
    params = replace(params, cumulative_budget=True, penalty_lambda=0.3)
    is_open, editable = [True, False, True, False, False, True], [False, False, False, True, False, False]
    memory = list(range(levenshtein.memory_size(T))) if tokens.indel else []
    mine = record(set_of(is_open), set_of(editable), numbers(params), [3, 2, *memory])
    table = torch.tensor([mine, idle(T, tokens)])
    block, state, given, algorithm = unpack(torch.arange(2 * T), table, T, tokens)
    assert block.ids.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert block.open.tolist() == [is_open, [False] * T]
    assert block.editable.tolist() == [editable, [False] * T]
    assert (state.step.tolist(), state.edits.tolist()) == ([3, 0], [2, 0])
    assert state.memory is not None and state.memory.tolist() == [memory, [-1] * len(memory)]
    assert [list(ALGORITHMS)[code] for code in algorithm.tolist()] == ["joint_threshold", "threshold"]
    assert (given.steps.tolist(), given.max_post_edit_steps.tolist()) == ([4, T], [16, 0])
    assert given.cumulative_budget.tolist() == [True, False]
    assert given.edit_threshold.tolist() == [0.5, 1.0]
    assert given.threshold.dtype == torch.float32
    assert given.threshold[0] == torch.tensor(0.123456789)
    lowered = repeated(torch.arange(2 * T), table, T)
    assert lowered.by.tolist() == [0.0, *torch.full((T - 1,), 0.3).tolist(), *[0.0] * T]
    assert lowered.token[1:].tolist() == list(range(2 * T - 1))
    prob = torch.full((2, T), 0.25)
    out = StepOut(block.ids, block.open, state, torch.tensor([True, False]), block.open, prob, block.ids)
    short = [*range(6), set_of(is_open), 3, 2, *memory, 1]
    assert pack(out)[0].tolist() == short
    row = pack(out, trace=True)[0].tolist()
    assert row[: len(short) + 2 * T] == [*short, 1, 0, 1, 0, 0, 1, *range(6)]
    assert [number(each) for each in row[len(short) + 2 * T :]] == [0.25] * T


@pytest.mark.parametrize("tokens", [PLAIN, INDEL])
@pytest.mark.parametrize("seed", range(5))
def test_decisions_are_those_of_the_step_on_full_scores(seed: int, tokens: Tokens) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows = random_rows(rng, 7, tokens)
    hidden, head = torch.randn(7 * T, WIDTH), Head(torch.randn(V, WIDTH))
    ids = torch.randint(0, V, (7 * T,))
    block, state, params, algorithm = unpack(ids, torch.tensor(rows), T, tokens)
    logits = hidden @ head.weight.T
    for r, row in enumerate(rows):  # a penalty for the token to the left, in the block
        for at in range(r * T + 1, (r + 1) * T):
            logits[at, ids[at - 1]] -= number(row[STAYS.index("penalty_lambda") - len(STAYS)])
    found, several = best(logits, MASK), best(logits, -1, levenshtein.CANDIDATES)
    scores = Scores(
        found.token.view(-1, T), found.prob.view(-1, T), several.token.view(-1, T, 5), several.prob.view(-1, T, 5)
    )
    steps = {CODES[name]: each.step for name, each in ALGORITHMS.items() if tokens.indel or not each.indel}
    wants = {code: step(block, scores, state, params) for code, step in steps.items()}
    for count in (int((block.open | block.editable).sum()), 7 * T):
        got = step(rows, hidden, ids, head, count, tokens)
        for r, code in enumerate(algorithm.tolist()):
            want = wants[code]
            assert torch.equal(got.ids[r], want.ids[r]) and torch.equal(got.open[r], want.open[r])
            assert got.done[r] == want.done[r] and got.state.edits[r] == want.state.edits[r]
            assert torch.equal(got.state.memory[r], want.state.memory[r])  # type: ignore[index]


@pytest.mark.parametrize("tokens", [PLAIN, INDEL])
def test_who_changes_logits_has_nobody_selected_or_drawn_again(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside greedy rows and rows that draw; what stands of a step may have rows behind these, as a graph's does."""
    torch.manual_seed(3)
    rng, how = random.Random(3), [None, Sampling(1.0, 5, 0.9, 0.0, 7), Sampling(2.0, 1 << 30, 1.0, 0.0, -1)]
    many = [replace(params_of("threshold", tokens), sampling=how[i % 3]) for i in range(8)]
    rows = [record(rng.randrange(1, 1 << T), 0, numbers(each), fresh(T, tokens), T * i) for i, each in enumerate(many)]
    hidden, ids, head = torch.randn(8 * T, WIDTH), torch.full((8 * T,), MASK), Head(torch.randn(V, WIDTH))
    options = {"head": head, "block_size": T, "tokens": tokens, "drawing": 8 * T}
    found = decide(hidden, ids, torch.tensor(rows), 8 * T, **options)
    block, *_ = unpack(ids, torch.tensor(rows), T, tokens)
    open_ones = block.open.flatten().nonzero()[:, 0].tolist()
    groups = [
        Group([i for i in open_ones if i // T == r], how[r % 3], lambda x: x + torch.arange(V) % 7 * 5.0)
        for r in (0, 4)
    ]
    first = (hidden[: 6 * T], ids[: 6 * T], torch.tensor(rows[:6]))
    want = decide(*first, 6 * T, groups=groups, **options)
    for name in ("select", "draw"):
        monkeypatch.setattr(decide_module, name, None)
    got = decide(*first, 6 * T, groups=groups, found=found, **options)
    assert torch.equal(pack(got, trace=True), pack(want, trace=True))
    kept = [r not in (0, 4) for r in range(6)]
    assert torch.equal(got.ids[kept], found.ids[:6][kept]) and not torch.equal(got.ids, found.ids[:6])


@pytest.mark.parametrize("tokens", [PLAIN, INDEL])
def test_idle_rows_decide_nothing(tokens: Tokens) -> None:
    ids = torch.randint(0, V, (2 * T,))
    rows = [idle(T, tokens)] * 2
    out = step(rows, torch.randn(2 * T, WIDTH), ids, Head(torch.randn(V, WIDTH)), 2 * T, tokens)
    assert torch.equal(out.ids.flatten(), ids) and not out.open.any() and out.done.all()


@pytest.mark.parametrize("tokens", [PLAIN, INDEL])
def test_hidden_states_of_other_rows_do_not_matter(tokens: Tokens) -> None:
    """A graph's padded rows hold anything."""
    torch.manual_seed(1)
    rows, head = random_rows(random.Random(1), 3, tokens), Head(torch.randn(V, WIDTH))
    hidden, ids = torch.randn(3 * T, WIDTH), torch.randint(0, V, (3 * T,))
    alone = step(rows, hidden, ids, head, 3 * T, tokens)
    worse = torch.cat((hidden, torch.full((T, WIDTH), float("nan"))))
    beside = step([*rows, [7] * len(idle(T, tokens))], worse, torch.cat((ids, ids[:T])), head, 4 * T, tokens)
    assert torch.equal(beside.ids[:3], alone.ids) and torch.equal(beside.open[:3], alone.open)
    assert isinstance(alone.state, State) and isinstance(unpack(ids, torch.tensor(rows), T, tokens)[0], BlockRows)
    assert isinstance(unpack(ids, torch.tensor(rows), T, tokens)[2], Params)


@pytest.mark.parametrize("tokens", [PLAIN, INDEL])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_whose_logits_are_not_finite_says_so(bad: float, tokens: Tokens) -> None:
    torch.manual_seed(2)
    names = [name for name, each in ALGORITHMS.items() if tokens.indel or not each.indel]
    rows = [record(2**T - 1, 0, numbers(params_of(name, tokens)), fresh(T, tokens)) for name in names]
    hidden = torch.rand(len(rows) * T, WIDTH)
    hidden[T + 2] = bad
    head = Head(torch.rand(V, WIDTH))
    out = step(rows, hidden, torch.full((len(rows) * T,), MASK), head, len(rows) * T, tokens)
    assert [bool((row == -1).all()) for row in out.ids] == [r == 1 for r in range(len(rows))]
