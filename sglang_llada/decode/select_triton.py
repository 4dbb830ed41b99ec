"""Selection (select.py) as two Triton kernels: logits live in registers, tile by tile, and are never written.

The first gives every program a block of positions and a slice of the vocabulary, and leaves a record of each position
there. The second folds a position's records and ends with probabilities, or under tensor parallelism with a record that
ranks exchange; there it runs once more. In how many slices the vocabulary is cut follows on the device from how many
positions are wanted: all programs have work whatever a graph was captured for. An invariant head is cut in as many
slices, and multiplied in one form, however many positions there are: all sums then have one order.

With few positions the head's bytes are what a step waits for: all multiprocessors stream it, and the ids of a tile are
the rows of the product, so that a tile may be narrow. With many it is arithmetic: tiles are as large as registers
allow, and the programs of one slice stand side by side, so that all but the first find the head in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sglang_llada.card import Card, card_of
from sglang_llada.decode.head import Best, Exchange, Head, Lowered, Partial

INTERPRETED = triton.knobs.runtime.interpret  # where a product of bf16 would be one of integers
ALIGNMENT = 16  # bytes that a row must be a multiple of to be fetched by tile


@dataclass(frozen=True, slots=True)
class Form:
    """A way to run the first kernel.

    A tile of logits is positions x ids, summed over `width` hidden dimensions at once. upright: ids are the rows of the
    product, else positions are. flat: the next tile is fetched while one is reduced. programs: how many share a
    multiprocessor.
    """

    positions: int
    ids: int
    width: int
    warps: int
    stages: int
    programs: int
    upright: bool = False
    flat: bool = False


# By the most positions. Numbers of four bytes do not run on tensor cores.
MANY = 1 << 31
HOPPER = {
    32: Form(32, 128, 64, warps=4, stages=5, programs=2, upright=True, flat=True),
    64: Form(64, 128, 64, warps=4, stages=4, programs=2, upright=True, flat=True),
    128: Form(128, 128, 64, warps=4, stages=3, programs=2, flat=True),
    MANY: Form(128, 256, 64, warps=8, stages=4, programs=1, flat=True),
}
HALF = {
    32: Form(32, 128, 64, warps=4, stages=4, programs=2, upright=True),
    64: Form(64, 128, 64, warps=8, stages=4, programs=2),
    MANY: Form(128, 128, 64, warps=8, stages=3, programs=1),
}
SINGLE = {MANY: Form(64, 128, 16, warps=8, stages=3, programs=1)}
INVARIANT_SLICES = 128
FOLD_POSITIONS, FOLD_RECORDS, FOLD_WARPS = 4, 128, 4  # of a program of the second kernel, at once


def form_of(hidden: Tensor, invariant: bool) -> Form:
    """The form for hidden states [P, H]; invariant: the same for any P."""
    forms = forms_for(hidden.element_size(), card_of(hidden.device))
    return forms[MANY] if invariant else next(form for most, form in forms.items() if len(hidden) <= most)


def forms_for(element_size: int, card: Card) -> dict[int, Form]:
    """The forms for hidden states of so many bytes a number, by the most positions."""
    return SINGLE if element_size == 4 else HOPPER if is_hopper(card) else HALF


def is_hopper(card: Card) -> bool:
    """Whether products take their operands from shared memory, and copies go there by tile, both on the side."""
    return card.capability[0] == 9


def select(
    hidden: Tensor,
    head: Head,
    mask_id: int,
    count: int,
    exchange: Exchange | None,
    wanted: Tensor | None,
    lowered: Lowered | None = None,
) -> Best:
    """As select.select; hidden [P, H] and head.weight [v, H] of one dtype."""
    if head.invariant:
        wanted = None  # their number would decide on the slices
    block = form_of(hidden, head.invariant).positions
    records = reduce_slices(hidden, head, mask_id, count, wanted, lowered)
    if exchange is not None:
        packed = torch.ops.sglang_llada.fold_records(records, wanted, len(hidden), block, count)
        records, block = torch.stack(list(exchange(packed))).mT, len(hidden)
    token, prob = torch.ops.sglang_llada.finish_records(records, wanted, len(hidden), block, count)
    return Best(token, prob)


def reduce(
    hidden: Tensor,
    head: Head,
    mask_id: int,
    count: int,
    wanted: Tensor | None = None,
    lowered: Lowered | None = None,
) -> Partial:
    """As select.reduce; hidden [P, H] and head.weight [v, H] of one dtype."""
    block = form_of(hidden, head.invariant).positions
    records = reduce_slices(hidden, head, mask_id, count, wanted, lowered)
    return Partial.unpack(torch.ops.sglang_llada.fold_records(records, wanted, len(hidden), block, count))


def reduce_slices(
    hidden: Tensor, head: Head, mask_id: int, count: int, wanted: Tensor | None, lowered: Lowered | None
) -> Tensor:
    """The first kernel's records, see records_of()."""
    less, by = (None, None) if lowered is None else lowered
    numbers = (head.first, mask_id, count, head.invariant)
    return torch.ops.sglang_llada.reduce_slices(hidden, head.weight, wanted, less, by, *numbers)


