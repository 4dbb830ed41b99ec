"""The reduction of select.py as one Triton kernel: logits live in registers, tile by tile, and are never written.

A program takes a block of positions and a slice of the vocabulary; slices are folded by the torch code that also folds
shards of ranks. Checked in Triton's interpreter and compiled for sm_80, sm_90 and sm_100; not run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_llada.decode.select import Head, Lowered, Partial, fold

POSITIONS, IDS = 64, 128  # of a tile of logits
WIDTH = {2: 32, 4: 16}  # hidden dimensions that are summed at once, by bytes per element; more would spill registers
WARPS, STAGES = 8, 3
INTERPRETED = triton.knobs.runtime.interpret  # where a product of bf16 would be one of integers
SLICES = 64  # of the vocabulary, so that few positions still occupy a device


def reduce(
    hidden: Tensor,
    head: Head,
    mask_id: int,
    count: int,
    wanted: Tensor | None = None,
    lowered: Lowered | None = None,
) -> Partial:
    """As select.reduce; hidden [P, H] and head.weight [v, H] of one dtype."""
    P, v = hidden.shape[0], head.weight.shape[0]
    slices = max(min(SLICES, triton.cdiv(v, IDS)), 1)
    per_slice = triton.cdiv(triton.cdiv(v, slices), IDS) * IDS
    padded = triton.next_power_of_2(count)
    logit = torch.empty(P, slices, padded, dtype=torch.float32, device=hidden.device)
    token = torch.empty_like(logit, dtype=torch.int32)
    peak, total = torch.empty(2, slices, P, dtype=torch.float32, device=hidden.device)
    if P:
        kernel[(triton.cdiv(P, POSITIONS), slices)](
            hidden.contiguous(),
            head.weight.contiguous(),
            logit,
            token,
            peak,
            total,
            hidden if wanted is None else wanted,
            hidden if lowered is None else lowered.token.contiguous(),
            hidden if lowered is None else lowered.by.contiguous(),
            P,
            v,
            hidden.shape[1],
            head.first,
            mask_id,
            per_slice,
            BOUNDED=wanted is not None,
            LOWERED=lowered is not None,
            COUNT=count,
            PADDED=padded,
            POSITIONS=POSITIONS,
            IDS=IDS,
            WIDTH=WIDTH[hidden.element_size()],
            UPCAST=INTERPRETED and hidden.dtype == torch.bfloat16,
            num_warps=WARPS,
            num_stages=STAGES,
        )
    # Equals must stand in order of their ids: the kernel keeps the best in no order.
    flat_token, flat_logit = token.flatten(1).long(), logit.flatten(1)
    by_id = flat_token.argsort(-1)
    return fold(flat_logit.gather(-1, by_id), flat_token.gather(-1, by_id), peak, total, count)


@triton.jit
def kernel(
    hidden,
    weight,
    logit,
    token,
    peak,
    total,
    wanted,
    lowered,
    lowered_by,
    positions,
    vocabulary,
    width,
    first,
    mask_id,
    per_slice,
    BOUNDED: tl.constexpr,
    LOWERED: tl.constexpr,
    COUNT: tl.constexpr,
    PADDED: tl.constexpr,
    POSITIONS: tl.constexpr,
    IDS: tl.constexpr,
    WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program (i, s): the best COUNT ids and the softmax terms of position block i over slice s of the vocabulary.

    hidden [positions, width], weight [vocabulary, width], both contiguous; logit, token [positions, slices, PADDED];
    peak, total [slices, positions]. If BOUNDED, only blocks with a position below wanted [1] are worked on. If LOWERED,
    the logit of id lowered [positions] is first made less by lowered_by [positions].
    """
    s = tl.program_id(1)
    if BOUNDED:  # noqa: SIM102 (else there is nothing to load)
        if tl.program_id(0) * POSITIONS >= tl.load(wanted):
            return
    p = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    there = p < positions
    if LOWERED:
        less = tl.load(lowered + p, there, -1)
        by = tl.load(lowered_by + p, there, 0.0)
    place = tl.arange(0, PADDED)
    # Free places hold ids below zero, each its own, so that there is always one worst place.
    best = tl.full((POSITIONS, PADDED), float("-inf"), tl.float32)
    ids = tl.zeros((POSITIONS, PADDED), tl.int32) - 1 - place[None, :]
    top = tl.full((POSITIONS,), float("-inf"), tl.float32)
    mass = tl.zeros((POSITIONS,), tl.float32)

    begin = s * per_slice
    end = tl.minimum(begin + per_slice, vocabulary)
    for at in range(begin, end, IDS):
        row = at + tl.arange(0, IDS)
        known = row < end
        x = tl.zeros((POSITIONS, IDS), tl.float32)
        for k in range(0, width, WIDTH):
            d = k + tl.arange(0, WIDTH)
            inside = d < width
            a = tl.load(hidden + p[:, None].to(tl.int64) * width + d[None, :], there[:, None] & inside[None, :], 0.0)
            b = tl.load(weight + row[:, None].to(tl.int64) * width + d[None, :], known[:, None] & inside[None, :], 0.0)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            x = tl.dot(a, tl.trans(b), x, input_precision="ieee")
        x = tl.where(known[None, :], x, float("-inf"))
        names = (first + row)[None, :]
        if LOWERED:
            x = x - tl.where(names == less[:, None], by[:, None], 0.0)

        higher = tl.maximum(top, tl.max(x, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(top - base) + tl.sum(tl.exp(x - base[:, None]), 1)
        top = higher

        x = tl.where(names == mask_id, float("-inf"), x)
        for _ in tl.static_range(COUNT):
            value = tl.max(x, 1)
            name = tl.min(tl.where(x == value[:, None], names, 2147483647), 1)
            x = tl.where(names == name[:, None], float("-inf"), x)
            # The worst place: the lowest value, of equals the highest id. Ids rise, so a newcomer must be better.
            usable = place[None, :] < COUNT
            low = tl.min(tl.where(usable, best, float("inf")), 1)
            worst = tl.max(tl.where(usable & (best == low[:, None]), ids, -2147483648), 1)
            swap = usable & (best == low[:, None]) & (ids == worst[:, None]) & (value > low)[:, None]
            best = tl.where(swap, value[:, None], best)
            ids = tl.where(swap, name[:, None], ids)

    out = (p[:, None].to(tl.int64) * tl.num_programs(1) + s) * PADDED + place[None, :]
    tl.store(logit + out, best, mask=there[:, None])
    tl.store(token + out, tl.maximum(ids, 0), mask=there[:, None])
    tl.store(peak + s * positions + p, top, mask=there)
    tl.store(total + s * positions + p, mass, mask=there)
