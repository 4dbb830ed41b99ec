"""What requests do to their logits, against loops that read like the definition."""

from __future__ import annotations

import random

import pytest
import torch

from sglang_llada.decode.penalties import add, ban, counted, penalise
from sglang_llada.llada2.editing import Wishes

V = 30


@pytest.mark.parametrize("seed", range(20))
def test_penalties_bias_and_bans_are_the_references(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    size, ends = 8, [3, 7]
    decided = {i: rng.randrange(V) for i in range(size) if rng.random() < 0.5}  # of the block
    output = [rng.randrange(V) for _ in range(rng.choice([0, 5, 60]))]  # before it
    wishes = Wishes(
        repetition=rng.choice([1.0, 0.5, 1.7]),
        frequency=rng.uniform(-2, 2),
        presence=rng.uniform(-2, 2),
        min_new_tokens=len(output) + rng.randrange(size),
        ends=frozenset(ends),
        bias={rng.randrange(V): rng.uniform(-50, 50) for _ in range(3)},
    )
    logits = torch.randn(size, V)
    own = torch.tensor([decided.get(i, -1) for i in range(size)])
    counts = counted(torch.tensor([*output, *decided.values()], dtype=torch.long), own, V)
    got = penalise(logits, counts, wishes.repetition, wishes.frequency, wishes.presence)
    early = torch.tensor([len(output) + i < wishes.min_new_tokens for i in range(size)])
    got = ban(got, early, torch.tensor(ends))
    got = add(got, torch.tensor(list(wishes.bias)), torch.tensor(list(wishes.bias.values())))
    for i in range(size):
        others = [*output, *(token for at, token in decided.items() if at != i)]
        want = wishes.changed(logits[i].tolist(), len(output) + i, others)
        assert got[i].tolist() == pytest.approx(want, abs=1e-5)


def test_no_tokens_no_change() -> None:
    logits = torch.randn(2, V)
    counts = counted(torch.tensor([], dtype=torch.long), torch.tensor([-1, -1]), V)
    assert torch.equal(penalise(logits, counts, 1.5, 1.0, 1.0), logits)
