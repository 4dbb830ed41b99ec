"""Block routing (router.py: route_blocks) as one Triton kernel: a program routes the tokens of one block.

Checked in Triton's interpreter and compiled for sm_80, sm_90 and sm_100; not run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_llada.llada2.router import Routing

WARPS = 8


def route_blocks(
    logits: Tensor, expert_bias: Tensor, block_size: int, capacity: int, top_k: int, normalise: bool
) -> Routing:
    """As router.route_blocks."""
    tokens, experts = logits.shape
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    if tokens:
        kernel[(tokens // block_size,)](
            logits.contiguous(),
            expert_bias,
            weights,
            ids,
            EXPERTS=experts,
            BLOCK=block_size,
            CAPACITY=capacity,
            TOP_K=top_k,
            NORMALISE=normalise,
            EXPERTS_PADDED=triton.next_power_of_2(experts),
            BLOCK_PADDED=triton.next_power_of_2(block_size),
            TOP_K_PADDED=triton.next_power_of_2(top_k),
            num_warps=WARPS,
        )
    return Routing(weights, ids)


@triton.jit
def kernel(
    logits,
    expert_bias,
    weights,
    ids,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALISE: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    BLOCK_PADDED: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
):
    """Program b: logits [B * BLOCK, EXPERTS] of block b to weights and ids, both [B * BLOCK, TOP_K]."""
    place = tl.arange(0, BLOCK_PADDED)
    token = tl.program_id(0).to(tl.int64) * BLOCK + place
    inside = (place < BLOCK)[:, None]
    e = tl.arange(0, EXPERTS_PADDED)
    real = e < EXPERTS
    x = tl.load(logits + token[:, None] * EXPERTS + e[None, :], inside & real[None, :], 0.0).to(tl.float32)
    scores = 1.0 / (1.0 + tl.exp(-x))
    biased = scores + tl.load(expert_bias + e, real, 0.0)[None, :]
    biased = tl.where(inside & real[None, :], biased, float("-inf"))

    best = tl.max(biased, 0)
    pool = e < 0
    for _ in range(CAPACITY):
        chosen = tl.min(tl.where((best == tl.max(best, 0)) & ~pool, e, EXPERTS_PADDED), 0)
        pool = pool | (e == chosen)
        best = tl.where(e == chosen, float("-inf"), best)

    left = tl.where(pool[None, :], biased, float("-inf"))
    k = tl.arange(0, TOP_K_PADDED)[None, :]
    found = tl.zeros((BLOCK_PADDED, TOP_K_PADDED), tl.float32)
    names = tl.zeros((BLOCK_PADDED, TOP_K_PADDED), tl.int64)
    for i in range(TOP_K):
        name = tl.min(tl.where(left == tl.max(left, 1)[:, None], e[None, :], EXPERTS - 1), 1)
        here = e[None, :] == name[:, None]
        weight = tl.sum(tl.where(here, scores, 0.0), 1)
        found = tl.where(k == i, weight[:, None], found)
        names = tl.where(k == i, name[:, None].to(tl.int64), names)
        left = tl.where(here, float("-inf"), left)
    if NORMALISE:
        found = found / (tl.sum(found, 1)[:, None] + 1e-20)
    out = token[:, None] * TOP_K + k
    tl.store(weights + out, found, inside & (k < TOP_K))
    tl.store(ids + out, names, inside & (k < TOP_K))
