"""The scheduler: the host's, with an event loop of its own that runs rows instead of batches of requests.

The host keeps what is not diffusion: receiving, tokenizers, the waiting queue and its policy, admission by KV budget,
the radix tree, the pools, streaming, aborts, pauses, metrics. This class is the loop; what it works with has files of
its own: admission, tiers, pages, pipeline, booking, endings. `self.running_batch.reqs` always lists the host requests
that hold KV, so that the host's own checks and reports see them.

One turn of the loop: take in requests and admit them (the device may still be busy with the last step), read the last
step, take those of its decisions that the next one's rows depend on, launch that, and only then take the others and
book what was decided (finish states, stop strings, streaming, radix insertion), while the device works. Where the
device is the CPU itself, booking comes before the launch, since nothing overlaps and the client would wait.

Where all that the next step's rows need lies on the device, it is launched before the last step is read, so that the
device never waits for the host (`_launch_ahead`). A row whose block the last step finishes is then in the next one,
with nothing open, and seals the block; the block behind it begins in that same step if its row was added because the
end was in sight, else one step later. A row that was added too early is thrown away. A few requests that need the host
between their steps are left out of every other one, so that the others need not wait for that.

What goes wrong with one request ends that request (failures.py): everything that is done for one alone is guarded.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Collection
from functools import partial
from http import HTTPStatus
from typing import Any

from sglang.srt.environ import envs
from sglang.srt.managers.schedule_batch import FINISH_ABORT, ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import DynamicGradMode

from sglang_llada.blocks import Phase, Plan, Request, Row, Table, next_step
from sglang_llada.config import AHEAD_VARIABLE, REPLAY_VARIABLE, DecodeConfig, read_switch
from sglang_llada.host.engine.admission import Admission
from sglang_llada.host.engine.booking import Booking
from sglang_llada.host.engine.endings import Endings
from sglang_llada.host.engine.executor import Decider, Executor, tokens_of
from sglang_llada.host.engine.failures import Failures, carried_out
from sglang_llada.host.engine.metrics import Metrics
from sglang_llada.host.engine.pages import Pages
from sglang_llada.host.engine.pipeline import Pipeline
from sglang_llada.host.engine.ranks import naming_a_loss, rows_of_ranks
from sglang_llada.host.engine.storage import name_weights
from sglang_llada.host.engine.streaming import LladaOutputStreamer
from sglang_llada.host.engine.tiers import Tiers
from sglang_llada.host.facts import decode_config, facts_of, is_ours, row_budget
from sglang_llada.host.requests.wishes import ends_of_tokenizer

logger = logging.getLogger(__name__)


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
        defaults = decode_config(self.dllm_config, facts)
        self.row_budget = row_budget(self.chunked_prefill_size, facts.block_size)
        # Whether a launched step runs by itself. A replay on the CPU is to be told what a device is.
        self.overlaps = self.device != "cpu" or read_switch(os.environ, REPLAY_VARIABLE, default=False)
        self.runs_ahead = self.overlaps and read_switch(os.environ, AHEAD_VARIABLE, default=True)
        parallel = get_parallel()
        self.attention_ranks = parallel.attn_dp_size
        peers = parallel.attn_tp_group.cpu_group if parallel.attn_tp_size > 1 else None  # that run the same rows
        self.running_batch.forward_mode = ForwardMode.DLLM_EXTEND
        # Checkpoints without a generation_config name their stop tokens in the tokenizer only.
        self.model_config.hf_eos_token_id = set(self.model_config.hf_eos_token_id or ()) | set(facts.stop_ids)
        usual_stops = ends_of_tokenizer(self.tokenizer) | self.model_config.hf_eos_token_id

        runner, vocabulary = self.tp_worker.model_runner, self.model_config.vocab_size
        graphs = runner.decode_cuda_graph_runner
        executor = Executor(runner, Decider(runner) if graphs is None else graphs.decider)
        executor.stops[[token for token in usual_stops if 0 <= token < vocabulary]] = True
        context = self.metrics_collector_context
        metrics = Metrics(context.collector.labels) if context.current_scheduler_metrics_enabled else None
        self.table = Table()
        self.failures = Failures((lambda: None) if metrics is None else metrics.failed.inc)
        self.pipeline = Pipeline(executor, self.failures, facts.mask_id)
        self.tiers = Tiers(self, self.table, facts.block_size)
        self.pages = Pages(self, self.table, self.tiers, self.failures, facts.block_size)
        parts = (self, self.table, self.pages, self.pipeline, self.failures)
        self.endings = Endings(*parts, peers)
        self.booking = Booking(*parts, self.endings, metrics)
        self.admission = Admission(
            *(self, self.table, self.pages, self.tiers, self.booking, self.failures),
            facts=facts,
            tokens=tokens_of(facts),
            vocabulary=vocabulary,
            defaults=defaults,
            usual_stops=usual_stops,
        )
        name_weights(self)
        logger.info(
            "block rows: block %d, mask id %d, stop ids %s, at most %d rows a forward, %s",
            *(facts.block_size, facts.mask_id, sorted(facts.stop_ids), self.row_budget, defaults),
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
        with naming_a_loss():
            while not self.gracefully_exit:
                self.ingest_requests()
                if self._engine_paused:
                    self._record_scheduler_state_for_paused_engine()
                    continue
                self._turn()

    def _turn(self) -> None:
        self.tiers.poll()
        self.admission.admit_waiting()
        self.tiers.start()
        busy = bool(self.pipeline.flights)
        ahead = self._launch_ahead()
        self.pipeline.read()
        self.endings.end_aborted()
        if self.overlaps:
            busy |= ahead or self._launch()
            self.booking.book()
        else:
            self.booking.book()
            busy |= self._launch()
        if self.pipeline.flights:
            self.pages.share(self.pipeline.flights[-1].plan)
        if envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY.get():
            self.table.check_integrity(self.pages.held())
        if not busy:
            self.cur_batch_for_debug = None
            self._sched_idled = True
            self.endings.end_contradictory(strict=envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE.get())
            self.on_idle()

    def _launch_ahead(self) -> bool:
        """Launch the next step before the last one is read, if its rows need nothing of that on the host."""
        ahead = self.pipeline.ahead() if self.runs_ahead and self.attention_ranks == 1 else None
        if ahead is None:
            return False
        plan = self._next_step(ahead.rows, ahead.left_out)
        if not plan.rows or not self.pages.ensure_rows(plan.rows):
            return False
        self._enqueue(plan, [len(plan.rows)])
        return True

    def _launch(self) -> bool:
        """Plan the next step and launch it."""
        plan = self._plan()
        rows = rows_of_ranks(len(plan.rows), self.attention_ranks)
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
        step = self.pipeline.launch(plan, rows if len(rows) > 1 else None)
        self.booking.count_step(step)
        self.new_token_ratio_tracker.decay_step()

    def _plan(self) -> Plan:
        """Rows whose requests have their pages; requests are retracted until the rest has."""
        while True:
            plan = self._next_step(self.pipeline.carried)
            if self.pages.ensure_rows(plan.rows):
                return plan
            if self.pipeline.untold:
                self.booking.book()  # may end requests and so free pages
            elif not self.tiers.finish():  # copies to and from host memory hold pages, too
                self._retract_one()

    def _next_step(self, carried: list[Row], left_out: Collection[Request[DecodeConfig]] = ()) -> Plan:
        """As next_step(), but for requests that are left out; a request that stands in its way ends."""
        while True:
            carried = [row for row in carried if row.request.phase is Phase.DECODING]
            try:
                requests = [each for each in self.table if each not in left_out] if left_out else self.table
                return next_step(requests, self.row_budget, carried)
            except Exception:
                if not self.endings.end_contradictory():
                    raise

    # --- admission --------------------------------------------------------------------------------------------------

    def _abort_on_queued_limit(self, req: Any) -> bool:
        """As the host, which would take a running request that is retracted for one more that wants to wait."""
        return self.table.get(req.rid) is None and super()._abort_on_queued_limit(req)

    def handle_generate_request(self, recv_req: Any, **kwargs: Any) -> None:
        """As the host; what goes wrong answers the request."""
        try:
            super().handle_generate_request(recv_req, **kwargs)
        except Exception as error:
            self.endings.answer_failed(recv_req, self.failures.reason(recv_req.rid, error))

    def validate_dllm_request(self, req: Any) -> str | None:
        """The host's door: the sentence that refuses the request, or None."""
        return self.admission.read(req)

    # --- ends from outside ------------------------------------------------------------------------------------------

    def abort_request(self, recv_req: Any) -> None:
        """As the host, which takes an id for the beginning of ids: one client's "a" would end another one's "ab"."""
        if recv_req.abort_all:
            super().abort_request(recv_req)
            return
        for req in [req for req in self.waiting_queue if req.rid == recv_req.rid]:
            self.waiting_queue.remove(req)
            self._release_aborted_request(req)
            self.endings.answer_given_up(req, recv_req.finished_reason)
        status = HTTPStatus.SERVICE_UNAVAILABLE if recv_req.abort_message else None  # of one that took too long
        for req in (*self.grammar_manager.grammar_queue, *self.running_batch.reqs):
            if req.rid == recv_req.rid and not req.finished():
                req.to_finish = FINISH_ABORT(recv_req.abort_message, status)

    def _release_aborted_request(self, req: Any) -> None:
        """As the host, which calls this for every request it drops from its queue; the table may know it."""
        super()._release_aborted_request(req)
        self.table.drop(req.rid)

    def unload_lora_adapter(self, recv_req: Any) -> Any:
        """As the host, which is told to once all of its requests are answered; some may have rows in flight."""
        self.settle()
        return super().unload_lora_adapter(recv_req)

    def settle(self) -> None:
        """Read and book everything, so that nothing is in flight, and nothing that failed runs."""
        self.pipeline.drain()
        self.endings.end_aborted()
        self.booking.book()
        self.tiers.finish()

    def _retract_one(self) -> None:
        """Take the KV of the request that the host's policy would give up first."""
        reqs = self.running_batch.reqs
        if len(reqs) == 1:
            reqs[0].to_finish = FINISH_ABORT(
                "the KV pool is too small for this request alone", HTTPStatus.INTERNAL_SERVER_ERROR
            )
            self.endings.end_aborted()
            self.booking.book()
            return
        victim = reqs[ScheduleBatch._get_decode_retraction_order(reqs)[-1]]
        logger.warning("KV pool is full: retracting %s of %d running requests", victim.rid, len(reqs))
        self.booking.count_retracted(victim)
        self.pages.retract(victim)
        self.new_token_ratio_tracker.current = min(1.0, 2 * self.new_token_ratio_tracker.current)

    def pause_generation(self, recv_req: Any) -> None:
        """As the host, with nothing in flight; in "retract" mode the table gives up KV like the host."""
        self.settle()
        retracted = [req.rid for req in self.running_batch.reqs] if recv_req.mode == "retract" else []
        super().pause_generation(recv_req)
        for rid in retracted:
            del self.pages.reqs[rid]
            if (request := self.table.get(rid)) is not None:  # the host turns away what its queue has no room for
                request.retract()

    # --- queries ----------------------------------------------------------------------------------------------------

    def is_fully_idle(self, for_health_check: bool = False, ignore_waiting: bool = False) -> bool:
        """As the host; a step in flight is work too."""
        return not self.pipeline.flights and super().is_fully_idle(for_health_check, ignore_waiting)
