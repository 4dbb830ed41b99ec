"""Ends that do not come from a request's own tokens: aborts, failures, contradictions."""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.common import release_kv_cache

from sglang_llada.blocks import Table
from sglang_llada.errors import IntegrityError
from sglang_llada.host import earlier
from sglang_llada.host.engine.failures import Failures
from sglang_llada.host.engine.pages import Pages
from sglang_llada.host.engine.pipeline import Pipeline

logger = logging.getLogger(__name__)


class Endings:
    """Which requests take no further part, and what they are told.

    Attributes:
        host: the host's scheduler.
        peers: the process group of the ranks that run the same rows; None if there is one.
    """

    def __init__(
        self, host: Any, table: Table, pages: Pages, pipeline: Pipeline, failures: Failures, peers: Any
    ) -> None:
        self.host, self.table, self.pages, self.pipeline = host, table, pages, pipeline
        self.failures, self.peers = failures, peers

    def end_aborted(self) -> None:
        """Requests that failed, or that the host marked for an end, take no further part."""
        running = self.host.running_batch.reqs
        if self.failures.reasons or any(req.to_finish is not None for req in running):
            self.pipeline.take_rest()
        for req, reason in self.take_failed():
            req.to_finish = reason
        for req in running:
            if req.to_finish is not None:
                self.table[req.rid].abandon()

    def take_failed(self) -> list[tuple[Any, FINISH_ABORT]]:
        """Running requests that failed on any rank, and what they are told. All ranks call this at the same points."""
        unsure = self.peers is not None and any(map(may_differ, self.host.running_batch.reqs))
        failures = self.failures.take(self.peers if unsure else None)
        found = [(self.pages.reqs[rid], reason) for rid, reason in failures.items() if rid in self.pages.reqs]
        for req, _ in found:
            req.skip_radix_cache_insert = True  # ranks may have come to different points with it
            self.table[req.rid].abandon()
        return found

    def end_contradictory(self, *, strict: bool = False) -> bool:
        """End requests that contradict themselves or the host's records; whether there were any.

        Raises:
            IntegrityError: there are some, and `strict`.
        """
        if strict:
            self.table.check_integrity(self.pages.held())
        found = self.table.contradictions(self.pages.held())
        for rid, what in found.items():
            request, req = self.table.get(rid), self.pages.reqs.get(rid)
            logger.error("request %s contradicts itself: %s; its blocks are %s", rid, what, request and request.blocks)
            if request is None:
                release_kv_cache(self.pages.reqs.pop(rid), self.host.tree_cache, checkpoint=False)
            elif req is None:
                self.host.admission.turn_away(
                    [req for req in self.host.waiting_queue if req.rid == rid], IntegrityError(what)
                )
                self.table.drop(rid)
            else:
                request.abandon()
                self.failures.note(rid, IntegrityError(what))
        return bool(found)

    def answer_given_up(self, req: Any, reason: dict[str, Any] | None) -> None:
        """Answer a request that is given up in the queue."""
        req.time_stats.set_completion_time()
        earlier.send_abort_output(self.host, AbortReq(rid=req.rid, finished_reason=reason), req)

    def answer_failed(self, req: Any, reason: FINISH_ABORT) -> None:
        """Answer a request, or what was received of it, of which there is no output to send."""
        earlier.send_abort_output(self.host, AbortReq(rid=req.rid, finished_reason=reason.to_json()), req)


def may_differ(req: Any) -> bool:
    """Whether a request may fail on one rank alone: somebody else's code, or a clock, has a say in it."""
    return bool(req.custom_logit_processor) or ends_by_text(req)


def ends_by_text(req: Any) -> bool:
    """Whether more may end a request than its stop tokens and its length."""
    params = req.sampling_params
    return bool(params.stop_strs or params.stop_regex_strs or req.grammar is not None)
