"""A step's decisions on a GPU (decide.py is what they must be): two Triton kernels around those of select_triton.py.

The first gathers the hidden states of the positions that are open or editable, so that selection works on these alone
and no size is read on the host. The second makes decisions of what was selected, of the tokens and of the records, and
packs them for the host: every algorithm that does not insert is a few lines over one row's positions. Levenshtein stays
with torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_llada.decode.contract import State, StepOut
from sglang_llada.decode.head import Best, Exchange, Head, Lowered
from sglang_llada.decode.layout import CODES, COUNTS, EDITABLE_COLUMN, OPEN_COLUMN, STAYS, repeated
from sglang_llada.decode.select_triton import select
from sglang_llada.decode.whole import Group, choose

RECORD = 1 + len(COUNTS) + len(STAYS)  # columns, where no algorithm has a memory
STAYS_COUNT = tl.constexpr(len(STAYS))
OUTCOME = 2 + len(COUNTS)  # what pack() gives beside tokens and trace
COLUMNS = tl.constexpr(256)  # of hidden states that a program moves
ROWS = tl.constexpr(128)  # whose positions are counted at once
JOINT, RUN = tl.constexpr(CODES["joint_threshold"]), tl.constexpr(CODES["run"])


def decide(
    hidden: Tensor,
    ids: Tensor,
    table: Tensor,
    count: int,
    head: Head,
    block_size: int,
    mask_id: int,
    exchange: Exchange | None = None,
    groups: Sequence[Group] = (),
    best: Best | None = None,
) -> StepOut:
    """As decide.decide, for checkpoints that do not insert."""
    T, ops = block_size, torch.ops.sglang_llada
    if best is None:
        gathered, number, less, by = ops.gather_wanted(hidden, ids, table, T, min(count, len(hidden)))
        best = select(gathered, head, mask_id, 1, exchange, number, Lowered(less, by))
    taken = best
    if choosing := [group for group in groups if group.chooses]:
        at, found = choose(hidden, choosing, head, mask_id, mask_id, 1, exchange, repeated(ids, table, T))
        place = places_of_wanted(table, T)[at]
        taken = Best(best.token.index_copy(0, place, found.token), best.prob.index_copy(0, place, found.prob))
    packed, is_open, done, written, prob = ops.decide_rows(ids, table, taken.token, taken.prob, T)
    return StepOut(
        ids=packed[:, :T],
        open=is_open,
        state=State(step=packed[:, T + 1], edits=packed[:, T + 2], memory=packed[:, T + 3 : T + 3]),
        done=done,
        written=written,
        prob=prob,
        origin=packed[:, 2 * T + OUTCOME : 3 * T + OUTCOME],
        packed=packed,
        best=best,
    )


def places_of_wanted(table: Tensor, block_size: int) -> Tensor:
    """Where each position that is open or editable stands among them, int64 [R * T]."""
    sets = table[:, OPEN_COLUMN] | table[:, EDITABLE_COLUMN]
    wanted = sets[:, None] >> torch.arange(block_size, device=table.device) & 1
    return wanted.flatten().cumsum(0) - 1


@torch.library.custom_op(
    "sglang_llada::gather_wanted",
    mutates_args=(),
    schema="(Tensor hidden, Tensor ids, Tensor table, int block_size, int count) -> (Tensor, Tensor, Tensor, Tensor)",
)
def gather_wanted(
    hidden: Tensor, ids: Tensor, table: Tensor, block_size: int, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [count, H] of the wanted positions of [R * T, H], in order, then anything; how many, int32 [1].

    And what decide.repeated() says of those positions, int64 and fp32 [count].
    """
    gathered, number, less, by = room_for_wanted(hidden, ids, table, block_size, count)
    width = hidden.shape[1]
    gather_kernel[(len(table), triton.cdiv(width, COLUMNS.value))](
        hidden.contiguous(),
        ids.contiguous(),
        table,
        gathered,
        number,
        less,
        by,
        table.stride(0),
        count,
        HIDDEN=width,
        BLOCK=block_size,
        PADDED=triton.next_power_of_2(block_size),
        RECORD=RECORD,
    )
    return gathered, number, less, by