# Operators, so that they can be traced and counted.


@torch.library.custom_op(
    "sglang_llada::reduce_slices",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? wanted, Tensor? less, Tensor? by, int first, int mask_id, int count,"
    " bool invariant) -> Tensor",
)
def reduce_slices_op(
    hidden: Tensor,
    weight: Tensor,
    wanted: Tensor | None,
    less: Tensor | None,
    by: Tensor | None,
    first: int,
    mask_id: int,
    count: int,
    invariant: bool,
) -> Tensor:
    lowered = None if less is None or by is None else Lowered(less, by)
    return run_slices(form_of(hidden, invariant), hidden, weight, wanted, lowered, first, mask_id, count, invariant)


@reduce_slices_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    wanted: Tensor | None,
    less: Tensor | None,
    by: Tensor | None,
    first: int,
    mask_id: int,
    count: int,
    invariant: bool,
) -> Tensor:
    return records_of(form_of(hidden, invariant), hidden, count, invariant)


@torch.library.custom_op(
    "sglang_llada::fold_records",
    mutates_args=(),
    schema="(Tensor records, Tensor? wanted, int positions, int block, int count) -> Tensor",
)
def fold_records_op(records: Tensor, wanted: Tensor | None, positions: int, block: int, count: int) -> Tensor:
    packed = records.new_empty(positions, 2 * count + 2)
    run_fold(records, wanted, positions, block, count, packed, packed, final=False)
    return packed


@fold_records_op.register_fake
def _(records: Tensor, wanted: Tensor | None, positions: int, block: int, count: int) -> Tensor:
    return records.new_empty(positions, 2 * count + 2)


@torch.library.custom_op(
    "sglang_llada::finish_records",
    mutates_args=(),
    schema="(Tensor records, Tensor? wanted, int positions, int block, int count) -> (Tensor, Tensor)",
)
def finish_records_op(
    records: Tensor, wanted: Tensor | None, positions: int, block: int, count: int
) -> tuple[Tensor, Tensor]:
    token = records.new_empty(positions, count, dtype=torch.int64)
    prob = records.new_empty(positions, count)
    run_fold(records, wanted, positions, block, count, token, prob, final=True)
    return token, prob


@finish_records_op.register_fake
def _(records: Tensor, wanted: Tensor | None, positions: int, block: int, count: int) -> tuple[Tensor, Tensor]:
    return records.new_empty(positions, count, dtype=torch.int64), records.new_empty(positions, count)


# Launches.


def records_of(form: Form, hidden: Tensor, count: int, invariant: bool) -> Tensor:
    """Room for the records of all programs, fp32 [programs, 2 count + 2, form.positions], with Partial.pack's fields.

    Program s * blocks + b works on slice s and on block b of those that are wanted.
    """
    programs = programs_of(form, hidden, invariant)
    return hidden.new_empty(programs, 2 * count + 2, form.positions, dtype=torch.float32)


def programs_of(form: Form, source: Tensor, invariant: bool) -> int:
    """How many programs share the positions of `source` and the vocabulary."""
    blocks, at_once = triton.cdiv(len(source), form.positions), form.programs * card_of(source.device).multiprocessors
    return INVARIANT_SLICES * blocks if invariant else max(at_once, blocks)


