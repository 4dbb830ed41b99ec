"""Tiers of KV behind the device: host memory, and storage behind that, as the host's hierarchical cache has them.

The host's tree moves whole blocks down, as its write policy says, and up again for a request that is let in. What is
ours is who waits for it: no row of a request runs until all of its cached prefix is on the device, whether it was
loaded for itself or for another one, and nobody else waits. So a step never waits for a copy, layer by layer as the
host's batches do, which a captured graph could not.

A copy to host memory follows all steps that are launched before it on the device's own order, so that it takes what
they write. Ranks take note of copies in lockstep (`check_hicache_events`), so that they let the same requests begin.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from sglang_llada.blocks import Phase, Table


@dataclass(frozen=True, slots=True)
class Load:
    """KV on its way to the device: positions from `start` on, of whoever begins with the same tokens up to `upto`."""

    key: Hashable
    start: int
    upto: int
    tokens: Any

    def is_of(self, req: Any, upto: int) -> bool:
        """Whether some of it is what a request has before the position `upto`."""
        same = upto > self.start and cache_key(req) == self.key
        return same and req.full_untruncated_fill_ids[: self.upto] == self.tokens


class Tiers:
    """The host's hierarchical cache, and the requests that wait for it; nothing where it is off.

    Attributes:
        host: the host's scheduler, which owns tree and pools.
        loads: what is on its way to the device, by the node of the tree that the host loads it for.
        awaited: of requests that are LOADING, by id, the nodes that they wait for.
    """

    def __init__(self, host: Any, table: Table, block_size: int) -> None:
        self.host, self.table, self.block_size = host, table, block_size
        self.loads: dict[Any, Load] = {}
        self.awaited: dict[str, set[Any]] = {}

    # --- in the order of a turn -------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Take note of copies that are done; requests that waited for them begin."""
        if self.host.enable_hierarchical_cache:
            self.host._process_hicache_events()
            self._begin_loaded()

    def has_fetched(self, req: Any) -> bool:
        """Whether a waiting request waits for storage no longer: what that has of its prefix is in host memory."""
        tree, handle = self.host.tree_cache, req.cache_request_handle
        done = tree.check_prefetch_progress(handle)
        req.time_stats.observe_storage_prefetch_ready(done)
        if done:
            fetched, start = tree.pop_prefetch_loaded_span(handle)
            if fetched > 0:
                req.storage_hit_length, req.storage_hit_start, req.host_hit_is_storage = fetched, start, False
        return bool(done)

    def awaits(self, req: Any) -> bool:
        """Note a request that is let in; whether some of its cached prefix is still on its way."""
        coming = {node for node, load in self.loads.items() if load.is_of(req, req.prefix_len)}
        if loaded := req.materialized_host_hit_len():
            start = req.prefix_len - loaded
            upto = start + self.block_size
            self.loads[req.last_node] = Load(cache_key(req), start, upto, req.full_untruncated_fill_ids[:upto])
            coming.add(req.last_node)
        if self.host.enable_hicache_storage:
            self.host.tree_cache.storage_prefetch_retries.cancel(req.rid)
        if coming:
            self.awaited[req.rid] = coming
        return bool(coming)

    def is_loading(self, req: Any, upto: int) -> bool:
        """Whether some of what a request has before the position `upto` is on its way for somebody else.

        If it has KV of its own there, it must keep that: the tree would give it the pages that are still to be written.
        """
        return any(load.is_of(req, upto) for load in self.loads.values())

    def start(self) -> None:
        """Start to load what was asked for, as soon as the host has a place for it among its copies."""
        if self.host.enable_hierarchical_cache and self.host.tree_cache.has_free_load_back_slot():
            self.host.tree_cache.ready_to_load_host_cache()

    def finish(self) -> bool:
        """Wait for all copies, which hold on to KV; whether there were any."""
        if not self.host.enable_hierarchical_cache:
            return False
        tree = self.host.tree_cache
        if not tree.cache_controller.has_inflight_device_transfers():
            return False
        self.start()
        tree.writing_check(write_back=True)
        loading = tree.cache_controller.ack_load_queue
        for copy in loading:
            copy.finish_event.synchronize()
        tree.loading_check(finish_count=len(loading))
        self._begin_loaded()
        return True

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _begin_loaded(self) -> None:
        """Forget loads that are done, and let those begin that wait for none that is not."""
        ongoing = self.host.tree_cache.ongoing_load_back
        for node in self.loads.keys() - ongoing.keys():
            del self.loads[node]
        for rid, nodes in list(self.awaited.items()):
            request = self.table.get(rid)
            if request is None or request.phase is not Phase.LOADING:  # ended or retracted meanwhile
                del self.awaited[rid]
            elif nodes.isdisjoint(ongoing):
                del self.awaited[rid]
                request.load()


def cache_key(req: Any) -> tuple[Any, Any]:
    """What keeps a request's cached blocks apart from others of the same tokens."""
    return req.extra_key, req.cache_salt
