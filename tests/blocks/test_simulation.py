"""Thousands of requests against a fake forward: arrivals, aborts, retractions, time-outs, ends, all accounted for."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from sglang_llada.blocks import Ending, Phase, Request, RowKind, Table, most_rows, next_step

T, MASK, EOS, VOCAB = 4, 0, 1, 12


def answer(rid: str, position: int) -> int:
    """The token that the fake model puts at a position of a request: a function of both alone, sometimes the end."""
    draw = random.Random(f"{rid}/{position}").random()
    return EOS if draw < 0.06 else 2 + int(draw * 1000) % (VOCAB - 2)


def expected(request: Request[None]) -> list[int]:
    """The answer that a request must get, whatever happens around it."""
    out: list[int] = []
    while len(out) < request.max_new_tokens:
        out.append(answer(request.rid, len(request.prompt) + len(out)))
        if out[-1] in request.stop_ids:
            break
    return out


def denoise(request: Request[None], rng: random.Random) -> tuple[list[int], list[bool]]:
    """A fake step: decides at least one open position, chosen at random."""
    block = request.block
    holes = [i for i, is_open in enumerate(block.open) if is_open]
    chosen = set(rng.sample(holes, rng.randint(1, len(holes))))
    tokens = [answer(request.rid, block.start + i) if i in chosen else t for i, t in enumerate(block.tokens)]
    return tokens, [is_open and i not in chosen for i, is_open in enumerate(block.open)]


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
                table.add(Request(rid, prompt, rng.choice([0, 1, 4, 7, 30]), stops, None, T, MASK))
                waiting.append(rid)
                born[rid] = turn  # time-outs count from here
        for request in list(table):  # aborts at any moment, and time-outs
            if rng.random() < 0.01 or turn - born[request.rid] > 15:
                ended["aborted" if turn - born[request.rid] <= 15 else "timed out"] += 1
                table.drop(request.rid)
                pool.free(request.rid)
                waiting = [rid for rid in waiting if rid != request.rid]
        while waiting and len(table.running()) < slots:
            request = table[waiting[0]]
            if not pool.grow(request.rid, request.block.start + T):
                pool.free(request.rid)
                break
            table.readmit(waiting.pop(0), cached=rng.randrange(request.block.start // T + 1) * T)
        while True:  # plan; retract the youngest until the rest has its pages
            plan = next_step(table.running(), budget)
            assert len(plan.rows) <= most_rows(len(table.running()), budget)
            if all([pool.grow(row.request.rid, row.start + T) for row in plan.rows]):
                break
            victim = table.running()[-1]
            victim.retract()
            pool.free(victim.rid)
            waiting.insert(0, victim.rid)
            ended["retracted"] += 1
        table.advance(plan)
        for row in plan.of(RowKind.DENOISE):
            row.request.decide(*(news := denoise(row.request, rng)), not any(news[1]))
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