def run_slices(
    form: Form,
    hidden: Tensor,
    weight: Tensor,
    wanted: Tensor | None,
    lowered: Lowered | None,
    first: int,
    mask_id: int,
    count: int,
    invariant: bool = False,
) -> Tensor:
    """The first kernel in a form; its records."""
    records = records_of(form, hidden, count, invariant)
    positions, width = hidden.shape
    if not positions:
        return records
    hidden, weight = hidden.contiguous(), weight.contiguous()
    by_tile = hidden.element_size() == 2 and all(described(each) for each in (hidden, weight))
    kernel[(len(records),)](
        TensorDescriptor.from_tensor(hidden, [form.positions, form.width]) if by_tile else hidden,
        TensorDescriptor.from_tensor(weight, [form.ids, form.width]) if by_tile else weight,
        records,
        records if wanted is None else wanted,
        records if lowered is None else lowered.token,
        records if lowered is None else lowered.by,
        positions,
        len(weight),
        first,
        mask_id,
        **constants(form, width, count),
        BOUNDED=wanted is not None,
        LOWERED=lowered is not None,
        BY_TILE=by_tile,
        UPCAST=INTERPRETED and hidden.dtype == torch.bfloat16,
        num_warps=form.warps,
        num_stages=form.stages,
    )
    return records


def constants(form: Form, width: int, count: int) -> dict[str, Any]:
    """What the first kernel is compiled for, apart from how its arguments come."""
    return {
        "HIDDEN": width,
        "COUNT": count,
        "PADDED": triton.next_power_of_2(count),
        "POSITIONS": form.positions,
        "IDS": form.ids,
        "WIDTH": form.width,
        "UPRIGHT": form.upright,
        "FLAT": form.flat,
    }


def described(matrix: Tensor) -> bool:
    """Whether a contiguous matrix can be fetched by tile."""
    return len(matrix) > 0 and not (matrix.shape[1] * matrix.element_size() | matrix.data_ptr()) % ALIGNMENT


def run_fold(
    records: Tensor,
    wanted: Tensor | None,
    positions: int,
    block: int,
    count: int,
    token: Tensor,
    prob: Tensor,
    *,
    final: bool,
) -> None:
    """The second kernel; records [n, 2 count + 2, block] of any strides, of which block b has b, b + blocks and so on.

    final: tokens and their probabilities [positions, count], else a record that is packed [positions, 2 count + 2].
    """
    if positions:
        fold_kernel[(triton.cdiv(positions, FOLD_POSITIONS),)](
            records,
            *records.stride(),
            token,
            prob,
            records if wanted is None else wanted,
            len(records),
            positions,
            block,
            BOUNDED=wanted is not None,
            FINAL=final,
            COUNT=count,
            PADDED=triton.next_power_of_2(count),
            POSITIONS=FOLD_POSITIONS,
            RECORDS=FOLD_RECORDS,
            num_warps=FOLD_WARPS,
        )


# Kernels. Numbers that vary from step to step are not specialised on: for those that are 1 or no multiple of 16 Triton
# would compile anew, while requests wait.


@triton.jit
def none_yet(POSITIONS: tl.constexpr, PADDED: tl.constexpr):
    """Places for the best of POSITIONS, all free: these hold ids below zero, each its own, so that one is the worst."""
    values = tl.full((POSITIONS, PADDED), float("-inf"), tl.float32)
    return values, tl.zeros((POSITIONS, PADDED), tl.int32) - 1 - tl.arange(0, PADDED)[None, :]


@triton.jit
def keep(best, ids, x, names, COUNT: tl.constexpr, PADDED: tl.constexpr):
    """The COUNT best of `best` and of x, both with their ids, which are above those of earlier calls; in no order."""
    usable = tl.arange(0, PADDED)[None, :] < COUNT
    for _ in tl.static_range(COUNT):
        value = tl.max(x, 1)
        name = tl.min(tl.where(x == value[:, None], names, 2147483647), 1)
        if COUNT > 1:
            x = tl.where(names == name[:, None], float("-inf"), x)
        # The worst place: the lowest value, of equals the highest id. Ids rise, so a newcomer must be better.
        low = tl.min(tl.where(usable, best, float("inf")), 1)
        worst = tl.max(tl.where(usable & (best == low[:, None]), ids, -2147483648), 1)
        swap = usable & (best == low[:, None]) & (ids == worst[:, None]) & (value > low)[:, None]
        best = tl.where(swap, value[:, None], best)
        ids = tl.where(swap, name[:, None], ids)
    return best, ids


