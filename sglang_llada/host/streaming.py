"""What leaves the scheduler beside tokens: forward counts in `meta_info`, through the host's own channel for it."""

from __future__ import annotations

from typing import Any, ClassVar

from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from sglang_llada.blocks import Table

FORWARD_COUNTS = "dllm_forward_counts"


class LladaOutputStreamer(SchedulerOutputStreamer):
    """Adds `meta_info["dllm_forward_counts"]`: decode steps of each block of the answer, in order.

    The host's tokenizer process appends what each output brings, so a block is reported once, when it is decided or
    the request ends.
    """

    has_additional_customized_info: ClassVar[bool] = True
    table: Table  # set by the scheduler right after construction

    def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
        """Forward counts of the blocks decided since the last output, one list per request."""
        return {FORWARD_COUNTS: [self._news(req) for req in reqs]}

    def _news(self, req: Any) -> list[int]:
        request = self.table.get(req.rid)
        return [] if request is None else request.report_steps(ended=req.finished())
