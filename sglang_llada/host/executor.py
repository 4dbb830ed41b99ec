"""Rows to forward to decisions: builds the host's ForwardBatch directly from a plan and reads back what a step decided.

One host-to-device copy in (everything that a step must know of its rows, as one table) and one device-to-host read out
per step. Logits exist only for open positions; FILL and SEAL rows run the layers and nothing else. A step that fits a
captured CUDA graph decides inside it (graphs.py), every other one right after its forward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import compress, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from sglang.srt.environ import envs
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
    enable_num_token_non_padded,
)
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from torch import Tensor

from sglang_llada.blocks import Decided, Plan, Request, Row, RowKind
from sglang_llada.config import DecodeConfig
from sglang_llada.decode.contract import StepOut, Tokens
from sglang_llada.decode.decide import STAYS, decide, idle, number, pack, repeated
from sglang_llada.decode.sampling import uniform
from sglang_llada.decode.whole import Group, order, report
from sglang_llada.host.arguments import facts_of
from sglang_llada.host.rows import Flags, Outcome, Rows, Writer, may_edit, offsets, send
from sglang_llada.llada2.checkpoint import CheckpointFacts


@dataclass(frozen=True, slots=True)
class InFlight:
    """A launched step.

    Attributes:
        plan: its rows.
        deciding: which of them decide, bool [R].
        patient: of those, the ones of patient requests.
        own: their positions that are not a prompt's, bool [R, T].
        outcome: what was decided (decide.pack), still on the device; None if no row decides.
        replayed: whether a graph ran it.
        groups: requests with more to them than their best tokens.
        reports: the log-probabilities that some of them want, see whole.report().
    """

    plan: Plan
    deciding: Flags
    patient: Flags
    own: Flags
    outcome: Tensor | None
    replayed: bool
    groups: list[RequestGroup]
    reports: Tensor | None


class Decision(NamedTuple):
    """What a step decided for each live block of a request; None if some of its logits were not finite."""

    request: Request[DecodeConfig]
    blocks: list[Decided] | None


class Landed(NamedTuple):
    """A step that was read.

    Attributes:
        rows: as planned.
        outcome: what was made of them.
        urgent: of which rows what follows depends on it: those that are done, have a stop token now or logits that are
            not finite, and all of requests that are not patient; bool [R].
        calm: the other rows that decide, bool [R].
        reports: log-probabilities by request id and position.
    """

    rows: list[Row]
    outcome: Outcome
    urgent: Flags
    calm: Flags
    reports: dict[str, dict[int, list[float]]]

    def decisions(self, which: Flags) -> list[Decision]:
        """Those for some rows, with all or none of a request's among them."""
        at = which.nonzero()[0]
        if not len(at):
            return []
        decisions: list[Decision] = []
        blocks: list[Decided] = []
        sound = True
        for r, decided in zip(at.tolist(), self.outcome.decided(at), strict=True):
            row = self.rows[r]
            request = row.request
            sound &= decided.tokens[0] >= 0
            if request.noted:
                decided = noted(row, decided, self.outcome.trace(r), self.reports.get(request.rid, {}))
            if decisions and decisions[-1].request is request:
                blocks.append(decided)
            else:
                blocks = [decided]
                decisions.append(Decision(request, blocks))
        if sound:
            return decisions
        return [Decision(r, None if any(b.tokens[0] < 0 for b in blocks or ()) else blocks) for r, blocks in decisions]

    @property
    def going_on(self) -> list[Row]:
        """The calm rows, which the next step has too unless their requests end or are retracted."""
        return list(compress(self.rows, self.calm.tolist()))


class Note(NamedTuple):
    """Of a token: the step of its block, from 1, that put it there, its probability then, and its row of a report."""

    step: int
    prob: float
    report: list[float] | None = None


class RequestGroup(NamedTuple):
    """Positions of a request that a step chooses tokens for or reports on."""

    request: Request[DecodeConfig]
    positions: list[int]
    group: Group


