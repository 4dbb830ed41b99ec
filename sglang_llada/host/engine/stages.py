"""Stages of a request, as the host's traces show them (`--enable-trace`).

The host tells the way to the queue and the wait in it. From then on a request here has

    prefill_forward    let in, until the first step that decides for it is launched: forwards with FILL rows alone
    decode_forward     from there to its end, or to its retraction; with what it took
      decode_loop      of each block, until it left; a child of decode_forward

A prompt's tail, and mostly the whole of a short one, is filled by the first decode step, so that prefill_forward may
take no time at all. A retracted request waits, is filled and decodes once more, each as a further span. Nobody makes a
Stages unless something is traced.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang.srt.observability.req_time_stats import RequestStage, convert_time_to_realtime_ns

from sglang_llada.blocks import Plan, Request, RowKind

DECODE, PREFILL = RequestStage.DECODE_FORWARD, RequestStage.PREFILL_FORWARD


@dataclass(slots=True)
class Told:
    """What was told of a request: how many blocks, and when the last of them left."""

    blocks: int
    since: float


class Stages:
    """Tells when requests come to another stage; `reqs` are the host's requests by id."""

    def __init__(self, reqs: Mapping[str, Any]) -> None:
        self.reqs = reqs

    def launched(self, plan: Plan) -> None:
        """A step is on its way: it may be the first that decides for a request since that was let in."""
        now = time.perf_counter()
        for row in plan.rows:
            if row.kind is RowKind.DENOISE:
                stats = self.reqs[row.request.rid].time_stats
                if stats.last_prefill_finished_time == 0.0:  # the host forgets it at a retraction
                    self._begin(stats, row.request, now)

    def _begin(self, stats: Any, request: Request[Any], now: float) -> None:
        stats.last_prefill_finished_time = now
        if request.told is None:
            request.told = Told(0, now)
            stats.trace_ctx.trace_slice_end(PREFILL.stage_name, PREFILL.level, convert_time_to_realtime_ns(now))
        else:
            request.told.since = now
            self._end(stats, request, stats.wait_queue_entry_time)
            let_in = stats.last_forward_entry_time
            stats.trace_slice(RequestStage.PREFILL_WAITING, stats.wait_queue_entry_time, let_in)
            stats.trace_slice(PREFILL, let_in, now)
        stats.trace_ctx.trace_slice_start(DECODE.stage_name, DECODE.level, convert_time_to_realtime_ns(now))

    def decided(self, req: Any, request: Request[Any], *, ended: bool = False) -> None:
        """Blocks may have left; where the request has ended, those that were live have, too."""
        told = request.told
        if told is None or req.time_stats.last_prefill_finished_time == 0.0:
            return
        now, steps = time.perf_counter(), request.steps_of_blocks if ended else request.steps_per_block
        for block in range(told.blocks, len(steps)):
            attributes = {"block": block, "steps": steps[block]}
            req.time_stats.trace_slice(RequestStage.DECODE_LOOP, told.since, now, attributes)
            told.blocks, told.since = block + 1, now
        if ended:
            self._end(req.time_stats, request, now, returned=len(req.output_ids_through_stop))

    def _end(self, stats: Any, request: Request[Any], now: float, returned: int | None = None) -> None:
        tokens = len(request.output) if returned is None else returned
        attributes = {
            "tokens": tokens,
            "forwards": request.forwards,
            "steps": request.steps,
            "blocks": len(request.steps_of_blocks),
            "tokens_per_forward": tokens / request.forwards,
        }
        stats.trace_ctx.trace_slice_end(DECODE.stage_name, DECODE.level, convert_time_to_realtime_ns(now), attributes)
