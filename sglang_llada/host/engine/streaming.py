"""What leaves the scheduler beside tokens: forward counts in `meta_info`, through the host's own channel for it."""

from __future__ import annotations

import logging
import math
from operator import attrgetter
from typing import Any, ClassVar

from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from sglang_llada.blocks import Request, Table
from sglang_llada.config import DecodeConfig
from sglang_llada.host.engine.step import Note
from sglang_llada.host.requests.meta_info import CHOICES, CONFIDENCES, FORWARD_COUNTS, NFE, SNAPSHOTS, STEP_MAPS, STEPS

logger = logging.getLogger(__name__)

# Of a host request, what its streamer notes as sent.
SENT = (
    "finished_output",
    "finished_len",
    "send_token_offset",
    "send_decode_id_offset",
    "input_logprob_sent",
    "send_output_token_logprobs_offset",
)
sent_of = attrgetter(*SENT)


class LladaOutputStreamer(SchedulerOutputStreamer):
    """Adds `meta_info["dllm_forward_counts"]`: decode steps of each block of the answer that is done, in order; and the
    numbers `meta_info["dllm_steps"]` and `meta_info["dllm_nfe"]`: the decode steps, fewer than the blocks' sum where
    several were live at once, and the forwards that the request took part in at all. They are what they are so far.

    Requests that ask for a trace get `meta_info["step_maps"]`, the 1-based step of its block in which each returned
    token was decided or last edited, and `meta_info["dllm_confidences"]`, its probability in that step. Requests with
    stream_mode "denoise" get `meta_info["dllm_snapshots"]`: for each step its number, how many tokens were committed
    after it, and the tokens that stood behind those, null where open; with a trace also when and how surely each came.
    Requests with choices get `meta_info["dllm_choices"]`, of each open position of their canvas the probabilities of
    these.

    Of what belongs to tokens and steps each output brings what is new, which the host's tokenizer process appends.
    """

    has_additional_customized_info: ClassVar[bool] = True
    table: Table  # set by the scheduler right after construction

    def stream_each(self, reqs: list[Any]) -> list[tuple[Any, Exception]]:
        """Send outputs; the requests of which that fails, with the error, and nothing of theirs is sent.

        The host sends all of them together or none, and notes of each what it has sent as it goes.
        """
        before = [(sent_of(req), self.table.get(req.rid)) for req in reqs]
        reported = [None if r is None else (r.notes_reported, r.shown) for _, r in before]
        try:
            self.stream_output(reqs, any(req.return_logprob for req in reqs))
            for req in reqs:
                note_sent(req)
            return []
        except Exception:
            logger.exception("outputs are sent one by one")
        failed = []
        for req, (sent, request), notes in zip(reqs, before, reported, strict=True):
            for name, value in zip(SENT, sent, strict=True):
                setattr(req, name, value)
            if request is not None and notes is not None:
                request.notes_reported, request.shown = notes
            try:
                self.stream_output([req], req.return_logprob)
                note_sent(req)
            except Exception as error:  # one request's
                failed.append((req, error))
        return failed

    def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
        """What there is to say of each request since its last output; nothing of those that were never admitted."""
        known = [(self.table.get(req.rid), req.finished()) for req in reqs]
        notes = [traced(req, request) for req, (request, _) in zip(reqs, known, strict=True)]
        traces: dict[str, list[Any]] = {
            STEP_MAPS: [[note.step for note in each] for each in notes],
            CONFIDENCES: [[note.prob for note in each] for each in notes],
        }
        if not any(r is not None and r.params.trace for r, _ in known):
            traces = {}
        if any(r is not None and r.shown for r, _ in known):
            traces[SNAPSHOTS] = [[] if r is None else shown(r) for r, _ in known]
        read = [chances(r) for r, _ in known]
        if any(each is not None for each in read):
            traces[CHOICES] = read
        return traces | {
            FORWARD_COUNTS: [
                [] if r is None else r.steps_of_blocks if ended else r.steps_per_block for r, ended in known
            ],
            STEPS: [0 if r is None else r.steps for r, _ in known],
            NFE: [0 if r is None else r.forwards for r, _ in known],
        }


