"""What the host's hierarchical cache needs of a device, where that is the CPU: copies of KV by torch.

The host pins the memory of its second tier, and has kernels for its copies. Here both tiers are plain memory, and a
copy is done when the call returns, so that the events of torch.cpu, which are always there, say the truth.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import Tensor

TARGET = "sglang.srt.mem_cache.pool_host.base.HostKVCache._allocate_host_buffer"
RESERVE = 1 << 30  # bytes of memory that stay free; the host leaves ten times that, beside what it pins


def install() -> None:
    """Hook the host's pools in host memory."""
    HookRegistry.register(TARGET, prepare, HookType.BEFORE)


def prepare(pool: Any) -> None:
    """Before a pool takes its memory: none of it is pinned, and there is something to copy with."""
    from sglang.srt.mem_cache.pool_host import base, mha

    pool.pin_memory = False
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = RESERVE
    mha.transfer_kv_direct = copy_positions


def copy_positions(
    src_layers: list[Tensor], dst_layers: list[Tensor], src_indices: Tensor, dst_indices: Tensor, page_size: int
) -> None:
    """Copy positions of layers [positions, heads, size] to other positions of other layers."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]
