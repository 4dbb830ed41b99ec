"""A step's decisions on a GPU (decide.py is what they must be): two Triton kernels around those of select_triton.py.

The first gathers the hidden states of the positions that are open or editable, those that are drawn last, so that
selection and draws work on these alone and no size is read on the host. The second makes decisions of what was
selected, of the tokens and of the records, and packs them for the host: every algorithm that does not insert is a few
lines over one row's positions. Levenshtein stays with torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_llada.decode.contract import State, StepOut
from sglang_llada.decode.head import Best, Exchange, Head, Lowered
from sglang_llada.decode.layout import CODES, COUNTS, STAYS, draws_of, repeated
from sglang_llada.decode.sampling_triton import draw_into
from sglang_llada.decode.select_triton import select
from sglang_llada.decode.whole import Group, choose

RECORD = 1 + len(COUNTS) + len(STAYS)  # columns, where no algorithm has a memory
# Where columns stand, from the end of a record.
EDITABLE, ALGORITHM, STEPS, EDITS, THRESHOLD, EDIT_THRESHOLD, PENALTY, SEED, HEAT, START = (
    tl.constexpr(len(STAYS) - STAYS.index(name))
    for name in (
        *("editable", "algorithm", "steps", "max_post_edit_steps", "threshold", "edit_threshold"),
        *("penalty_lambda", "seed", "temperature", "start"),
    )
)
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
    drawing: int = 0,
    found: StepOut | None = None,
) -> StepOut:
    """As decide.decide, for checkpoints that do not insert."""
    T, ops = block_size, torch.ops.sglang_llada
    if found is None or found.best is None or found.place is None:
        gathered, spans, place, less, by, key, how = ops.gather_wanted(hidden, ids, table, T, min(count, len(hidden)))
        lowered = Lowered(less, by)
        best = select(gathered, head, mask_id, 1, exchange, spans[:1], lowered)
        if drawing:
            draw_into(best, gathered, head, mask_id, key, how, exchange, spans, lowered)
    else:
        best, place = found.best, found.place
    taken = best
    if choosing := [group for group in groups if group.chooses]:
        more = (draws_of(table, T), repeated(ids, table, T))
        at, chosen = choose(hidden, choosing, head, mask_id, mask_id, 1, exchange, *more)
        at = place[at].long()
        taken = Best(best.token.index_copy(0, at, chosen.token), best.prob.index_copy(0, at, chosen.prob))
    packed, is_open, done, written, prob = ops.decide_rows(ids, table, place, taken.token, taken.prob, T)
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
        place=place,
    )


@torch.library.custom_op(
    "sglang_llada::gather_wanted",
    mutates_args=(),
    schema="(Tensor hidden, Tensor ids, Tensor table, int block_size, int count)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def gather_wanted(hidden: Tensor, ids: Tensor, table: Tensor, block_size: int, count: int) -> tuple[Tensor, ...]:
    """Hidden states [count, H] of the wanted positions of [R * T, H], then anything: in the order of their rows those
    that are not drawn, those that are drawn from all tokens, those that are drawn from some.

    And where the second of these begin, the third, and what is behind them, int32 [3]; where each wanted position
    stands, int32 [R * T]; and what decide.repeated() and draws_of() say of them, int64 and fp32 [count], int64 [count]
    and fp32 [4, count].
    """
    out = gathered, spans, place, less, by, key, how = room_for_wanted(hidden, ids, table, block_size, count)
    width = hidden.shape[1]
    gather_kernel[(len(table), triton.cdiv(width, COLUMNS.value))](
        hidden.contiguous(),
        ids.contiguous(),
        table,
        gathered,
        spans,
        place,
        less,
        by,
        key,
        how,
        table.stride(0),
        count,
        HIDDEN=width,
        BLOCK=block_size,
        PADDED=triton.next_power_of_2(block_size),
        RECORD=RECORD,
    )
    return out


@gather_wanted.register_fake
def room_for_wanted(
    hidden: Tensor, ids: Tensor, table: Tensor, block_size: int, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(count, hidden.shape[1]),
        hidden.new_empty(3, dtype=torch.int32),
        ids.new_empty(len(ids), dtype=torch.int32),
        ids.new_empty(count),
        hidden.new_empty(count, dtype=torch.float32),
        ids.new_empty(count),
        hidden.new_empty(4, count, dtype=torch.float32),
    )


@torch.library.custom_op(
    "sglang_llada::decide_rows",
    mutates_args=(),
    schema="(Tensor ids, Tensor table, Tensor place, Tensor token, Tensor prob, int block_size) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def decide_rows(
    ids: Tensor, table: Tensor, place: Tensor, token: Tensor, prob: Tensor, block_size: int
) -> tuple[Tensor, ...]:
    """What is decided, packed with a trace, and its open, done, written and prob (StepOut).

    token, prob: [count, 1], of the wanted positions, which stand there at `place` [R * T].
    """
    out = packed, is_open, done, written, chances = room_for_decisions(ids, table, place, token, prob, block_size)
    rows_kernel[(len(table),)](
        ids.contiguous(),
        table,
        place,
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
    ids: Tensor, table: Tensor, place: Tensor, token: Tensor, prob: Tensor, block_size: int
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
def floats(record, BACK: tl.constexpr, mask):
    """A column of records that holds the bits of float64, as fp32; of records that are not there 0."""
    return tl.load(record - BACK, mask, 0).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def kinds(end, mask):
    """Of records that end there: 0 nothing is drawn, 1 from all tokens, 2 from some."""
    top_k, top_p, least = floats(end, HEAT - 1, mask), floats(end, HEAT - 2, mask), floats(end, HEAT - 3, mask)
    cut = (top_k < float("inf")) | (top_p < float("inf")) | (least > float("-inf"))
    return tl.where(floats(end, HEAT, mask) > 0, 1 + cut.to(tl.int32), 0)


@triton.jit(do_not_specialize=["stride", "count"])
def gather_kernel(
    hidden,
    ids,
    table,
    gathered,
    spans,
    place,
    less,
    by,
    key,
    how,
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
    end = record + RECORD
    sets = tl.load(record) | tl.load(end - EDITABLE)
    wanted = (sets >> t.to(tl.int64) & 1).to(tl.int32)
    kind = tl.max(kinds(end + tl.zeros((1,), tl.int32), tl.full((1,), 1, tl.int1)), 0)

    before, plain, uncut, every = 0, 0, 0, 0  # wanted positions that come before this row's; of kind 0, up to 1, all
    for at in range(0, tl.num_programs(0), ROWS):
        row = at + tl.arange(0, ROWS)
        there = row < tl.num_programs(0)
        theirs = table + row * stride
        changeable = tl.load(theirs, there, 0) | tl.load(theirs + RECORD - EDITABLE, there, 0)
        number, others = tl.sum(members(changeable, PADDED), 1), kinds(theirs + RECORD, there)
        first = (others < kind) | ((others == kind) & (row < r))
        before += tl.sum(tl.where(first, number, 0), 0)
        plain += tl.sum(tl.where(others == 0, number, 0), 0)
        uncut += tl.sum(tl.where(others < 2, number, 0), 0)
        every += tl.sum(number, 0)

    to = before + tl.cumsum(wanted, 0) - wanted
    listed = (wanted > 0) & (t < BLOCK) & (to < count)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    moved = listed[:, None] & (column < HIDDEN)[None, :]
    x = tl.load(hidden + (r * BLOCK + t).to(tl.int64)[:, None] * HIDDEN + column[None, :], moved)
    tl.store(gathered + to.to(tl.int64)[:, None] * HIDDEN + column[None, :], x, moved)
    if tl.program_id(1) == 0:
        tl.store(place + r * BLOCK + t, to, listed)
        # decide.repeated(): the token to the left within the block, and the row's penalty for it.
        has_left = listed & (t > 0)
        tl.store(less + to, tl.load(ids + r * BLOCK + t - 1, has_left, -1), listed)
        tl.store(by + to, tl.where(has_left, floats(end + t * 0, PENALTY, listed), 0.0), listed)
        # draws_of()
        bits = mixed(mixed(mixed(tl.load(end - SEED)) ^ (tl.load(end - START) + t)) ^ tl.load(record + 1))
        tl.store(key + to, bits, listed)
        for i in tl.static_range(4):
            tl.store(how + i * count + to, floats(end + t * 0, HEAT - i, listed), listed)
        if r == 0:
            tl.store(spans, plain)
            tl.store(spans + 1, uncut)
            tl.store(spans + 2, every)


@triton.jit
def mixed(x):
    """noise.mix()"""
    z = x.to(tl.uint64) + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return (z ^ (z >> 31)).to(tl.int64)


@triton.jit(do_not_specialize=["stride"])
def rows_kernel(
    ids,
    table,
    place,
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
    end = record + RECORD
    editable_set, algorithm = tl.load(end - EDITABLE), tl.load(end - ALGORITHM)
    steps, most_edits = tl.load(end - STEPS), tl.load(end - EDITS)
    threshold, edit_threshold = floats(end, THRESHOLD, True), floats(end, EDIT_THRESHOLD, True)

    is_open = (open_set >> t.to(tl.int64) & 1) == 1
    editable = ((editable_set >> t.to(tl.int64) & 1) == 1) & ~is_open
    wanted = (is_open | editable).to(tl.int32)
    at = tl.load(place + r * BLOCK + t, wanted > 0, 0)
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