@gather_wanted.register_fake
def room_for_wanted(
    hidden: Tensor, ids: Tensor, table: Tensor, block_size: int, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(count, hidden.shape[1]),
        hidden.new_empty(1, dtype=torch.int32),
        ids.new_empty(count),
        hidden.new_empty(count, dtype=torch.float32),
    )


@torch.library.custom_op(
    "sglang_llada::decide_rows",
    mutates_args=(),
    schema="(Tensor ids, Tensor table, Tensor token, Tensor prob, int block_size) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def decide_rows(ids: Tensor, table: Tensor, token: Tensor, prob: Tensor, block_size: int) -> tuple[Tensor, ...]:
    """What is decided, packed with a trace, and its open, done, written and prob (StepOut).

    token, prob: [count, 1], of the wanted positions, in order.
    """
    out = packed, is_open, done, written, chances = room_for_decisions(ids, table, token, prob, block_size)
    rows_kernel[(len(table),)](
        ids.contiguous(),
        table,
        token,
        prob,
        packed,
        is_open.view(torch.uint8),
        done.view(torch.uint8),
        written.view(torch.uint8),
        chances,
        table.stride(0),
        BLOCK=block_size,
        PADDED=triton.next_power_of_2(block_size),
        RECORD=RECORD,
        num_warps=1,
    )
    return out


@decide_rows.register_fake
def room_for_decisions(
    ids: Tensor, table: Tensor, token: Tensor, prob: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    R, T = len(table), block_size
    return (
        ids.new_empty(R, T + OUTCOME + 3 * T),
        ids.new_empty(R, T, dtype=torch.bool),
        ids.new_empty(R, dtype=torch.bool),
        ids.new_empty(R, T, dtype=torch.bool),
        prob.new_empty(R, T),
    )


@triton.jit
def members(sets, PADDED: tl.constexpr):
    """Which of PADDED positions are in each of the sets [n]: int32 [n, PADDED]."""
    return (sets[:, None] >> tl.arange(0, PADDED).to(tl.int64)[None, :] & 1).to(tl.int32)


@triton.jit
def wanted_before(table, stride, r, PADDED: tl.constexpr, RECORD: tl.constexpr):
    """How many positions of rows before r are open or editable."""
    found = 0
    for at in range(0, r, ROWS):
        row = at + tl.arange(0, ROWS)
        record = table + row * stride
        sets = tl.load(record, row < r, 0) | tl.load(record + RECORD - STAYS_COUNT, row < r, 0)
        found += tl.sum(tl.sum(members(sets, PADDED), 1), 0)
    return found


@triton.jit
def gather_kernel(
    hidden,
    ids,
    table,
    gathered,
    number,
    less,
    by,
    stride,
    count,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    RECORD: tl.constexpr,
):
    """Program (r, c): columns c of row r's wanted positions."""
    r = tl.program_id(0)
    t = tl.arange(0, PADDED)
    record = table + r * stride
    sets = tl.load(record) | tl.load(record + RECORD - STAYS_COUNT)
    wanted = (sets >> t.to(tl.int64) & 1).to(tl.int32)
    before = wanted_before(table, stride, r, PADDED, RECORD)
    to = before + tl.cumsum(wanted, 0) - wanted
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    moved = ((wanted > 0) & (t < BLOCK) & (to < count))[:, None] & (column < HIDDEN)[None, :]
    x = tl.load(hidden + (r * BLOCK + t).to(tl.int64)[:, None] * HIDDEN + column[None, :], moved)
    tl.store(gathered + to.to(tl.int64)[:, None] * HIDDEN + column[None, :], x, moved)
    if tl.program_id(1) == 0:
        # decide.repeated(): the token to the left within the block, and the row's penalty for it.
        listed = (wanted > 0) & (t < BLOCK) & (to < count)
        has_left = listed & (t > 0)
        penalty = tl.load(record + RECORD - 1).to(tl.float64, bitcast=True).to(tl.float32)
        tl.store(less + to, tl.load(ids + r * BLOCK + t - 1, has_left, -1), listed)
        tl.store(by + to, tl.where(has_left, penalty, 0.0), listed)
        if r == tl.num_programs(0) - 1:
            tl.store(number, before + tl.sum(wanted, 0))


@triton.jit
def rows_kernel(
    ids,
    table,
    token,
    prob,
    packed,
    open_out,
    done_out,
    written_out,
    prob_out,
    stride,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    RECORD: tl.constexpr,
):
    """Program r: row r's decisions; packed as decide.pack lays it out."""
    r = tl.program_id(0)
    t = tl.arange(0, PADDED)
    inside = t < BLOCK
    # The record, in the order of OPEN_COLUMN, COUNTS and STAYS.
    record = table + r * stride
    open_set, step, edits = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    stays = record + RECORD - STAYS_COUNT
    editable_set, algorithm = tl.load(stays), tl.load(stays + 1)
    steps, most_edits = tl.load(stays + 2), tl.load(stays + 3)
    threshold = tl.load(stays + 5).to(tl.float64, bitcast=True).to(tl.float32)
    edit_threshold = tl.load(stays + 6).to(tl.float64, bitcast=True).to(tl.float32)

    is_open = (open_set >> t.to(tl.int64) & 1) == 1
    editable = ((editable_set >> t.to(tl.int64) & 1) == 1) & ~is_open
    wanted = (is_open | editable).to(tl.int32)
    at = wanted_before(table, stride, r, PADDED, RECORD) + tl.cumsum(wanted, 0) - wanted
    best = tl.load(token + at, wanted > 0, 0)
    chance = tl.load(prob + at, wanted > 0, 0.0)
    old = tl.load(ids + r * BLOCK + t, inside, 0)

    confidence = tl.where(is_open, chance, float("-inf"))
    sure = is_open & (confidence > threshold)
    higher = (confidence[None, :] > confidence[:, None]) | (
        (confidence[None, :] == confidence[:, None]) & (t[None, :] < t[:, None])
    )
    rank = tl.sum((higher & inside[None, :]).to(tl.int32), 1)
    opens, sures = tl.sum(is_open.to(tl.int32), 0), tl.sum(sure.to(tl.int32), 0)

    # threshold.py
    quota = BLOCK // steps + (step < BLOCK % steps).to(tl.int64)
    least = tl.minimum(quota, opens.to(tl.int64))
    chosen = tl.where(sures >= least, sure.to(tl.int32), (is_open & (rank < least)).to(tl.int32)) > 0
    edited = t < 0
    if algorithm == JOINT:  # joint_threshold.py
        chosen = tl.where(sures > 0, sure.to(tl.int32), (is_open & (rank == 0)).to(tl.int32)) > 0
        edited = editable & (best != old) & (chance > edit_threshold)
        edits += (opens == 0).to(tl.int64)
    if algorithm == RUN:  # run.py
        first = is_open & (tl.cumsum(is_open.to(tl.int32), 0) == 1)
        stopped = is_open & ~first & ~(chance > threshold)
        chosen = is_open & (tl.cumsum(stopped.to(tl.int32), 0) == 0)

    written = chosen | edited
    still_open = is_open & ~chosen
    left, changes = tl.sum(still_open.to(tl.int32), 0), tl.sum(written.to(tl.int32), 0)
    done = left == 0
    if algorithm == JOINT:
        done = (changes == 0) | ((left == 0) & (edits >= most_edits))
    unsound = tl.sum(((best < 0) & (wanted > 0)).to(tl.int32), 0) > 0
    new = tl.where(unsound, -1, tl.where(written, best, old))

    to = packed + r * (4 * BLOCK + 4)
    tl.store(to + t, new, inside)
    tl.store(to + BLOCK, tl.sum(still_open.to(tl.int64) << t.to(tl.int64), 0))
    tl.store(to + BLOCK + 1, step + 1)
    tl.store(to + BLOCK + 2, edits)
    tl.store(to + BLOCK + 3, done.to(tl.int64))
    trace = to + BLOCK + 4 + t
    tl.store(trace, written.to(tl.int64), inside)
    tl.store(trace + BLOCK, t.to(tl.int64), inside)
    tl.store(trace + 2 * BLOCK, chance.to(tl.float64).to(tl.int64, bitcast=True), inside)
    tl.store(open_out + r * BLOCK + t, still_open.to(tl.uint8), inside)
    tl.store(done_out + r, done.to(tl.uint8))
    tl.store(written_out + r * BLOCK + t, written.to(tl.uint8), inside)
    tl.store(prob_out + r * BLOCK + t, chance, inside)
