"""Steps from launch until what they decided is taken: at most two are in flight, one is read and not all taken.

Of a step that is read, those decisions are taken at once that the next step's rows depend on; the others, with all that
is told to the outside, when the next one is launched and the device works. scheduler.py says in which order.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from sglang_llada.blocks import Decided, Phase, Plan, Request, Row, RowKind
from sglang_llada.config import DecodeConfig
from sglang_llada.errors import ConfigError
from sglang_llada.host.engine.executor import Executor
from sglang_llada.host.engine.failures import Failures
from sglang_llada.host.engine.rows import is_constrained
from sglang_llada.host.engine.step import Decision, InFlight, StepResult
from sglang_llada.host.engine.streaming import snapshot_of
from sglang_llada.host.requests.grammar import conform

# Of the requests that decide. Who is left out gives up half of its steps: with more of them that costs more than it
# brings to the others (`python -m bench.ahead`).
LEFT_OUT_SHARE = 1 / 8


class Pipeline:
    """The steps that are on their way.

    Attributes:
        flights: launched, the oldest first; all but the last are not read.
        result: of the step read last, if some of its decisions are not taken yet.
        carried: of that step, the rows that the next one has too.
        decided: requests with decisions that the outside has not been told of.
    """

    def __init__(self, executor: Executor, failures: Failures, mask_id: int) -> None:
        self.executor, self.failures, self.mask_id = executor, failures, mask_id
        self.flights: deque[InFlight] = deque()
        self.result: StepResult | None = None
        self.carried: list[Row] = []
        self.decided: list[Request[DecodeConfig]] = []

    def launch(self, plan: Plan, of_ranks: list[int] | None) -> InFlight:
        """Enqueue a step; `of_ranks` as for Executor.launch()."""
        step = self.executor.launch(plan, of_ranks)
        self.flights.append(step)
        self.carried = []
        for request, fills in plan.fills().items():
            try:
                request.take_part(fills)
            except Exception as error:
                self.failures.note(request.rid, error)
        return step

    def read(self) -> None:
        """Read the oldest step in flight and take what the next one depends on."""
        if not self.flights:
            return
        flight = self.flights.popleft()
        self.result = self.executor.read(flight)
        for rid, error in flight.failed.items():
            self.failures.note(rid, error)
        if self.result is not None:
            self.carried = self.result.carried
            self._take(self.result, self.result.decisions(self.result.blocking))

    def take_rest(self) -> None:
        """Take the decisions that the next step's rows did not depend on."""
        if self.result is not None:
            result, self.result = self.result, None
            self._take(result, result.decisions(result.deferrable))

    def drain(self) -> None:
        """Read all that is in flight, and take all decisions."""
        while self.flights:
            self.read()
            self.take_rest()
        # Who is retracted now may be let in again before the next step, with another place for its KV.
        self.carried = []

    def _take(self, result: StepResult, decisions: list[Decision]) -> None:
        for decision in decisions:
            request = decision.request
            # The first if it ended while the step ran, by a stop string or an abort.
            if request.phase is Phase.DONE or request.rid in self.failures:
                continue
            try:
                if not decision.finite:
                    raise ArithmeticError("the model gave logits that are not finite")
                blocks = decision.blocks if request.plain else self._conforming(result, decision)
                first = request.blocks[0]
                request.decide(blocks)
                if self.flights and id(first) in self.flights[-1].taken_over and request.filled == first.start:
                    self._note_sealed(request)
                if request.params.stream_mode == "denoise":
                    request.shown.append(snapshot_of(request))
                self.decided.append(request)
            except Exception as error:
                self.failures.note(request.rid, error)

    def _conforming(self, result: StepResult, decision: Decision) -> list[Decided]:
        """A step's decisions as the request may take them: noted, and of one with a grammar what that accepts."""
        request = decision.request
        blocks = result.noted(decision) if request.noted else decision.blocks
        if not is_constrained(request):
            return blocks
        [block], [decided] = request.blocks, blocks
        accepted = conform(request.shaping.matcher, block, decided, self.mask_id)
        if accepted is None:
            raise ConfigError("the grammar allows no token of the vocabulary after the output so far")
        return [accepted]

    def _note_sealed(self, request: Request[DecodeConfig]) -> None:
        """The first block was live in the step that is read, and is in the next one too: if it left, that sealed it."""
        if request.phase is not Phase.DONE and request.filled < request.live_from:
            request.fill(1)

    @property
    def untold(self) -> bool:
        """Whether something was decided that the outside has not been told of."""
        return bool(self.decided) or self.result is not None

    def ahead(self) -> Ahead | None:
        """As ahead(), of the one step in flight; None if there are none, or two."""
        return ahead(self.flights[0].plan) if len(self.flights) == 1 else None


class Ahead(NamedTuple):
    """What is known of the next step before the last one is read.

    Attributes:
        rows: those that both have, and those of blocks that are about to begin.
        left_out: requests whose next rows are not known: with several live blocks, or with something for the host to do
            between their steps. They have rows in every other step.
    """

    rows: list[Row]
    left_out: set[Request[DecodeConfig]]


def ahead(plan: Plan) -> Ahead | None:
    """What is known of the step behind one that is not read; None if too many requests would be left out of it."""
    rows: list[Row] = []
    left_out: set[Request[DecodeConfig]] = set()
    going_on = 0
    for row in plan.rows:
        request = row.request
        if row.block is None or request.phase is not Phase.DECODING:
            continue
        if not request.single:
            left_out.add(request)
            continue
        if row.start != request.live_from:
            continue  # sealed by that step, or begun too early in it
        going_on += 1
        rows.append(row)
        if request.may_finish_block and (block := request.block_after()) is not None:
            rows.append(Row(request, RowKind.DENOISE, block.start, block))
    return Ahead(rows, left_out) if len(left_out) <= LEFT_OUT_SHARE * (going_on + len(left_out)) else None
