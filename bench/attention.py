"""Times of our attention kernel at LLaDA2.0-mini's shape, of its variants and of others, against what the card allows.

    python -m bench.attention [--variants] [--out attention.json]

Rows are blocks of 32 queries, 16 heads of 128 on 4 KV heads, bf16. A time is of one call in a CUDA graph of 20 calls;
all read the same KV, which the card's cache holds if it is short. The floor is the longer of reading the KV once from
memory and the arithmetic. Without --variants the settings of the product are timed; with it, tables of others follow.
The last line printed is one JSON record.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.records import new_record
from tests.paged import Paged

T, KV_HEADS, GROUP, D = 32, 4, 4, 128
ROWS, CONTEXTS = (1, 8, 32, 64, 128), (256, 1024, 8192)
MOST_KV = 1 << 19  # tokens of KV; rows beyond share requests
CALLS, REPLAYS = 20, 7
BYTES_A_SECOND = {"H200": 4.8e12, "H100": 3.35e12, "B200": 8e12, "A100": 2e12}  # by name of the card
FLOPS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12}
VARIANTS = (
    (128, 64, 8, 3),
    (128, 64, 8, 5),
    (128, 64, 8, 7),
    (128, 64, 4, 5),
    (128, 128, 8, 3),
    (128, 128, 8, 5),
    (64, 64, 4, 3),
    (64, 64, 4, 5),
    (64, 64, 4, 7),
    (64, 128, 4, 3),
    (64, 128, 4, 5),
)  # queries, keys, warps, stages
VARIANT_CASES = ((1, 256), (1, 8192), (8, 1024), (8, 8192), (32, 1024), (32, 8192), (128, 1024))
SPLITS = (1, 2, 4, 8, 16, 32)


def main(argv: list[str] | None = None) -> int:
    """Print the tables and the record; 2 if there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--variants", action="store_true", help="also time other settings and numbers of splits")
    parser.add_argument("--out", type=Path, help="where the record is written")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.attention: torch.cuda sees no accelerator", file=sys.stderr)
        return 2
    record = {**new_record(), "card": torch.cuda.get_device_name(), "times": [*times()]}
    if args.variants:
        record["variants"] = [*variants()]
        record["splits"] = [*split_times()]
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))
    return 0


def cases() -> Iterator[tuple[str, Paged]]:
    """Steps of a decode, and a prompt of 8,192 tokens in one forward."""
    for context in CONTEXTS:
        for rows in ROWS:
            yield f"{rows} x {context}", decode(rows, context)
    prompt = [(0, T * (i + 1)) for i in range(256)]
    yield "prompt of 8192", paged(prompt, 8192)


