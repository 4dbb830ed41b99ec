"""The host's server whose copies of KV between tiers take turns, as a device's do: `python -m tests.host.late FLAGS`.

A copy is made once it was asked often enough whether it is done, or is waited for. Until then the positions that a load
will write hold NaN, which a step that read them too early would give to its logits, and a copy to host memory takes
what its pages hold by then. Whenever the cache is flushed, both tiers are emptied first, and must then be free.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.mem_cache import l2_transfer
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

TURNS = 3  # of a copy
MANY, LONG_TURNS = 1024, 60  # of a load of more positions than that
EVERYTHING = 1 << 40


class Late:
    """The event of a copy that has not been made."""

    def __init__(self, copy: Callable[[], object], turns: int) -> None:
        self.copy, self.turns, self.done = copy, turns, False

    def query(self) -> bool:
        self.turns -= 1
        if self.turns < 0:
            self.synchronize()
        return self.done

    def synchronize(self) -> None:
        if not self.done:
            self.done = True
            self.copy()


def late(original: Callable[..., Any], *, loads: bool) -> Callable[..., Any]:
    def submit(engine: Any, transfers: list[Any], **options: Any) -> Any:
        if loads:
            for transfer in transfers:
                for layer in (*transfer.device_pool.k_buffer, *transfer.device_pool.v_buffer):
                    layer[transfer.device_indices] = float("nan")
        many = loads and sum(len(transfer.device_indices) for transfer in transfers) > MANY
        event = Late(lambda: original(engine, transfers, **options), LONG_TURNS if many else TURNS)
        return l2_transfer.TransferCompletion(torch.cpu.Event(), event, False)

    return submit


def emptied(original: Callable[[Any], None]) -> Callable[[Any], None]:
    def reset(tree: Any) -> None:
        if tree.cache_controller is not None:
            tree.check_hicache_events()
            tree.evict(EvictParams(num_tokens=EVERYTHING))
            tree.evict_host(EVERYTHING)
            for pool, size in (
                (tree.token_to_kv_pool_allocator, tree.token_to_kv_pool_allocator.size),
                (tree.cache_controller.mem_pool_host, tree.cache_controller.mem_pool_host.logical_size),
            ):
                assert pool.available_size() == size, f"{type(pool).__name__}: {pool.available_size()} of {size} free"
        original(tree)

    return reset


if __name__ in ("__main__", "__mp_main__"):  # the latter where the host spawns its processes
    engine = l2_transfer.L2TransferEngine
    engine.submit_host_to_device = late(engine.submit_host_to_device, loads=True)  # type: ignore[method-assign]
    engine.submit_device_to_host = late(engine.submit_device_to_host, loads=False)  # type: ignore[method-assign]
    UnifiedRadixCache.reset = emptied(UnifiedRadixCache.reset)  # type: ignore[method-assign]

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
