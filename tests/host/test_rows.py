"""Rows go on from a step's outcome as if all of its decisions had been taken and every row written out."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_llada.blocks import Decided, Phase, Plan, Request, Row, Table, next_step
from sglang_llada.config import DecodeConfig
from sglang_llada.decode.contract import State, StepOut, Tokens
from sglang_llada.decode.layout import fresh, idle, layout_of, numbers
from tests.blocks.test_simulation import EOS, MASK, RULES, VOCAB, T, denoise
from tests.sets import set_of

pytestmark = pytest.mark.host

TOKENS, BUDGET, SLOTS = Tokens(MASK), 12, 9
PARAMS = DecodeConfig.defaults(T, "joint_threshold")


def request(rid: str, rng: random.Random, *, plain: bool = True) -> Request[DecodeConfig]:
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(0, 20))]
    more: dict[str, Any] = {"fresh": fresh(T, TOKENS), "numbers": numbers(PARAMS), "rules": rng.choice(RULES)}
    more |= {"plain": plain, "needs_host": not plain}
    return Request(rid, prompt, rng.randint(1, 30), frozenset({EOS}), PARAMS, T, MASK, **more)


class FakeModel:
    """Decides what it is told to."""

    block_size, idle, layout = T, idle(T, TOKENS), layout_of(T, TOKENS)
    last = torch.zeros(64, T + 4, dtype=torch.int64)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=VOCAB))
    news: list[Decided]

    def __call__(self, hidden: Any, ids: torch.Tensor, table: torch.Tensor, count: int, **_: Any) -> StepOut:
        is_open = torch.tensor([[new.open >> i & 1 for i in range(T)] for new in self.news], dtype=torch.bool)
        step, edits = torch.tensor([list(new.state) for new in self.news]).unbind(-1)
        return StepOut(
            ids=torch.tensor([new.tokens for new in self.news]),
            open=is_open,
            done=torch.tensor([new.done for new in self.news]),
            state=State(step, edits, ids.new_zeros(len(self.news), 0)),
            written=~is_open,
            origin=torch.zeros(len(self.news), T, dtype=torch.int64),
            prob=torch.zeros(len(self.news), T),
        )


def executor(model: FakeModel) -> Any:
    from sglang_llada.host.engine.executor import Executor

    runner = SimpleNamespace(
        device="cpu",
        decode_cuda_graph_runner=None,
        lora_manager=None,
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(SLOTS, 100, dtype=torch.int32)),
        kv_index_translator=SimpleNamespace(bind_own_plan=lambda batch: None),
        forward=lambda batch: SimpleNamespace(
            logits_output=SimpleNamespace(hidden_states=batch.input_ids), can_run_graph=False
        ),
    )
    made = Executor(runner, model)  # type: ignore[arg-type]  # a stand-in
    made.stops[EOS] = True
    return made


@pytest.mark.parametrize("seed", range(3))
def test_the_next_step_is_the_same_before_deferrable_rows_decisions_are_taken(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_llada.host.engine import executor as module
    from sglang_llada.host.engine import rows as rows_module
    from sglang_llada.host.engine.rows import Writer

    constrained: set[str] = set()  # requests with a grammar, which may cut what was decided
    monkeypatch.setattr(rows_module, "is_constrained", lambda request: request.rid in constrained)
    monkeypatch.setattr(module, "enable_num_token_non_padded", lambda: False)
    rng, table, model = random.Random(seed), Table(), FakeModel()
    device = executor(model)
    carried: list[Row] = []
    kept = waited = 0
    for turn in range(400):
        if len(table) < 6:
            constrained |= {f"r{turn}"} if rng.random() < 0.2 else set()
            table.add(request(f"r{turn}", rng, plain=f"r{turn}" not in constrained))
        for each in list(table):
            if each.phase is Phase.WAITING and rng.random() < 0.7:
                each.slot = rng.randrange(SLOTS)
                table.readmit(each.rid, rng.randrange(each.live_from // T + 1) * T)
            elif each.phase is Phase.DECODING and rng.random() < 0.05:
                each.retract()
            elif rng.random() < 0.02:
                table.drop(each.rid)
        plan = next_step(table, BUDGET, [row for row in carried if row.request.phase is Phase.DECODING])
        assert numbers_of(device.writer, plan) == numbers_of(Writer(layout_of(T, TOKENS), idle(T, TOKENS)), plan)
        kept += sum(id(row.block) in device.writer.row_of for row in plan.rows)
        model.news = news_for(plan, rng)
        launched = device.launch(plan)
        for each, fills in plan.fills().items():
            each.take_part(fills)
        result, carried = device.read(launched), []
        if result is None:
            continue
        carried = result.carried
        for made, _, blocks in result.decisions(result.blocking):
            if made.rid in constrained and len(blocks) == 1 and not blocks[0].open and rng.random() < 0.5:
                blocks = shortened(made, blocks[0])
            made.decide(blocks)
        before = next_step(table, BUDGET, carried)
        early = numbers_of(device.writer, before)
        for made, _, blocks in result.decisions(result.deferrable):
            made.decide(blocks)
            waited += 1
        after = next_step(table, BUDGET)
        assert (
            early
            == numbers_of(device.writer, after)
            == numbers_of(Writer(layout_of(T, TOKENS), idle(T, TOKENS)), after)
        )
        assert [row for row in before.rows if row in carried] == carried
        for each in [each for each in table if each.phase is Phase.DONE]:
            table.drop(each.rid)
    assert kept > 300 and waited > 100


def numbers_of(writer: Any, plan: Plan) -> dict[tuple[str, int], list[int]]:
    """What is written for each request and position."""
    written: list[list[int]] = writer.write(plan).tolist()
    assert len(written) == len(plan.rows)
    return {(row.request.rid, row.start): each for row, each in zip(plan.rows, written, strict=True)}


def news_for(plan: Plan, rng: random.Random) -> list[Decided]:
    """Decisions for each row; of those that decide nothing, any."""
    steps = {row.request.rid: iter(denoise(row.request, rng)) for row in plan.rows if row.block is not None}
    nothing = Decided([EOS] * T, 0, True)
    news = [nothing if row.block is None else next(steps[row.request.rid]) for row in plan.rows]
    return [new._replace(state=[rng.randrange(9), rng.randrange(9)]) for new in news]


def shortened(request: Request[DecodeConfig], new: Decided) -> list[Decided]:
    """Decisions of which the last one is taken back, if that leaves one."""
    (block,) = request.blocks
    decided = [i for i in range(T) if block.open >> i & 1]
    if len(decided) < 2:
        return [new]
    tokens = list(new.tokens)
    tokens[decided[-1]] = MASK
    return [Decided(tokens, 1 << decided[-1], False, new.state)]


def test_logits_that_are_not_finite_are_blocking(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_llada.host.engine import executor as module

    monkeypatch.setattr(module, "enable_num_token_non_padded", lambda: False)
    table, model = Table(), FakeModel()
    for rid in "ab":
        table.add(
            Request(rid, [5] * T, 20, frozenset({EOS}), PARAMS, T, MASK, numbers=numbers(PARAMS), fresh=[0, 0], slot=0)
        )
        table.readmit(rid, T)
    device, half = executor(model), set_of([False, False, True, True])
    model.news = [Decided([-1] * T, half, False, [1, 0]), Decided([5, 5, MASK, MASK], half, False, [1, 0])]
    result = device.read(device.launch(next_step(table, BUDGET)))
    assert [(made.request.rid, made.finite) for made in result.decisions(result.blocking)] == [("a", False)]
    assert np.flatnonzero(result.deferrable).tolist() == [1]


def test_a_row_is_blocking_for_its_own_stop_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_llada.host.engine import executor as module

    monkeypatch.setattr(module, "enable_num_token_non_padded", lambda: False)
    table, model = Table(), FakeModel()
    every = frozenset(range(VOCAB))
    stops = {"usual": frozenset({EOS}), "every token": every, "none": frozenset[int](), "another": frozenset({EOS, 9})}
    for rid, ids in stops.items():
        more: dict[str, Any] = {"numbers": numbers(PARAMS), "fresh": [0, 0], "slot": 0}
        table.add(Request(rid, [5] * T, 20, ids, PARAMS, T, MASK, rare_stops=not ids <= {EOS}, **more))
        table.readmit(rid, T)
    half = set_of([False, False, True, True])
    for tokens, blocking in (
        ([5, 6], {"every token"}),
        ([5, 9], {"every token", "another"}),
        ([5, EOS], {*stops} - {"none"}),
    ):
        device = executor(model)
        model.news = [Decided([*tokens, MASK, MASK], half, False, [1, 0])] * len(stops)
        result = device.read(device.launch(next_step(table, BUDGET)))
        assert {made.request.rid for made in result.decisions(result.blocking)} == blocking
