"""Every move of a request from every phase, and what commits when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sglang_llada.blocks import Decided, Ending, Phase, Request, Rules, Table
from sglang_llada.errors import IntegrityError
from tests.sets import set_of

T, MASK, EOS = 4, 0, 1


def make(
    prompt: int = 6, max_new_tokens: int = 20, stops: frozenset[int] = frozenset({EOS}), **rules: Any
) -> Request[None]:
    return Request("r", [7] * prompt, max_new_tokens, stops, None, T, MASK, rules=Rules(**rules))


def decide(request: Request[None], *tokens: int) -> int:
    """Decide the whole live block, given positions kept, the open ones as `tokens` says."""
    (block,) = request.blocks
    given = block.tokens[: T - block.open.bit_count()]
    return request.decide([Decided(given + list(tokens), 0, True)])


def see(request: Request[None], *blocks: list[int], done: int = 0) -> int:
    """A step after which the live blocks read like this, open where masked; the first `done` of them are done."""
    return request.decide(
        [Decided(tokens, set_of(t == MASK for t in tokens), i < done) for i, tokens in enumerate(blocks)]
    )


def in_phase(phase: Phase, **rules: Any) -> Request[None]:
    request = make(**rules)
    if phase is not Phase.WAITING:
        request.admit(0 if phase is Phase.FILLING else 4, loading=phase is Phase.LOADING)
    if phase is Phase.DONE:
        request.end(Ending.OUTSIDE)
    return request


MOVES: dict[str, tuple[Callable[[Request[None]], object], dict[Phase, Phase]]] = {
    "admit": (lambda r: r.admit(0), {Phase.WAITING: Phase.FILLING}),
    "admit cached": (lambda r: r.admit(4), {Phase.WAITING: Phase.DECODING}),
    "admit while it loads": (lambda r: r.admit(4, loading=True), {Phase.WAITING: Phase.LOADING}),
    "load": (lambda r: r.load(), {Phase.LOADING: Phase.DECODING}),
    "fill": (lambda r: r.fill(1), {Phase.FILLING: Phase.DECODING}),
    "fill nothing": (lambda r: r.fill(0), {Phase.FILLING: Phase.FILLING, Phase.DECODING: Phase.DECODING}),
    "decide": (lambda r: decide(r, 5, 5), {Phase.DECODING: Phase.DECODING}),
    "decide the end": (lambda r: decide(r, 5, EOS), {Phase.DECODING: Phase.DONE}),
    "retract": (
        lambda r: r.retract(),
        dict.fromkeys((Phase.LOADING, Phase.FILLING, Phase.DECODING), Phase.WAITING),
    ),
    "end": (
        lambda r: r.end(Ending.OUTSIDE),
        dict.fromkeys((Phase.WAITING, Phase.LOADING, Phase.FILLING, Phase.DECODING), Phase.DONE),
    ),
}


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("move", MOVES)
def test_every_move_from_every_phase(phase: Phase, move: str) -> None:
    request, (act, to) = in_phase(phase), MOVES[move]
    if phase in to:
        act(request)
        assert request.phase is to[phase]
        assert not request.contradictions()
    else:
        with pytest.raises(IntegrityError, match="^r: "):
            act(request)


def test_the_prompts_tail_is_the_given_part_of_the_first_block() -> None:
    request = make(prompt=6)
    (block,) = request.blocks
    assert (block.start, block.tokens, block.open) == (4, [7, 7, MASK, MASK], 0b1100)


@pytest.mark.parametrize(("prompt", "start"), [(0, 0), (3, 0), (4, 4), (5, 4), (8, 8)])
def test_the_live_block_starts_at_the_last_block_border(prompt: int, start: int) -> None:
    assert make(prompt=prompt).live_from == start


def test_tokens_commit_once_everything_before_them_is_decided() -> None:
    request = in_phase(Phase.DECODING)
    assert see(request, [7, 7, MASK, 9]) == 0
    assert see(request, [7, 7, 8, 9], done=1) == 2
    assert request.output == [8, 9]
    assert request.steps_per_block == [2]


def test_a_stop_behind_a_hole_does_not_end_the_answer() -> None:
    request = in_phase(Phase.DECODING)
    see(request, [7, 7, MASK, EOS])
    assert request.phase is Phase.DECODING and request.output == []
    see(request, [7, 7, 8, EOS], done=1)
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
    assert see(request, [7, 7, 8, MASK]) == 1
    assert request.ending is Ending.LENGTH


def test_a_request_for_no_token_ends_when_it_is_filled() -> None:
    request = make(max_new_tokens=0)
    request.admit(0)
    assert request.phase is Phase.FILLING and not request.wants_decode
    request.fill(1)
    assert request.ending is Ending.LENGTH


def test_a_literal_mask_in_the_prompt_is_given() -> None:
    request = Request("r", [7, MASK], 5, frozenset(), None, T, MASK)
    assert request.blocks[0].open == 0b1100
    request.admit(0)
    decide(request, 8, 9)
    assert request.output == [8, 9]


@pytest.mark.parametrize(
    ("tokens", "still_open", "why"),
    [
        ([7, 7, MASK, MASK], 0b1100, "decided nothing"),
        ([7, 6, 8, 9], 0, "changed a fixed position"),
        ([7, 7, 8, 9], 0b0001, "changed a fixed position"),
    ],
)
def test_a_step_must_decide_something_and_nothing_that_is_fixed(tokens: list[int], still_open: int, why: str) -> None:
    with pytest.raises(IntegrityError, match=why):
        in_phase(Phase.DECODING).decide([Decided(tokens, still_open, not still_open)])


def test_retraction_keeps_the_live_blocks_decisions() -> None:
    request = in_phase(Phase.DECODING)
    see(request, [7, 7, MASK, 9])
    request.retract()
    request.admit(0)
    request.fill(1)
    assert request.blocks[0].tokens == [7, 7, MASK, 9] and request.blocks[0].steps == 1


def test_tokens_of_a_block_span_prompt_and_output() -> None:
    request = in_phase(Phase.DECODING)
    decide(request, 8, 9)
    assert request.tokens_at(0) == [7, 7, 7, 7]
    assert request.tokens_at(4) == [7, 7, 8, 9]
    assert request.tokens_at(8) == [MASK] * T


def test_steps_are_counted_per_block() -> None:
    request = in_phase(Phase.DECODING)
    assert request.steps_per_block == []
    decide(request, 8, 9)
    assert request.steps_per_block == [1]
    decide(request, 8, 9, 8, EOS)
    assert (request.steps_per_block, request.steps_of_blocks) == ([1], [1, 1])


@pytest.mark.parametrize(
    ("held", "why"),
    [({"r": 12}, "may hold 8"), ({"s": 4, "r": 8}, "not known"), ({}, "holds 0 positions")],
)
def test_the_table_notices_pages_that_do_not_fit_its_requests(held: dict[str, int], why: str) -> None:
    table = Table()
    table.add(make())
    table.readmit("r", 4)
    table.check_integrity({"r": 8})
    with pytest.raises(IntegrityError, match=why):
        table.check_integrity(held)


def test_the_last_allowed_step_ends_before_the_first_open_position() -> None:
    request = in_phase(Phase.DECODING, max_nfe=2)
    assert see(request, [7, 7, MASK, 9]) == 0
    assert see(request, [7, 7, 8, 9], done=1) == 2
    assert (request.ending, request.output) == (Ending.LENGTH, [8, 9])
    request = in_phase(Phase.DECODING, max_nfe=1, edits=True, whole_blocks=True)
    assert see(request, [7, 7, 8, MASK]) == 1
    assert (request.ending, request.output) == (Ending.LENGTH, [8])
    request = in_phase(Phase.DECODING, max_nfe=1)
    see(request, [7, 7, EOS, MASK])
    assert request.ending is Ending.STOP


def test_without_early_exit_an_answer_is_complete_with_its_block() -> None:
    request = in_phase(Phase.DECODING, whole_blocks=True)
    assert see(request, [7, 7, EOS, MASK]) == 0
    assert see(request, [7, 7, EOS, 9], done=1) == 1
    assert (request.ending, request.output) == (Ending.STOP, [EOS])


def windowed(**rules: Any) -> Request[None]:
    return in_phase(Phase.DECODING, edits=True, whole_blocks=True, most_steps=9, **rules)


def test_a_block_leaves_the_window_when_those_after_it_are_done() -> None:
    request = windowed(window=2)
    assert see(request, [7, 7, 8, 9], done=1) == 0, "it may still change"
    assert see(request, [7, 7, 6, 9], [5, 5, 5, MASK]) == 0
    assert see(request, [7, 7, 6, 9], [5, 5, 5, 5], done=2) == 2
    assert (request.output, request.live_from, request.filled) == ([6, 9], 8, 8), (
        "its KV is final, as it did not change"
    )
    assert see(request, [4, 5, 5, 5], [5, 5, 5, 5], done=2) == 4
    assert (request.output, request.live_from, request.filled) == ([6, 9, 4, 5, 5, 5], 12, 8), "it is to be sealed"
    assert not request.contradictions()


def test_an_edit_of_an_older_block_may_take_the_stop_away_or_bring_it() -> None:
    request = windowed(window=2)
    see(request, [7, 7, 8, 9], done=1)
    assert see(request, [7, 7, EOS, 9], [5, 5, MASK, MASK]) == 1
    assert (request.ending, request.output) == (Ending.STOP, [EOS])
    request = windowed(window=2)
    see(request, [7, 7, 8, 9], done=1)
    assert see(request, [7, 7, 8, 9], [5, EOS, 5, 5]) == 0, "not done: it may still change"
    assert see(request, [7, 7, 8, 9], [5, 6, 5, 5], done=2) == 2
    assert request.phase is Phase.DECODING


def test_the_state_of_a_done_block_is_fresh() -> None:
    request = windowed(window=3)
    request.decide([Decided([7, 7, 8, 9], 0, True, state=[5])])
    request.decide([Decided([7, 7, 8, 8], 0, False, state=[6]), Decided([1, 1, 1, 1], 0, False, [3])])
    assert [(block.steps, block.state) for block in request.blocks] == [(2, ()), (1, [3])]


def test_the_next_block_begins_below_the_share_and_waits_for_the_one_before() -> None:
    request = make(prompt=4, live_blocks=2, next_block_share=0.5)
    request.admit(4)
    see(request, [8, MASK, MASK, 9])
    assert len(request.blocks) == 1, "half of it is open"
    see(request, [8, 8, MASK, 9])
    assert [block.start for block in request.blocks] == [4, 8] and request.output == [8, 8]
    assert not request.contradictions()
    assert see(request, [8, 8, 8, 9], [5, 5, MASK, 5], done=1) == 4, "what is decided in a row is final"
    assert (request.live_from, request.filled, request.output) == (8, 4, [8, 8, 8, 9, 5, 5])


def test_a_later_block_that_is_done_waits_for_the_earlier_one() -> None:
    request = make(prompt=4, live_blocks=2, next_block_share=1.0)
    request.admit(4)
    see(request, [MASK, MASK, MASK, 9])
    request.decide([Decided([MASK, MASK, 8, 9], 0b0011, False), Decided([5] * T, 0, True)])
    assert len(request.blocks) == 2 and request.output == []
    assert see(request, [8, 8, 8, 9], [5] * T, done=1) == 8
    assert (request.live_from, request.filled) == (12, 4), "both are to be sealed"
    assert request.steps_per_block == [3, 2]
    assert not request.contradictions()


def test_no_block_begins_behind_a_stop_token_or_past_the_last_allowed_one() -> None:
    request = make(prompt=4, live_blocks=4, next_block_share=1.0)
    request.admit(4)
    see(request, [MASK, MASK, MASK, EOS])
    assert len(request.blocks) == 1
    request = make(prompt=4, max_new_tokens=5, live_blocks=4, next_block_share=1.0)
    request.admit(4)
    see(request, [MASK, MASK, MASK, 8])
    see(request, [MASK, MASK, 8, 8], [MASK, MASK, MASK, 8])
    assert len(request.blocks) == 2