class Decider:
    """Decisions from a model's hidden states."""

    def __init__(self, model_runner: Any) -> None:
        args = model_runner.server_args
        facts = facts_of(args.model_path, args.revision)
        self.model = model_runner.model
        self.block_size = facts.block_size
        self.tokens = tokens_of(facts)
        self.idle = idle(self.block_size, self.tokens)

    def __call__(self, hidden: Tensor, ids: Tensor, table: Tensor, count: int, **options: Any) -> StepOut:
        """As decide(), with its groups and codes as options."""
        head, exchange = self.model.head, self.model.exchange
        shape: dict[str, Any] = {"block_size": self.block_size, "tokens": self.tokens}
        return decide(hidden, ids, table, count, head=head, exchange=exchange, **shape, **options)

    def report(self, hidden: Tensor, groups: list[Group], rows: Rows, ids: Tensor, origin: Tensor) -> Tensor | None:
        """As report(), of the rows of a forward; None if nobody wants one."""
        if all(group.report is None for group in groups):
            return None
        lowered = repeated(rows.ids, rows.table, self.block_size)
        return report(hidden, groups, ids, origin, self.model.head, self.tokens.mask, self.model.exchange, lowered)


class Executor:
    """Runs plans on the host's model runner."""

    def __init__(self, model_runner: Any, decider: Decider) -> None:
        self.runner = model_runner
        self.decide = decider
        self.block_size = decider.block_size
        self.device = model_runner.device
        self.req_to_token: Tensor = model_runner.req_to_token_pool.req_to_token
        self.offsets = torch.arange(self.block_size, device=self.device)
        self.writer = Writer(self.block_size, decider.idle)
        # Which tokens end some request, or stand for logits that are not finite (-1). Where they are another request's
        # a row is urgent that need not be.
        self.stops = np.zeros(decider.model.config.vocab_size + 1, bool)
        self.stops[-1] = True
        self.counts_tokens = enable_num_token_non_padded()
        self.shapes: dict[int, ForwardBatch] = {}  # by number of rows
        # The host's eager runner would copy each step into buffers sized for max_running_requests rows.
        envs.SGLANG_EAGER_INPUT_NO_COPY.set(True)

    def launch(self, plan: Plan, of_ranks: list[int] | None = None) -> InFlight:
        """Enqueue a plan's forward and decode step. Called in inference mode.

        Args:
            plan: its rows; none on a rank that takes part for the sake of the others' experts.
            of_ranks: under DP attention, the rows of each of its ranks in this forward.
        """
        planned = plan.rows
        written = self.writer.write(plan)
        rows = send(written, self.block_size, self.req_to_token.shape[1], self.device)
        batch = self.forward_batch(rows, of_ranks)
        batch.step_table = rows.table  # for the graph runner
        output = self.runner.forward(batch)
        # From here on the device works: what read() will want to know is worked out now.
        self.writer.follow(plan, written)
        special = [(r, row) for r, row in enumerate(planned) if not row.request.plain]
        asking = self._groups(special) if special else []
        groups = [each.group for each in asking]
        hidden = output.logits_output.hidden_states
        begins = np.array([self.block_size if row.block is None else row.block.given for row in planned])
        deciding = begins < self.block_size
        patient = np.array([row.request.patient for row in planned], bool) & deciding
        decided = None
        if deciding.any() and output.can_run_graph and not any(group.chooses for group in groups):
            decided = output.logits_output.decided
        elif deciding.any():
            hidden_of_rows = hidden[: len(planned) * self.block_size]
            options: dict[str, Any] = {"groups": groups, "codes": rows.algorithms}
            decided = self.decide(hidden_of_rows, rows.ids, rows.table, rows.changeable, **options)
        trace = any(row.request.noted for _, row in special)
        outcome = None if decided is None else pack(decided, trace=trace)
        reports = None
        if groups:
            blocks, unmoved = rows.ids.view(-1, self.block_size), self.offsets.expand(len(planned), -1)
            after = (blocks, unmoved) if decided is None else (decided.ids, decided.origin)
            reports = self.decide.report(hidden, groups, rows, *after)
        own = offsets(self.block_size) >= begins[:, None]
        return InFlight(plan, deciding, patient, own, outcome, output.can_run_graph, asking, reports)

    def read(self, launched: InFlight) -> Landed | None:
        """Wait for a step and bring its outcome to the host, its one device-to-host read; None if no row decided."""
        reports = self._read_reports(launched)
        if launched.outcome is None:
            return None
        numbers = launched.outcome.cpu().numpy()[: len(launched.deciding)]
        outcome = Outcome(numbers, self.block_size, len(self.decide.idle) - 1 - len(STAYS))
        self.writer.keep(outcome)
        stops = (self.stops[outcome.ids] & launched.own).any(-1)
        calm = launched.patient & (outcome.done == 0) & ~stops
        return Landed(launched.plan.rows, outcome, launched.deciding ^ calm, calm, reports)

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _read_reports(self, launched: InFlight) -> dict[str, dict[int, list[float]]]:
        """Of requests that want log-probabilities, by id, the row of each position; prompts keep theirs."""
        if launched.reports is None:
            return {}
        flat = iter(launched.reports.tolist())
        found: dict[str, dict[int, list[float]]] = {}
        for request, positions, group in launched.groups:
            if group.report is not None:
                width = 1 + 2 * group.report.top + len(group.report.ids)
                rows = {position: list(islice(flat, width)) for position in positions}
                request.prompt_notes.update({at: row for at, row in rows.items() if at < len(request.prompt)})
                found.setdefault(request.rid, {}).update(rows)
        return found

    def _groups(self, rows: list[tuple[int, Row]]) -> list[RequestGroup]:
        """Of numbered rows, their requests with more to them than their best tokens, in the order that a step needs."""
        found = {}
        asked: list[RequestGroup] = []
        for r, row in rows:
            request, params = row.request, row.request.params
            if params.sampling is None and params.shaping is None and params.report is None:
                continue
            if (prompt := self._prompt_group(r, row)) is not None:
                asked.append(prompt)
            if row.kind is not RowKind.DENOISE or request.rid in found:
                continue  # the rows of its other live blocks follow this one
            positions = free_positions(request)
            how, noise = params.sampling, None
            if how is not None:
                where = torch.tensor(positions)
                noise = uniform(torch.full_like(where, how.seed), where, torch.full_like(where, request.steps))
            found[request.rid] = RequestGroup(
                request,
                positions,
                Group(
                    at=[r * self.block_size + position - row.start for position in positions],
                    vocabulary=self.decide.model.config.vocab_size,
                    sampling=how,
                    noise=noise,
                    shape=None if params.shaping is None else params.shaping.of(request, positions),
                    report=params.report,
                ),
            )
        return sorted([*found.values(), *asked], key=lambda each: order(each.group))

    def _prompt_group(self, r: int, row: Row) -> RequestGroup | None:
        """The prompt's tokens in row `r` of which the request wants log-probabilities and has none yet."""
        request, wanted = row.request, row.request.params.report
        if wanted is None or wanted.prompt_from is None or row.kind is RowKind.SEAL:
            return None
        mine = range(max(row.start, wanted.prompt_from), min(row.start + self.block_size, len(request.prompt)))
        positions = [position for position in mine if position not in request.prompt_notes]
        if not positions:
            return None
        at = [r * self.block_size + position - row.start for position in positions]
        vocabulary = self.decide.model.config.vocab_size
        return RequestGroup(request, positions, Group(at, vocabulary, report=replace(wanted, original=True)))

    def forward_batch(self, rows: Rows, of_ranks: list[int] | None = None) -> ForwardBatch:
        """The host's batch of rows."""
        T, R = self.block_size, len(rows.starts)
        if R not in self.shapes:
            self.shapes[R] = self._batch_of(R)
        batch = object.__new__(ForwardBatch)  # a copy; its constructor goes through a hundred fields
        vars(batch).update(vars(self.shapes[R]))
        batch.input_ids, batch.positions = rows.ids, rows.positions
        batch.req_pool_indices, batch.req_pool_indices_cpu = rows.slot, torch.from_numpy(rows.slots)
        batch.seq_lens, batch.seq_lens_cpu = rows.end, torch.from_numpy(rows.ends)
        batch.seq_lens_sum = sum(rows.starts) + R * T
        batch.extend_prefix_lens, batch.extend_prefix_lens_cpu = rows.start.int(), rows.starts
        batch.out_cache_loc = self.req_to_token.view(-1).index_select(0, rows.places).long()
        if of_ranks is not None:
            tokens = [each * T for each in of_ranks]
            batch.is_extend_in_batch = True
            batch.can_run_decode_cuda_graph = True
            batch.original_global_num_tokens_cpu = of_ranks  # which graph to replay is asked in rows
            batch.global_num_tokens_cpu = batch.global_num_tokens_for_logprob_cpu = tokens
            batch.global_num_tokens_gpu = torch.tensor(tokens, device=self.device)
            batch.global_num_tokens_for_logprob_gpu = batch.global_num_tokens_gpu.clone()
        self.runner.kv_index_translator.bind_own_plan(batch)
        # As the host's _init_num_token_non_padded, which asks anew each time.
        batch.global_num_token_non_padded_cpu = R * T
        if self.counts_tokens:
            batch.global_num_token_non_padded = torch.tensor(R * T, dtype=torch.int32).to(self.device)
        return batch

    def _batch_of(self, rows: int) -> ForwardBatch:
        """What is the same in all batches of so many rows."""
        T, R = self.block_size, rows
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        return ForwardBatch(
            forward_mode=ForwardMode.DLLM_EXTEND if R else ForwardMode.IDLE,
            batch_size=R,
            input_ids=none,
            req_pool_indices=none,
            seq_lens=none,
            out_cache_loc=none,
            seq_lens_sum=0,
            capture_hidden_mode=CaptureHiddenMode.NULL,
            spec_algorithm=SpeculativeAlgorithm.NONE,
            extend_num_tokens=R * T,
            extend_seq_lens=torch.full((R,), T, dtype=torch.int32, device=self.device),
            extend_start_loc=torch.arange(0, R * T, T, dtype=torch.int32, device=self.device),
            extend_seq_lens_cpu=[T] * R,
            extend_logprob_start_lens_cpu=[T] * R,
        )


def tokens_of(facts: CheckpointFacts) -> Tokens:
    """The checkpoint's tokens as steps know them."""
    if facts.delete_id is None or facts.split_id is None:
        return Tokens(facts.mask_id)
    return Tokens(facts.mask_id, facts.delete_id, facts.split_id)


def noted(row: Row, decided: Decided, trace: list[int], reports: dict[int, list[float]]) -> Decided:
    """Decisions for a row's block with what is to be said of each token; `reports` by position."""
    block = row.block
    assert block is not None
    T = len(block.tokens)
    written, origin, prob = trace[:T], trace[T : 2 * T], trace[2 * T :]
    notes = [
        Note(block.steps + 1, number(prob[i]), reports.get(block.start + origin[i]))
        if written[i]
        else block.notes[origin[i]]
        if origin[i] >= 0
        else None
        for i in range(T)
    ]
    return decided._replace(notes=notes)


def free_positions(request: Request[DecodeConfig]) -> list[int]:
    """Positions of its live blocks of which tokens may change."""
    T = request.block_size
    sets = [(block.start, block.open | may_edit(request, block)) for block in request.blocks]
    return [start + i for start, positions in sets for i in range(T) if positions >> i & 1]
