"""Attention of rows over paged KV as a Triton kernel that needs no plan: lengths and pages are read on the device.

A row is a block of T queries of one request; it attends, without a mask, to the KV of positions [0, end). The KV of the
whole forward is written before. A page holds one block: the slot of position p is table[request, p // T * T] + p % T.

A program takes the T queries of the heads that share a KV head (M = T x group, in tiles) and walks over
its keys with an online softmax in fp32. With few rows the keys of a row are split over programs, so that every
processor works: each split leaves its maximum, sum and mean of values, and `merge` joins them. How many splits there
are depends on the number of rows and the device alone, which parts they are on the row's length, found on the device:
a launch captured in a CUDA graph is right for any lengths. A row that is shorter than two parts is not split, its
program writes the result, and the merge has nothing to do.

For a fixed number of splits a row's result does not depend, to the last bit, on the rows beside it.

Checked in Triton's interpreter, compiled for sm_80, sm_90 and sm_100, run on an H200.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_llada.errors import IntegrityError

INTERPRETED = triton.knobs.runtime.interpret  # where a product of bf16 would be one of integers
HEAD_SIZES = (16, 32, 64, 128)
MOST_SPLITS = 64
MERGED = {"QUERIES": 8, "PARTS": 8, "num_warps": 4}  # by one program of the merge at once
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Settings:
    """How the kernel is compiled, for one kind of device.

    Attributes:
        queries, keys: of a tile. warps: of a program.
        stages: as Triton counts them. Loading a tile takes two loads, of pages and then of KV, so 2 n + 1 stages keep n
            tiles in flight.
        part: the fewest keys that a split is given; a shorter part would cost more to merge than it saves.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    part: int = 256


# By bytes per element of queries. Where products are of tiles in shared memory (Hopper, Blackwell's data centre cards),
# and where they are of registers.
LARGE = {2: Settings(128, 64, 8, 5), 4: Settings(64, 32, 8, 5)}
OTHERS = {2: Settings(128, 32, 8, 5), 4: Settings(64, 16, 8, 5)}


def settings_for(element_size: int, capability: tuple[int, int]) -> Settings:
    """Settings for queries of so many bytes on a device of a compute capability."""
    return (LARGE if capability[0] in (9, 10) else OTHERS)[element_size]


