"""The rows of a forward as numbers, in one copy to the device.

A row is its tokens, its record (decode/decide.py), its request's place in the host's req_to_token table and its first
position. What a step gives back of a row is what the next one is told of it, so rows whose block goes on are taken from
there as they are, and only those of new blocks, of blocks that the host has changed, and of known tokens are written
out.
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
from sglang_llada.decode.decide import ALGORITHM_COLUMN, EDITABLE_COLUMN, OPEN_COLUMN, record

Numbers = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


class Rows(NamedTuple):
    """R rows of T tokens: what the device gets, and what the host keeps of it.

    ids, positions: int64 [R * T]. places: int64 [R * T], where in a flat req_to_token it is told where their KV goes.
    table: int64 [R, K], their records. slot, start, end: int64 [R], where each one's request stands in req_to_token,
    its first position, and the one behind its last. All these are on the device, the others on the host.
    """

    ids: Tensor
    positions: Tensor
    places: Tensor
    table: Tensor
    slot: Tensor
    start: Tensor
    end: Tensor
    records: Numbers
    slots: Numbers
    ends: Numbers
    starts: list[int]

    @property
    def algorithms(self) -> set[int]:
        """The codes of those that any row asks for, idle ones included."""
        return set(self.records[:, ALGORITHM_COLUMN].tolist())

    @property
    def changeable(self) -> int:
        """Positions that are open or may be edited."""
        return sum(map(int.bit_count, (self.records[:, OPEN_COLUMN] | self.records[:, EDITABLE_COLUMN]).tolist()))


def send(written: Numbers, block_size: int, width: int, device: Any) -> Rows:
    """Rows as Writer.write() gives them on the device; width: of req_to_token."""
    R, T, K = len(written), block_size, written.shape[1] - block_size - 2
    tokens, records, slot, start = written[:, :T], written[:, T:-2], written[:, -2], written[:, -1]
    end, positions = start + T, start[:, None] + offsets(T)
    places = positions + (slot * width)[:, None]
    parts = (tokens.ravel(), positions.ravel(), places.ravel(), records.ravel(), slot, start, end)
    packed = torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True)
    ids, at, to, table, slots, starts, ends = packed.split_with_sizes((R * T, R * T, R * T, R * K, R, R, R))
    return Rows(ids, at, to, table.view(R, K), slots, starts, ends, records, slot, end, start.tolist())


class Outcome(NamedTuple):
    """What a step made of R rows, on the host.

    numbers: int64 [R, W], as decide.pack() gives them. state_size: columns of a state, S.
    """

    numbers: Numbers
    block_size: int
    state_size: int

    @property
    def ids(self) -> Numbers:
        """[R, T]."""
        return self.numbers[:, : self.block_size]

    @property
    def carried(self) -> Numbers:
        """What the next step's rows begin with, [R, T + 1 + S]."""
        return self.numbers[:, : self.block_size + 1 + self.state_size]

    @property
    def done(self) -> Numbers:
        """0 or 1, [R]."""
        return self.numbers[:, self.block_size + 1 + self.state_size]

    def decided(self, which: Numbers) -> list[Decided]:
        """What the step made of some of its rows."""
        T, end = self.block_size, self.block_size + 1 + self.state_size
        rows = self.numbers[which, : end + 1].tolist()
        return [Decided(row[:T], row[T], row[end] == 1, row[T + 1 : end]) for row in rows]

    def trace(self, row: int) -> list[int]:
        """Of a row of a step that was told to give them: written, origin and prob, 3 T."""
        numbers: list[int] = self.numbers[row, self.block_size + 2 + self.state_size :].tolist()
        return numbers


class Writer:
    """Writes the rows of plan after plan, int64 [R, T + K + 2]: tokens, record, slot of the request, first position."""

    def __init__(self, block_size: int, idle: list[int]) -> None:
        """`idle`: the record of a row that decides nothing."""
        self.block_size, self.idle = block_size, idle
        self.planned: list[Row] = []
        self.rows: Numbers = np.empty((0, block_size + len(idle) + 2), np.int64)
        # Where in those each block's row stands that goes on as the step left it; by the identities of the blocks,
        # which `planned` keeps.
        self.row_of: dict[int, int] = {}

    def follow(self, plan: Plan, written: Numbers) -> None:
        """Note which rows a step has."""
        self.planned, self.rows = plan.rows, written
        self.row_of = {
            id(row.block): r
            for r, row in enumerate(plan.rows)
            if row.block is not None and not row.block.done  # whose state stays fresh
        }

    def keep(self, outcome: Outcome) -> None:
        """Note what it made of them: what was written becomes what is to be written next."""
        carried = outcome.carried
        self.rows[:, : carried.shape[1]] = carried
        for r in outcome.done.nonzero()[0].tolist():
            self.forget(self.planned[r].block)

    def forget(self, block: Block | None) -> None:
        """The block does not go on as the step left it, or not where it was."""
        self.row_of.pop(id(block), None)

    def write(self, plan: Plan) -> Numbers:
        """The rows of a plan."""
        source = list(map(self.row_of.get, map(id, map(BLOCK, plan.rows)), repeat(-1)))
        new = [r for r, kept in enumerate(source) if kept < 0]
        if not new:
            return self.rows[source]
        flat: list[int] = []
        for i, r in enumerate(new, len(self.rows)):
            source[r] = i
            request, _, start, block = plan.rows[r]
            if block is None:
                flat += request.tokens_at(start)
                flat += self.idle
            else:
                flat += block.tokens
                flat += record(block.open, may_edit(request, block), request.numbers, block.state)
            flat += request.slot, start
        added = np.frombuffer(array("q", flat), np.int64).reshape(len(new), -1)
        return np.concatenate((self.rows, added))[source]


def may_edit(request: Request[DecodeConfig], block: Block) -> int:
    """The set of positions of a live block that a step may edit once they are decided."""
    if not request.rules.edits or (block.done and request.rules.reopens):
        return 0
    return (1 << request.block_size) - (1 << block.given)


@cache
def offsets(T: int) -> Numbers:
    """0 to T - 1."""
    return np.arange(T)
