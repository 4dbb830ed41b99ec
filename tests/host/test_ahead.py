"""Steps launched before the one before them is read, against a decode of each request alone: the same tokens.

The model is a hash. What a row decides depends on the tokens whose KV lies in its request's pages when it attends, and
on nothing else: a block that is begun beside one that is not final, a row that goes on from a wrong one, or KV that is
not final when it is shared gives other tokens.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from sglang_llada.blocks import Block, Decided, Ending, Phase, Plan, Request, Rules
from sglang_llada.config import DecodeConfig
from sglang_llada.decode.contract import State, StepOut, Tokens
from sglang_llada.decode.layout import OPEN_COLUMN, fresh, idle, layout_of, numbers

pytestmark = pytest.mark.host

T, VOCAB, MASK, EOS = 4, 50, 0, 1
TOKENS = Tokens(MASK)
SLOTS, LONGEST, PAGES, BUDGET = 9, 96, 60, 12
EDITS = 3  # most steps that edit a block with nothing open
RULES = {
    "threshold": Rules(),
    "whole blocks": Rules(whole_blocks=True),
    "edits": Rules(edits=True, whole_blocks=True, most_steps=T + EDITS + 1),
}


class Made(NamedTuple):
    """What the model makes of a block: tokens, open set, done, and how many edits it has made."""

    tokens: list[int]
    open: int
    done: bool
    edits: int


def model(context: tuple[int, ...], ids: list[int], is_open: int, editable: int, edits: int) -> Made:
    """The block after a step, from all tokens before it and its own."""
    rng = random.Random(hash((context, tuple(ids), is_open)))
    tokens, holes = list(ids), [i for i in range(T) if is_open >> i & 1]
    for i in rng.sample(holes, rng.randint(1, len(holes)) if holes else 0):
        tokens[i] = EOS if rng.random() < 0.02 else rng.randrange(2, VOCAB)
        is_open &= ~(1 << i)
    if not editable:
        return Made(tokens, is_open, not is_open, edits)
    if not holes and edits < EDITS and rng.random() < 0.5:
        places = [i for i in range(T) if editable >> i & 1]
        tokens[rng.choice(places)] = rng.randrange(2, VOCAB)
        return Made(tokens, 0, False, edits + 1)
    return Made(tokens, is_open, not holes, edits)


def placed(made: Made, ids: list[int], is_open: int) -> list[bool]:
    """Which tokens a step put where there was none, or another one."""
    return [
        not made.open >> i & 1 and (is_open >> i & 1 == 1 or token != ids[i]) for i, token in enumerate(made.tokens)
    ]


def cut(block: Block, decided: Decided) -> Decided:
    """What is taken of the decisions for a request with a grammar: the first new token."""
    first, *others = [i for i in range(T) if (block.open & ~decided.open) >> i & 1] or [0]
    tokens = [MASK if i in others else token for i, token in enumerate(decided.tokens)]
    is_open = decided.open | sum(1 << i for i in others)
    return decided._replace(tokens=tokens, open=is_open, done=not is_open)


SHAPING = SimpleNamespace(matcher="a grammar", of=lambda request, positions: lambda logits: logits)


def decoded(asked: Request[DecodeConfig]) -> tuple[list[int], list[int]]:
    """The answer to a request, decoded alone, and the step of its block that put each token there."""
    prompt = list(asked.prompt)
    request = new_request("alone", prompt, asked.rules, asked.max_new_tokens, asked.canvas, noted=True)
    request.admit(request.live_from)
    while request.phase is not Phase.DONE:
        (block,) = request.blocks
        editable = (1 << T) - 1 ^ block.fixed if asked.rules.edits else 0
        context = tuple((prompt + request.output)[: block.start])
        made = model(context, block.tokens, block.open, editable & ~block.open, block.state[1])
        new = placed(made, block.tokens, block.open)
        notes = [block.steps + 1 if now else step for now, step in zip(new, block.notes, strict=True)]
        news = Decided(made.tokens, made.open, made.done, [block.state[0] + 1, made.edits], notes)
        request.decide([cut(block, news) if asked.needs_host else news])
        if request.phase is not Phase.DONE:
            request.fill(request.unfilled)
    return request.output, request.notes


def some_canvas(rng: random.Random, length: int) -> list[int | None]:
    """Given runs, the later ones with stop tokens, and open positions between and behind them; or none."""
    canvas: list[int | None] = []
    while rng.random() < 0.7 and len(canvas) < length:
        canvas += [rng.choice([EOS] * bool(canvas) + [*range(2, 20)]) for _ in range(rng.choice([1, 4, 6, 13]))]
        canvas += [None] * rng.choice([1, 1, 3, 6])
    return canvas[: length - 1] + [None] if canvas else []


def new_request(
    rid: str, prompt: list[int], rules: Rules, new: int, canvas: Sequence[int | None] = (), **options: Any
) -> Request[DecodeConfig]:
    params = DecodeConfig.defaults(T, "joint_threshold" if rules.edits else "threshold")
    options |= {"fresh": fresh(T, TOKENS), "numbers": numbers(params), "rules": rules}
    return Request(rid, prompt, len(canvas) or new, frozenset({EOS}), params, T, MASK, canvas, **options)


class Hashed:
    """The decider: what the model says of each row, from the KV that lies in its request's pages."""

    block_size, tokens, idle, layout = T, TOKENS, idle(T, TOKENS), layout_of(T, TOKENS)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=VOCAB))

    def __init__(self) -> None:
        self.last = torch.zeros(200, T + 4, dtype=torch.int64)
        self.kv = torch.full((SLOTS * LONGEST,), -1)
        self.batch: Any = None

    def forward(self, batch: Any) -> Any:
        self.kv[batch.out_cache_loc] = batch.input_ids
        self.batch = batch
        return SimpleNamespace(logits_output=SimpleNamespace(hidden_states=batch.input_ids), can_run_graph=False)

    def report(self, *_: Any) -> None:
        """Nobody wants one."""

    def __call__(self, hidden: Any, ids: torch.Tensor, table: torch.Tensor, count: int, **_: Any) -> StepOut:
        made, new = [], []
        slots, ends = self.batch.req_pool_indices.tolist(), self.batch.seq_lens.tolist()
        for r, (slot, end) in enumerate(zip(slots, ends, strict=True)):
            context = tuple(self.kv[slot * LONGEST : slot * LONGEST + end - T].tolist())
            is_open, _, edits, editable = table[r, : OPEN_COLUMN + 4].tolist()
            mine = ids[r * T : (r + 1) * T].tolist()
            made.append(model(context, mine, is_open, editable & ~is_open, edits))
            new.append(placed(made[-1], mine, is_open))
        rows = len(made)
        is_open = torch.tensor([each.open for each in made])[:, None] >> torch.arange(T) & 1 == 1
        return StepOut(
            ids=torch.tensor([each.tokens for each in made]),
            open=is_open,
            done=torch.tensor([each.done for each in made]),
            state=State(table[:, 1] + 1, torch.tensor([each.edits for each in made]), ids.new_zeros(rows, 0)),
            written=torch.tensor(new),
            origin=torch.arange(T).repeat(rows, 1),
            prob=torch.ones(rows, T),
        )


