"""What the outside hears of decisions: finish states, streams, log-probabilities, metrics, traces, the log."""

from __future__ import annotations

import time
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, FINISH_MATCHED_TOKEN
from sglang.srt.observability.trace import get_global_tracing_enabled

from sglang_llada.blocks import Ending, Phase, Table
from sglang_llada.errors import ConfigError, IntegrityError
from sglang_llada.host.engine.endings import Endings, ends_by_text
from sglang_llada.host.engine.failures import Failures, log
from sglang_llada.host.engine.metrics import Metrics
from sglang_llada.host.engine.pages import Pages
from sglang_llada.host.engine.pipeline import Pipeline
from sglang_llada.host.engine.stages import Stages
from sglang_llada.host.engine.step import InFlight
from sglang_llada.host.engine.streaming import book_logprobs, book_prompt_logprobs


class Booking:
    """From decided blocks to answers on their way.

    Attributes:
        host: the host's scheduler, which owns streamer and reports.
        replayed, eager: how many steps a CUDA graph ran, and how many none.
    """

    def __init__(
        self,
        host: Any,
        table: Table,
        pages: Pages,
        pipeline: Pipeline,
        failures: Failures,
        endings: Endings,
        metrics: Metrics | None,
    ) -> None:
        self.host, self.table, self.pages, self.pipeline = host, table, pages, pipeline
        self.failures, self.endings, self.metrics = failures, endings, metrics
        self.stages = Stages(pages.reqs) if get_global_tracing_enabled() else None
        self.replayed = self.eager = 0

    def book(self) -> None:
        """Tell the outside what was decided: the radix tree, finish states, streams, metrics."""
        self.pipeline.take_rest()
        decided, self.pipeline.decided = self.pipeline.decided, []
        news: dict[str, int] = {}  # tokens committed per request
        for request in decided:
            try:
                req = self.pages.reqs[request.rid]
                new = request.output[len(req.output_ids) :]
                if req.return_logprob:
                    book_logprobs(req, new, request.notes[len(req.output_ids) :])
                if new and not req.output_ids:
                    req.time_stats.prefill_finished_time = time.perf_counter()  # the first token, by the host's account
                req.output_ids.extend(new)
                news[req.rid] = len(new)
                if self.stages is not None:
                    self.stages.decided(req, request)
            except Exception as error:
                self.failures.note(request.rid, error)
        changed = {}
        for req in self.host.running_batch.reqs:
            try:
                book_prompt_logprobs(req, self.table[req.rid])
                if self._update_finish(req, news.get(req.rid)):
                    changed[req.rid] = req
            except Exception as error:
                self.failures.note(req.rid, error)
        for req, reason in self.endings.take_failed():
            req.finished_reason = reason  # whatever end it came to where it did not fail
            changed[req.rid] = req
        cut = sum(len(req.output_ids) - len(req.output_ids_through_stop) for req in changed.values())  # after a stop
        if changed:
            self._stream(list(changed.values()))
        if decided:
            self._report(sum(news.values()) - cut)
        self.host.maybe_send_health_check_signal()

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
        if request.canvas and request.ending is Ending.STOP and isinstance(req.finished_reason, FINISH_LENGTH | None):
            req.finished_reason = FINISH_MATCHED_TOKEN(matched=request.output[-1])  # which the host does not look for
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
            self.pages.release(req)
            try:
                if self.stages is not None:
                    self.stages.decided(req, self.table[req.rid], ended=True)
                req.time_stats.set_completion_time()
                if self.metrics is not None:
                    self.metrics.ended(self.table[req.rid], len(req.output_ids_through_stop))
            except Exception as error:
                log(req.rid, error)  # its answer is whole; it is only not counted
        self.send(changed)
        for req in ended:
            self.table.drop(req.rid)
        if ended:
            self.host.running_batch.reqs = [req for req in self.host.running_batch.reqs if not req.finished()]

    def send(self, changed: list[Any]) -> None:
        """Send the outputs of requests."""
        for req, error in self.host.output_streamer.stream_each(changed):
            if req.finished():
                self.endings.answer_failed(req, self.failures.reason(req.rid, error))
            else:
                self.failures.note(req.rid, error)

    def _report(self, committed: int) -> None:
        reporter = self.host.metrics_reporter
        reporter.num_generated_tokens += committed
        reporter.forward_ct_decode += 1
        # The host only prints its first argument, as whether the last step was a graph's.
        reporter.report_decode_stats(
            f"{self.replayed} steps replayed, {self.eager} eager", self.host.running_batch, committed
        )
        snapshot = self.host.publish_load_snapshot(force=False)
        self.host.load_publisher.publish_load_stat(self.host.load_inquirer.get_loads, force=False, snapshot=snapshot)

    def count_step(self, step: InFlight) -> None:
        """Steps that a CUDA graph ran, and others, for the log line, the metrics and the traces."""
        if step.replayed:
            self.replayed += 1
        else:
            self.eager += 1
        if self.stages is not None:
            self.stages.launched(step.plan)
        if self.metrics is not None:
            self.host.metrics_collector.increment_decode_cuda_graph_pass(value=step.replayed)
            self.metrics.step(step.plan, replayed=step.replayed)

    def count_retracted(self, req: Any) -> None:
        """A request that gives up its KV for the sake of others."""
        self.host.metrics_reporter.num_retracted_reqs += 1
        if self.metrics is not None:
            self.host.metrics_collector.increment_retracted_reqs(
                num_retracted_reqs=1,
                num_retracted_input_tokens=len(req.origin_input_ids),
                num_retracted_output_tokens=len(req.output_ids),
            )
