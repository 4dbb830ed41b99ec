"""Draws follow their distribution, cut as its definition says, and depend on seed, position and step alone."""

from __future__ import annotations

import random

import pytest
import torch
from scipy.stats import chisquare

from sglang_llada.config import Sampling
from sglang_llada.decode import select
from sglang_llada.decode.head import Best, Head, Lowered
from sglang_llada.decode.noise import MOST, gumbel, hashed, words
from sglang_llada.decode.sampling import draw, draw_whole
from sglang_llada.decode.whole import Group, choose
from sglang_llada.llada2 import editing
from tests.decode.distribution import MASK, SAMPLES, WAYS, V, draws, fit, keys, sampling, share


@pytest.mark.parametrize("name", WAYS)
def test_twenty_thousand_draws_follow_the_distribution(name: str) -> None:
    torch.manual_seed(1)
    logits, way = torch.randn(V) * 2, sampling(**WAYS[name])
    found = draw_whole(logits.repeat(SAMPLES, 1), MASK, draws([way] * SAMPLES, keys(SAMPLES)))
    token, prob, want = found.token[:, 0], found.prob[:, 0], share(logits, way)
    assert torch.allclose(prob, want[token], atol=1e-6)
    print(f"{name}: chi-square p = {fit(token, want):.3f}")
    assert fit(token, want) > 0.001


@pytest.mark.parametrize("axis", range(3))
def test_keys_are_random_along_seeds_positions_and_steps(axis: int) -> None:
    numbers = [torch.full((SAMPLES,), 5), torch.full((SAMPLES,), 9), torch.full((SAMPLES,), 2)]
    numbers[axis] = torch.arange(SAMPLES)
    key = hashed(*numbers)
    for half in (key >> 32 & 0xFFFFFFFF, key & 0xFFFFFFFF):
        noise = half.double() / 2**32
        assert chisquare(torch.histc(noise, 100, 0, 1).tolist()).pvalue > 0.001
        neighbours = torch.corrcoef(torch.stack((noise[:-1], noise[1:])))[0, 1]
        assert abs(neighbours) < 4 / SAMPLES**0.5


@pytest.mark.parametrize("along", ["tokens", "positions"])
def test_noise_is_uniform_and_its_neighbours_are_independent(along: str) -> None:
    many, few = torch.arange(SAMPLES), torch.arange(4)
    noise = words(keys(4), many) if along == "tokens" else words(keys(SAMPLES), few).T
    for each in noise.double() / 2**32:
        assert chisquare(torch.histc(each, 100, 0, 1).tolist()).pvalue > 0.001
    assert (torch.corrcoef(noise.double()) - torch.eye(4)).abs().max() < 4 / SAMPLES**0.5
    shifted = torch.corrcoef(torch.stack((noise[0, :-1], noise[0, 1:])).double())[0, 1]
    assert abs(shifted) < 4 / SAMPLES**0.5


def test_noise_is_finite_at_its_ends_and_fine_where_it_is_high() -> None:
    ends = torch.tensor([0.5 * 2.0**-32, 1.5 * 2.0**-32, MOST])
    high, next_to_it, low = (-(-torch.log1p(-ends)).log()).tolist()
    assert low > -3 and high < 23 and high > next_to_it + 1


def test_noise_is_the_references() -> None:
    rng = random.Random(0)
    triples = [(rng.randrange(-(2**63), 2**63), rng.randrange(10**6), rng.randrange(50)) for _ in range(200)]
    key = hashed(*torch.tensor(triples).unbind(-1))
    want = [editing.hashed(*triple) for triple in triples]
    assert [each % 2**64 for each in key.tolist()] == want
    ids = [0, 1, 17, 156_895]
    expected = torch.tensor([[editing.gumbel(each, token) for token in ids] for each in want])
    torch.testing.assert_close(gumbel(key, torch.tensor(ids)), expected, rtol=1e-5, atol=1e-5)


