"""Draws (sampling.py) as Triton kernels: logits live in registers, tile by tile, and are made anew for each pass.

A pass gives every program a block of positions and a slice of the vocabulary, as selection does (select_triton.py), and
leaves a record of each position there; a second kernel folds a position's records. Two kinds of pass draw: the first
over all tokens, and the last, where a distribution is cut, over those that stay. Those between count and weigh what is
above bounds. All sums have a fixed order.

Positions that are cut stand behind those that are not. Where there are none, a program of a later pass ends at once,
and so does one that counts for positions whose cut is found: a single token is left between two bounds.

Checked in Triton's interpreter and compiled for sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sglang_llada.decode.contract import BOUNDS, PASSES, RANGE, Draws
from sglang_llada.decode.head import Best, Exchange, Head, Lowered
from sglang_llada.decode.noise import MOST, UNIT
from sglang_llada.decode.select_triton import (
    INTERPRETED,
    Form,
    described,
    product,
    programs_of,
    raised,
)

# Of heads of two bytes and of four, which do not run on tensor cores, and of logits that are there already.
HALF, SINGLE = Form(64, 128, 64, warps=8, stages=4, programs=1), Form(64, 128, 16, warps=8, stages=3, programs=1)
STORED = Form(16, 128, 16, warps=4, stages=1, programs=2)
FIELDS = 5  # of a record of a draw: score, token, logit, peak, total
STATE = 5  # of a position between passes: peak, total, lowest bound, distance of bounds, tokens above the highest one
FOLD_POSITIONS, FOLD_RECORDS, COUNT_RECORDS = 4, 128, 16  # of a program that folds, at once


def draw(
    source: Tensor,
    head: Head | None,
    mask_id: int,
    draws: Draws,
    exchange: Exchange | None,
    spans: Tensor | None,
    lowered: Lowered | None,
) -> Best:
    """As sampling.draw, of hidden states [P, H] and a head of one dtype; without one of logits fp32 [P, V]."""
    token, prob = draws.key.new_empty(len(source), 1), draws.temperature.new_empty(len(source), 1)
    draw_into(Best(token, prob), source, head, mask_id, draws.key, torch.stack(draws[1:]), exchange, spans, lowered)
    return Best(token, prob)


def draw_into(
    best: Best,
    source: Tensor,
    head: Head | None,
    mask_id: int,
    key: Tensor,
    how: Tensor,
    exchange: Exchange | None = None,
    spans: Tensor | None = None,
    lowered: Lowered | None = None,
) -> None:
    """As draw, put in place; how: fp32 [4, P], all of Draws but the key [P]."""
    ops, P = torch.ops.sglang_llada, len(source)
    weight, first, invariant = (None, 0, False) if head is None else (head.weight, head.first, head.invariant)
    state = how.new_empty(STATE, P)
    for cut, counts in ((False, False), *[(True, True)] * PASSES, (True, False)):
        block = form_of(source, weight).positions
        given = (source, weight, spans, *(lowered or (None, None)), key, how, state)
        records = ops.pass_over(*given, first, mask_id, invariant, cut, counts)
        if exchange is not None:
            packed = ops.fold_pass(records, spans, state, P, block, cut)
            records, block = torch.stack(list(exchange(packed))), P
        ops.finish_pass(records, spans, how, state, best.token, best.prob, block, cut)


def form_of(source: Tensor, weight: Tensor | None) -> Form:
    """The form for hidden states and weights, or logits."""
    return STORED if weight is None else SINGLE if source.element_size() == 4 else HALF


# Operators, so that they can be traced and counted.


@torch.library.custom_op(
    "sglang_llada::pass_over",
    mutates_args=(),
    schema="(Tensor source, Tensor? weight, Tensor? spans, Tensor? less, Tensor? by, Tensor key, Tensor how, "
    "Tensor state, int first, int mask_id, bool invariant, bool cut, bool counts) -> Tensor",
)
def pass_over(
    source: Tensor,
    weight: Tensor | None,
    spans: Tensor | None,
    less: Tensor | None,
    by: Tensor | None,
    key: Tensor,
    how: Tensor,
    state: Tensor,
    first: int,
    mask_id: int,
    invariant: bool,
    cut: bool,
    counts: bool,
) -> Tensor:
    """The records of a pass, [programs, positions of a block, fields]; see slice_kernel."""
    form, P = form_of(source, weight), len(source)
    records = room_for_records(source, weight, spans, less, by, key, how, state, first, mask_id, invariant, cut, counts)
    if not P:
        return records
    source = source.contiguous()
    weight = source if weight is None else weight.contiguous()
    stored = weight is source
    by_tile = source.element_size() == 2 and all(described(each) for each in (source, weight))
    slice_kernel[(len(records),)](
        TensorDescriptor.from_tensor(source, [form.positions, form.width]) if by_tile else source,
        TensorDescriptor.from_tensor(weight, [form.ids, form.width]) if by_tile else weight,
        records,
        records if spans is None else spans,
        records if less is None else less,
        records if by is None else by,
        key,
        how,
        state,
        P,
        source.shape[1] if stored else len(weight),
        first,
        mask_id,
        **constants(form, source.shape[1], counts=counts),
        CUT=cut,
        STORED=stored,
        SPANNED=spans is not None,
        LOWERED=less is not None,
        BY_TILE=by_tile,
        UPCAST=INTERPRETED and source.dtype == torch.bfloat16,
        num_warps=form.warps,
        num_stages=form.stages,
    )
    return records


def constants(form: Form, width: int, *, counts: bool) -> dict[str, Any]:
    """What a pass is compiled for, apart from how its arguments come."""
    tile = {"POSITIONS": form.positions, "IDS": form.ids, "WIDTH": form.width}
    return {"HIDDEN": width, "BOUNDS": BOUNDS if counts else 0, **tile, "UNIT": UNIT, "MOST": MOST}


@pass_over.register_fake
def room_for_records(
    source: Tensor,
    weight: Tensor | None,
    spans: Tensor | None,
    less: Tensor | None,
    by: Tensor | None,
    key: Tensor,
    how: Tensor,
    state: Tensor,
    first: int,
    mask_id: int,
    invariant: bool,
    cut: bool,
    counts: bool,
) -> Tensor:
    form = form_of(source, weight)
    programs = programs_of(form, source, invariant)
    return how.new_empty(programs, form.positions, 2 * BOUNDS if counts else FIELDS)


@torch.library.custom_op(
    "sglang_llada::fold_pass",
    mutates_args=(),
    schema="(Tensor records, Tensor? spans, Tensor state, int positions, int block, bool cut) -> Tensor",
)
def fold_pass(records: Tensor, spans: Tensor | None, state: Tensor, positions: int, block: int, cut: bool) -> Tensor:
    """A rank's record of each position, [P, fields], the first of those that the pass is about at 0."""
    packed = records.new_zeros(positions, records.shape[-1])
    run_fold(records, spans, state, state, packed, packed, block, cut, final=False)
    return packed


