"""Draws follow their distribution, cut as the host cuts it, and depend on seed, position and step alone."""

from __future__ import annotations

import random

import pytest
import torch
from scipy.stats import chisquare

from sglang_llada.config import Sampling
from sglang_llada.decode.contract import Draws
from sglang_llada.decode.head import Head
from sglang_llada.decode.sampling import draw, uniform
from sglang_llada.decode.whole import Group, choose, order
from sglang_llada.llada2 import editing
from tests.decode.distribution import MASK, SAMPLES, WAYS, V, fit, sampling, share


def draws(ways: list[Sampling], noise: torch.Tensor) -> Draws:
    """One position of each way; those that are not cut must stand first."""
    cut = [way.top_k < V or way.top_p < 1 or way.min_p > 0 for way in ways]
    assert cut == sorted(cut)
    return Draws(
        temperature=torch.tensor([way.temperature for way in ways]),
        top_k=torch.tensor([way.top_k for way in ways]),
        top_p=torch.tensor([way.top_p for way in ways]),
        min_p=torch.tensor([way.min_p for way in ways]),
        noise=noise,
        whole=len(ways) - sum(cut),
    )


@pytest.mark.parametrize("name", WAYS)
def test_twenty_thousand_draws_follow_the_distribution(name: str) -> None:
    torch.manual_seed(1)
    logits, way = torch.randn(V) * 2, sampling(**WAYS[name])
    seeds = torch.arange(SAMPLES)
    noise = uniform(seeds, seeds * 0 + 3, seeds * 0)
    token, prob = draw(logits.repeat(SAMPLES, 1), MASK, draws([way] * SAMPLES, noise))
    want = share(logits, way)
    assert torch.allclose(prob, want[token], atol=1e-6)
    print(f"{name}: chi-square p = {fit(token, want):.3f}")
    assert fit(token, want) > 0.001


@pytest.mark.parametrize("axis", range(3))
def test_noise_is_uniform_along_seeds_positions_and_steps(axis: int) -> None:
    numbers = [torch.full((SAMPLES,), 5), torch.full((SAMPLES,), 9), torch.full((SAMPLES,), 2)]
    numbers[axis] = torch.arange(SAMPLES)
    noise = uniform(*numbers)
    assert noise.dtype == torch.float64 and noise.min() >= 0 and noise.max() < 1
    assert chisquare(torch.histc(noise, 100, 0, 1).tolist()).pvalue > 0.001
    neighbours = torch.corrcoef(torch.stack((noise[:-1], noise[1:])))[0, 1]
    assert abs(neighbours) < 4 / SAMPLES**0.5


def test_noise_is_the_references() -> None:
    rng = random.Random(0)
    triples = [(rng.randrange(-(2**63), 2**63), rng.randrange(10**6), rng.randrange(50)) for _ in range(1000)]
    assert uniform(*torch.tensor(triples).unbind(-1)).tolist() == [editing.uniform(*triple) for triple in triples]


def test_draws_are_the_references_and_do_not_depend_on_their_neighbours() -> None:
    """Positions of all ways in one call, of several chunks, and some of them alone."""
    rng = random.Random(0)
    torch.manual_seed(0)
    ways = [sampling(seed=i, **WAYS[rng.choice(list(WAYS))]) for i in range(600)]
    logits = torch.randn(len(ways), V) * 2
    noise = torch.tensor([editing.uniform(way.seed, i, 1) for i, way in enumerate(ways)], dtype=torch.float64)
    groups = [Group([i], V, sampling=way, noise=noise[i : i + 1]) for i, way in enumerate(ways)]
    token, prob = chosen(logits, groups)
    near = 0
    for i, way in enumerate(ways):
        (want, chance), margin = editing.drawn(logits[i], MASK, way, noise[i].item())
        near += margin < 1e-5
        if margin >= 1e-5:
            assert (int(token[i]), pytest.approx(float(prob[i]), abs=1e-5)) == (want, chance)
    assert near < 10
    for group in rng.sample(groups, 100):
        [i] = group.at
        alone = chosen(logits, [group])
        assert (alone[0][i], alone[1][i]) == (token[i], prob[i])


def chosen(logits: torch.Tensor, groups: list[Group]) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of each position and its probability, from hidden states and a head that give these logits."""
    at, found = choose(logits, sorted(groups, key=order), Head(torch.eye(V)), MASK, MASK, 1, None)
    place = torch.full((len(logits),), -1).index_copy(0, at, torch.arange(len(at)))
    return found.token[place, 0], found.prob[place, 0]