def test_draws_are_the_references_and_do_not_depend_on_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of all ways in one call, of several chunks, and some of them alone."""
    monkeypatch.setattr(select, "VOCAB_CHUNK", 7)
    rng = random.Random(0)
    torch.manual_seed(0)
    ways = [sampling(seed=i, **WAYS[rng.choice(list(WAYS))]) for i in range(600)]
    logits = torch.randn(len(ways), V) * 2
    how = draws(ways, hashed(torch.arange(600), torch.arange(600), torch.ones(600, dtype=torch.int64)))
    together = draw(logits, Head(torch.eye(V)), MASK, how)
    near = 0
    for i, way in enumerate(ways):
        (want, chance), margin = editing.drawn(logits[i], MASK, way, editing.hashed(i, i, 1))
        near += margin < 1e-4
        if margin >= 1e-4:
            assert (int(together.token[i]), pytest.approx(float(together.prob[i]), abs=1e-5)) == (want, chance)
    assert near < 10
    for i in rng.sample(range(600), 50):
        at = torch.tensor([i])
        alone = draw(logits[at], Head(torch.eye(V)), MASK, how.at(at))
        assert (alone.token, alone.prob) == (together.token[i], together.prob[i])


def test_equals_stay_or_go_together() -> None:
    """One of weight 4 and, of seven of weight 1, all or none."""
    logits = torch.full((V,), float("-inf"))
    ones = [MASK, 2, 5, 11, 20, 33, 39]
    logits[ones], logits[15] = 0.0, torch.tensor(4.0).log()
    for cut, stays in (
        ({"top_k": 1}, {15}),
        ({"top_k": 2}, {15, *ones}),
        ({"top_p": 0.39}, {15}),
        ({"top_p": 0.41}, {15, *ones}),
        ({"min_p": 0.26}, {15}),
        ({"min_p": 0.24}, {15, *ones}),
        ({"min_p": 1.0}, {15}),
    ):
        found = draw_whole(logits.repeat(300, 1), MASK, draws([sampling(**cut)] * 300, keys(300)))
        assert set(found.token[:, 0].tolist()) == stays - {MASK}, cut


def test_positions_that_change_their_logits_draw_with_the_same_noise() -> None:
    """As a bias of nothing does: whole logits, beside a position that draws nothing."""
    torch.manual_seed(2)
    hidden, head, ways = torch.randn(3, V), Head(torch.eye(V)), [sampling(), sampling(top_p=0.7)]
    how = draws([*ways, None], keys(3))
    groups = [Group([i], way, lambda x: x + 0.0) for i, way in enumerate([*ways, None])]
    lowered = Lowered(torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0, 0.0]))
    at, found = choose(hidden, groups, head, MASK, MASK, 2, None, how, lowered)
    assert at.tolist() == [0, 1, 2]
    want = draw(hidden, head, MASK, how, lowered=lowered)
    best = select.select(hidden, head, MASK, 2, lowered=lowered)
    assert torch.equal(found.token[:2, 0], want.token[:2, 0]) and torch.equal(found.prob[:2, 0], want.prob[:2, 0])
    assert torch.equal(found.token[:2, 1], best.token[:2, 0])
    assert torch.equal(found.token[2], best.token[2])


@pytest.mark.parametrize("cut", [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_what_is_not_finite_spoils_its_position_only(cut: dict[str, float]) -> None:
    torch.manual_seed(3)
    logits = torch.randn(6, V)
    logits[0, 30] = logits[1, MASK] = float("nan")
    logits[2, 39] = float("inf")
    logits[3] = float("-inf")
    logits[4, :20] = float("-inf")
    found: Best = draw_whole(logits, MASK, draws([sampling(**cut)] * 6, keys(6)))
    assert [int(each) < 0 for each in found.token] == [True] * 4 + [False] * 2
    assert found.prob[:4].tolist() == [[0.0]] * 4


def test_the_hottest_and_the_coldest() -> None:
    torch.manual_seed(4)
    logits, hot, cold = torch.randn(V) * 2, sampling(temperature=1e4), sampling(temperature=1e-5)
    many = draw_whole(logits.repeat(SAMPLES, 1), MASK, draws([hot] * SAMPLES, keys(SAMPLES)))
    assert fit(many.token[:, 0], share(logits, hot)) > 0.001
    one = draw_whole(logits.repeat(9, 1), MASK, draws([cold] * 9, keys(9)))
    best = logits.index_fill(0, torch.tensor(MASK), float("-inf")).argmax()
    assert (one.token == best).all() and (one.prob == 1).all()


def test_parameters_that_cut_nothing_are_infinite() -> None:
    how = draws([Sampling(1.0, 1 << 30, 1.0, 0.0, 7), sampling(top_k=3), None], keys(3))
    assert how.cut.tolist() == [False, True, False] and how.drawn.tolist() == [True, True, False]
