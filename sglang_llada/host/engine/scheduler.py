"""The scheduler: the host's, with an event loop of its own that runs rows instead of batches of requests.

The host keeps what is not diffusion: receiving, tokenizers, the waiting queue and its policy, admission by KV budget,
the radix tree, the pools, streaming, aborts, pauses, metrics. This class decides which blocks run next and when a
request's KV is taken, shared and given back. `self.running_batch.reqs` always lists the host requests that hold KV, so
that the host's own checks and reports see them.

One turn of the loop: take in requests and admit them (the device may still be busy with the last step), read the last
step, take those of its decisions that the next one's rows depend on, launch that, and only then take the others and
book what was decided (finish states, stop strings, streaming, radix insertion), while the device works. Where the
device is the CPU itself, booking comes before the launch, since nothing overlaps and the client would wait a step
longer.

Where all that the next step's rows need lies on the device, it is launched before the last step is read, so that the
device never waits for the host (`_launch_ahead`). A row whose block the last step finishes is then in the next one,
with nothing open, and seals the block; the block behind it begins in that same step if its row was added because the
end was in sight, else one step later. A row that was added too early is thrown away.

What goes wrong with one request ends that request (failures.py): everything that is done for one alone is guarded.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections import deque
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import Any

import numpy as np
import torch
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, ScheduleBatch, release_req
from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.mem_cache.common import (
    evict_from_tree_cache,
    match_kv_cache,
    release_kv_cache,
)
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.observability.req_time_stats import set_time_batch
from sglang.srt.runtime_context import get_parallel, get_schedule, get_serving
from sglang.srt.utils import DynamicGradMode

from sglang_llada.blocks import (
    Decided,
    Ending,
    Filling,
    Phase,
    Plan,
    Request,
    Row,
    RowKind,
    Rules,
    Table,
    next_step,
    prefixes,
)
from sglang_llada.config import AHEAD_VARIABLE, REPLAY_VARIABLE, DecodeConfig, read_switch
from sglang_llada.decode.decide import fresh, numbers
from sglang_llada.errors import ConfigError, IntegrityError
from sglang_llada.host.engine.executor import Decider, Decision, Executor, InFlight, Landed, to_device, tokens_of
from sglang_llada.host.engine.failures import Failures, carried_out, log
from sglang_llada.host.engine.metrics import Metrics
from sglang_llada.host.engine.streaming import LladaOutputStreamer, book_logprobs, book_prompt_logprobs, snapshot_of
from sglang_llada.host.facts import decode_config, facts_of, is_ours, row_budget
from sglang_llada.host.requests.grammar import conform
from sglang_llada.host.requests.shaping import shaping_of
from sglang_llada.host.requests.stops import MOST_TAIL
from sglang_llada.host.requests.wishes import ends_of_tokenizer, report_of, wishes_of

logger = logging.getLogger(__name__)

WORTH_WAITING = 4  # blocks that another request is filling, for which a request waits a step instead of filling them
IDLE_SECONDS = 0.001  # between questions to the other DP attention ranks; nothing wakes a rank but an answer


class LladaScheduler(Scheduler):
    """Block rows in place of the host's dLLM scheduling; put in place of the host's class by plugin.register()."""

    # --- construction -----------------------------------------------------------------------------------------------

    def __new__(cls, server_args: Any, port_args: Any) -> Any:
        """This class stands in for the host's whatever the model; one that is not ours gets the host's."""
        return super().__new__(cls) if is_ours(server_args) else cls.__base__(server_args, port_args)  # type: ignore[misc]

    def init_diffusion_llm(self) -> None:
        """Called by the host once its pools exist."""
        super().init_diffusion_llm()
        facts = facts_of(self.server_args.model_path, self.server_args.revision)
        self.facts = facts
        self.defaults = decode_config(self.dllm_config, facts)
        self.fresh = fresh(facts.block_size, tokens_of(facts))
        self.table = Table()
        self.filling = Filling()
        self.reqs: dict[str, Any] = {}  # host requests that hold KV, by id
        self.flights: deque[InFlight] = deque()  # launched steps, at most two, of which all but the last are not read
        self.landed: Landed | None = None  # the last step, with decisions that are not taken yet
        self.going_on: list[Row] = []  # of the last step, rows that the next one has too
        self.unbooked: list[Request[DecodeConfig]] = []  # with decisions that the outside has not been told of
        self.row_budget = row_budget(self.chunked_prefill_size, facts.block_size)
        # Whether a launched step runs by itself. A replay on the CPU is to be told what a device is.
        self.overlaps = self.device != "cpu" or read_switch(os.environ, REPLAY_VARIABLE, default=False)
        self.runs_ahead = self.overlaps and read_switch(os.environ, AHEAD_VARIABLE, default=True)
        self.replayed = self.eager = 0  # steps
        self.attention_ranks = get_parallel().attn_dp_size
        context = self.metrics_collector_context
        self.metrics = Metrics(context.collector.labels) if context.current_scheduler_metrics_enabled else None
        self.failures = Failures((lambda: None) if self.metrics is None else self.metrics.failed.inc)
        parallel = get_parallel()
        self.peers = parallel.attn_tp_group.cpu_group if parallel.attn_tp_size > 1 else None  # that run the same rows
        runner = self.tp_worker.model_runner
        graphs = runner.decode_cuda_graph_runner
        self.executor = Executor(runner, Decider(runner) if graphs is None else graphs.decide)
        self.running_batch.forward_mode = ForwardMode.DLLM_EXTEND
        # Checkpoints without a generation_config name their stop tokens in the tokenizer only.
        self.model_config.hf_eos_token_id = set(self.model_config.hf_eos_token_id or ()) | set(facts.stop_ids)
        self.usual_stops = ends_of_tokenizer(self.tokenizer) | self.model_config.hf_eos_token_id
        self.executor.stops[[token for token in self.usual_stops if 0 <= token < self.model_config.vocab_size]] = True
        logger.info(
            "block rows: block %d, mask id %d, stop ids %s, at most %d rows a forward, %s",
            facts.block_size,
            facts.mask_id,
            sorted(facts.stop_ids),
            self.row_budget,
            self.defaults,
        )

    def init_request_dispatcher(self) -> None:
        """As the host; a command that cannot be carried out is answered."""
        super().init_request_dispatcher()
        self._request_dispatcher: Any = partial(carried_out, self._request_dispatcher)

    def init_output_streamer(self) -> None:
        """The streamer reports forward counts, which the table knows."""
        super().init_output_streamer()
        self.output_streamer.table = self.table

    def get_output_streamer_class(self) -> type[LladaOutputStreamer]:
        """The host's hook for a streamer of one's own."""
        return LladaOutputStreamer

    # --- the loop ---------------------------------------------------------------------------------------------------

    @DynamicGradMode()
    def event_loop_normal(self) -> None:
        """Turn after turn until shutdown; see the module."""
        gc.freeze()  # modules and weights are no garbage; looking through them stops everything for half a second
        while not self.gracefully_exit:
            self.ingest_requests()
            if self._engine_paused:
                self._record_scheduler_state_for_paused_engine()
                continue
            self._turn()

    def _turn(self) -> None:
        self._admit_waiting()
        busy = bool(self.flights)
        ahead = self._launch_ahead()
        self._read()
        self._end_aborted()
        if self.overlaps:
            busy |= ahead or self._launch()
            self._book()
        else:
            self._book()
            busy |= self._launch()
        self._share()
        if envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY.get():
            self.table.check_integrity(self._held())
        if not busy:
            self.cur_batch_for_debug = None
            self._sched_idled = True
            self._end_contradictory(strict=envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE.get())
            self.on_idle()

    def _read(self) -> None:
        """Stage: read the oldest step in flight and take what the next one depends on; the rest is booked later."""
        if not self.flights:
            return
        flight = self.flights.popleft()
        self.landed = self.executor.read(flight)
        for rid, error in flight.failed.items():
            self.failures.note(rid, error)
        if self.landed is not None:
            self.going_on = self.landed.going_on
            self._take(self.landed, self.landed.decisions(self.landed.urgent))

    def _take_rest(self) -> None:
        """Take the decisions that the next step's rows did not depend on."""
        if self.landed is not None:
            landed, self.landed = self.landed, None
            self._take(landed, landed.decisions(landed.calm))

    def _take(self, landed: Landed, decisions: list[Decision]) -> None:
        for decision in decisions:
            request = decision.request
            # The first if it ended while the step ran, by a stop string or an abort.
            if request.phase is Phase.DONE or request.rid in self.failures:
                continue
            try:
                if not decision.finite:
                    raise ArithmeticError("the model gave logits that are not finite")
                blocks = decision.blocks if request.plain else self._conforming(landed, decision)
                first = request.blocks[0]
                request.decide(blocks)
                if self.flights and id(first) in self.flights[-1].carried and request.filled == first.start:
                    self._note_sealed(request)
                if request.params.stream_mode == "denoise":
                    request.shown.append(snapshot_of(request))
                self.unbooked.append(request)
            except Exception as error:
                self.failures.note(request.rid, error)

    def _conforming(self, landed: Landed, decision: Decision) -> list[Decided]:
        """A step's decisions as the request may take them: noted, and of one with a grammar what that accepts."""
        request = decision.request
        blocks = landed.noted(decision) if request.noted else decision.blocks
        shaping = request.params.shaping
        if shaping is None or shaping.matcher is None:
            return blocks
        [block], [decided] = request.blocks, blocks
        self.executor.writer.forget(block)
        accepted = conform(shaping.matcher, block, decided, self.facts.mask_id)
        if accepted is None:
            raise ConfigError("the grammar allows no token of the vocabulary after the output so far")
        return [accepted]

    def _note_sealed(self, request: Request[DecodeConfig]) -> None:
        """The first block was live in the step that is read, and is in the next one too: if it left, that sealed it."""
        if request.phase is Phase.DECODING and request.filled < request.live_from:
            request.fill(1)

    def _launch_ahead(self) -> bool:
        """Stage: launch the next step before the last one is read, if its rows need nothing of that on the host."""
        if not self.runs_ahead or len(self.flights) != 1 or self.attention_ranks > 1:
            return False
        rows = rows_ahead(self.flights[0].plan)
        if rows is None:
            return False
        plan = self._next_step(rows)
        if not plan.rows or not self._ensure_rows(plan.rows):
            return False
        self._enqueue(plan, [len(plan.rows)])
        return True

    def _launch(self) -> bool:
        """Stage: plan the next step and enqueue it."""
        plan = self._plan()
        rows = self._rows_of_ranks(len(plan.rows))
        if not any(rows):
            return False
        self._enqueue(plan, rows)
        return True

    def _enqueue(self, plan: Plan, rows: list[int]) -> None:
        self.forward_ct += 1
        self.cur_batch_for_debug = self.running_batch
        self._sched_idled = False
        self.metrics_reporter.record_scheduler_active(time.monotonic_ns())
        self.profiler_manager._profile_batch_predicate(self.running_batch)
        step = self.executor.launch(plan, rows if len(rows) > 1 else None)
        self.flights.append(step)
        self.going_on = []
        self._count_step(step)
        for request, fills in plan.fills().items():
            try:
                request.take_part(fills)
            except Exception as error:
                self.failures.note(request.rid, error)
        self.new_token_ratio_tracker.decay_step()

    def _plan(self) -> Plan:
        """Rows whose requests have their pages; requests are retracted until the rest has."""
        while True:
            plan = self._next_step(self.going_on)
            if self._ensure_rows(plan.rows):
                return plan
            if self.unbooked or self.landed is not None:
                self._book()  # may end requests and so free pages
            else:
                self._retract_one()

    def _next_step(self, going_on: list[Row]) -> Plan:
        """As next_step(); a request that stands in its way ends."""
        while True:
            going_on = [row for row in going_on if row.request.phase is Phase.DECODING]
            try:
                return next_step(self.table, self.row_budget, going_on)
            except Exception:
                if not self._end_contradictory():
                    raise

    def _ensure_rows(self, rows: list[Row]) -> bool:
        """Pages for all of these rows that have none yet; False if the pool is too full."""
        T = self.facts.block_size
        reach = {row.request.rid: row.start + T for row in rows if row.start >= row.request.room}
        return self._ensure_pages(reach)

    def _rows_of_ranks(self, mine: int) -> list[int]:
        """Rows that each DP attention rank has for the next forward: all take part, or none does."""
        if self.attention_ranks == 1:
            return [mine]
        parallel = get_parallel()
        everyones = torch.empty(parallel.tp_size, dtype=torch.int64)
        torch.distributed.all_gather_single(everyones, torch.tensor([mine]), group=parallel.tp_group.cpu_group)
        rows: list[int] = everyones[:: parallel.attn_tp_size].tolist()
        if not any(rows):
            time.sleep(IDLE_SECONDS)
        return rows

    def _count_step(self, step: InFlight) -> None:
        """Steps that a CUDA graph ran, and others, for the log line and the metrics."""
        if step.replayed:
            self.replayed += 1
        else:
            self.eager += 1
        if self.metrics is not None:
            self.metrics_collector.increment_decode_cuda_graph_pass(value=step.replayed)
            self.metrics.step(step.plan, replayed=step.replayed)

    # --- admission --------------------------------------------------------------------------------------------------

    def _abort_on_queued_limit(self, req: Any) -> bool:
        """As the host, which would take a running request that is retracted for one more that wants to wait."""
        return self.table.get(req.rid) is None and super()._abort_on_queued_limit(req)

    def handle_generate_request(self, recv_req: Any, **kwargs: Any) -> None:
        """As the host; what goes wrong answers the request."""
        try:
            super().handle_generate_request(recv_req, **kwargs)
        except Exception as error:
            self._answer_failed(recv_req, self.failures.reason(recv_req.rid, error))

    def validate_dllm_request(self, req: Any) -> str | None:
        """The host's door: the sentence that refuses the request, or None; what it wants is read here, once."""
        waiting = (*self.waiting_queue, *self.grammar_manager.grammar_queue)
        if self.table.get(req.rid) is not None or any(other.rid == req.rid for other in waiting):
            return f"rid is {req.rid!r}, which is that of a request that is not done; allowed: another one"
        try:
            req.wishes = wishes_of(req, self.defaults, self.model_config.vocab_size, self.facts)
        except ConfigError as error:
            return str(error)
        params = req.sampling_params  # the whole answer, searched after every step, is quadratic work
        params.stop_regex_max_len = min(params.stop_regex_max_len, MOST_TAIL)
        return None

    def _admit_waiting(self) -> None:
        """Stage: let waiting requests in, in the order of the host's policy, as far as KV and request slots go."""
        if self.grammar_manager.has_waiting_grammars():
            for req in self.grammar_manager.get_ready_grammar_requests():
                self._add_request_to_queue(req)
        if not self.waiting_queue:
            return
        self.policy.calc_priority(
            self.waiting_queue, self.running_batch, processed_tokens=self.processed_tokens_counter
        )
        adder = self._adder()
        self.filling.settle()
        for req in list(self.waiting_queue):
            if req.to_finish is not None:
                self.waiting_queue.remove(req)
                self._finish_unadmitted(req)
                continue
            try:
                if self._is_being_filled(req):
                    continue
                while not (fits := self._fits(req, adder)):
                    self._admit(adder.can_run_list)
                    if not self._preempt_for(req):
                        break
                    adder = self._adder()
            except Exception as error:
                self._turn_away([req], error)
                continue
            if not fits:
                return
        self._admit(adder.can_run_list)

    def _is_being_filled(self, req: Any) -> bool:
        """Whether most of what a request has to fill is about to be filled for another one: it waits, and shares it."""
        request, worth = self._request_of(req), WORTH_WAITING * self.facts.block_size
        if self.tree_cache.disable or request.live_from < worth:
            return False
        if request.params.report is not None:  # which may have to read its prompt itself
            return False
        return self.filling.brings(request, worth)

    def _adder(self) -> Any:
        """The host's admission by KV budget, without chunks: rows are budgeted by the planner."""
        return self.get_prefill_adder_class()(
            self.page_size,
            self.tree_cache,
            self.token_to_kv_pool_allocator,
            self.running_batch,
            self.new_token_ratio_tracker.current,
            self.max_prefill_tokens,
            None,
            0,
            self.priority_scheduling_preemption_threshold,
            max_running_requests=self.max_running_requests,
            prefill_max_requests=get_schedule().prefill_max_requests,
            waiting_queue_len=len(self.waiting_queue),
        )

    def _fits(self, req: Any, adder: Any) -> bool:
        """Match a waiting request's whole blocks in the radix tree and reserve KV for it; False if there is no room."""
        if self.get_num_allocatable_reqs(len(self.running_batch.reqs)) <= len(adder.can_run_list):
            return False
        if adder.budget_state() != AddReqResult.CONTINUE:
            return False
        request = self._request_of(req)
        req.refresh_fill_ids()
        read_from = None if request.params.report is None else request.params.report.prompt_from
        reach = request.live_from if read_from is None else read_from // request.block_size * request.block_size
        match = match_kv_cache(req, self.tree_cache, req.full_untruncated_fill_ids, max_prefix_len=reach)
        if match.cache_protected_len is None:
            req.kv.cache_protected_len = req.prefix_len
        adder.add_one_req(req, has_chunked_req=False, truncation_align_size=None)
        fits = req in adder.can_run_list[-1:]
        if fits:
            self.filling.add(request, req.prefix_len)
        return fits

    def _admit(self, reqs: list[Any]) -> None:
        """Give requests that fit a row of req_to_token, their cached prefix, and pages up to their live block."""
        if not reqs:
            return
        self.req_to_token_pool.alloc(reqs)
        for req in reqs:
            self.waiting_queue.remove(req)
            self.reqs[req.rid] = req
            self.running_batch.reqs.append(req)
            req.kv.kv_allocated_len = req.kv.kv_committed_len = req.prefix_len
            try:
                self._place(req)
            except Exception as error:
                self.failures.note(req.rid, error)
        admitted = [self.table[req.rid] for req in reqs if req.rid not in self.failures]
        self._ensure_pages({request.rid: request.live_to for request in admitted})
        set_time_batch(reqs, "set_forward_entry_time")

    def _place(self, req: Any) -> None:
        """Let a request begin on its row of req_to_token, behind its cached prefix."""
        request, row, cached = self.table[req.rid], req.kv.req_pool_idx, req.prefix_len
        if cached:
            prefix = self.tree_cache.prefix_device_indices(req)
            self.req_to_token_pool.write((row, slice(0, cached)), prefix)
        request.slot, request.room = row, cached
        for block in request.blocks:
            self.executor.writer.forget(block)
        self.table.readmit(req.rid, cached)
        if not req.retracted_stain:
            req.cached_tokens = req.cached_tokens_device = cached
        self.processed_tokens_counter += request.live_from - request.filled

    def _request_of(self, req: Any) -> Request[DecodeConfig]:
        """What the table knows of a host request; from now on, if it is new."""
        request = self.table.get(req.rid)
        if request is None:
            request = self._new_request(req)
            self.table.add(request)
        return request

    def _new_request(self, req: Any) -> Request[DecodeConfig]:
        wishes = req.wishes
        shaping = shaping_of(req, wishes, self.model_config.vocab_size, self.facts.own_tokens)
        params = replace(wishes.params, shaping=shaping, report=report_of(req))
        return Request(
            rid=req.rid,
            prompt=req.origin_input_ids,
            max_new_tokens=req.sampling_params.max_new_tokens,
            stop_ids=wishes.stop_ids,
            params=params,
            fresh=self.fresh,
            numbers=numbers(params),
            plain=params.plain,
            noted=params.noted,
            rare_stops=not wishes.stop_ids <= self.usual_stops,
            prefixes=prefixes(req.origin_input_ids, self.facts.block_size, cache_key(req)),
            rules=Rules(
                edits=params.edits,
                reopens=params.reopens,
                whole_blocks=params.edits or not params.early_exit,
                most_steps=params.most_steps,
                max_nfe=params.max_nfe,
                window=params.window,
                live_blocks=params.live_blocks,
                next_block_share=params.next_block_share,
                reads_prompt=params.report is not None and params.report.prompt_from is not None,
            ),
            block_size=self.facts.block_size,
            mask_id=self.facts.mask_id,
        )

    def _ensure_pages(self, reach: dict[str, int]) -> bool:
        """Pages for positions [0, reach) of each request, evicting from the radix tree if need be.

        False, and no pages for any of them, if the pool is too full for all.
        """
        if not reach:
            return True
        grown = [(self.table[rid], upto) for rid, upto in reach.items()]
        needed = sum(upto - request.room for request, upto in grown)
        evict_from_tree_cache(self.tree_cache, needed)
        pages = self.token_to_kv_pool_allocator.alloc(needed)
        if pages is None:
            return False
        slots = np.repeat([request.slot for request, _ in grown], [upto - request.room for request, upto in grown])
        positions = np.concatenate([np.arange(request.room, upto) for request, upto in grown])
        slot, position = to_device(np.stack((slots, positions)), self.device)
        self.req_to_token_pool.write((slot, position), pages.int())
        for request, upto in grown:
            kv = self.reqs[request.rid].kv
            request.room = kv.kv_allocated_len = kv.kv_committed_len = upto
        return True

    def _preempt_for(self, req: Any) -> bool:
        """Retract the least important running request if `req` outranks it by more than the host's threshold."""
        if not self.enable_priority_preemption or not self.running_batch.reqs:
            return False
        sign = 1 if self.schedule_low_priority_values_first else -1
        victim = max(self.running_batch.reqs, key=lambda r: (sign * r.priority, r.time_stats.wait_queue_entry_time))
        if sign * (victim.priority - req.priority) <= self.priority_scheduling_preemption_threshold:
            return False
        self._settle()
        if victim in self.running_batch.reqs:
            self._retract(victim)
        return True

    # --- booking ----------------------------------------------------------------------------------------------------

    def _book(self) -> None:
        """Stage: tell the outside what was decided: the radix tree, finish states, streams, metrics."""
        self._take_rest()
        decided, self.unbooked = self.unbooked, []
        news: dict[str, int] = {}  # tokens committed per request
        for request in decided:
            try:
                req = self.reqs[request.rid]
                new = request.output[len(req.output_ids) :]
                if req.return_logprob:
                    book_logprobs(req, new, request.notes[len(req.output_ids) :])
                req.output_ids.extend(new)
                news[req.rid] = len(new)
            except Exception as error:
                self.failures.note(request.rid, error)
        changed = {}
        for req in self.running_batch.reqs:
            try:
                book_prompt_logprobs(req, self.table[req.rid])
                if self._update_finish(req, news.get(req.rid)):
                    changed[req.rid] = req
            except Exception as error:
                self.failures.note(req.rid, error)
        for req, reason in self._failed():
            req.finished_reason = reason  # whatever end it came to where it did not fail
            changed[req.rid] = req
        cut = sum(len(req.output_ids) - len(req.output_ids_through_stop) for req in changed.values())  # after a stop
        if changed:
            self._stream(list(changed.values()))
        if decided:
            self._report(sum(news.values()) - cut)
        self.maybe_send_health_check_signal()

    def _share(self) -> None:
        """Stage: insert what a launched step fills of prompts into the radix tree, for whoever is admitted next."""
        if not self.flights:
            return
        T, plan = self.facts.block_size, self.flights[-1].plan
        for rid in dict.fromkeys(row.request.rid for row in plan.rows if row.kind is RowKind.FILL):
            req = self.reqs.get(rid)  # None if it has ended meanwhile
            if req is not None:
                try:
                    self._insert(req, len(req.origin_input_ids) // T * T)
                except Exception as error:
                    self.failures.note(rid, error)

    def _insert(self, req: Any, upto: int) -> None:
        """Insert a request's filled blocks before `upto` into the radix tree, if they are not there.

        The tree goes over the whole prefix each time, so this is for prompts, once they are filled, and for answers,
        once their requests let go of them.
        """
        final = min(self.table[req.rid].filled, upto)
        if get_serving().strip_thinking_cache:
            final = min(final, len(req.origin_input_ids) // self.facts.block_size * self.facts.block_size)
        if final > req.kv.cache_protected_len and not (self.tree_cache.disable or req.skip_radix_cache_insert):
            req.refresh_fill_ids()
            self.tree_cache.checkpoint(req, up_to=final)

    def _update_finish(self, req: Any, committed: int | None) -> bool:
        """Let the host judge new tokens if they may be an end; whether there is anything to send.

        The blocks see stop tokens and lengths, so it is only asked where they have ended, and of all tokens where text
        or a grammar may end a request.

        Args:
            committed: how many tokens there are since last time; None if no step was decided.
        """
        if req.rid in self.failures:
            return False
        request, decided, new = self.table[req.rid], committed is not None, committed or 0
        if req.to_finish or (new and (request.phase is Phase.DONE or ends_by_text(req))):
            marked = req.to_finish is not None
            req.update_finish_state(new)
            if not marked and isinstance(req.finished_reason, FINISH_ABORT):  # the search of its text took too long
                raise ConfigError(req.finished_reason.message)
        if request.ending is Ending.LENGTH and not req.finished():  # max_nfe, or no token was asked for
            req.to_finish = FINISH_LENGTH(len(req.output_ids))
            req.update_finish_state(0)
        if request.phase is Phase.DONE and not req.finished():
            raise IntegrityError(f"{req.rid}: blocks ended by {request.ending}, the host sees no end")
        return new > 0 or req.finished() or (decided and request.params.stream_mode == "denoise")

    def _stream(self, changed: list[Any]) -> None:
        """Send new tokens and ends; let go of what ended."""
        ended = [req for req in changed if req.finished()]
        for req in ended:
            self._release(req)
            try:
                req.time_stats.set_completion_time()
                if self.metrics is not None:
                    self.metrics.ended(self.table[req.rid], len(req.output_ids_through_stop))
            except Exception as error:
                log(req.rid, error)  # its answer is whole; it is only not counted
        self._send(changed)
        for req in ended:
            self.table.drop(req.rid)
        if ended:
            self.running_batch.reqs = [req for req in self.running_batch.reqs if not req.finished()]

    def _send(self, changed: list[Any]) -> None:
        """Send the outputs of requests."""
        for req, error in self.output_streamer.stream_each(changed):
            if req.finished():
                self._answer_failed(req, self.failures.reason(req.rid, error))
            else:
                self.failures.note(req.rid, error)

    def _report(self, committed: int) -> None:
        reporter = self.metrics_reporter
        reporter.num_generated_tokens += committed
        reporter.forward_ct_decode += 1
        # The host only prints its first argument, as whether the last step was a graph's.
        reporter.report_decode_stats(
            f"{self.replayed} steps replayed, {self.eager} eager", self.running_batch, committed
        )
        snapshot = self.publish_load_snapshot(force=False)
        self.load_publisher.publish_load_stat(self.load_inquirer.get_loads, force=False, snapshot=snapshot)

    def _release(self, req: Any) -> None:
        """Give back a request's row and pages; the tree keeps whole blocks of what is returned of it."""
        try:
            self._insert(req, req.owned_kv_len() // self.facts.block_size * self.facts.block_size)
        except Exception as error:
            log(req.rid, error)  # its answer is whole; nobody shares its KV
        del self.reqs[req.rid]
        if req.kv.is_kv_released:  # a row without a page yet, which the host does not know
            self.tree_cache.unlock(req.lock)
            req.lock = None
            self.req_to_token_pool.free(req)
        else:
            release_kv_cache(req, self.tree_cache, checkpoint=False)

    # --- ends from outside ------------------------------------------------------------------------------------------

    def abort_request(self, recv_req: Any) -> None:
        """As the host, which takes an id for the beginning of ids: one client's "a" would end another one's "ab"."""
        if recv_req.abort_all:
            super().abort_request(recv_req)
            return
        for req in [req for req in self.waiting_queue if req.rid == recv_req.rid]:
            self.waiting_queue.remove(req)
            self._release_aborted_request(req)
            self.send_abort_output(AbortReq(rid=req.rid, finished_reason=recv_req.finished_reason), req)
        status = HTTPStatus.SERVICE_UNAVAILABLE if recv_req.abort_message else None  # of one that took too long
        for req in (*self.grammar_manager.grammar_queue, *self.running_batch.reqs):
            if req.rid == recv_req.rid and not req.finished():
                req.to_finish = FINISH_ABORT(recv_req.abort_message, status)

    def _end_aborted(self) -> None:
        """Stage: requests that failed, or that the host marked for an end, take no further part."""
        running = self.running_batch.reqs
        if self.failures.reasons or any(req.to_finish is not None for req in running):
            self._take_rest()
        for req, reason in self._failed():
            req.to_finish = reason
        for req in running:
            if req.to_finish is not None:
                self.table[req.rid].abandon()

    def _failed(self) -> list[tuple[Any, FINISH_ABORT]]:
        """Running requests that failed on any rank, and what they are told. All ranks call this at the same points."""
        unsure = self.peers is not None and any(map(may_differ, self.running_batch.reqs))
        failures = self.failures.take(self.peers if unsure else None)
        found = [(self.reqs[rid], reason) for rid, reason in failures.items() if rid in self.reqs]
        for req, _ in found:
            req.skip_radix_cache_insert = True  # ranks may have come to different points with it
            self.table[req.rid].abandon()
        return found

    def _end_contradictory(self, *, strict: bool = False) -> bool:
        """End requests that contradict themselves or the host's records; whether there were any.

        Raises:
            IntegrityError: there are some, and `strict`.
        """
        if strict:
            self.table.check_integrity(self._held())
        found = self.table.contradictions(self._held())
        for rid, what in found.items():
            request, req = self.table.get(rid), self.reqs.get(rid)
            logger.error("request %s contradicts itself: %s; its blocks are %s", rid, what, request and request.blocks)
            if request is None:
                release_kv_cache(self.reqs.pop(rid), self.tree_cache, checkpoint=False)
            elif req is None:
                self._turn_away([req for req in self.waiting_queue if req.rid == rid], IntegrityError(what))
                self.table.drop(rid)
            else:
                request.abandon()
                self.failures.note(rid, IntegrityError(what))
        return bool(found)

    def _turn_away(self, reqs: list[Any], error: Exception) -> None:
        """Answer waiting requests that fail."""
        for req in reqs:
            req.to_finish = self.failures.reason(req.rid, error)
            self.waiting_queue.remove(req)
            self._finish_unadmitted(req)

    def _answer_failed(self, req: Any, reason: FINISH_ABORT) -> None:
        """Answer a request, or what was received of it, of which there is no output to send."""
        self.send_abort_output(AbortReq(rid=req.rid, finished_reason=reason.to_json()), req)

    def _finish_unadmitted(self, req: Any) -> None:
        """Answer a request that ends in the queue: refused by the host, or aborted after a retraction."""
        self._release_aborted_request(req)
        req.update_finish_state(0)
        self._send([req])

    def _release_aborted_request(self, req: Any) -> None:
        """As the host, which calls this for every request it drops from its queue; the table may know it."""
        super()._release_aborted_request(req)
        self.table.drop(req.rid)

    def _settle(self) -> None:
        """Read and book everything, so that nothing is in flight, and nothing that failed runs."""
        while self.flights:
            self._read()
            self._take_rest()
        self._end_aborted()
        self._book()

    def _retract_one(self) -> None:
        """Take the KV of the request that the host's policy would give up first."""
        reqs = self.running_batch.reqs
        if len(reqs) == 1:
            reqs[0].to_finish = FINISH_ABORT(
                "the KV pool is too small for this request alone", HTTPStatus.INTERNAL_SERVER_ERROR
            )
            self._end_aborted()
            self._book()
            return
        victim = reqs[ScheduleBatch._get_decode_retraction_order(reqs)[-1]]
        logger.warning("KV pool is full: retracting %s of %d running requests", victim.rid, len(reqs))
        self.metrics_reporter.num_retracted_reqs = 1
        self._retract(victim)
        self.new_token_ratio_tracker.current = min(1.0, 2 * self.new_token_ratio_tracker.current)

    def _retract(self, req: Any) -> None:
        """Back to the queue without KV; the table keeps what the live block has decided."""
        request = self.table[req.rid]
        self._insert(req, request.filled)
        request.retract()
        del self.reqs[req.rid]
        self.running_batch.reqs.remove(req)
        release_req(
            req=req,
            remaing_req_count=len(self.running_batch.reqs),
            req_to_token_pool=self.req_to_token_pool,
            token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
            tree_cache=self.tree_cache,
            hisparse_coordinator=None,
        )
        self._add_request_to_queue(req, is_retracted=True)

    def pause_generation(self, recv_req: Any) -> None:
        """As the host, with nothing in flight; in "retract" mode the table gives up KV like the host."""
        self._settle()
        retracted = [req.rid for req in self.running_batch.reqs] if recv_req.mode == "retract" else []
        super().pause_generation(recv_req)
        for rid in retracted:
            del self.reqs[rid]
            if (request := self.table.get(rid)) is not None:  # the host turns away what its queue has no room for
                request.retract()

    # --- queries ----------------------------------------------------------------------------------------------------

    def is_fully_idle(self, for_health_check: bool = False, ignore_waiting: bool = False) -> bool:
        """As the host; a step in flight is work too."""
        return not self.flights and super().is_fully_idle(for_health_check, ignore_waiting)

    def _held(self) -> dict[str, int]:
        """Positions that each request has pages for, as the host's records say."""
        return {rid: req.kv.kv_allocated_len for rid, req in self.reqs.items()}


def rows_ahead(plan: Plan) -> list[Row] | None:
    """The rows of a step that is not read which the next one has too, and those of blocks that are about to begin.

    None if some request must be read first: one that needs the host between its steps, or has several live blocks.
    """
    rows: list[Row] = []
    for row in plan.rows:
        request = row.request
        if row.block is None or request.phase is not Phase.DECODING:
            continue
        if not request.single:
            return None
        if row.start != request.live_from:
            continue  # sealed by that step, or begun too early in it
        rows.append(row)
        if request.may_finish_block and (block := request.block_after()) is not None:
            rows.append(Row(request, RowKind.DENOISE, block.start, block))
    return rows


def may_differ(req: Any) -> bool:
    """Whether a request may fail on one rank alone: somebody else's code, or a clock, has a say in it."""
    return bool(req.custom_logit_processor) or ends_by_text(req)


def ends_by_text(req: Any) -> bool:
    """Whether more may end a request than its stop tokens and its length."""
    params = req.sampling_params
    return bool(params.stop_strs or params.stop_regex_strs or req.grammar is not None)


def cache_key(req: Any) -> tuple[Any, Any]:
    """What keeps a request's cached blocks apart from others of the same tokens."""
    return req.extra_key, req.cache_salt
