"""Rows to forward to decisions: builds the host's ForwardBatch directly from a plan and reads back what a step decided.

One host-to-device copy in (everything that a step must know of its rows, as one table) and one device-to-host read out
per step. Logits exist only for open positions; FILL and SEAL rows run the layers and nothing else. A step that fits a
captured CUDA graph decides inside it (graphs.py), every other one right after its forward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

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
from sglang_llada.decode.decide import STATE_COLUMN, decide, idle, number, pack
from sglang_llada.decode.sampling import uniform
from sglang_llada.decode.whole import Group, order, report
from sglang_llada.host.arguments import facts_of
from sglang_llada.host.rows import Outcome, Rows, Writer, may_edit, send
from sglang_llada.llada2.checkpoint import CheckpointFacts


@dataclass(frozen=True, slots=True)
class InFlight:
    """A launched step.

    Attributes:
        plan: its rows.
        rows: they as the device got them.
        deciding: which of them decide.
        outcome: what those decided (decide.pack), still on the device; None if there are none.
        replayed: whether a graph ran it.
        groups: requests with more to them than their best tokens.
        reports: the log-probabilities that some of them want, see whole.report().
    """

    plan: Plan
    rows: Rows
    deciding: list[int]
    outcome: Tensor | None
    replayed: bool
    groups: list[RequestGroup]
    reports: Tensor | None


class Decision(NamedTuple):
    """What a step decided for each live block of a request; None if some of its logits were not finite."""

    request: Request[DecodeConfig]
    blocks: list[Decided] | None

    @property
    def sound(self) -> bool:
        """Whether all blocks have tokens."""
        return all(decided.tokens[0] >= 0 for decided in self.blocks or ())


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

    def report(self, hidden: Tensor, groups: list[Group], ids: Tensor, origin: Tensor) -> Tensor | None:
        """As report(); None if nobody wants one."""
        if all(group.report is None for group in groups):
            return None
        return report(hidden, groups, ids, origin, self.model.head, self.tokens.mask, self.model.exchange)


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
        self.counts_tokens = enable_num_token_non_padded()
        self.shapes: dict[int, tuple[Tensor, Tensor]] = {}  # by number of rows: their lengths, and where each begins
        # The host's eager runner would copy each step into buffers sized for max_running_requests rows.
        envs.SGLANG_EAGER_INPUT_NO_COPY.set(True)

    def launch(self, plan: Plan, of_ranks: list[int] | None = None) -> InFlight:
        """Enqueue a plan's forward and decode step. Called in inference mode.

        Args:
            plan: its rows; none on a rank that takes part for the sake of the others' experts.
            of_ranks: under DP attention, the rows of each of its ranks in this forward.
        """
        planned = plan.rows
        tokens, records = self.writer.write(plan)
        slots, starts = [row.request.slot for row in planned], [row.start for row in planned]
        rows = send(tokens, records, slots, starts, self.req_to_token.shape[1], self.device)
        batch = self.forward_batch(rows, of_ranks)
        batch.step_table = rows.table  # for the graph runner
        output = self.runner.forward(batch)
        special = [(r, row) for r, row in enumerate(planned) if not row.request.plain]
        asking = self._groups(special) if special else []
        groups = [each.group for each in asking]
        hidden = output.logits_output.hidden_states
        deciding = [r for r, row in enumerate(planned) if row.block is not None]
        decided = None
        if deciding and output.can_run_graph and not any(group.chooses for group in groups):
            decided = output.logits_output.decided
        elif deciding:
            hidden_of_rows = hidden[: len(planned) * self.block_size]
            options: dict[str, Any] = {"groups": groups, "codes": rows.algorithms}
            decided = self.decide(hidden_of_rows, rows.ids, rows.table, rows.changeable, **options)
        trace = any(row.request.noted for _, row in special)
        outcome = None if decided is None else pack(decided, trace=trace)
        reports = None
        if groups:
            blocks, unmoved = rows.ids.view(-1, self.block_size), self.offsets.expand(len(planned), -1)
            after = (blocks, unmoved) if decided is None else (decided.ids, decided.origin)
            reports = self.decide.report(hidden, groups, *after)
        return InFlight(plan, rows, deciding, outcome, output.can_run_graph, asking, reports)

    def read(self, launched: InFlight) -> list[Decision]:
        """Wait for a step and bring its decisions to the host: the step's one device-to-host read."""
        reports = self._read_reports(launched)
        if launched.outcome is None:
            return []
        planned, at, state_size = launched.plan.rows, launched.deciding, len(self.decide.idle) - STATE_COLUMN
        outcome = Outcome.read(launched.outcome, at, self.block_size, state_size)
        self.writer.keep(launched.rows, outcome, at)
        traces = outcome.trace.tolist()
        each = zip(outcome.tokens, outcome.open.tolist(), outcome.done, outcome.state.tolist(), strict=True)
        decisions: list[Decision] = []
        blocks: list[Decided] = []
        for r, made, trace in zip(at, each, traces, strict=True):
            request, decided = planned[r].request, Decided(*made)
            if request.noted:
                decided = noted(planned[r], decided, trace, reports.get(request.rid, {}))
            if decisions and decisions[-1].request is request:
                blocks.append(decided)
            else:
                blocks = [decided]
                decisions.append(Decision(request, blocks))
        if outcome.sound:
            return decisions
        return [each if each.sound else Decision(each.request, None) for each in decisions]

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
            lengths = torch.full((R,), T, dtype=torch.int32, device=self.device)
            self.shapes[R] = (lengths, torch.arange(0, R * T, T, dtype=torch.int32, device=self.device))
        lengths, begins = self.shapes[R]
        pages = self.req_to_token.view(-1).index_select(0, rows.page).long()  # a block is a page of KV
        batch = ForwardBatch(
            forward_mode=ForwardMode.DLLM_EXTEND if R else ForwardMode.IDLE,
            batch_size=R,
            input_ids=rows.ids,
            req_pool_indices=rows.slot,
            seq_lens=rows.end,
            out_cache_loc=(pages[:, None] + self.offsets).view(-1),
            seq_lens_sum=sum(rows.starts) + R * T,
            seq_lens_cpu=torch.from_numpy(rows.ends),
            req_pool_indices_cpu=torch.from_numpy(rows.slots),
            positions=rows.positions,
            capture_hidden_mode=CaptureHiddenMode.NULL,
            spec_algorithm=SpeculativeAlgorithm.NONE,
            extend_num_tokens=R * T,
            extend_seq_lens=lengths,
            extend_prefix_lens=rows.start.int(),
            extend_start_loc=begins,
            extend_seq_lens_cpu=[T] * R,
            extend_prefix_lens_cpu=rows.starts,
            extend_logprob_start_lens_cpu=[T] * R,
        )
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
