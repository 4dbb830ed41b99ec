"""The step of structured output: runs from the first open position, as far as the network is sure."""

from __future__ import annotations

import random

import torch

from sglang_llada.config import DecodeConfig
from sglang_llada.decode import run
from sglang_llada.decode.contract import BlockRows, Scores, Tokens
from sglang_llada.decode.layout import fresh, numbers, record, unpack
from tests.sets import set_of

T, MASK, ROWS = 8, 9, 10_000


def test_a_step_decides_the_first_open_position_and_what_follows_above_the_threshold() -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    at = [rng.choice([0.0, 0.3, 0.8, 1.0]) for _ in range(ROWS)]
    from_here = [rng.randrange(T + 1) for _ in range(ROWS)]  # mostly open from somewhere on, as requests have it
    holes = [set_of(i >= first and rng.random() < 0.9 for i in range(T)) for first in from_here]
    params = [DecodeConfig.defaults(T).replaced({"threshold": t}).from_left_to_right for t in at]
    records = [record(h, 0, numbers(p), fresh(T, Tokens(MASK))) for h, p in zip(holes, params, strict=True)]
    table = torch.tensor(records)
    ids = torch.randint(0, 50, (ROWS * T,))
    block, state, unpacked, _ = unpack(ids, table, T, Tokens(MASK))
    ids = torch.where(block.open, MASK, block.ids)
    block = BlockRows(ids, block.open, block.editable)
    prob = torch.randint(0, 11, (ROWS, T)) / 10
    token = torch.randint(10, 50, (ROWS, T))
    out = run.step(block, Scores(token, prob), state, unpacked)
    for r in range(ROWS):
        want, is_open = ids[r].tolist(), block.open[r].tolist()
        positions = [i for i in range(T) if is_open[i]]
        for n, i in enumerate(positions):
            if n and not prob[r, i] > unpacked.threshold[r]:
                break
            want[i], is_open[i] = int(token[r, i]), False
        assert out.ids[r].tolist() == want and out.open[r].tolist() == is_open
        assert bool(out.done[r]) == (not any(is_open))