@fold_pass.register_fake
def _(records: Tensor, spans: Tensor | None, state: Tensor, positions: int, block: int, cut: bool) -> Tensor:
    return records.new_zeros(positions, records.shape[-1])


@torch.library.custom_op(
    "sglang_llada::finish_pass",
    mutates_args=("state", "token", "prob"),
    schema="(Tensor records, Tensor? spans, Tensor how, Tensor(a!) state, Tensor(b!) token, Tensor(c!) prob, "
    "int block, bool cut) -> ()",
)
def finish_pass(
    records: Tensor,
    spans: Tensor | None,
    how: Tensor,
    state: Tensor,
    token: Tensor,
    prob: Tensor,
    block: int,
    cut: bool,
) -> None:
    """What a pass makes of its positions: tokens and probabilities [P, 1], or the next bounds."""
    run_fold(records, spans, how, state, token, prob, block, cut, final=True)


@finish_pass.register_fake
def _(
    records: Tensor,
    spans: Tensor | None,
    how: Tensor,
    state: Tensor,
    token: Tensor,
    prob: Tensor,
    block: int,
    cut: bool,
) -> None:
    return None


def run_fold(
    records: Tensor,
    spans: Tensor | None,
    how: Tensor,
    state: Tensor,
    token: Tensor,
    prob: Tensor,
    block: int,
    cut: bool,
    *,
    final: bool,
) -> None:
    """Fold records [n, block, fields], of which block b has b, b + blocks and so on; final as in fold_kernel."""
    P, counts = state.shape[1], records.shape[-1] > FIELDS
    strides = records.stride()[:2]
    given = (records, *strides, *((token,) if counts else (token, prob)))
    given = (*given, records if spans is None else spans, how, state, len(records), P, block)
    kinds = {"SPANNED": spans is not None, "FINAL": final, "FROM": int(cut), "num_warps": 4}
    if P and counts:
        bounds_kernel[(P,)](*given, BOUNDS=BOUNDS, RECORDS=COUNT_RECORDS, **kinds)
    elif P:
        sizes = {"POSITIONS": FOLD_POSITIONS, "RECORDS": FOLD_RECORDS, "RANGE": RANGE, "BOUNDS": BOUNDS}
        draws_kernel[(triton.cdiv(P, FOLD_POSITIONS),)](*given, **sizes, **kinds)


