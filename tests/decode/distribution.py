"""Ways to draw a token, the distribution that each means, and whether drawn tokens follow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import chisquare

from sglang_llada.config import Sampling
from sglang_llada.decode.contract import Draws
from sglang_llada.decode.layout import drawing
from sglang_llada.decode.noise import hashed

V, MASK, SAMPLES = 40, 7, 20_000
WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 2.0},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.1},
    "all": {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
}


def sampling(seed: int = 0, **values: Any) -> Sampling:
    return Sampling(**{"temperature": 1.0, "top_k": V, "top_p": 1.0, "min_p": 0.0, "seed": seed, **values})


def keys(count: int) -> torch.Tensor:
    """Of seeds from 0 on, all at one position and step."""
    seeds = torch.arange(count)
    return hashed(seeds, torch.full_like(seeds, 3), torch.zeros_like(seeds))


def draws(ways: Sequence[Sampling | None], key: torch.Tensor) -> Draws:
    """One position of each way; None draws nothing."""
    bits = torch.tensor([drawing(way)[1:] for way in ways])
    return Draws(key, *bits.view(torch.float64).float().unbind(-1))


def share(logits: torch.Tensor, way: Sampling) -> torch.Tensor:
    """The distribution of the definition, position by position."""
    chances = (logits / way.temperature).index_fill(0, torch.tensor(MASK), float("-inf")).softmax(-1).tolist()
    kept, before = [0.0] * V, 0.0
    for rank, token in enumerate(sorted(range(V), key=lambda t: -chances[t])):
        if rank < way.top_k and before <= way.top_p and chances[token] >= way.min_p * max(chances):
            kept[token] = chances[token]
        before += chances[token]
    return torch.tensor(kept) / sum(kept)


def fit(token: torch.Tensor, want: torch.Tensor) -> float:
    """The chance of a chi-square as large as that of these tokens; 0 if one of them is impossible."""
    counts = token.bincount(minlength=V)
    if counts[want == 0].sum() > 0:
        return 0.0
    likely = want * len(token) >= 5  # where the test is valid; the others together are one more kind
    observed = [*counts[likely].tolist(), int(counts[~likely].sum())]
    expected = [*(want[likely] * len(token)).tolist(), float(want[~likely].sum() * len(token))]
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    total = sum(expected)
    return float(chisquare(observed, [each * sum(observed) / total for each in expected]).pvalue)
