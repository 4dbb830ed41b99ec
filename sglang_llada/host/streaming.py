"""What leaves the scheduler beside tokens: forward counts in `meta_info`, through the host's own channel for it."""

from __future__ import annotations

from typing import Any, ClassVar

from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from sglang_llada.blocks import Request, Table
from sglang_llada.config import DecodeConfig
from sglang_llada.host.executor import Note

FORWARD_COUNTS = "dllm_forward_counts"
STEPS = "dllm_steps"
NFE = "dllm_nfe"
STEP_MAPS = "step_maps"
CONFIDENCES = "dllm_confidences"


class LladaOutputStreamer(SchedulerOutputStreamer):
    """Adds `meta_info["dllm_forward_counts"]`: decode steps of each block of the answer, in order; and with the last
    output `meta_info["dllm_steps"]` and `meta_info["dllm_nfe"]`, each a list of one number: the decode steps, fewer
    than the blocks' sum where several were live at once, and the forwards that the request took part in at all.

    Requests that ask for a trace get `meta_info["step_maps"]`, the 1-based step of its block in which each returned
    token was decided or last edited, and `meta_info["dllm_confidences"]`, its probability in that step.

    The host's tokenizer process appends what each output brings, so a block is reported once, when it is decided or
    the request ends.
    """

    has_additional_customized_info: ClassVar[bool] = True
    table: Table  # set by the scheduler right after construction

    def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
        """What there is to say of each request since its last output; nothing of those that were never admitted."""
        known = [(self.table.get(req.rid), req.finished()) for req in reqs]
        notes = [traced(req, request) for req, (request, _) in zip(reqs, known, strict=True)]
        traces: dict[str, list[Any]] = {
            STEP_MAPS: [[note.step for note in each] for each in notes],
            CONFIDENCES: [[note.prob for note in each] for each in notes],
        }
        asked = any(r is not None and r.params.trace for r, _ in known)
        return (traces if asked else {}) | {
            FORWARD_COUNTS: [[] if r is None else r.report_steps(ended=ended) for r, ended in known],
            STEPS: [[] if r is None or not ended else [r.steps] for r, ended in known],
            NFE: [[] if r is None or not ended else [r.forwards] for r, ended in known],
        }


def traced(req: Any, request: Request[DecodeConfig] | None) -> list[Note]:
    """Notes on the tokens since the last output, of a request that asked for them; none on what a stop cuts off."""
    if request is None or not request.params.trace:
        return []
    return request.report_notes(len(req.output_ids_through_stop))
