"""Who waits for whose prompt, against a comparison of every token with every other request's."""

from __future__ import annotations

import random
import time

import pytest

from sglang_llada.blocks import Filling, Phase, Request, prefixes

T, MASK = 4, 0


def make(prompt: list[int], key: str = "") -> Request[None]:
    return Request("r", prompt, 5, frozenset(), None, T, MASK, prefixes=prefixes(prompt, T, key))


def common(a: Request[None], b: Request[None]) -> int:
    """Positions of whole blocks that both prompts begin with."""
    most = min(len(a.prompt), len(b.prompt)) // T * T
    return next(at for at in range(most, -1, -T) if a.prompt[:at] == b.prompt[:at])


@pytest.mark.parametrize(
    ("mine", "theirs", "shared"),
    [([7] * 9, [7] * 12, 2), ([7] * 7, [7] * 7, 1), ([7] * 8, [7] * 5 + [6] * 3, 1), ([6] + [7] * 7, [7] * 8, 0)],
)
def test_equal_numbers_are_equal_beginnings_of_whole_blocks(mine: list[int], theirs: list[int], shared: int) -> None:
    a, b = (prefixes(prompt, T, "") for prompt in (mine, theirs))
    assert [x == y for x, y in zip(a, b, strict=False)] == [i < shared for i in range(min(len(a), len(b)))]
    assert not set(a) & set(prefixes(theirs, T, "another salt"))


@pytest.mark.parametrize("seed", range(5))
def test_a_request_waits_if_most_of_it_is_coming_and_only_then(seed: int) -> None:
    rng, filling = random.Random(seed), Filling()
    alive: list[Request[None]] = []
    waited = 0
    for _ in range(300):
        same, own = rng.randrange(40), rng.randrange(10)
        prompt = [1] * same + [rng.randrange(2, 4) for _ in range(own)]
        request = make(prompt)
        least = rng.choice([T, 2 * T])
        shares = [min(common(request, other), request.live_from, other.live_from) for other in alive]
        coming = [share - other.filled for share, other in zip(shares, alive, strict=True)]
        deepest = max(shares, default=0)
        want = any(
            more >= least and 2 * more >= request.live_from - other.filled
            for more, share, other in zip(coming, shares, alive, strict=True)
            if share == deepest and share
        )
        assert filling.brings(request, least) == want
        waited += want
        if request.live_from and rng.random() < 0.5:
            cached = rng.randrange(request.live_from // T) * T
            filling.add(request, cached)
            request.admit(cached, loading=rng.random() < 0.3)
            alive.append(request)
        for other in alive:
            if other.phase is Phase.LOADING:
                if rng.random() < 0.5:
                    other.load()
            elif rng.random() < 0.2:
                other.fill(1)
            elif rng.random() < 0.1:
                other.retract()
        filling.settle()
        alive = [other for other in alive if other.phase in (Phase.LOADING, Phase.FILLING)]
    assert waited > 10
    for other in alive:
        other.retract()
    filling.settle()
    assert not filling._begun and not filling._by_prefix


def test_one_question_costs_the_same_however_many_ask() -> None:
    prompt = [7] * 30_000
    filling, asks = Filling(), make(prompt)
    first = make(prompt)
    filling.add(first, 0)
    first.admit(0)
    begin = time.perf_counter()
    for _ in range(1000):
        assert filling.brings(asks, T)
    assert time.perf_counter() - begin < 0.5  # a comparison of the prompts alone takes 0.3 ms