@dataclass(frozen=True, slots=True)
class Device:
    """What a launch must know of its device, and memory for what splits leave to the merge.

    Made once, so that graphs may hold on to it.

    Attributes:
        programs: how many run at once, at least; one on each multiprocessor.
        means: fp32 [programs x queries of a tile x D]. log_sums: fp32 [programs x queries of a tile], base 2.
    """

    settings: Settings
    programs: int
    means: Tensor
    log_sums: Tensor

    @classmethod
    def make(cls, settings: Settings, programs: int, head_size: int, device: torch.device | str) -> Device:
        """With memory for so many programs."""
        queries = programs * settings.queries
        means = torch.empty(queries * head_size, dtype=torch.float32, device=device)
        return cls(settings, programs, means, torch.empty(queries, dtype=torch.float32, device=device))

    def splits(self, programs: int, longest: int) -> int:
        """Into how many parts the keys of each row are split: as many as let all programs run at once.

        Args:
            programs: of an unsplit launch. longest: positions that a request may have.
        """
        return max(min(self.programs // programs, longest // self.settings.part, MOST_SPLITS), 1)


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    requests: Tensor,
    ends: Tensor,
    *,
    on: Device,
    block: int,
    scale: float,
    value_scale: float = 1.0,
    splits: int | None = None,
) -> Tensor:
    """Attention of each row's queries to [0, end) of its request, [R x T, Hq, D].

    Args:
        q: [N, Hq, D], of which the first R x T are rows and what follows belongs to none; its result is 0.
        keys, values: [slots, Hkv, D], of q's dtype or of 8 bits.
        table: int32 [requests, positions], slots. requests, ends: int [R]; an end of 0 gives zeros.
        block: T. scale: of products of queries and keys. value_scale: of values.
        splits: of the keys; chosen for the device if None.
    """
    requests, ends = requests.contiguous(), ends.contiguous()
    rows, kv_heads = requests.shape[0], keys.shape[1]
    heads, D = q.shape[1:]
    padded = q.shape[0] > rows * block
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device) if padded else q.new_empty(q.shape)
    if not rows:
        return out
    queries = block * (heads // kv_heads)
    tile = max(min(triton.next_power_of_2(queries), on.settings.queries), 16)
    tiles = triton.cdiv(queries, tile)
    splits = on.splits(rows * kv_heads * tiles, table.shape[1]) if splits is None else splits
    if splits > 1 and rows * kv_heads * tiles * splits * tile > on.log_sums.shape[0]:
        raise IntegrityError(f"{splits} splits of {rows} rows: there is memory for {on.programs} programs")
    shape = {
        "BLOCK": block,
        "GROUP": heads // kv_heads,
        "TILES": tiles,
        "TILE": tile,
        "D": D,
        "KEYS": on.settings.keys,
        "LEAST_PART": on.settings.part,
    }
    attend_kernel[(rows, kv_heads * tiles, splits)](
        q,
        keys,
        values,
        out,
        on.means,
        on.log_sums,
        table,
        requests,
        ends,
        scale * LOG2_E,
        value_scale,
        splits,
        q.stride(0),
        q.stride(1),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        table.stride(0),
        SPLIT=splits > 1,
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
        num_warps=on.settings.warps,
        num_stages=on.settings.stages,
        **shape,
    )
    if splits > 1:
        grid = (rows, kv_heads * tiles * tile // MERGED["QUERIES"])
        merge_kernel[grid](out, on.means, on.log_sums, ends, splits, **shape, **MERGED)
    return out


@triton.jit
def part_of(end, splits, KEYS: tl.constexpr, LEAST_PART: tl.constexpr):
    """Keys of each part of a row: whole tiles, and not too few."""
    return tl.maximum(tl.cdiv(tl.cdiv(end, splits), KEYS) * KEYS, LEAST_PART)


@triton.jit(do_not_specialize=["splits", "table_stride"])
def attend_kernel(
    q,
    keys,
    values,
    out,
    means,
    log_sums,
    table,
    requests,
    ends,
    scale,
    value_scale,
    splits,
    q_stride,
    q_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    table_stride,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    LEAST_PART: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program (row, head and tile, split): one tile of a row's queries over one part of its keys."""
    # Last rows first: those of a prompt are the longest, and the short ones fill the gaps at the end.
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1) // TILES
    m = tl.program_id(1) % TILES * TILE + tl.arange(0, TILE)
    split = tl.program_id(2)

    end = tl.load(ends + row).to(tl.int32)
    begin = 0
    stop = end
    if SPLIT:
        part = part_of(end, splits, KEYS, LEAST_PART)
        begin = split * part
        stop = tl.minimum(begin + part, end)
        if (begin >= end) & (split > 0):
            return

    # Query m of a tile is position m // GROUP of the block and head m % GROUP of those that share the KV head.
    d = tl.arange(0, D)
    inside = (m < BLOCK * GROUP)[:, None]
    token = row.to(tl.int64) * BLOCK + m // GROUP
    q_head = head * GROUP + m % GROUP
    query = tl.load(q + token[:, None] * q_stride + q_head[:, None] * q_head_stride + d[None, :], inside, 0.0)

    pages = table + tl.load(requests + row).to(tl.int64) * table_stride
    keys += head.to(tl.int64) * key_head_stride
    values += head.to(tl.int64) * value_head_stride
    peak = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, D), tl.float32)
    offset = tl.arange(0, KEYS)
    for start in range(begin, stop, KEYS):
        # Beyond the end the last key is read again, and does not count: a mask of loads would cost more.
        position = tl.minimum(start + offset, stop - 1)
        slot = (tl.load(pages + position // BLOCK * BLOCK) + position % BLOCK).to(tl.int64)
        key = tl.load(keys + slot[None, :] * key_stride + d[:, None]).to(query.dtype)
        value = tl.load(values + slot[:, None] * value_stride + d[None, :]).to(query.dtype)
        if UPCAST:
            product = tl.dot(query.to(tl.float32), key.to(tl.float32))  # [TILE, KEYS]
        else:
            product = tl.dot(query, key, input_precision="ieee")
        if start + KEYS > stop:
            product = tl.where((start + offset < stop)[None, :], product, float("-inf"))
        higher = tl.maximum(peak, tl.max(product, 1) * scale)
        weight = tl.exp2(product * scale - higher[:, None])
        faded = tl.exp2(peak - higher)
        total = total * faded + tl.sum(weight, 1)
        acc = acc * faded[:, None]
        weight = weight.to(query.dtype)
        if UPCAST:
            acc = tl.dot(weight.to(tl.float32), value.to(tl.float32), acc)
        else:
            acc = tl.dot(weight, value, acc, input_precision="ieee")
        peak = higher
    result = acc * (value_scale / tl.where(total > 0.0, total, 1.0))[:, None]

    final = out + (token[:, None] * (tl.num_programs(1) // TILES) * GROUP + q_head[:, None]) * D + d[None, :]
    if SPLIT:
        if part >= end:
            tl.store(final, result.to(out.dtype.element_ty), inside)
        else:
            place = ((row.to(tl.int64) * splits + split) * tl.num_programs(1) + tl.program_id(1)) * TILE
            place += tl.arange(0, TILE)
            tl.store(means + place[:, None] * D + d[None, :], result)
            tl.store(log_sums + place, peak + tl.log2(total))
    else:
        tl.store(final, result.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    out,
    means,
    log_sums,
    ends,
    splits,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    LEAST_PART: tl.constexpr,
    QUERIES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Program (row, some queries): the parts of their results joined, PARTS at a time and in their order."""
    row = tl.program_id(0)
    end = tl.load(ends + row).to(tl.int32)
    part = part_of(end, splits, KEYS, LEAST_PART)
    if part >= end:
        return
    tiles = tl.num_programs(1) * QUERIES // TILE  # of a row, over its KV heads
    tile = tl.program_id(1) * QUERIES // TILE
    m = tl.program_id(1) * QUERIES % TILE + tl.arange(0, QUERIES)
    d = tl.arange(0, D)
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, D), tl.float32)
    parts = tl.cdiv(end, part)
    for first in range(0, parts, PARTS):
        split = first + tl.arange(0, PARTS)
        real = (split < parts)[:, None]
        place = ((row.to(tl.int64) * splits + split) * tiles + tile)[:, None] * TILE + m[None, :]  # [PARTS, QUERIES]
        log = tl.load(log_sums + place, real, float("-inf"))
        mean = tl.load(means + place[:, :, None] * D + d[None, None, :], real[:, :, None], 0.0)
        higher = tl.maximum(peak, tl.max(log, 0))
        faded, weight = tl.exp2(peak - higher), tl.exp2(log - higher[None, :])
        acc = acc * faded[:, None] + tl.sum(mean * weight[:, :, None], 0)
        total = total * faded + tl.sum(weight, 0)
        peak = higher
    m += tile % TILES * TILE
    token = row.to(tl.int64) * BLOCK + m // GROUP
    q_head = tile // TILES * GROUP + m % GROUP
    final = out + (token[:, None] * (tiles // TILES) * GROUP + q_head[:, None]) * D + d[None, :]
    tl.store(final, (acc / total[:, None]).to(out.dtype.element_ty), (m < BLOCK * GROUP)[:, None])