@triton.jit
def raised(top, mass, x):
    """A running softmax's highest logit and sum of exp(logit - highest), once it has seen x [positions, n]."""
    higher = tl.maximum(top, tl.max(x, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, base, mass * tl.exp(top - base)


@triton.jit
def product(
    hidden,
    weight,
    begin,
    row,
    there,
    known,
    HIDDEN: tl.constexpr,
    POSITIONS: tl.constexpr,
    IDS: tl.constexpr,
    WIDTH: tl.constexpr,
    UPRIGHT: tl.constexpr,
    BY_TILE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Logits fp32 [POSITIONS, IDS] of the positions from `begin` on and the rows of the weights from `row` on.

    Which of those exist say `there` and `known`; the other arguments are kernel()'s.
    """
    x = tl.zeros((IDS, POSITIONS), tl.float32) if UPRIGHT else tl.zeros((POSITIONS, IDS), tl.float32)
    for k in range(0, HIDDEN, WIDTH):
        if BY_TILE:
            a = hidden.load([begin, k])
            b = weight.load([row, k])
        else:
            p, i, d = begin + tl.arange(0, POSITIONS), row + tl.arange(0, IDS), k + tl.arange(0, WIDTH)
            inside = (d < HIDDEN)[None, :]
            a = tl.load(hidden + p[:, None].to(tl.int64) * HIDDEN + d[None, :], there[:, None] & inside, 0.0)
            b = tl.load(weight + i[:, None].to(tl.int64) * HIDDEN + d[None, :], known[:, None] & inside, 0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        if UPRIGHT:
            x = tl.dot(b, tl.trans(a), x, input_precision="ieee")
        else:
            x = tl.dot(a, tl.trans(b), x, input_precision="ieee")
    return tl.trans(x) if UPRIGHT else x


@triton.jit(do_not_specialize=["positions", "vocabulary", "first", "mask_id"])
def kernel(
    hidden,
    weight,
    records,
    wanted,
    less,
    by,
    positions,
    vocabulary,
    first,
    mask_id,
    HIDDEN: tl.constexpr,
    COUNT: tl.constexpr,
    PADDED: tl.constexpr,
    POSITIONS: tl.constexpr,
    IDS: tl.constexpr,
    WIDTH: tl.constexpr,
    UPRIGHT: tl.constexpr,
    FLAT: tl.constexpr,
    BOUNDED: tl.constexpr,
    LOWERED: tl.constexpr,
    BY_TILE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program s * blocks + b: the best COUNT ids and the softmax terms of position block b over slice s.

    hidden [positions, HIDDEN], weight [vocabulary, HIDDEN], both contiguous or, if BY_TILE, their descriptors; records
    [programs, 2 COUNT + 2, POSITIONS]. If BOUNDED, only the first wanted [1] positions are worked on. If LOWERED, the
    logit of id less [positions] is first made smaller by `by` [positions].
    """
    count = positions
    if BOUNDED:
        count = tl.minimum(tl.load(wanted).to(tl.int32), positions)
    blocks = tl.cdiv(count, POSITIONS)
    if tl.program_id(0) >= tl.num_programs(0) // tl.maximum(blocks, 1) * blocks:
        return
    slices = tl.num_programs(0) // blocks
    s = tl.program_id(0) // blocks
    begin = tl.program_id(0) % blocks * POSITIONS
    tiles = tl.cdiv(vocabulary, IDS)

    p = begin + tl.arange(0, POSITIONS)
    there = p < count
    if LOWERED:
        lowers = tl.max(tl.abs(tl.load(by + p, there, 0.0)), 0) > 0.0  # in most steps nobody's
    best, ids = none_yet(POSITIONS, PADDED)
    top = tl.full((POSITIONS,), float("-inf"), tl.float32)
    mass = tl.zeros((POSITIONS,), tl.float32)
    for tile in tl.range(s * tiles // slices, (s + 1) * tiles // slices, flatten=FLAT):
        row = tile * IDS + tl.arange(0, IDS)
        known = row < vocabulary
        x = product(
            hidden, weight, begin, tile * IDS, there, known, HIDDEN, POSITIONS, IDS, WIDTH, UPRIGHT, BY_TILE, UPCAST
        )
        x = tl.where(known[None, :], x, float("-inf"))
        names = (first + row)[None, :]
        if LOWERED:  # noqa: SIM102 (else there is nothing to ask)
            if lowers:  # loaded anew for each tile: the products need the registers
                unwanted, lower = tl.load(less + p, there, -1).to(tl.int32), tl.load(by + p, there, 0.0)
                x -= tl.where(names == unwanted[:, None], lower[:, None], 0.0)
        top, base, mass = raised(top, mass, x)
        mass += tl.sum(tl.exp(x - base[:, None]), 1)
        best, ids = keep(best, ids, tl.where(names == mask_id, float("-inf"), x), names, COUNT, PADDED)

    out = records + tl.program_id(0) * (2 * COUNT + 2) * POSITIONS + tl.arange(0, POSITIONS)
    place = tl.arange(0, PADDED)[None, :]
    tl.store(out[:, None] + place * POSITIONS, best, mask=place < COUNT)
    tl.store(out[:, None] + (COUNT + place) * POSITIONS, tl.maximum(ids, 0).to(tl.float32), mask=place < COUNT)
    tl.store(out + 2 * COUNT * POSITIONS, top)
    tl.store(out + (2 * COUNT + 1) * POSITIONS, mass)


@triton.jit(do_not_specialize=["part_stride", "parts", "positions", "block"])
def fold_kernel(
    records,
    part_stride,
    field_stride,
    position_stride,
    token,
    prob,
    wanted,
    parts,
    positions,
    block,
    BOUNDED: tl.constexpr,
    FINAL: tl.constexpr,
    COUNT: tl.constexpr,
    PADDED: tl.constexpr,
    POSITIONS: tl.constexpr,
    RECORDS: tl.constexpr,
):
    """Program i: all records of some positions as one, see run_fold()."""
    count = positions
    if BOUNDED:
        count = tl.minimum(tl.load(wanted).to(tl.int32), positions)
    blocks = tl.cdiv(count, block)
    p = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    if tl.program_id(0) * POSITIONS >= count:
        return
    there = (p < count)[:, None]
    slices = parts // blocks

    best, ids = none_yet(POSITIONS, PADDED)
    top = tl.full((POSITIONS,), float("-inf"), tl.float32)
    mass = tl.zeros((POSITIONS,), tl.float32)
    for at in range(0, slices, RECORDS):
        s = at + tl.arange(0, RECORDS)
        valid = there & (s < slices)[None, :]
        part = s[None, :] * blocks + (p // block)[:, None]
        here = records + part.to(tl.int64) * part_stride + (p % block)[:, None] * position_stride
        peak = tl.load(here + 2 * COUNT * field_stride, valid, float("-inf"))
        total = tl.load(here + (2 * COUNT + 1) * field_stride, valid, 0.0)
        top, base, mass = raised(top, mass, peak)
        mass += tl.sum(total * tl.exp(peak - base[:, None]), 1)
        c = tl.arange(0, RECORDS * PADDED)
        s, place = at + c // PADDED, c % PADDED
        valid = there & ((s < slices) & (place < COUNT))[None, :]
        part = s[None, :] * blocks + (p // block)[:, None]
        here = records + part.to(tl.int64) * part_stride + (p % block)[:, None] * position_stride
        here += place[None, :] * field_stride
        x = tl.load(here, valid, float("-inf"))
        names = tl.load(here + COUNT * field_stride, valid, 0.0).to(tl.int32)
        best, ids = keep(best, ids, x, names, COUNT, PADDED)

    place = tl.arange(0, PADDED)[None, :]
    free = place < COUNT
    prob_of_first = tl.exp(tl.max(tl.where(free, best, float("-inf")), 1) - top) / mass
    sound = prob_of_first - prob_of_first == 0
    for j in tl.static_range(COUNT):
        value = tl.max(tl.where(free, best, float("-inf")), 1)
        name = tl.min(tl.where(free & (best == value[:, None]), ids, 2147483647), 1)
        free = free & ~((best == value[:, None]) & (ids == name[:, None]))
        name = tl.maximum(name, 0)
        if FINAL:
            tl.store(token + p * COUNT + j, tl.where(sound, name, -1).to(tl.int64), p < count)
            tl.store(prob + p * COUNT + j, tl.where(sound, tl.exp(value - top) / mass, 0.0), p < count)
        else:
            tl.store(token + p * (2 * COUNT + 2) + j, value, p < count)
            tl.store(token + p * (2 * COUNT + 2) + COUNT + j, name.to(tl.float32), p < count)
    if not FINAL:
        tl.store(token + p * (2 * COUNT + 2) + 2 * COUNT, top, p < count)
        tl.store(token + p * (2 * COUNT + 2) + 2 * COUNT + 1, mass, p < count)
