"""Between a layer's projection and its attention, one Triton kernel: norms, rotation, the write of keys and values.

A program has one token. Of each query and key head it takes the norm, in the type that the heads have, turns the first
part of it, and puts keys and values where attention will look for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4


@torch.library.custom_op(
    "sglang_llada::rotate_and_store",
    mutates_args=("k_pool", "v_pool"),
    schema="(Tensor qkv, Tensor positions, Tensor q_norm, Tensor k_norm, Tensor cos_sin, float eps, Tensor(a!) k_pool, "
    "Tensor(b!) v_pool, Tensor places) -> (Tensor, Tensor)",
)
def rotate_and_store(
    qkv: Tensor,
    positions: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos_sin: Tensor,
    eps: float,
    k_pool: Tensor,
    v_pool: Tensor,
    places: Tensor,
) -> tuple[Tensor, Tensor]:
    """Queries [N, heads * D] and keys [N, kv_heads * D], normed and turned; keys and values are in the pool then.

    Args:
        qkv: [N, (heads + 2 kv_heads) * D].
        positions, places: where the tokens stand in their requests, and in the pool; int64 [N].
        q_norm, k_norm: weights of the norms, [D].
        cos_sin: cosines, then sines, of a position's angles, fp32 [positions, rotated dimensions]; the two that are
            turned together stand half of these apart.
        k_pool, v_pool: [places, kv_heads, D].
    """
    q, k = room_for_heads(qkv, positions, q_norm, k_norm, cos_sin, eps, k_pool, v_pool, places)
    if len(qkv):
        kernel[(len(qkv),)](
            qkv,
            positions,
            q_norm,
            k_norm,
            cos_sin,
            k_pool,
            v_pool,
            places,
            q,
            k,
            qkv.stride(0),
            k_pool.stride(0),
            v_pool.stride(0),
            eps,
            **constants(q.shape[1] // len(q_norm), k_pool.shape[1], len(q_norm), cos_sin.shape[1]),
            num_warps=WARPS,
        )
    return q, k


@rotate_and_store.register_fake
def room_for_heads(
    qkv: Tensor,
    positions: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos_sin: Tensor,
    eps: float,
    k_pool: Tensor,
    v_pool: Tensor,
    places: Tensor,
) -> tuple[Tensor, Tensor]:
    of_keys = k_pool.shape[1] * k_pool.shape[2]
    return qkv.new_empty(len(qkv), qkv.shape[1] - 2 * of_keys), qkv.new_empty(len(qkv), of_keys)


def constants(heads: int, kv_heads: int, width: int, rotated: int) -> dict[str, int]:
    """What the kernel is compiled for."""
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "D": width,
        "D_PADDED": triton.next_power_of_2(width),
        "HALF": rotated // 2,
        "ROWS": triton.next_power_of_2(heads + kv_heads),
        "KV_ROWS": triton.next_power_of_2(kv_heads),
    }


@triton.jit
def kernel(
    qkv,
    positions,
    q_norm,
    k_norm,
    cos_sin,
    k_pool,
    v_pool,
    places,
    q,
    k,
    qkv_stride,
    k_stride,
    v_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    KV_ROWS: tl.constexpr,
):
    """Program n: token n."""
    n = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, D_PADDED)[None, :]
    partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    there = (h < HEADS + KV_HEADS) & (d < D)
    row = qkv + n * qkv_stride + h * D
    x = tl.load(row + d, there, 0.0)
    other = tl.load(row + partner, there, 0.0)
    x32 = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x32 * x32, 1) / D + eps)[:, None]
    is_query = h < HEADS
    norm = tl.where(is_query, tl.load(q_norm + d, d < D, 0.0), tl.load(k_norm + d, d < D, 0.0)).to(tl.float32)
    norm_of_other = tl.where(is_query, tl.load(q_norm + partner, d < D, 0.0), tl.load(k_norm + partner, d < D, 0.0))
    x32 = (x32 * scale * norm).to(x.dtype).to(tl.float32)
    other = (other.to(tl.float32) * scale * norm_of_other.to(tl.float32)).to(x.dtype).to(tl.float32)
    angle = cos_sin + tl.load(positions + n) * (2 * HALF) + tl.where(d < HALF, d, d - HALF)
    turned = d < 2 * HALF
    cos = tl.load(angle, turned, 1.0).to(tl.float32)
    sin = tl.load(angle + HALF, turned, 0.0).to(tl.float32)
    out = (x32 * cos + tl.where(d < HALF, -other, other) * sin).to(x.dtype)

    place = tl.load(places + n).to(tl.int64)
    tl.store(q + n * (HEADS * D) + h * D + d, out, there & is_query)
    tl.store(k + n * (KV_HEADS * D) + (h - HEADS) * D + d, out, there & ~is_query)
    tl.store(k_pool + place * k_stride + (h - HEADS) * D + d, out, there & ~is_query)
    head = tl.arange(0, KV_ROWS)[:, None]
    there = (head < KV_HEADS) & (d < D)
    v = tl.load(qkv + n * qkv_stride + (HEADS + KV_HEADS + head) * D + d, there)
    tl.store(v_pool + place * v_stride + head * D + d, v, there)
