"""The rows of a forward as numbers, in one copy to the device.

A row is its tokens, its record (decode/decide.py), its request's place in the host's req_to_token table and its first
position. What a step gives back of a row is what the next one is told of it, so rows whose block goes on are taken from
there as they are, and only those of new blocks, of blocks that the host has changed, and of known tokens are written
out.
"""

from __future__ import annotations

from array import array
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sglang_llada.blocks import Block, Plan, Request
from sglang_llada.config import DecodeConfig
from sglang_llada.decode.decide import ALGORITHM_COLUMN, EDITABLE_COLUMN, OPEN_COLUMN, STATE_COLUMN, record

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class Rows(NamedTuple):
    """R rows of T tokens: what the device gets, and what the host keeps of it.

    ids, positions: int64 [R * T]. table: int64 [R, K], their records. slot, start, end: int64 [R], where each one's
    request stands in req_to_token, its first position, and the one behind its last. page: int64 [R], where in a flat
    req_to_token the place of its KV is told. All these are on the device; ends, slots, starts and records on the host.
    """

    ids: Tensor
    positions: Tensor
    table: Tensor
    slot: Tensor
    start: Tensor
    end: Tensor
    page: Tensor
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


def send(tokens: Numbers, records: Numbers, slots: list[int], starts: list[int], width: int, device: Any) -> Rows:
    """Rows on the device: tokens [R, T], records [R, K], each row's slot and start, and the width of req_to_token."""
    (R, T), K = tokens.shape, records.shape[1]
    slot, start = np.array(slots, np.int64), np.array(starts, np.int64)
    end, positions = start + T, start[:, None] + offsets(T)
    parts = (tokens.ravel(), positions.ravel(), records.ravel(), slot, start, end, slot * width + start)
    packed = torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True)
    there = packed.split_with_sizes((R * T, R * T, R * K, R, R, R, R))
    ids, at, table, slot_there, start_there, end_there, page = there
    return Rows(ids, at, table.view(R, K), slot_there, start_there, end_there, page, records, slot, end, starts)


class Outcome(NamedTuple):
    """What a step made of N rows, as decide.pack() gives it, on the host.

    ids: int64 [N, T]. open: int64 [N], the sets of positions that are open. done: N of bool. state: int64 [N, S].
    trace: int64 [N, 3 T], or of no width. tokens: the ids as lists.
    """

    ids: Numbers
    open: Numbers
    done: list[bool]
    state: Numbers
    trace: Numbers
    tokens: list[list[int]]

    @staticmethod
    def read(packed: Tensor, at: list[int], block_size: int, state_size: int) -> Outcome:
        """The outcome of rows `at`. Waits for the device: a step's one read from it."""
        numbers, T, end = packed.cpu().numpy(), block_size, 2 * block_size + 1 + state_size
        if len(at) < len(numbers):
            numbers = numbers[at]
        ids, flags, done = numbers[:, :T], numbers[:, T : 2 * T], numbers[:, 2 * T]
        is_open = flags @ powers(T)
        state, trace = numbers[:, 2 * T + 1 : end], numbers[:, end:]
        return Outcome(ids, is_open, list(map(bool, done.tolist())), state, trace, ids.tolist())

    @property
    def sound(self) -> bool:
        """Whether all logits that mattered were finite."""
        return -1 not in self.ids[:, 0].tolist()


class Writer:
    """Writes the rows of plan after plan."""

    def __init__(self, block_size: int, idle: list[int]) -> None:
        """`idle`: the record of a row that decides nothing."""
        self.block_size, self.idle = block_size, idle
        self.tokens: Numbers = np.empty((0, block_size), np.int64)
        self.records: Numbers = np.empty((0, len(idle)), np.int64)
        # Where in those a block's row stands, by the identity of its token list: a block that the host has changed, or
        # that did not take part in the last step, has another list. `given` keeps the lists, and so their identities.
        self.given: list[list[int]] = []
        self.row_of: dict[int, int] = {}

    def keep(self, rows: Rows, outcome: Outcome, at: list[int]) -> None:
        """Note what a step made of rows `at`, whose blocks now have the token lists of the outcome."""
        self.given = outcome.tokens
        self.row_of = dict(zip(map(id, outcome.tokens), range(len(at)), strict=True))
        self.tokens, self.records = outcome.ids, rows.records if len(at) == len(rows.records) else rows.records[at]
        self.records[:, OPEN_COLUMN], self.records[:, STATE_COLUMN:] = outcome.open, outcome.state

    def write(self, plan: Plan) -> tuple[Numbers, Numbers]:
        """Tokens [R, T] and records [R, K] of a plan's rows."""
        rows, T = plan.rows, self.block_size
        known = self.row_of.get
        kept = [-1 if row.block is None or row.block.done else known(id(row.block.tokens), -1) for row in rows]
        if kept == list(range(len(self.tokens))):
            return self.tokens, self.records
        if -1 not in kept:
            return self.tokens[kept], self.records[kept]
        flat: list[int] = []
        written: list[int] = []
        for r, (request, _, start, block) in enumerate(rows):
            if kept[r] < 0:
                written.append(r)
                if block is None:
                    flat += request.tokens_at(start)
                    flat += self.idle
                else:
                    flat += block.tokens
                    flat += record(block.open, may_edit(request, block), request.numbers, block.state)
        new = np.frombuffer(array("q", flat), np.int64).reshape(len(written), T + len(self.idle))
        if len(written) == len(rows):
            return new[:, :T], new[:, T:]
        tokens, records = np.empty((len(rows), T), np.int64), np.empty((len(rows), len(self.idle)), np.int64)
        others = [r for r, i in enumerate(kept) if i >= 0]
        came = [kept[r] for r in others]
        tokens[written], records[written] = new[:, :T], new[:, T:]
        tokens[others], records[others] = self.tokens[came], self.records[came]
        return tokens, records


def may_edit(request: Request[DecodeConfig], block: Block) -> int:
    """The set of positions of a live block that a step may edit once they are decided."""
    if not request.rules.edits or (block.done and request.rules.reopens):
        return 0
    return (1 << request.block_size) - (1 << block.given)


@cache
def offsets(T: int) -> Numbers:
    """0 to T - 1."""
    return np.arange(T)


@cache
def powers(T: int) -> Numbers:
    """Of two, so that flags times these make the number that stands for their set."""
    return 1 << np.arange(T)
