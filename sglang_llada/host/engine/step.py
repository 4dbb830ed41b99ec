"""The life of a step: launched, on its way to the host, read, and taken apart into decisions."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sglang_llada.blocks import Decided, Plan, Request, Row
from sglang_llada.config import DecodeConfig
from sglang_llada.decode.layout import number
from sglang_llada.decode.whole import Group
from sglang_llada.host.engine.rows import Flags, Outcome


@dataclass(frozen=True, slots=True)
class InFlight:
    """A launched step.

    Attributes:
        plan: its rows.
        deciding: which of them decide, bool [R].
        can_defer: of those, the ones of requests that can defer.
        rare: the ones of requests with stop ids that `Executor.stops` may not list.
        own: their positions that are not a prompt's, bool [R, T].
        outcome: what was decided (decide.pack), on its way to the host; None if no row decides.
        replayed: whether a graph ran it.
        groups: requests with more to them than their best tokens.
        reports: the log-probabilities that some of them want, see whole.report().
        failed: what went wrong with what a request asks of its logits, by id.
        taken_over: blocks, by identity, that it took over from a step that was not read. Where that step finished one,
            the row in this step sealed it.
    """

    plan: Plan
    deciding: Flags
    can_defer: Flags
    rare: Flags
    own: Flags
    outcome: Coming | None
    replayed: bool
    groups: list[RequestGroup]
    reports: Coming | None
    failed: dict[str, Exception] = field(default_factory=dict)
    taken_over: frozenset[int] = field(default=frozenset())


@dataclass(slots=True)
class Arrival:
    """What tells that a copy is on the host; None where it is known to be."""

    event: Any = None

    def wait(self) -> None:
        """Until it is."""
        if self.event is not None:
            self.event.synchronize()
            self.event = None


@dataclass(frozen=True, slots=True)
class Coming:
    """A tensor on its way to the host, perhaps with others."""

    tensor: Tensor
    arrival: Arrival

    def wait(self) -> Any:
        """Its numbers, as numpy has them."""
        self.arrival.wait()
        return self.tensor.numpy()


class RequestGroup(NamedTuple):
    """Positions of a request that a step chooses tokens for or reports on."""

    request: Request[DecodeConfig]
    positions: list[int]
    group: Group


class Decision(NamedTuple):
    """What a step decided for each live block of a request, and in which of its rows."""

    request: Request[DecodeConfig]
    rows: list[int]
    blocks: list[Decided]

    @property
    def finite(self) -> bool:
        """Whether the logits were."""
        return all(block.tokens[0] >= 0 for block in self.blocks)


class StepResult(NamedTuple):
    """A step that was read.

    Attributes:
        rows: as planned.
        outcome: what was made of them.
        blocking: the rows that what follows depends on: those that are done, have a stop token now or logits that are
            not finite, and all of requests that cannot defer; bool [R].
        deferrable: the other rows that decide, bool [R].
        reports: log-probabilities by request id and position.
    """

    rows: list[Row]
    outcome: Outcome
    blocking: Flags
    deferrable: Flags
    reports: dict[str, dict[int, list[float]]]

    def decisions(self, which: Flags) -> list[Decision]:
        """Those for some rows, with all or none of a request's among them."""
        at = which.nonzero()[0]
        if not len(at):
            return []
        decisions: list[Decision] = []
        for r, decided in zip(at.tolist(), self.outcome.decided(at), strict=True):
            request = self.rows[r].request
            if decisions and decisions[-1].request is request:
                decisions[-1].rows.append(r)
                decisions[-1].blocks.append(decided)
            else:
                decisions.append(Decision(request, [r], [decided]))
        return decisions

    def noted(self, decision: Decision) -> list[Decided]:
        """The blocks of a decision with what is to be said of each token."""
        report = self.reports.get(decision.request.rid, {})
        found = zip(decision.rows, decision.blocks, strict=True)
        return [noted(self.rows[r], decided, self.outcome.trace(r), report) for r, decided in found]

    @property
    def carried(self) -> list[Row]:
        """The deferrable rows, which the next step has too unless their requests end or are retracted."""
        return list(compress(self.rows, self.deferrable.tolist()))


class Note(NamedTuple):
    """Of a token: the step of its block, from 1, that put it there, its probability then, and its row of a report."""

    step: int
    prob: float
    report: list[float] | None = None


def noted(row: Row, decided: Decided, trace: list[int], reports: dict[int, list[float]]) -> Decided:
    """Decisions for a row's block with what is to be said of each token; `reports` by position."""
    block = row.block
    assert block is not None
    T = len(block.tokens)
    written, origin, prob = trace[:T], trace[T : 2 * T], trace[2 * T :]
    notes = [
        Note(block.steps + 1, number(prob[i]), reports.get(block.start + origin[i]))
        if written[i]
        else block.notes[origin[i]]
        if origin[i] >= 0
        else None
        for i in range(T)
    ]
    return decided._replace(notes=notes)


def to_host(*tensors: Tensor | None) -> list[Coming | None]:
    """Begin to copy tensors to the host, behind what is enqueued now and before what comes next.

    One copy takes them all, so their numbers have eight bytes each.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if not given or given[0].device.type == "cpu":  # the next step may write where they lie
        return [None if tensor is None else Coming(tensor.clone(), Arrival()) for tensor in tensors]
    flat = given[0] if len(given) == 1 else torch.cat([tensor.flatten().view(torch.int64) for tensor in given])
    host = torch.empty_like(flat, device="cpu", pin_memory=True)
    host.copy_(flat, non_blocking=True)
    arrival = Arrival(torch.get_device_module(flat.device).Event())
    arrival.event.record()
    parts = iter(host.flatten().split([tensor.numel() for tensor in given]))
    return [
        None if tensor is None else Coming(next(parts).view(tensor.dtype).view(tensor.shape), arrival)
        for tensor in tensors
    ]