@dataclass
class Load:
    """Requests that arrive, end and are aborted, on a scheduler without the host around it."""

    scheduler: Any
    rng: random.Random
    waiting: deque[Request[DecodeConfig]] = field(default_factory=deque)
    answers: dict[str, Request[DecodeConfig]] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    retracted: int = 0

    def admit(self) -> None:
        """What stands for Admission.admit_waiting."""
        scheduler, used = self.scheduler, {request.slot for request in self.scheduler.table}
        free = [slot for slot in range(SLOTS) if slot not in used]
        while self.waiting and free and self.rng.random() < 0.7:
            request = self.waiting.popleft()
            if scheduler.table.get(request.rid) is None:
                scheduler.table.add(request)
            request.slot, request.room = free.pop(), 0
            scheduler.table.readmit(request.rid, 0)
            scheduler.pages.reqs[request.rid] = SimpleNamespace(rid=request.rid, to_finish=None)
        scheduler.running_batch.reqs = list(scheduler.pages.reqs.values())

    def ensure_pages(self, reach: dict[str, int]) -> bool:
        """What stands for Pages.ensure: the pool has PAGES of them."""
        table = self.scheduler.table
        held = sum(request.room for request in table) + sum(upto - table[rid].room for rid, upto in reach.items())
        if held > PAGES * T:
            return False
        for rid, upto in reach.items():
            table[rid].room = upto
        return True

    def retract_one(self) -> None:
        """What stands for _retract_one."""
        table = self.scheduler.table
        rid = self.rng.choice([rid for rid in self.scheduler.pages.reqs if table[rid].phase is not Phase.DONE])
        table[rid].retract()
        table[rid].slot, table[rid].room = -1, 0
        del self.scheduler.pages.reqs[rid]
        self.waiting.append(table[rid])
        self.retracted += 1

    def book(self) -> None:
        """What stands for Booking.book: ended requests leave."""
        scheduler = self.scheduler
        scheduler.pipeline.take_rest()
        scheduler.pipeline.decided.clear()
        for rid in list(scheduler.pages.reqs):
            request = scheduler.table[rid]
            if request.phase is Phase.DONE:
                if request.ending is Ending.OUTSIDE:
                    self.aborted.append(rid)
                else:
                    self.answers[rid] = request
                del scheduler.pages.reqs[rid]
                scheduler.table.drop(rid)
        scheduler.running_batch.reqs = list(scheduler.pages.reqs.values())


