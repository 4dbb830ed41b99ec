"""The draw of sampling.py as one Triton kernel: a program draws for one position, and nothing is sorted.

A distribution is cut at one weight: all tokens above it stay, and of those that have just this weight the first few in
order of ids. Weights are softmax terms, numbers from 0 to 1, whose order is that of their bits as integers. So the cut
is the smallest integer above which there are fewer than top_k tokens and at most top_p of the mass. It is searched by
eighths: a pass over the row counts and weighs what is above eight bounds at once. No pass depends on other positions,
and all sums have a fixed order: a draw is the same alone and in any batch.

It is draw_sorted() but for rounding: a token that stands at the boundary of a cut, or a number that falls between two
tokens, to within some 1e-6 of the mass may go the other way.

Checked in Triton's interpreter and compiled for sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_llada.decode.contract import Draws

LANES = 2048  # tokens that a pass looks at together
TILE = 4096  # tokens whose weights are first summed and, in one of these tiles, then run through
WARPS, UNROLL = 16, 2


def draw(logits: Tensor, mask_id: int, draws: Draws) -> tuple[Tensor, Tensor]:
    """As sampling.draw; logits [P, V] hold the softmax terms afterwards, if they were finite."""
    P, V = logits.shape
    assert logits.stride(1) == 1
    token = torch.empty(P, dtype=torch.int64, device=logits.device)
    prob = torch.empty(P, dtype=torch.float32, device=logits.device)
    if P:
        kernel[(P,)](
            logits,
            draws.temperature,
            draws.top_k,
            draws.top_p,
            draws.min_p,
            draws.noise,
            token,
            prob,
            V,
            logits.stride(0),
            mask_id,
            LANES=LANES,
            TILE=TILE,
            TILES=tiles(V),
            UNROLL=UNROLL,
            num_warps=WARPS,
        )
    return token, prob


def tiles(vocabulary: int) -> int:
    """Room for this many tiles."""
    return int(triton.next_power_of_2(triton.cdiv(vocabulary, TILE)))


@triton.jit
def kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    noise,
    token,
    prob,
    vocabulary,
    stride,
    mask_id,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Program p: logits [P, vocabulary], fp32, whose rows are `stride` apart, to token p and its probability."""
    p = tl.program_id(0)
    row = logits + p.to(tl.int64) * stride
    lane = tl.arange(0, LANES)
    impossible = float("-inf")

    highest = tl.full((LANES,), impossible, tl.float32)
    finite = tl.full((LANES,), 1, tl.int1)
    for at in tl.range(0, vocabulary, LANES, loop_unroll_factor=UNROLL):
        i = at + lane
        x = tl.load(row + i, i < vocabulary, impossible)
        finite = finite & (x < float("inf"))  # nor NaN
        highest = tl.maximum(highest, tl.where(i == mask_id, impossible, x))
    peak = tl.max(highest, 0)
    sound = tl.min(finite.to(tl.int32), 0) == 1
    if (not sound) | (tl.maximum(peak, tl.load(row + mask_id)) == impossible):
        tl.store(token + p, -1)
        tl.store(prob + p, 0.0)
        return

    # Logits become weights, exp(logit / temperature - its maximum).
    heat = tl.load(temperature + p)
    base = tl.where(peak == impossible, 0.0, tl.div_rn(peak, heat))
    mass = tl.zeros((LANES,), tl.float32)
    for at in tl.range(0, vocabulary, LANES, loop_unroll_factor=UNROLL):
        i = at + lane
        x = tl.load(row + i, i < vocabulary, impossible)
        w = tl.where(i == mask_id, 0.0, tl.exp(tl.div_rn(x, heat) - base))
        tl.store(row + i, w, i < vocabulary)
        mass += w
    total = tl.sum(mass.to(tl.float64), 0)
    tl.debug_barrier()  # weights are read by other threads than wrote them

    # What is above `cut` stays, and the first `ties` of what is at it.
    cut, ties = tl.full((), -1, tl.int32), tl.full((), 0, tl.int32)
    most = tl.minimum(tl.load(top_k + p), vocabulary).to(tl.int32)
    nucleus, least = tl.load(top_p + p), tl.load(min_p + p)
    if (most < vocabulary) | (nucleus < 1) | (least > 0):
        share = tl.where(nucleus < 1, nucleus.to(tl.float64) * total, float("inf"))
        # The cut is in [low, high]. Above 1 there is nothing.
        low = tl.maximum(least, 0.0).to(tl.int32, bitcast=True)
        high = tl.maximum(tl.full((), 1.0, tl.float32).to(tl.int32, bitcast=True), low)
        upper = vocabulary  # at least as many as are at `low` or above
        eighth = tl.arange(0, 8)
        while low <= high:
            step = (high - low) // 8 + 1
            bound = tl.minimum(low + (eighth + 1) * step - 1, high)
            counts = tl.zeros((8, LANES), tl.int32)
            masses = tl.zeros((8, LANES), tl.float32)
            for at in tl.range(0, vocabulary, LANES, loop_unroll_factor=UNROLL):
                i = at + lane
                w = tl.load(row + i, i < vocabulary, 0.0)
                above = w.to(tl.int32, bitcast=True)[None, :] > bound[:, None]
                counts += above.to(tl.int32)
                masses += tl.where(above, w[None, :], 0.0)
            count, heavy = tl.sum(counts, 1), tl.sum(masses.to(tl.float64), 1)
            too_low = (count >= most) | (heavy > share)  # true, then false
            below = tl.sum(too_low.to(tl.int32), 0)
            here = eighth == below
            number, heavier = tl.sum(tl.where(here, count, 0), 0), tl.sum(tl.where(here, heavy, 0.0), 0)
            upper = tl.where(below > 0, tl.sum(tl.where(eighth == below - 1, count, 0), 0), upper)
            high = tl.sum(tl.where(here, bound, 0), 0)
            low += below * step
            # A single token in [low, high] stays, whatever it weighs. Of equal ones as many do as fit into the share;
            # of those without weight, which are never drawn, any number.
            alone = upper - number <= 1
            room = (share - heavier) / tl.where(high > 0, high, 1).to(tl.float32, bitcast=True).to(tl.float64)
            fitting = tl.minimum(room, vocabulary).to(tl.int32) + 1
            cut = tl.where(alone, low - 1, high)
            ties = tl.where(alone, 0, tl.minimum(most - number, fitting))
            low = tl.where(alone | (low == high), high + 1, low)

    # What stays of each tile.
    place, tile = tl.arange(0, TILE), tl.arange(0, TILES)
    over = tl.zeros((TILES,), tl.float64)
    tied = tl.zeros((TILES,), tl.int32)
    for n in tl.range(0, tl.cdiv(vocabulary, TILE)):
        i = n * TILE + place
        w = tl.load(row + i, i < vocabulary, 0.0)
        key = w.to(tl.int32, bitcast=True)
        over = tl.where(tile == n, tl.sum(tl.where(key > cut, w, 0.0).to(tl.float64), 0), over)
        tied = tl.where(tile == n, tl.sum(((key == cut) & (i < vocabulary)).to(tl.int32), 0), tied)
    free = tl.maximum(ties - (tl.cumsum(tied, 0) - tied), 0)  # of the ties that stay those not yet met
    weight = tl.maximum(cut, 0).to(tl.float32, bitcast=True).to(tl.float64)
    mine = over + tl.minimum(tied, free) * weight
    upto = tl.cumsum(mine, 0)
    whole = tl.max(upto, 0)

    # The tile, and then the token in it, at which the sum passes the number. Should rounding hide that, the last one.
    target = whole * tl.load(noise + p)
    last = tl.max(tl.where(mine > 0, tile, 0), 0)
    n = tl.min(tl.where(upto > target, tile, last), 0)
    before = tl.max(tl.where(tile < n, upto, 0.0), 0)
    free = tl.sum(tl.where(tile == n, free, 0), 0)
    i = n * TILE + place
    w = tl.load(row + i, i < vocabulary, 0.0)
    key = w.to(tl.int32, bitcast=True)
    equal = ((key == cut) & (i < vocabulary)).to(tl.int32)
    w = tl.where((key > cut) | ((equal == 1) & (tl.cumsum(equal, 0) <= free)), w, 0.0)
    running = before + tl.cumsum(w.to(tl.float64), 0)
    last = tl.max(tl.where(w > 0, i, -1), 0)
    last = tl.where(last < 0, vocabulary - 1, last)  # there is nothing to draw from
    drawn = tl.min(tl.where((w > 0) & (running > target), i, last), 0)
    tl.store(token + p, drawn)
    tl.store(prob + p, (tl.sum(tl.where(i == drawn, w, 0.0), 0).to(tl.float64) / whole).to(tl.float32))
