"""Who runs next: waiting requests are let in by the host's policy, as far as KV and request slots go."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Any

from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.mem_cache.common import match_kv_cache
from sglang.srt.observability.req_time_stats import set_time_batch
from sglang.srt.runtime_context import get_schedule

from sglang_llada.blocks import Filling, Request, Rules, Table, prefixes
from sglang_llada.config import DecodeConfig
from sglang_llada.decode.contract import Tokens
from sglang_llada.decode.layout import fresh, numbers
from sglang_llada.errors import ConfigError
from sglang_llada.host.engine.booking import Booking
from sglang_llada.host.engine.failures import Failures
from sglang_llada.host.engine.pages import Pages
from sglang_llada.host.engine.tiers import Tiers, cache_key
from sglang_llada.host.requests.canvas import as_prompt
from sglang_llada.host.requests.shaping import shaping_of
from sglang_llada.host.requests.stops import MOST_TAIL
from sglang_llada.host.requests.wishes import report_of, wishes_of
from sglang_llada.llada2.checkpoint import CheckpointFacts

WORTH_WAITING = 4  # blocks that another request is filling, for which a request waits a step instead of filling them


class Admission:
    """The way from the host's queue to a running request.

    Attributes:
        host: the host's scheduler, which owns the queue and its policy.
        defaults: how the server decodes where a request says nothing else.
        usual_stops: token ids that end most requests.
        filling: prompts that are about to be filled, which others may wait for.
    """

    def __init__(
        self,
        host: Any,
        table: Table,
        pages: Pages,
        tiers: Tiers,
        booking: Booking,
        failures: Failures,
        *,
        facts: CheckpointFacts,
        tokens: Tokens,
        vocabulary: int,
        defaults: DecodeConfig,
        usual_stops: Set[int],
    ) -> None:
        self.host, self.table, self.pages, self.tiers = host, table, pages, tiers
        self.booking, self.failures = booking, failures
        self.facts, self.vocabulary, self.defaults, self.usual_stops = facts, vocabulary, defaults, usual_stops
        self.fresh = fresh(facts.block_size, tokens)
        self.filling = Filling()

    def read(self, req: Any) -> str | None:
        """Read what a request wants, once; the sentence that refuses it, or None."""
        waiting = (*self.host.waiting_queue, *self.host.grammar_manager.grammar_queue)
        if self.table.get(req.rid) is not None or any(other.rid == req.rid for other in waiting):
            return f"rid is {req.rid!r}, which is that of a request that is not done; allowed: another one"
        try:
            req.wishes = wishes_of(req, self.defaults, self.vocabulary, self.facts)
        except ConfigError as error:
            return str(error)
        if req.wishes.canvas:  # in which stop tokens count from the last given one on, as the blocks know
            req.sampling_params.ignore_eos = True
        if req.wishes.choices:
            as_prompt(req, req.wishes.canvas, self.facts.mask_id)
        params = req.sampling_params  # the whole answer, searched after every step, is quadratic work
        params.stop_regex_max_len = min(params.stop_regex_max_len, MOST_TAIL)
        return None

    def admit_waiting(self) -> None:
        """Let waiting requests in, in the order of the host's policy, as far as KV and request slots go."""
        if self.host.grammar_manager.has_waiting_grammars():
            for req in self.host.grammar_manager.get_ready_grammar_requests():
                self.host._add_request_to_queue(req)
        if not self.host.waiting_queue:
            return
        self.host.policy.calc_priority(
            self.host.waiting_queue, self.host.running_batch, processed_tokens=self.host.processed_tokens_counter
        )
        adder = self._adder()
        self.filling.settle()
        if self.host.enable_lora and self.host.lora_drainer:
            self.host.lora_drainer.update_draining_state(self.host.waiting_queue, self.host.running_batch.reqs)
        for req in list(self.host.waiting_queue):
            if req.to_finish is not None:
                self.host.waiting_queue.remove(req)
                self.finish_unadmitted(req)
                continue
            try:
                if self._lacks_adapter(req, adder) or self._is_being_filled(req) or self._is_being_fetched(req):
                    continue
                while not (fits := self._fits(req, adder)):
                    self._admit(adder.can_run_list)
                    if not self._preempt_for(req):
                        break
                    adder = self._adder()
            except Exception as error:
                self.turn_away([req], error)
                continue
            if not fits:
                return
        self._admit(adder.can_run_list)

    def _lacks_adapter(self, req: Any, adder: Any) -> bool:
        """Whether there is no place for a request's adapter beside those of all that run; it waits, others need not."""
        if not self.host.enable_lora:
            return False
        return not self.host.can_schedule_lora_req(req, self._adapters(adder.can_run_list))

    def _adapters(self, reqs: list[Any]) -> set[str | None]:
        """Ids of the adapters of requests that are let in, and of those that run; None is none, which takes a place."""
        return {req.lora_id for req in (*self.host.running_batch.reqs, *reqs)}

    def _is_being_filled(self, req: Any) -> bool:
        """Whether most of what a request has to fill is about to be filled for another one: it waits, and shares it."""
        request, worth = self._request_of(req), WORTH_WAITING * self.facts.block_size
        if self.host.tree_cache.disable or request.live_from < worth:
            return False
        if request.params.report is not None:  # which may have to read its prompt itself
            return False
        return self.filling.brings(request, worth)

    def _is_being_fetched(self, req: Any) -> bool:
        """Whether storage is still asked for what a request begins with, or anew for what has gone meanwhile."""
        if not self.host.enable_hicache_storage:
            return False
        if not self.tiers.has_fetched(req):
            return True
        self._match(req)
        return bool(self.host._prefetch_after_device_hit_loss(req))

    def _adder(self) -> Any:
        """The host's admission by KV budget, without chunks: rows are budgeted by the planner."""
        return self.host.get_prefill_adder_class()(
            self.host.page_size,
            self.host.tree_cache,
            self.host.token_to_kv_pool_allocator,
            self.host.running_batch,
            self.host.new_token_ratio_tracker.current,
            self.host.max_prefill_tokens,
            None,
            0,
            self.host.priority_scheduling_preemption_threshold,
            max_running_requests=self.host.max_running_requests,
            prefill_max_requests=get_schedule().prefill_max_requests,
            waiting_queue_len=len(self.host.waiting_queue),
        )

    def _fits(self, req: Any, adder: Any) -> bool:
        """Reserve KV for a waiting request, behind what is cached of it; False if there is no room."""
        if self.host.get_num_allocatable_reqs(len(self.host.running_batch.reqs)) <= len(adder.can_run_list):
            return False
        if adder.budget_state() != AddReqResult.CONTINUE:
            return False
        self._match(req)
        adder.add_one_req(req, has_chunked_req=False, truncation_align_size=None)
        fits = req in adder.can_run_list[-1:]
        if fits:
            self.filling.add(self._request_of(req), req.prefix_len)
        return fits

    def _match(self, req: Any) -> None:
        """Look up how many of a request's whole blocks are cached, on the device and in host memory."""
        request = self._request_of(req)
        req.refresh_fill_ids()
        read_from = None if request.params.report is None else request.params.report.prompt_from
        reach = request.live_from if read_from is None else read_from // request.block_size * request.block_size
        match = match_kv_cache(req, self.host.tree_cache, req.full_untruncated_fill_ids, max_prefix_len=reach)
        if match.cache_protected_len is None:
            req.kv.cache_protected_len = req.prefix_len

    def _admit(self, reqs: list[Any]) -> None:
        """Give requests that fit a row of req_to_token, their cached prefix, and pages up to their live block."""
        if not reqs:
            return
        self.host.req_to_token_pool.alloc(reqs)
        if self.host.enable_lora:  # they stay as long as a request with them runs
            self.host.tp_worker.model_runner.lora_manager.fetch_new_loras(self._adapters(reqs))
        for req in reqs:
            self.host.waiting_queue.remove(req)
            self.pages.reqs[req.rid] = req
            self.host.running_batch.reqs.append(req)
            req.kv.kv_allocated_len = req.kv.kv_committed_len = req.prefix_len
            try:
                self.pages.place(req, loading=self.tiers.awaits(req))
            except Exception as error:
                self.failures.note(req.rid, error)
        admitted = [self.table[req.rid] for req in reqs if req.rid not in self.failures]
        for request in admitted:  # what a canvas gives before its first open position needs no step
            if len(request.output) > len(self.pages.reqs[request.rid].output_ids):
                self.booking.pipeline.decided.append(request)
        self.pages.ensure({request.rid: request.live_to for request in admitted})
        set_time_batch(reqs, "set_forward_entry_time")

    def _request_of(self, req: Any) -> Request[DecodeConfig]:
        """What the table knows of a host request; from now on, if it is new."""
        request = self.table.get(req.rid)
        if request is None:
            request = self._new_request(req)
            self.table.add(request)
        return request

    def _new_request(self, req: Any) -> Request[DecodeConfig]:
        wishes = req.wishes
        shaping = shaping_of(req, wishes, self.vocabulary, self.facts.own_tokens)
        params = replace(wishes.params, report=report_of(req))
        canvas, room = () if wishes.choices else wishes.canvas, req.sampling_params.max_new_tokens
        if room < len(canvas):
            raise ConfigError(f"canvas has {len(canvas)} positions; allowed: {room} behind this prompt")
        return Request(
            rid=req.rid,
            prompt=req.origin_input_ids,
            max_new_tokens=req.sampling_params.max_new_tokens,
            stop_ids=wishes.stop_ids,
            params=params,
            fresh=self.fresh,
            numbers=numbers(params),
            shaping=shaping,
            plain=params.plain and shaping is None,
            needs_host=shaping is not None or params.report is not None,
            noted=params.noted,
            rare_stops=not wishes.stop_ids <= self.usual_stops,
            prefixes=prefixes(req.origin_input_ids, self.facts.block_size, cache_key(req)),
            adapter=req.lora_id,
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
            canvas=canvas,
        )

    def _preempt_for(self, req: Any) -> bool:
        """Retract the least important running request if `req` outranks it by more than the host's threshold."""
        if not self.host.enable_priority_preemption or not self.host.running_batch.reqs:
            return False
        sign = 1 if self.host.schedule_low_priority_values_first else -1
        running = self.host.running_batch.reqs
        victim = max(running, key=lambda r: (sign * r.priority, r.time_stats.wait_queue_entry_time))
        if sign * (victim.priority - req.priority) <= self.host.priority_scheduling_preemption_threshold:
            return False
        self.host.settle()
        if victim in self.host.running_batch.reqs:
            self.pages.retract(victim)
        return True

    def turn_away(self, reqs: list[Any], error: Exception) -> None:
        """Answer waiting requests that fail."""
        for req in reqs:
            req.to_finish = self.failures.reason(req.rid, error)
            self.host.waiting_queue.remove(req)
            self.finish_unadmitted(req)

    def finish_unadmitted(self, req: Any) -> None:
        """Answer a request that ends in the queue: refused by the host, or aborted after a retraction."""
        self.host._release_aborted_request(req)
        req.time_stats.set_completion_time()
        req.update_finish_state(0)
        self.booking.send([req])