# Kernels. A state is [STATE, positions], `how` [4, positions].


@triton.jit
def span(spans, positions, FROM: tl.constexpr, SPANNED: tl.constexpr):
    """Where positions begin and end that a pass is about: from the first drawn (FROM 0) or cut one (1) on."""
    begin, end = 0, positions
    if SPANNED:
        begin, end = tl.load(spans + FROM), tl.load(spans + 2)
    return begin, end


@triton.jit
def noise(key, names, UNIT: tl.constexpr, MOST: tl.constexpr):
    """noise.gumbel() of keys [POSITIONS] and ids [IDS]."""
    low, high = key.to(tl.uint32)[:, None], (key >> 32).to(tl.uint32)[:, None]
    x = names.to(tl.uint32)[None, :] ^ low
    x = ((x ^ (x >> 16)) * 0x7FEB352D) ^ high
    x = (x ^ (x >> 15)) * 0x846CA68B
    uniform = tl.minimum(((x ^ (x >> 16)).to(tl.float32) + 0.5) * UNIT, MOST)
    # log(1 - u) as it is for small u, too (Higham 2002, section 1.14.1)
    rest = 1.0 - uniform
    near = tl.where(rest == 1.0, uniform, uniform * tl.log(rest) / tl.where(rest == 1.0, 1.0, rest - 1.0))
    return -tl.log(near)


