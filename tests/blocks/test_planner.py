"""Which rows a step carries, as tables."""

from __future__ import annotations

import pytest

from sglang_llada.blocks import Decided, Request, RowKind, Rules, Table, next_step

T, MASK = 4, 0
PLAIN = Rules()
FILL, DENOISE, SEAL = RowKind.FILL, RowKind.DENOISE, RowKind.SEAL


def admitted(
    table: Table, rid: str, prompt: int, cached: int = 0, max_new_tokens: int = 20, rules: Rules = PLAIN
) -> Request[None]:
    request: Request[None] = Request(rid, [7] * prompt, max_new_tokens, frozenset(), None, T, MASK, rules=rules)
    table.add(request)
    table.readmit(rid, cached)
    return request


def rows(table: Table, budget: int = 100) -> list[tuple[str, RowKind, int]]:
    return [(row.request.rid, row.kind, row.start) for row in next_step(table, budget).rows]


def step(table: Table, budget: int = 100) -> None:
    """Run a plan that decides every block whole."""
    plan = next_step(table, budget)
    for request, fills in plan.fills().items():
        request.take_part(fills)
    for request in {row.request.rid: row.request for row in plan.of(DENOISE)}.values():
        request.decide([Decided([7 if t == MASK else t for t in block.tokens], 0, True) for block in request.blocks])


def test_a_long_prompt_and_its_first_decode_step_are_one_forward() -> None:
    table = Table()
    admitted(table, "a", prompt=10)
    assert rows(table) == [("a", FILL, 0), ("a", FILL, 4), ("a", DENOISE, 8)]


def test_a_cached_prefix_is_not_filled_again() -> None:
    table = Table()
    admitted(table, "a", prompt=10, cached=4)
    assert rows(table) == [("a", FILL, 4), ("a", DENOISE, 8)]


def test_a_seal_rides_with_the_next_block() -> None:
    table = Table()
    admitted(table, "a", prompt=1)
    step(table)
    assert rows(table) == [("a", SEAL, 0), ("a", DENOISE, 4)]


def test_the_block_that_ends_a_request_is_not_sealed() -> None:
    table = Table()
    admitted(table, "a", prompt=0, max_new_tokens=4)
    step(table)
    assert rows(table) == []


@pytest.mark.parametrize(
    ("budget", "forwards"),
    [(1, [1, 1, 1, 1]), (2, [2, 2]), (3, [3, 1]), (4, [4])],
)
def test_a_prompt_is_split_by_the_budget_and_its_first_step_needs_a_row(budget: int, forwards: list[int]) -> None:
    table, seen = Table(), []
    request = admitted(table, "a", prompt=13)
    while request.steps == 0:
        seen.append(len(rows(table, budget)))
        step(table, budget)
    assert seen == forwards


def test_decode_rows_are_never_held_back() -> None:
    table = Table()
    for i in range(5):
        admitted(table, f"d{i}", prompt=1)
    admitted(table, "long", prompt=400)
    planned = rows(table, budget=4)
    assert [row[:2] for row in planned[:5]] == [(f"d{i}", DENOISE) for i in range(5)]
    assert planned[5:] == [("long", FILL, 0)], "newcomers keep their share although decode rows exceed the budget"


def test_eight_prompts_arriving_while_eight_decode_delay_none_of_them() -> None:
    table = Table()
    running = [admitted(table, f"d{i}", prompt=1, max_new_tokens=400) for i in range(8)]
    step(table)
    for i in range(8):
        admitted(table, f"n{i}", prompt=512 // 8)
    while any(len(table[f"n{i}"].output) == 0 for i in range(8)):
        before = [len(r.output) for r in running]
        step(table, budget=64)
        assert [len(r.output) for r in running] == [n + T for n in before]


def test_newcomers_are_filled_in_order_of_admission() -> None:
    table = Table()
    admitted(table, "a", prompt=9)
    admitted(table, "b", prompt=9)
    assert rows(table, budget=4) == [("a", FILL, 0), ("a", FILL, 4), ("a", DENOISE, 8), ("b", FILL, 0)]


def test_a_request_for_no_token_only_fills() -> None:
    table = Table()
    admitted(table, "a", prompt=9, max_new_tokens=0)
    assert rows(table) == [("a", FILL, 0), ("a", FILL, 4)]


def test_live_blocks_are_rows_of_one_forward_behind_the_seals_of_those_that_left() -> None:
    table = Table()
    admitted(table, "a", prompt=1, rules=Rules(edits=True, whole_blocks=True, window=2))
    step(table)
    assert rows(table) == [("a", DENOISE, 0), ("a", DENOISE, 4)]
    step(table)
    assert rows(table) == [("a", DENOISE, 4), ("a", DENOISE, 8)], "its last step had not changed the block that left"
    table["a"].decide([Decided([6] * T, 0, True), Decided([7] * T, 0, True)])
    assert rows(table) == [("a", SEAL, 4), ("a", DENOISE, 8), ("a", DENOISE, 12)]


def test_a_newcomers_live_blocks_wait_until_all_of_them_fit() -> None:
    table = Table()
    request = admitted(table, "a", prompt=5, rules=Rules(edits=True, whole_blocks=True, window=2))
    step(table)
    request.retract()
    table.readmit("a", 0)
    assert rows(table, budget=2) == [("a", FILL, 0)]
    assert rows(table, budget=3) == [("a", FILL, 0), ("a", DENOISE, 4), ("a", DENOISE, 8)]
