"""The rows of a forward as numbers, in one copy to the device.

A row (decode/layout.py) is its tokens, its record, its request's place in the host's req_to_token table and its source.
What a step gives back of a row is what the next one is told of it. A row whose block goes on while that step is not
read yet is therefore taken from the step's outcome where it lies, on the device: its source says which row it was
there. All others are written out here, from what the host knows: of rows that went on and were read, as they came back;
of new blocks, of blocks that the host has changed and of known tokens, from the request.
"""

from __future__ import annotations

from array import array
from functools import cache
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sglang_llada.blocks import Block, Decided, Plan, Request, Row
from sglang_llada.blocks.planner import BLOCK
from sglang_llada.config import DecodeConfig
from sglang_llada.decode.layout import RowLayout, record

Numbers = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]

WRITTEN = -1  # the source of a row that is written out


class Rows(NamedTuple):
    """R rows of T tokens on the device.

    ids, positions, loc: int64 [R * T]; loc: where in the KV pool each one's KV goes. table: int64 [R, K], their
    records. slot, start, end: int64 [R], where each one's request stands in req_to_token, its first position, and the
    one behind its last.
    """

    ids: Tensor
    positions: Tensor
    loc: Tensor
    table: Tensor
    slot: Tensor
    start: Tensor
    end: Tensor

    def first(self, rows: int) -> Rows:
        """The first of them."""
        tokens = rows * (len(self.ids) // len(self.slot))
        return Rows(*(each[: tokens if len(each) == len(self.ids) else rows] for each in self))


def unfold(packed: Tensor, last: Tensor, req_to_token: Tensor, layout: RowLayout, *, carries: bool = True) -> Rows:
    """Rows from their numbers on the device: the same eagerly and inside a CUDA graph.

    A row whose block turns out to be done, when it goes on, seals it: its KV is what counts, and nobody asks what the
    step makes of it.

    Args:
        packed: int64 [R, width], as Writer.write() gives them.
        last: the outcome of the step before this one, int64 [at least its rows, made].
        req_to_token: the host's table, [slots, positions].
        carries: whether some row may have a source; a graph does not know.
    """
    T = layout.block_size
    start, slot, source = packed[:, layout.place].T.contiguous()  # as kernels take them
    ids, table = packed[:, layout.tokens], packed[:, layout.record]
    if carries:
        from_last = last.index_select(0, source.clamp(min=0))[:, layout.kept]
        begin = torch.where(source[:, None] >= 0, from_last, packed[:, layout.kept])
        ids, table = begin[:, layout.tokens], torch.cat((begin[:, T:], packed[:, layout.stays]), dim=-1)
    positions = start[:, None] + torch.arange(T, device=packed.device)
    loc = req_to_token.view(-1).index_select(0, (positions + (slot * req_to_token.shape[1])[:, None]).view(-1)).long()
    return Rows(ids.reshape(-1), positions.view(-1), loc, table.contiguous(), slot, start, start + T)


class Outcome(NamedTuple):
    """What a step made of R rows, on the host: int64 [R, at least made], as layout.pack() gives it."""

    numbers: Numbers
    layout: RowLayout

    @property
    def ids(self) -> Numbers:
        """[R, T]."""
        return self.numbers[:, self.layout.tokens]

    @property
    def kept(self) -> Numbers:
        """What the next step's rows begin with, [R, T + 1 + S]."""
        return self.numbers[:, self.layout.kept]

    @property
    def done(self) -> Numbers:
        """0 or 1, [R]."""
        return self.numbers[:, self.layout.done]

    def decided(self, which: Numbers) -> list[Decided]:
        """What the step made of some of its rows."""
        at = self.layout
        tokens, is_open, state, done = at.tokens, at.open, at.state, at.done
        rows = self.numbers[which, : at.made].tolist()
        return [Decided(row[tokens], row[is_open], row[done] == 1, row[state]) for row in rows]

    def trace(self, row: int) -> list[int]:
        """Of a row of a step that was told to give them: written, origin and prob, 3 T."""
        numbers: list[int] = self.numbers[row, self.layout.trace].tolist()
        return numbers


class Writer:
    """Writes the rows of plan after plan, int64 [R, width]."""

    def __init__(self, layout: RowLayout, idle: list[int]) -> None:
        """`idle`: the record of a row that decides nothing."""
        self.layout, self.idle = layout, idle
        self.plan = Plan([])  # of the last step launched
        self.rows: Numbers = np.empty((0, layout.width), np.int64)  # its rows
        self.read = True  # whether they are what that step made of them
        # Where in those each block's row stands that goes on as the step left it; by the identities of the blocks,
        # which `plan` keeps.
        self.row_of: dict[int, int] = {}

    def follow(self, plan: Plan, written: Numbers) -> None:
        """Note which rows a launched step has."""
        self.plan, self.rows, self.read = plan, written, False
        self.row_of = {
            id(row.block): r
            for r, row in enumerate(plan.rows)
            # The state of one that is done stays fresh, and a grammar may change what a step decides.
            if row.block is not None and not row.block.done and not is_constrained(row.request)
        }

    def keep(self, plan: Plan, outcome: Outcome, live: Flags) -> None:
        """Note what a step made of its rows: what was written becomes what is to be written next.

        Args:
            live: of which rows the block was live when they were decided; the others do not go on. [R]
        """
        if plan is not self.plan:
            return  # the step after it is launched, and took them on the device
        self.rows[:, self.layout.kept] = outcome.kept
        self.read = True
        for r in ((outcome.done == 1) | ~live).nonzero()[0].tolist():
            self.row_of.pop(id(plan.rows[r].block), None)

    def write(self, plan: Plan) -> Numbers:
        """The rows of a plan. If the last step is not read, those of its live blocks get it as their source."""
        rows = plan.rows
        origin = list(map(self.row_of.get, map(id, map(BLOCK, rows)), repeat(WRITTEN)))
        if not self.read:
            origin = [r if is_live(row) else WRITTEN for r, row in zip(origin, rows, strict=True)]
        source = WRITTEN if self.read else np.array(origin, np.int64)
        new = [r for r, kept in enumerate(origin) if kept == WRITTEN]
        written = self.rows
        if new:
            flat: list[int] = []
            for i, r in enumerate(new, len(written)):
                origin[r] = i
                request, _, start, block = rows[r]
                if block is None:
                    flat += request.tokens_at(start)
                    flat += self.idle[:-1]
                    flat.append(start)
                else:
                    flat += block.tokens
                    flat += record(block.open, may_edit(request, block), request.numbers, block.state, start)
                flat += request.slot, WRITTEN
            added = np.frombuffer(array("q", flat), np.int64).reshape(len(new), -1)
            written = np.concatenate((written, added))
        written = written[origin]
        written[:, self.layout.source] = source
        return written


def is_constrained(request: Request[DecodeConfig]) -> bool:
    """Whether a grammar has a say in what is taken of a step's decisions."""
    return request.shaping is not None and request.shaping.matcher is not None


def is_live(row: Row) -> bool:
    """Whether the row's block is live now: it may have left since the row was planned, or be begun early."""
    blocks = row.request.blocks
    return bool(blocks) and blocks[0].start <= row.start <= blocks[-1].start


def algorithms(written: Numbers, layout: RowLayout) -> set[int]:
    """The codes of those that any row asks for, idle ones included."""
    return set(written[:, layout.algorithm].tolist())


def changeable(written: Numbers, layout: RowLayout) -> int:
    """Positions that are open or may be edited; of rows with a source at most so many, since nothing is added."""
    sets = written[:, layout.open] | written[:, layout.editable]
    return sum(map(int.bit_count, sets.tolist()))


def drawing(written: Numbers, layout: RowLayout) -> int:
    """Of these as many as are in rows that draw."""
    return changeable(written[written[:, layout.temperature] != 0], layout)


def may_edit(request: Request[DecodeConfig], block: Block) -> int:
    """The set of positions of a live block that a step may edit once they are decided."""
    if not request.rules.edits or (block.done and request.rules.reopens):
        return 0
    return (1 << request.block_size) - 1 ^ block.fixed


@cache
def offsets(T: int) -> Numbers:
    """0 to T - 1."""
    return np.arange(T)
