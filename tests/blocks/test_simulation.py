"""Thousands of requests against a fake forward: arrivals, aborts, retractions, time-outs, ends, all accounted for."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from sglang_llada.blocks import Decided, Ending, Phase, Request, RowKind, Rules, Table, most_rows, next_step
from tests.sets import set_of

T, MASK, EOS, VOCAB = 4, 0, 1, 12
STEPS = 9  # of a block where tokens may be edited
RULES = [
    Rules(),
    Rules(whole_blocks=True),
    Rules(live_blocks=3, next_block_share=0.6),
    Rules(edits=True, whole_blocks=True, most_steps=STEPS),
    Rules(edits=True, whole_blocks=True, most_steps=STEPS, window=3),
    Rules(edits=True, whole_blocks=True, most_steps=STEPS, window=2, live_blocks=2, next_block_share=1.0),
    Rules(edits=True, reopens=True, whole_blocks=True, most_steps=STEPS, live_blocks=2, next_block_share=0.3),
]
EACH = max(rules.window + rules.live_blocks for rules in RULES)


def answer(rid: str, position: int) -> int:
    """The token that the fake model puts at a position of a request: a function of both alone, sometimes the end."""
    draw = random.Random(f"{rid}/{position}").random()
    return EOS if draw < 0.06 else 2 + int(draw * 1000) % (VOCAB - 2)


def expected(request: Request[None]) -> list[int]:
    """The answer that a request must get, whatever happens around it."""
    out: list[int] = []
    while len(out) < request.max_new_tokens:
        out.append(right(request, len(request.prompt) + len(out)))
        if out[-1] in request.stop_ids and len(request.prompt) + len(out) > request.stops_from:
            break
    return out


def right(request: Request[None], position: int) -> int:
    """The token of an answer's position: what a canvas gives, or the model's."""
    at = position - len(request.prompt)
    given = request.canvas[at] if at < len(request.canvas) else None
    return answer(request.rid, position) if given is None else given


def some_canvas(rng: random.Random, rules: Rules) -> list[int | None]:
    """Mostly none; else runs of given tokens and of open positions, of which there is one at least."""
    if rules.reopens or rng.random() < 0.5:
        return []
    runs = [[rng.random() < 0.6] * rng.choice([1, 2, 5, 13]) for _ in range(rng.randint(1, 6))]
    given = [each for run in runs for each in run]
    given[rng.randrange(len(given))] = False
    canvas = [rng.randrange(1, VOCAB) if each else None for each in given]
    return canvas if None in canvas[: max((i for i, token in enumerate(canvas) if token), default=len(canvas))] else []


def denoise(request: Request[None], rng: random.Random) -> list[Decided]:
    """A fake step: decides at least one open position of each live block, or edits it, in the end to the answer.

    Where tokens may be edited they are wrong at first, and where blocks may open again holes come back; a block whose
    bound is near gets its answer.
    """
    out = []
    for block in request.blocks:
        truth = [token if i < block.given else right(request, block.start + i) for i, token in enumerate(block.tokens)]
        holes = [i for i in range(T) if block.open >> i & 1]
        tokens, still_open = list(block.tokens), [i in holes for i in range(T)]
        last = not block.done and request.rules.edits and block.steps + 2 >= STEPS
        settled_for_good = block.done and (request.rules.reopens or not request.rules.edits)
        for i in holes if last else rng.sample(holes, rng.randint(min(1, len(holes)), len(holes))):
            tokens[i], still_open[i] = truth[i], False
            if request.rules.edits and not last and rng.random() < 0.3:
                tokens[i] = rng.randrange(VOCAB)
        if request.rules.edits and not settled_for_good:
            for i in [i for i in range(T) if not block.fixed >> i & 1]:
                if i not in holes and (last or block.done or rng.random() < 0.5):
                    tokens[i] = truth[i]
                elif i not in holes and request.rules.reopens and rng.random() < 0.1:
                    tokens[i], still_open[i] = MASK, True
        settled = not request.rules.edits or (tokens == truth and rng.random() < 0.5)
        out.append(Decided(tokens, set_of(still_open), block.done or (not any(still_open) and (settled or last))))
    return out


def running(table: Table) -> list[Request[None]]:
    """Requests that hold KV, oldest admission first."""
    return [request for request in table if request.phase in (Phase.LOADING, Phase.FILLING, Phase.DECODING)]


class Pool:
    """Pages of T positions, held by request id; the fake of the host's pools."""

    def __init__(self, pages: int) -> None:
        self.pages, self.held = pages, dict[str, int]()

    def grow(self, rid: str, upto: int) -> bool:
        more = max(upto - self.held.get(rid, 0), 0) // T
        if more > self.pages:
            return False
        self.pages -= more
        self.held[rid] = self.held.get(rid, 0) + more * T
        return True

    def free(self, rid: str) -> None:
        self.pages += self.held.pop(rid, 0) // T


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nothing_is_held_and_every_answer_is_right_after_two_thousand_requests(seed: int) -> None:
    rng = random.Random(seed)
    total, pages, slots, budget = 2000, 24, 8, 12
    table, pool = Table(), Pool(pages)
    arrivals = [f"r{i}" for i in range(total)]
    waiting: list[str] = []
    ended: Counter[str] = Counter()
    born: dict[str, int] = {}
    turn = 0
    while arrivals or len(table):
        turn += 1
        assert turn < 200_000, "no progress"
        for _ in range(rng.choice([0, 0, 1, 3])):
            if arrivals:
                rid = arrivals.pop()
                prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([0, 1, 3, 4, 5, 8, 17, 40]))]
                stops = frozenset({EOS}) if rng.random() < 0.8 else frozenset()
                limit, rules = rng.choice([0, 1, 4, 7, 30]), rng.choice(RULES)
                canvas = some_canvas(rng, rules)
                limit = len(canvas) or limit
                table.add(Request(rid, prompt, limit, stops, None, T, MASK, canvas, rules=rules))
                waiting.append(rid)
                born[rid] = turn  # time-outs count from here
        for request in list(table):  # aborts at any moment, and time-outs
            if rng.random() < 0.01 or turn - born[request.rid] > 15:
                ended["aborted" if turn - born[request.rid] <= 15 else "timed out"] += 1
                table.drop(request.rid)
                pool.free(request.rid)
                waiting = [rid for rid in waiting if rid != request.rid]
        while waiting and len(running(table)) < slots:
            request = table[waiting[0]]
            if not pool.grow(request.rid, request.live_to):
                pool.free(request.rid)
                break
            cached = rng.randrange(request.live_from // T + 1) * T
            table.readmit(waiting.pop(0), cached, loading=rng.random() < 0.3)
        for request in running(table):  # copies that are done
            if request.phase is Phase.LOADING and rng.random() < 0.5:
                request.load()
        while True:  # plan; retract the youngest until the rest has its pages
            plan = next_step(table, budget)
            assert len(plan.rows) <= most_rows(len(running(table)), budget, EACH)
            assert all(row.request.phase is not Phase.LOADING for row in plan.rows)
            if all([pool.grow(row.request.rid, row.start + T) for row in plan.rows]):
                break
            victim = running(table)[-1]
            victim.retract()
            pool.free(victim.rid)
            waiting.insert(0, victim.rid)
            ended["retracted"] += 1
        for request, fills in plan.fills().items():
            request.take_part(fills)
        for request in {row.request.rid: row.request for row in plan.of(RowKind.DENOISE)}.values():
            before = list(request.output)
            committed = request.decide(denoise(request, rng))
            assert request.output[: len(before)] == before and committed == len(request.output) - len(before)
        table.check_integrity(pool.held)
        for request in list(table):
            if request.phase is Phase.DONE:
                assert request.output == expected(request)
                assert request.ending is (
                    Ending.STOP if request.output and request.output[-1] in request.stop_ids else Ending.LENGTH
                )
                ended["finished"] += 1
                table.drop(request.rid)
                pool.free(request.rid)
    assert pool.pages == pages and not pool.held
    assert ended["finished"] + ended["aborted"] + ended["timed out"] == total
    assert min(ended[kind] for kind in ("finished", "aborted", "timed out", "retracted")) > 20, ended
