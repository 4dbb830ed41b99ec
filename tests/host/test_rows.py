"""Rows that are taken over from the last step's outcome are those that would be written out."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from sglang_llada.blocks import Decided, Phase, Request, Table, next_step
from sglang_llada.config import DecodeConfig
from sglang_llada.decode.contract import Tokens
from sglang_llada.decode.decide import fresh, idle, numbers
from tests.blocks.test_simulation import EOS, MASK, RULES, VOCAB, T, denoise

pytestmark = pytest.mark.host

TOKENS = Tokens(MASK)
PARAMS = DecodeConfig.defaults(T, "joint_threshold")


def request(rid: str, rng: random.Random) -> Request[DecodeConfig]:
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(0, 20))]
    made = Request(rid, prompt, rng.randint(1, 30), frozenset({EOS}), PARAMS, T, MASK, fresh=fresh(T, TOKENS))
    made.rules, made.numbers = rng.choice(RULES), numbers(PARAMS)
    return made


def pack(decided: list[Decided | None]) -> torch.Tensor:
    """What a device gives back of rows, of which some decide nothing."""
    rows = []
    for each in decided:
        open_bits = [0 if each is None else each.open >> i & 1 for i in range(T)]
        ids = [0] * T if each is None else each.tokens
        state = [0, 0] if each is None else list(each.state)
        rows.append([*ids, *open_bits, each is None or each.done, *state])
    return torch.tensor(rows, dtype=torch.int64)


@pytest.mark.parametrize("seed", range(3))
def test_kept_rows_are_those_that_would_be_written(seed: int) -> None:
    from sglang_llada.host.rows import Outcome, Writer, send

    rng, table, writer, kept = random.Random(seed), Table(), Writer(T, idle(T, TOKENS)), 0
    for turn in range(400):
        if len(table) < 6:
            table.add(request(f"r{turn}", rng))
        for each in list(table):
            if each.phase is Phase.WAITING and rng.random() < 0.7:
                table.readmit(each.rid, rng.randrange(each.live_from // T + 1) * T)
            elif each.phase is Phase.DECODING and rng.random() < 0.05:
                each.retract()
            elif rng.random() < 0.02:
                table.drop(each.rid)
        plan = next_step(table, 12)
        tokens, records = writer.write(plan)
        want_tokens, want_records = Writer(T, idle(T, TOKENS)).write(plan)
        assert np.array_equal(tokens, want_tokens) and np.array_equal(records, want_records)
        kept += sum(row.block is not None and id(row.block.tokens) in writer.row_of for row in plan.rows)
        table.advance(plan)
        at = [r for r, row in enumerate(plan.rows) if row.block is not None]
        if not at:
            continue
        steps = {row.request.rid: iter(denoise(row.request, rng)) for row in plan.rows if row.block is not None}
        news = [None if row.block is None else next(steps[row.request.rid]) for row in plan.rows]
        news = [new and new._replace(state=[rng.randrange(9), rng.randrange(9)]) for new in news]
        rows = send(tokens, records, [0] * len(news), [row.start for row in plan.rows], 100, "cpu")
        outcome = Outcome.read(pack(news), at, T, 2)
        writer.keep(rows, outcome, at)
        made = zip(outcome.tokens, outcome.open.tolist(), outcome.done, outcome.state.tolist(), strict=True)
        taken: dict[str, list[Decided]] = {}
        for r, each in zip(at, made, strict=True):
            taken.setdefault(plan.rows[r].request.rid, []).append(Decided(*each))
        for rid, blocks in taken.items():
            if len(blocks) == 1 and not blocks[0].open and rng.random() < 0.2:  # the host may cut what was decided
                blocks = shortened(table[rid], blocks[0])
            table[rid].decide(blocks)
            if table[rid].phase is Phase.DONE:
                table.drop(rid)
    assert kept > 300


def shortened(request: Request[DecodeConfig], new: Decided) -> list[Decided]:
    """Decisions of which the last one is taken back, if that leaves one."""
    (block,) = request.blocks
    decided = [i for i in range(T) if block.open >> i & 1]
    if len(decided) < 2:
        return [new]
    tokens = list(new.tokens)
    tokens[decided[-1]] = MASK
    return [Decided(tokens, 1 << decided[-1], False, new.state)]