def scheduler_of(load_rng: random.Random, *, ahead: bool) -> Load:
    from bench.step import idle_scheduler
    from sglang_llada.host.engine.executor import Executor

    scheduler: Any = idle_scheduler(SLOTS)
    hashed = Hashed()
    runner = scheduler.pipeline.executor.runner
    runner.req_to_token_pool.req_to_token = torch.arange(SLOTS * LONGEST).view(SLOTS, LONGEST).int()
    runner.forward = hashed.forward
    executor = Executor(runner, hashed)  # type: ignore[arg-type]  # a stand-in
    executor.stops[EOS] = True
    scheduler.pipeline.executor, scheduler.pages.block_size = executor, T
    scheduler.row_budget, scheduler.overlaps, scheduler.runs_ahead = BUDGET, True, ahead
    load = Load(scheduler, load_rng)
    scheduler.admission = SimpleNamespace(admit_waiting=load.admit)
    scheduler.pages.ensure, scheduler.pages.share = load.ensure_pages, lambda plan: None
    scheduler.pages.held = lambda: {rid: scheduler.table[rid].room for rid in scheduler.pages.reqs}
    scheduler.booking.book, scheduler._retract_one, scheduler.on_idle = load.book, load.retract_one, lambda: None
    return load


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's parallel state, of which an executor asks this, is not up here."""
    from sglang_llada.host.engine import executor

    monkeypatch.setattr(executor, "enable_num_token_non_padded", lambda: False)


@torch.inference_mode()
def run(seed: int, count: int, *, ahead: bool) -> Load:
    """So many requests served, some of them aborted, with pauses in which nothing may be in flight."""
    rng = random.Random(seed)
    load = scheduler_of(random.Random(seed + 1), ahead=ahead)
    scheduler, asked = load.scheduler, 0
    while len(load.answers) + len(load.aborted) < count:
        if asked < count and rng.random() < 0.5:
            rid, rules = f"r{asked}", rng.choice(list(RULES.values()))
            prompt = [rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 30))]
            new = rng.randint(1, 40)
            canvas = some_canvas(rng, new) if rng.random() < 0.5 else ()
            noted, grammar = rng.random() < 0.5, not rules.edits and rng.random() < 0.3
            kind = {"noted": noted, "needs_host": grammar, "shaping": SHAPING if grammar else None}
            request = new_request(rid, prompt, rules, new, canvas, **kind, plain=not noted and not grammar)
            load.waiting.append(request)
            asked += 1
        scheduler._turn()
        scheduler.table.check_integrity(scheduler.pages.held())
        if rng.random() < 0.02 and scheduler.pages.reqs:
            victim = rng.choice(list(scheduler.pages.reqs.values()))
            if victim.to_finish is None:
                victim.to_finish = "aborted"
        if rng.random() < 0.01:
            scheduler.settle()
            assert not scheduler.pipeline.flights
    return load


@pytest.mark.parametrize(
    ("ahead", "count"), [(True, 500), (False, 200), pytest.param(True, 10_000, marks=pytest.mark.long)]
)
def test_answers_are_those_of_each_request_alone(ahead: bool, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_llada.host.engine import pipeline

    steps: Counter[str] = Counter()

    def counted(plan: Plan) -> pipeline.Ahead | None:
        found = known(plan)
        steps["read first" if found is None else "all" if not found.left_out else "some left out"] += 1
        return found

    monkeypatch.setattr(pipeline, "conform", lambda matcher, block, decided, mask_id: cut(block, decided))
    known = pipeline.ahead
    monkeypatch.setattr(pipeline, "ahead", counted)
    monkeypatch.setattr(pipeline, "LEFT_OUT_SHARE", 0.4)
    load = run(7, count, ahead=ahead)
    wrong = [rid for rid, request in load.answers.items() if not as_alone(request)]
    print(f"{len(load.answers)} answers, {len(load.aborted)} aborted, {load.retracted} retracted, {len(wrong)} wrong")
    print(f"of steps launched ahead had: {dict(steps)}")
    assert not wrong and len(load.answers) > count / 2 and load.retracted > count / 100
    assert len(steps) == (3 if ahead else 0) and all(seen > count / 10 for seen in steps.values())


def as_alone(request: Request[DecodeConfig]) -> bool:
    """Whether an answer, and the steps of its tokens where they are noted, are those of the request decoded alone."""
    output, steps = decoded(request)
    return request.output == output and (not request.noted or [note and note.step for note in request.notes] == steps)
