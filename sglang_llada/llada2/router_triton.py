"""Routing (router.py) as Triton kernels: route_blocks, where a program has a block, and route, where it has few tokens.

The second sums a router's products by part on its way, and gives a shared expert that stands with the routed ones its
column.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 8
TOKENS = 4  # of a program of route; each has a warp of its own


def route_blocks(
    logits: Tensor, expert_bias: Tensor, block_size: int, capacity: int, top_k: int, normalise: bool
) -> tuple[Tensor, Tensor]:
    """Weights and ids, as router.route_blocks."""
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
    return weights, ids


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


@torch.library.custom_op(
    "sglang_llada::route",
    mutates_args=(),
    schema="(Tensor by_part, Tensor expert_bias, int groups, int top_groups, int top_k, bool normalise, float scale, "
    "float shared) -> (Tensor, Tensor)",
)
def route(
    by_part: Tensor,
    expert_bias: Tensor,
    groups: int,
    top_groups: int,
    top_k: int,
    normalise: bool,
    scale: float,
    shared: float,
) -> tuple[Tensor, Tensor]:
    """As router.route of router.summed(by_part), for powers of two of groups and experts in each.

    Args:
        by_part: fp32 [N, 3 E].
        scale: of the weights.
        shared: the weight of one more column for expert E; none if 0.

    Returns:
        Weights fp32 and ids int32, [N, K].
    """
    weights, ids = room_for_route(by_part, expert_bias, groups, top_groups, top_k, normalise, scale, shared)
    parts = by_part.shape[1] // len(expert_bias)
    if len(by_part):
        route_kernel[(triton.cdiv(len(by_part), TOKENS),)](
            by_part,
            expert_bias,
            weights,
            ids,
            len(by_part),
            scale,
            shared,
            **route_constants(parts, len(expert_bias), groups, top_groups, top_k, normalise, shared),
            num_warps=TOKENS,
        )
    return weights, ids


@route.register_fake
def room_for_route(
    by_part: Tensor,
    expert_bias: Tensor,
    groups: int,
    top_groups: int,
    top_k: int,
    normalise: bool,
    scale: float,
    shared: float,
) -> tuple[Tensor, Tensor]:
    columns = top_k + (shared > 0)
    return by_part.new_empty(len(by_part), columns), by_part.new_empty(len(by_part), columns, dtype=torch.int32)


def route_constants(
    parts: int, experts: int, groups: int, top_groups: int, top_k: int, normalise: bool, shared: float
) -> dict[str, int]:
    """What route is compiled for."""
    return {
        "EXPERTS": experts,
        "PARTS": parts,
        "GROUPS": groups,
        "TOP_GROUPS": top_groups,
        "TOP_K": top_k,
        "COLUMNS": top_k + (shared > 0),
        "PADDED": triton.next_power_of_2(top_k + (shared > 0)),
        "NORMALISE": normalise,
        "TOKENS": TOKENS,
    }


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    by_part,
    expert_bias,
    weights,
    ids,
    tokens,
    scale,
    shared,
    EXPERTS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    NORMALISE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Program i: the experts of TOKENS tokens."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < tokens
    e = tl.arange(0, EXPERTS)[None, :]
    at = by_part + token.to(tl.int64)[:, None] * (PARTS * EXPERTS) + e
    x = tl.zeros((TOKENS, EXPERTS), tl.float32)
    for part in tl.static_range(PARTS):  # the small ones first
        x += tl.load(at + (PARTS - 1 - part) * EXPERTS, there[:, None], 0.0)
    scores = 1.0 / (1.0 + tl.exp(-x))
    biased = scores + tl.load(expert_bias + e)

    if TOP_GROUPS < GROUPS:
        # Of each group the sum of its two best; of equal ones the second is the other one.
        in_group = tl.reshape(biased, (TOKENS, GROUPS, EXPERTS // GROUPS))
        member = tl.arange(0, EXPERTS // GROUPS)[None, None, :]
        best = tl.max(in_group, 2)
        first = tl.min(tl.where(in_group == best[:, :, None], member, EXPERTS), 2)
        second = tl.max(tl.where(member == first[:, :, None], float("-inf"), in_group), 2)
        of_group = best + second
        g = tl.arange(0, GROUPS)[None, :]
        allowed = tl.zeros((TOKENS, GROUPS), tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            name = tl.min(tl.where(of_group == tl.max(of_group, 1)[:, None], g, GROUPS - 1), 1)
            here = g == name[:, None]
            allowed = tl.where(here, 1, allowed)
            of_group = tl.where(here, float("-inf"), of_group)
        in_group = tl.where(allowed[:, :, None] > 0, in_group, float("-inf"))
        left = tl.reshape(in_group, (TOKENS, EXPERTS))
    else:
        left = biased

    k = tl.arange(0, PADDED)[None, :]
    found = tl.zeros((TOKENS, PADDED), tl.float32)
    names = tl.zeros((TOKENS, PADDED), tl.int32) + EXPERTS
    for i in tl.static_range(TOP_K):
        name = tl.min(tl.where(left == tl.max(left, 1)[:, None], e, EXPERTS - 1), 1)
        here = e == name[:, None]
        found = tl.where(k == i, tl.sum(tl.where(here, scores, 0.0), 1)[:, None], found)
        names = tl.where(k == i, name[:, None], names)
        left = tl.where(here, float("-inf"), left)
    if NORMALISE:
        found = found / (tl.sum(found, 1)[:, None] + 1e-20)
    found = tl.where(k < TOP_K, found * scale, shared)
    out = token.to(tl.int64)[:, None] * COLUMNS + k
    tl.store(weights + out, found, there[:, None] & (k < COLUMNS))
    tl.store(ids + out, names, there[:, None] & (k < COLUMNS))