@triton.jit(do_not_specialize=["positions", "first", "mask_id"])
def slice_kernel(
    source,
    weight,
    records,
    spans,
    less,
    by,
    key,
    how,
    state,
    positions,
    vocabulary,
    first,
    mask_id,
    HIDDEN: tl.constexpr,
    BOUNDS: tl.constexpr,
    POSITIONS: tl.constexpr,
    IDS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    MOST: tl.constexpr,
    CUT: tl.constexpr,
    STORED: tl.constexpr,
    SPANNED: tl.constexpr,
    LOWERED: tl.constexpr,
    BY_TILE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program s * blocks + b: of position block b and slice s what is drawn, or without BOUNDS what is above bounds.

    source: hidden states [positions, HIDDEN], for weights [vocabulary, HIDDEN], or if STORED logits [positions,
    vocabulary]. records: [programs, POSITIONS, fields of sampling.Drawn, or twice BOUNDS]. If CUT, tokens below a
    bound do not count.
    """
    begin, end = span(spans, positions, CUT, SPANNED)
    blocks = tl.cdiv(end - begin, POSITIONS)
    if tl.program_id(0) >= tl.num_programs(0) // tl.maximum(blocks, 1) * blocks:
        return
    slices = tl.num_programs(0) // blocks
    s = tl.program_id(0) // blocks
    begin += tl.program_id(0) % blocks * POSITIONS
    tiles = tl.cdiv(vocabulary, IDS)

    p = begin + tl.arange(0, POSITIONS)
    there = p < end
    heat, keys = tl.load(how + p, there, 1.0), tl.load(key + p, there, 0)
    heat = tl.where(heat > 0, heat, 1.0)
    peak, low, width, least = heat, heat, heat, heat
    if CUT:
        peak, least = tl.load(state + p, there, 0.0), tl.load(how + 3 * positions + p, there, 0.0)
        low, width = tl.load(state + 2 * positions + p, there, 0.0), tl.load(state + 3 * positions + p, there, 0.0)
    if BOUNDS > 0:  # noqa: SIM102 - decided by the compiler, which would not find `width` in a pass without bounds
        if tl.max(width, 0) == 0.0:
            return
    best = tl.full((POSITIONS,), float("-inf"), tl.float32)
    logit, top = best, best
    ids, mass = tl.zeros((POSITIONS,), tl.int32), tl.zeros((POSITIONS,), tl.float32)
    column = tl.arange(0, BOUNDS if BOUNDS > 0 else 1)[None, :]
    count = tl.zeros((POSITIONS, BOUNDS if BOUNDS > 0 else 1), tl.float32)
    weighed = count
    for tile in tl.range(s * tiles // slices, (s + 1) * tiles // slices):
        row = tile * IDS + tl.arange(0, IDS)
        known = row < vocabulary
        names = first + row
        if STORED:
            here = source + p[:, None].to(tl.int64) * vocabulary + row[None, :]
            x = tl.load(here, there[:, None] & known[None, :], 0.0)
        else:
            x = product(
                source, weight, begin, tile * IDS, there, known, HIDDEN, POSITIONS, IDS, WIDTH, False, BY_TILE, UPCAST
            )
        x = tl.where(known[None, :], x, float("-inf"))
        if LOWERED:
            unwanted, lower = tl.load(less + p, there, -1).to(tl.int32), tl.load(by + p, there, 0.0)
            x -= tl.where(names[None, :] == unwanted[:, None], lower[:, None], 0.0)
        x = tl.div_rn(x, tl.broadcast_to(heat[:, None], (POSITIONS, IDS)))
        x = tl.where((names == mask_id)[None, :] & (x < float("inf")), float("-inf"), x)
        if BOUNDS > 0:
            x -= peak[:, None]
            w = tl.exp(x)
            for j in range(BOUNDS):
                above = x > (low + j * width)[:, None]
                count += tl.where(column == j, tl.sum(above.to(tl.float32), 1)[:, None], 0.0)
                weighed += tl.where(column == j, tl.sum(tl.where(above, w, 0.0), 1)[:, None], 0.0)
        else:
            if CUT:  # what is not a number stays, and is found
                below = x - peak[:, None]
                x = tl.where((below <= low[:, None]) | (below < least[:, None]), float("-inf"), x)
            top, base, mass = raised(top, mass, x)
            mass += tl.sum(tl.exp(x - base[:, None]), 1)
            score = x + noise(keys, names, UNIT, MOST)
            value = tl.max(score, 1)
            name = tl.min(tl.where(score == value[:, None], names[None, :], 2147483647), 1)
            mine = tl.max(tl.where(names[None, :] == name[:, None], x, float("-inf")), 1)
            better = value > best
            best, ids = tl.where(better, value, best), tl.where(better, name, ids)
            logit = tl.where(better, mine, logit)

    q = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    if BOUNDS > 0:
        out = records + q[:, None] * (2 * BOUNDS) + column
        tl.store(out, count)
        tl.store(out + BOUNDS, weighed)
    else:
        out = records + q * 5
        tl.store(out, best)
        tl.store(out + 1, ids.to(tl.float32))
        tl.store(out + 2, logit)
        tl.store(out + 3, top)
        tl.store(out + 4, mass)


@triton.jit(do_not_specialize=["part_stride", "parts", "positions", "block"])
def draws_kernel(
    records,
    part_stride,
    position_stride,
    token,
    prob,
    spans,
    how,
    state,
    parts,
    positions,
    block,
    POSITIONS: tl.constexpr,
    RECORDS: tl.constexpr,
    RANGE: tl.constexpr,
    BOUNDS: tl.constexpr,
    SPANNED: tl.constexpr,
    FINAL: tl.constexpr,
    FROM: tl.constexpr,
):
    """Program i: all records of some positions as one, in `token` [positions, 5]; if FINAL the token, its probability
    and, of a draw from all tokens, what the search for a cut begins with."""
    begin, end = span(spans, positions, FROM, SPANNED)
    q = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    p = begin + q
    if begin + tl.program_id(0) * POSITIONS >= end:
        return
    there = p < end
    blocks = tl.cdiv(end - begin, block)
    slices = parts // blocks

    best = tl.full((POSITIONS,), float("-inf"), tl.float32)
    logit, top = best, best
    ids, mass = tl.zeros((POSITIONS,), tl.int32), tl.zeros((POSITIONS,), tl.float32)
    for at in range(0, slices, RECORDS):
        s = at + tl.arange(0, RECORDS)
        valid = there[:, None] & (s < slices)[None, :]
        part = s[None, :] * blocks + (q // block)[:, None]
        here = records + part.to(tl.int64) * part_stride + (q % block)[:, None] * position_stride
        peak = tl.load(here + 3, valid, float("-inf"))
        top, base, mass = raised(top, mass, peak)
        mass += tl.sum(tl.load(here + 4, valid, 0.0) * tl.exp(peak - base[:, None]), 1)
        score, name = tl.load(here, valid, float("-inf")), tl.load(here + 1, valid, 0.0).to(tl.int32)
        value = tl.max(score, 1)
        lowest = tl.min(tl.where(score == value[:, None], name, 2147483647), 1)
        mine = (score == value[:, None]) & (name == lowest[:, None])
        found = tl.max(tl.where(mine, tl.load(here + 2, valid, float("-inf")), float("-inf")), 1)
        better = value > best
        best, ids = tl.where(better, value, best), tl.where(better, lowest, ids)
        logit = tl.where(better, found, logit)

    if FINAL:
        chance = tl.exp(logit - top) / mass
        sound = chance - chance == 0
        tl.store(token + p, tl.where(sound, ids, -1).to(tl.int64), there)
        tl.store(prob + p, tl.where(sound, chance, 0.0), there)
        if FROM == 0:
            searched = tl.load(how + positions + p, there, 0.0) < float("inf")
            searched = searched | (tl.load(how + 2 * positions + p, there, 0.0) < float("inf"))
            tl.store(state + p, top, there)
            tl.store(state + positions + p, mass, there)
            tl.store(state + 2 * positions + p, tl.where(searched, -RANGE, float("-inf")), there)
            tl.store(state + 3 * positions + p, tl.where(searched, RANGE / BOUNDS, 0.0), there)
            tl.store(state + 4 * positions + p, tl.zeros((POSITIONS,), tl.float32), there)
    else:
        out = token + q * 5
        tl.store(out, best, there)
        tl.store(out + 1, ids.to(tl.float32), there)
        tl.store(out + 2, logit, there)
        tl.store(out + 3, top, there)
        tl.store(out + 4, mass, there)


@triton.jit(do_not_specialize=["parts", "positions", "block"])
def bounds_kernel(
    records,
    part_stride,
    position_stride,
    packed,
    spans,
    how,
    state,
    parts,
    positions,
    block,
    BOUNDS: tl.constexpr,
    RECORDS: tl.constexpr,
    SPANNED: tl.constexpr,
    FINAL: tl.constexpr,
    FROM: tl.constexpr,
):
    """Program q: all that is above the bounds of a position, in `packed` [positions, twice BOUNDS]; if FINAL the next
    bounds, which lie between the highest at which tokens go and the one above it."""
    begin, end = span(spans, positions, FROM, SPANNED)
    q = tl.program_id(0)
    p = begin + q
    if p >= end:
        return
    width = tl.load(state + 3 * positions + p)
    if width == 0.0:
        return
    blocks = tl.cdiv(end - begin, block)
    slices = parts // blocks
    bound = tl.arange(0, BOUNDS)
    count, mass = tl.zeros((BOUNDS,), tl.float32), tl.zeros((BOUNDS,), tl.float32)
    for at in range(0, slices, RECORDS):
        s = at + tl.arange(0, RECORDS)
        part = (s * blocks + q // block).to(tl.int64) * part_stride + q % block * position_stride
        here = records + part[:, None] + bound[None, :]
        valid = (s < slices)[:, None] & (bound < BOUNDS)[None, :]
        count += tl.sum(tl.load(here, valid, 0.0), 0)
        mass += tl.sum(tl.load(here + BOUNDS, valid, 0.0), 0)

    if FINAL:
        share = tl.load(how + 2 * positions + p) * tl.load(state + positions + p)
        go = (count >= tl.load(how + positions + p)) | (mass > share)  # true, then false
        j = tl.maximum(tl.sum(go.to(tl.int32), 0) - 1, 0)
        above = tl.sum(tl.where(bound == j, count, 0.0), 0)
        beyond = tl.sum(tl.where(bound == j + 1, count, 0.0), 0)
        beyond = tl.where(j == BOUNDS - 1, tl.load(state + 4 * positions + p), beyond)
        tl.store(state + 2 * positions + p, tl.load(state + 2 * positions + p) + j * width)
        # A single token between two bounds stays: those above it are those above the upper one.
        tl.store(state + 3 * positions + p, tl.where(above - beyond <= 1, 0.0, width / BOUNDS))
        tl.store(state + 4 * positions + p, beyond)
    else:
        tl.store(packed + q * (2 * BOUNDS) + bound, count)
        tl.store(packed + q * (2 * BOUNDS) + BOUNDS + bound, mass)
