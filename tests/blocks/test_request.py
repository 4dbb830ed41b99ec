"""Every move of a request from every phase, and what commits when."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sglang_llada.blocks import Ending, Phase, Request, Table
from sglang_llada.errors import IntegrityError

T, MASK, EOS = 4, 0, 1


def make(prompt: int = 6, max_new_tokens: int = 20, stops: frozenset[int] = frozenset({EOS})) -> Request[None]:
    return Request("r", [7] * prompt, max_new_tokens, stops, None, T, MASK)


def decide(request: Request[None], *tokens: int) -> int:
    """Decide the whole live block, given positions kept, the open ones as `tokens` says."""
    given = [t for t, o in zip(request.block.tokens, request.block.open, strict=True) if not o]
    return request.decide(given + list(tokens), [False] * T, True)


def in_phase(phase: Phase) -> Request[None]:
    request = make()
    if phase is not Phase.WAITING:
        request.admit(0 if phase is Phase.FILLING else 4)
    if phase is Phase.DONE:
        request.end(Ending.OUTSIDE)
    return request


MOVES: dict[str, tuple[Callable[[Request[None]], object], dict[Phase, Phase]]] = {
    "admit": (lambda r: r.admit(0), {Phase.WAITING: Phase.FILLING}),
    "admit cached": (lambda r: r.admit(4), {Phase.WAITING: Phase.DECODING}),
    "fill": (lambda r: r.fill(1), {Phase.FILLING: Phase.DECODING}),
    "fill nothing": (lambda r: r.fill(0), {Phase.FILLING: Phase.FILLING, Phase.DECODING: Phase.DECODING}),
    "decide": (lambda r: decide(r, 5, 5), {Phase.DECODING: Phase.DECODING}),
    "decide the end": (lambda r: decide(r, 5, EOS), {Phase.DECODING: Phase.DONE}),
    "retract": (lambda r: r.retract(), {Phase.FILLING: Phase.WAITING, Phase.DECODING: Phase.WAITING}),
    "end": (
        lambda r: r.end(Ending.OUTSIDE),
        {Phase.WAITING: Phase.DONE, Phase.FILLING: Phase.DONE, Phase.DECODING: Phase.DONE},
    ),
}


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("move", MOVES)
def test_every_move_from_every_phase(phase: Phase, move: str) -> None:
    request, (act, to) = in_phase(phase), MOVES[move]
    if phase in to:
        act(request)
        assert request.phase is to[phase]
        request.check()
    else:
        with pytest.raises(IntegrityError, match="^r: "):
            act(request)


def test_the_prompts_tail_is_the_given_part_of_the_first_block() -> None:
    request = make(prompt=6)
    assert (request.block.start, request.block.tokens) == (4, [7, 7, MASK, MASK])
    assert request.block.open == [False, False, True, True]


@pytest.mark.parametrize(("prompt", "start"), [(0, 0), (3, 0), (4, 4), (5, 4), (8, 8)])
def test_the_live_block_starts_at_the_last_block_border(prompt: int, start: int) -> None:
    assert make(prompt=prompt).block.start == start


def test_tokens_commit_once_everything_before_them_is_decided() -> None:
    request = in_phase(Phase.DECODING)
    assert request.decide([7, 7, MASK, 9], [False, False, True, False], False) == 0
    assert request.decide([7, 7, 8, 9], [False] * T, True) == 2
    assert request.output == [8, 9]
    assert request.steps_per_block == [2, 0]


def test_a_stop_behind_a_hole_does_not_end_the_answer() -> None:
    request = in_phase(Phase.DECODING)
    request.decide([7, 7, MASK, EOS], [False, False, True, False], False)
    assert request.phase is Phase.DECODING and request.output == []
    request.decide([7, 7, 8, EOS], [False] * T, True)
    assert (request.ending, request.output) == (Ending.STOP, [8, EOS])


def test_nothing_after_a_stop_is_committed() -> None:
    request = in_phase(Phase.DECODING)
    assert decide(request, EOS, 9) == 1
    assert request.output == [EOS]


def test_a_stop_at_the_limit_is_a_stop() -> None:
    request = make(max_new_tokens=2)
    request.admit(4)
    decide(request, 8, EOS)
    assert request.ending is Ending.STOP


def test_the_limit_ends_inside_a_block_with_holes_behind_it() -> None:
    request = make(max_new_tokens=1)
    request.admit(4)
    assert request.decide([7, 7, 8, MASK], [False, False, False, True], False) == 1
    assert request.ending is Ending.LENGTH


def test_a_request_for_no_token_ends_when_it_is_filled() -> None:
    request = make(max_new_tokens=0)
    request.admit(0)
    assert request.phase is Phase.FILLING and not request.wants_decode
    request.fill(1)
    assert request.ending is Ending.LENGTH


def test_a_literal_mask_in_the_prompt_is_given() -> None:
    request = Request("r", [7, MASK], 5, frozenset(), None, T, MASK)
    assert request.block.open == [False, False, True, True]
    request.admit(0)
    decide(request, 8, 9)
    assert request.output == [8, 9]


@pytest.mark.parametrize(
    ("tokens", "still_open", "why"),
    [
        ([7, 7, MASK, MASK], [False, False, True, True], "decided nothing"),
        ([7, 6, 8, 9], [False] * 4, "changed a fixed position"),
        ([7, 7, 8, 9], [True, False, False, False], "changed a fixed position"),
    ],
)
def test_a_step_must_decide_something_and_nothing_that_is_fixed(
    tokens: list[int], still_open: list[bool], why: str
) -> None:
    with pytest.raises(IntegrityError, match=why):
        in_phase(Phase.DECODING).decide(tokens, still_open, not any(still_open))


def test_retraction_keeps_the_live_blocks_decisions() -> None:
    request = in_phase(Phase.DECODING)
    request.decide([7, 7, MASK, 9], [False, False, True, False], False)
    request.retract()
    request.admit(0)
    request.fill(1)
    assert request.block.tokens == [7, 7, MASK, 9] and request.block.steps == 1


def test_tokens_of_a_block_span_prompt_and_output() -> None:
    request = in_phase(Phase.DECODING)
    decide(request, 8, 9)
    assert request.tokens_at(0) == [7, 7, 7, 7]
    assert request.tokens_at(4) == [7, 7, 8, 9]
    assert request.tokens_at(8) == [MASK] * T


def test_steps_are_reported_once_per_block() -> None:
    request = in_phase(Phase.DECODING)
    assert request.report_steps(ended=False) == []
    decide(request, 8, 9)
    assert request.report_steps(ended=False) == [1]
    decide(request, 8, 9, 8, EOS)
    assert request.report_steps(ended=True) == [1]
    assert request.report_steps(ended=True) == []


@pytest.mark.parametrize(
    ("held", "why"),
    [({"r": 12}, "may hold 8"), ({"s": 4, "r": 8}, "unknown requests"), ({}, "holds 0 positions")],
)
def test_the_table_notices_pages_that_do_not_fit_its_requests(held: dict[str, int], why: str) -> None:
    table = Table()
    table.add(make())
    table.readmit("r", 4)
    table.check_integrity({"r": 8})
    with pytest.raises(IntegrityError, match=why):
        table.check_integrity(held)