def decode(rows: int, context: int) -> Paged:
    """Rows of requests of their own, as far as memory for their KV goes."""
    requests = min(rows, MOST_KV // context)
    return paged([(r % requests, context) for r in range(rows)], context)


def paged(rows: list[tuple[int, int]], length: int) -> Paged:
    """At mini's shape."""
    shape: dict[str, Any] = {"block": T, "kv_heads": KV_HEADS, "group": GROUP, "head_size": D}
    return Paged.make(rows, length=length, dtype=torch.bfloat16, device="cuda", **shape)


def times() -> Iterator[dict[str, Any]]:
    """Of each case: ours as the product launches it, the others that are there, and the floor, in microseconds."""
    print(
        f"{'rows x context':>16} {'ours':>9} {'splits':>7} {'sdpa':>9} {'flashinfer':>11} {'fa3':>9} {'floor':>9}  us"
    )
    for name, case in cases():
        on = launcher(settings())
        row = {
            "case": name,
            "ours": graphed(lambda: ours(case, on)),  # noqa: B023  # called at once
            "splits": on.splits(len(case.ends) * KV_HEADS, case.table.shape[1]),
            "sdpa": attempt(lambda: sdpa(case)),  # noqa: B023
            "flashinfer": attempt(lambda: flashinfer(case)),  # noqa: B023
            "fa3": attempt(lambda: fa3(case)),  # noqa: B023
            "floor": floor(case),
        }
        shown = {key: f"{value:.1f}" if isinstance(value, float) else str(value) for key, value in row.items()}
        print(
            f"{name:>16} {shown['ours']:>9} {shown['splits']:>7} {shown['sdpa']:>9} {shown['flashinfer']:>11} "
            f"{shown['fa3']:>9} {shown['floor']:>9}"
        )
        yield row


def variants() -> Iterator[dict[str, Any]]:
    """Of each variant the microseconds of each case, with splits as the product would choose."""
    print(
        f"{'queries keys warps stages':>26} " + " ".join(f"{rows:>5}x{context:<5}" for rows, context in VARIANT_CASES)
    )
    made = [decode(*case) for case in VARIANT_CASES]
    for queries, keys, warps, stages in VARIANTS:
        each = replace(settings(), queries=queries, keys=keys, warps=warps, stages=stages)
        on = launcher(each)
        found = [attempt(lambda: graphed(lambda: ours(case, on))) for case in made]  # noqa: B023
        print(f"{queries:>8} {keys:>5} {warps:>5} {stages:>5} " + " ".join(f"{cell(time):>11}" for time in found))
        yield {**asdict(each), "us": dict(zip(map(str, VARIANT_CASES), found, strict=True))}


def split_times() -> Iterator[dict[str, Any]]:
    """Of each number of splits and fewest keys of a part, the microseconds of few rows."""
    few = [(1, 256), (1, 1024), (1, 8192), (8, 256), (8, 1024), (8, 8192), (32, 8192)]
    print(f"{'splits part':>12} " + " ".join(f"{rows:>5}x{context:<5}" for rows, context in few))
    made = [decode(*case) for case in few]
    for part in (64, 128, 256, 512):
        on = launcher(replace(settings(), part=part), programs=SPLITS[-1] * few[-1][0] * KV_HEADS)
        for splits in SPLITS:
            found = [attempt(lambda: graphed(lambda: ours(case, on, splits))) for case in made]  # noqa: B023
            print(f"{splits:>6} {part:>5} " + " ".join(f"{cell(time):>11}" for time in found))
            yield {"part": part, "splits": splits, "us": dict(zip(map(str, few), found, strict=True))}


def cell(time: float | str) -> str:
    """A time as a table shows it."""
    return f"{time:.1f}" if isinstance(time, float) else time


# --- what is timed --------------------------------------------------------------------------------------------------


def settings() -> Any:
    """Those of the product on this card."""
    from sglang_llada.llada2.attention_triton import settings_for

    return settings_for(2, torch.cuda.get_device_capability())


def launcher(chosen: Any, programs: int | None = None) -> Any:
    """As the host's backend makes it."""
    from sglang_llada.llada2.attention_triton import Device

    processors = torch.cuda.get_device_properties().multi_processor_count
    return Device.make(chosen, programs or processors, D, "cuda")


def ours(case: Paged, on: Any, splits: int | None = None) -> Tensor:
    """A call as the host's backend makes it."""
    from sglang_llada.llada2.attention_triton import attend

    pool = (case.keys, case.values, case.table, case.requests, case.ends)
    return attend(case.q, *pool, on=on, block=T, scale=case.scale, splits=splits)


def sdpa(case: Paged) -> float:
    """Torch over KV that lies in one piece already, for rows of one length."""
    if len({*case.ends.tolist()}) > 1:
        raise NotImplementedError("rows of several lengths")
    rows, context = len(case.ends), int(case.ends[0])
    q = case.q.view(rows, T, KV_HEADS * GROUP, D).transpose(1, 2)
    k, v = torch.randn(2, rows, KV_HEADS, context, D, dtype=q.dtype, device=q.device)
    return graphed(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def flashinfer(case: Paged) -> float:
    """The paged form; its plan, which is host work, is not counted."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    wrapper = BatchPrefillWithPagedKVCacheWrapper(torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "NHD")
    pages = case.ends // T
    tables = [case.table[r, :e:T] // T for r, e in zip(case.requests.tolist(), case.ends.tolist(), strict=True)]
    starts = torch.nn.functional.pad(pages.cumsum(0), (1, 0)).int()
    queries = torch.arange(len(pages) + 1, device="cuda", dtype=torch.int32) * T
    wrapper.plan(
        queries, starts, torch.cat(tables).int(), torch.full_like(queries[1:], T), KV_HEADS * GROUP, KV_HEADS, D, T,
        q_data_type=case.q.dtype,
    )  # fmt: skip
    kv = tuple(x.view(-1, T, KV_HEADS, D) for x in (case.keys, case.values))
    return graphed(lambda: wrapper.run(case.q, kv))


def fa3(case: Paged) -> float:
    """The host's kernel package."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    table = (case.table[case.requests, ::T] // T).int()
    q = case.q.view(-1, T, KV_HEADS * GROUP, D)
    k, v = (x.view(-1, T, KV_HEADS, D) for x in (case.keys, case.values))
    ends = case.ends.int()
    return graphed(lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=ends, page_table=table, causal=False))


def attempt(time: Callable[[], float]) -> float | str:
    """A time, or why there is none: these are others' packages, and settings that a card may not have room for."""
    from triton.runtime.errors import OutOfResources

    try:
        return time()
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, OutOfResources) as error:
        return type(error).__name__[:10]


def floor(case: Paged) -> float | None:
    """Microseconds that the card needs at least; None if it is not in the tables."""
    card = next((name for name in FLOPS if name in torch.cuda.get_device_name()), None)
    if card is None:
        return None
    longest = dict.fromkeys(case.requests.tolist(), 0)
    for request, end in zip(case.requests.tolist(), case.ends.tolist(), strict=True):
        longest[request] = max(longest[request], end)
    read = 2 * sum(longest.values()) * KV_HEADS * D * 2 + 2 * case.q.numel() * 2
    work = 4 * int(case.ends.sum()) * T * KV_HEADS * GROUP * D
    return max(read / BYTES_A_SECOND[card], work / FLOPS[card]) * 1e6


def graphed(run: Callable[[], object]) -> float:
    """Median microseconds of one call of twenty in a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    found = []
    for _ in range(REPLAYS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return median(found[2:])


if __name__ == "__main__":
    sys.exit(main())