def note_sent(req: Any) -> None:
    """The host counts one log-probability as sent with every output; a snapshot may come before any token."""
    if not req.output_ids:
        req.send_output_token_logprobs_offset = 0


def chances(request: Request[DecodeConfig] | None) -> list[list[float]] | None:
    """Of each open position of a read, the probabilities of its choices; None of what is none."""
    if request is None or request.params.report is None or not request.params.report.only_open:
        return None
    return [[math.exp(value) for value in row[1:]] for _, row in sorted(request.prompt_notes.items())]


def snapshot_of(request: Request[DecodeConfig]) -> dict[str, Any]:
    """What stands after a step."""
    tokens = request.standing()
    said: dict[str, Any] = {"step": request.steps, "committed": len(request.output), "token_ids": tokens}
    if request.params.trace:
        standing = zip(tokens, request.standing_notes(), strict=True)
        notes = [None if token is None else note or GIVEN for token, note in standing]
        said["steps"] = [None if note is None else note.step for note in notes]
        said["confidences"] = [None if note is None else note.prob for note in notes]
    return said


def shown(request: Request[DecodeConfig]) -> list[Any]:
    """What is to be shown of a request since it was asked last."""
    since, request.shown = request.shown, []
    return since


def traced(req: Any, request: Request[DecodeConfig] | None) -> list[Note]:
    """Notes on the tokens since the last output, of a request that asked for them; none on what a stop cuts off."""
    if request is None or not request.params.trace:
        return []
    return [note or GIVEN for note in request.report_notes(len(req.output_ids_through_stop))]


GIVEN = Note(0, 1.0, [0.0])  # on a token that a canvas gives: no step decided it


def book_logprobs(req: Any, tokens: list[int], notes: list[Note | None]) -> None:
    """Append to a host request the log-probabilities of its new tokens, in the host's shape."""
    out = req.logprob
    rows = [(note or GIVEN).report or [] for note in notes]
    out.output_token_logprobs_val += [row[0] for row in rows]
    out.output_token_logprobs_idx += tokens
    if out.top_logprobs_num > 0:
        values, ids = tops(rows, out.top_logprobs_num)
        out.output_top_logprobs_val += values
        out.output_top_logprobs_idx += ids
    if out.token_ids_logprob is not None:
        out.output_token_ids_logprobs_val += [row[1 + 2 * out.top_logprobs_num :] for row in rows]
        out.output_token_ids_logprobs_idx += [list(out.token_ids_logprob) if len(row) > 1 else [] for row in rows]


def book_prompt_logprobs(req: Any, request: Request[DecodeConfig]) -> None:
    """The same of its prompt, once and as soon as all are there."""
    out, wanted = req.logprob, request.params.report if req.return_logprob else None
    if wanted is None or wanted.prompt_from is None or out.input_token_logprobs_val is not None:
        return
    positions = range(wanted.prompt_from, len(request.prompt))
    if len(request.prompt_notes) < len(positions):
        return
    rows = [request.prompt_notes[at] for at in positions]
    out.input_token_logprobs_val = [row[0] for row in rows]
    out.input_token_logprobs_idx = [request.prompt[at] for at in positions]
    out.input_top_logprobs_val, out.input_top_logprobs_idx = tops(rows, wanted.top)
    out.input_token_ids_logprobs_val = [row[1 + 2 * wanted.top :] for row in rows]
    out.input_token_ids_logprobs_idx = [list(wanted.ids) for _ in rows]


def tops(rows: list[list[float]], top: int) -> tuple[list[list[float]], list[list[int]]]:
    """Of reported rows the largest log-probabilities, and their ids."""
    return [row[1 : 1 + top] for row in rows], [[int(each) for each in row[1 + top : 1 + 2 * top]] for row in rows]
