"""KV of the requests that run: their rows in the host's req_to_token, their pages, what the radix tree shares of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from sglang.srt.managers.schedule_batch import release_req, split_cached_prefix_by_tier
from sglang.srt.mem_cache.common import evict_from_tree_cache, release_kv_cache
from sglang.srt.runtime_context import get_serving

from sglang_llada.blocks import Plan, Row, RowKind, Table
from sglang_llada.host.engine.executor import to_device
from sglang_llada.host.engine.failures import Failures, log
from sglang_llada.host.engine.tiers import Tiers


class Pages:
    """The requests that hold KV, and the host's pools and tree that it comes from.

    Attributes:
        reqs: host requests that hold KV, by id.
        host: the host's scheduler, which owns pools and tree.
    """

    def __init__(self, host: Any, table: Table, tiers: Tiers, failures: Failures, block_size: int) -> None:
        self.host, self.table, self.tiers, self.failures, self.block_size = host, table, tiers, failures, block_size
        self.reqs: dict[str, Any] = {}

    def ensure_rows(self, rows: list[Row]) -> bool:
        """Pages for all of these rows that have none yet; False if the pool is too full."""
        T = self.block_size
        reach = {row.request.rid: row.start + T for row in rows if row.start >= row.request.room}
        return self.ensure(reach)

    def ensure(self, reach: dict[str, int]) -> bool:
        """Pages for positions [0, reach) of each request, evicting from the radix tree if need be.

        False, and no pages for any of them, if the pool is too full for all.
        """
        if not reach:
            return True
        grown = [(self.table[rid], upto) for rid, upto in reach.items()]
        needed = sum(upto - request.room for request, upto in grown)
        evict_from_tree_cache(self.host.tree_cache, needed)
        pages = self.host.token_to_kv_pool_allocator.alloc(needed)
        if pages is None:
            return False
        slots = np.repeat([request.slot for request, _ in grown], [upto - request.room for request, upto in grown])
        positions = np.concatenate([np.arange(request.room, upto) for request, upto in grown])
        slot, position = to_device(np.stack((slots, positions)), self.host.device)
        self.host.req_to_token_pool.write((slot, position), pages.int())
        for request, upto in grown:
            kv = self.reqs[request.rid].kv
            request.room = kv.kv_allocated_len = kv.kv_committed_len = upto
        return True

    def place(self, req: Any, *, loading: bool) -> None:
        """Let a request begin on its row of req_to_token, behind its cached prefix, which may be `loading`."""
        request, row, cached = self.table[req.rid], req.kv.req_pool_idx, req.prefix_len
        if cached:
            prefix = self.host.tree_cache.prefix_device_indices(req)
            self.host.req_to_token_pool.write((row, slice(0, cached)), prefix)
        request.slot, request.room = row, cached
        self.table.readmit(req.rid, cached, loading=loading)
        if not req.retracted_stain:
            req.cached_tokens = cached
            req.cached_tokens_device, req.cached_tokens_host, req.cached_tokens_storage = split_cached_prefix_by_tier(
                cached,
                req.materialized_host_hit_len(),
                req.storage_hit_length,
                req.storage_hit_start,
                req.host_hit_is_storage,
            )
        self.host.processed_tokens_counter += request.live_from - request.filled

    def insert(self, req: Any, upto: int) -> None:
        """Insert a request's filled blocks before `upto` into the radix tree, if they are not there or on their way.

        The tree goes over the whole prefix each time, so this is for prompts, once they are filled, and for answers,
        once their requests let go of them.
        """
        final = min(self.table[req.rid].filled, upto)
        if get_serving().strip_thinking_cache:
            final = min(final, len(req.origin_input_ids) // self.block_size * self.block_size)
        if final > req.kv.cache_protected_len and not (self.host.tree_cache.disable or req.skip_radix_cache_insert):
            req.refresh_fill_ids()
            if self.tiers.is_loading(req, final):
                return
            self.host.tree_cache.checkpoint(req, up_to=final)

    def share(self, plan: Plan) -> None:
        """Insert what a launched step fills of prompts into the radix tree, for whoever is admitted next."""
        T = self.block_size
        for rid in dict.fromkeys(row.request.rid for row in plan.rows if row.kind is RowKind.FILL):
            req = self.reqs.get(rid)  # None if it has ended meanwhile
            if req is not None:
                try:
                    self.insert(req, len(req.origin_input_ids) // T * T)
                except Exception as error:
                    self.failures.note(rid, error)

    def release(self, req: Any) -> None:
        """Give back a request's row and pages; the tree keeps whole blocks of what is returned of it."""
        try:
            self.insert(req, req.owned_kv_len() // self.block_size * self.block_size)
        except Exception as error:
            log(req.rid, error)  # its answer is whole; nobody shares its KV
        del self.reqs[req.rid]
        if req.kv.is_kv_released:
            self._free_row(req)
        else:
            release_kv_cache(req, self.host.tree_cache, checkpoint=False)

    def retract(self, req: Any) -> None:
        """Back to the queue without KV; the table keeps what the live block has decided."""
        request = self.table[req.rid]
        self.insert(req, request.filled)
        request.retract()
        del self.reqs[req.rid]
        self.host.running_batch.reqs.remove(req)
        if req.kv.is_kv_released:
            self._free_row(req)
            req.reset_for_retract()
        else:
            release_req(
                req=req,
                remaing_req_count=len(self.host.running_batch.reqs),
                req_to_token_pool=self.host.req_to_token_pool,
                token_to_kv_pool_allocator=self.host.token_to_kv_pool_allocator,
                tree_cache=self.host.tree_cache,
                hisparse_coordinator=None,
            )
        self.host._add_request_to_queue(req, is_retracted=True)

    def _free_row(self, req: Any) -> None:
        """Give back a row without a page yet, which the host does not know."""
        self.host.tree_cache.unlock(req.lock)
        req.lock = None
        self.host.req_to_token_pool.free(req)

    def held(self) -> dict[str, int]:
        """Positions that each request has pages for, as the host's records say."""
        return {rid: req.kv.kv_allocated_len for rid, req in self.reqs.items()}
