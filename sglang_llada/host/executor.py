"""Rows to forward to decisions: builds the host's ForwardBatch directly from a plan and reads back what a step decided.

One host-to-device copy in (everything that a step must know of its rows, as one table) and one device-to-host read out
per step. Logits exist only for open positions; FILL and SEAL rows run the layers and nothing else. A step that fits a
captured CUDA graph decides inside it (graphs.py), every other one right after its forward.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from sglang.srt.environ import envs
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from torch import Tensor

from sglang_llada.blocks import Block, Decided, Plan, Request, Row, RowKind
from sglang_llada.config import DecodeConfig
from sglang_llada.decode.contract import StepOut, Tokens
from sglang_llada.decode.decide import decide, idle, number, pack, record
from sglang_llada.decode.sampling import uniform
from sglang_llada.decode.whole import Group, order, report
from sglang_llada.host.arguments import facts_of
from sglang_llada.llada2.checkpoint import CheckpointFacts


@dataclass(frozen=True, slots=True)
class InFlight:
    """A launched step.

    Attributes:
        plan: its rows.
        decided: what they decided, still on the device, first the plan's rows and then perhaps padding; None if the
            plan has no DENOISE row. A replayed graph writes its next decisions over these.
        replayed: whether a graph ran it.
        groups: requests with more to them than their best tokens.
        reports: the log-probabilities that some of them want, see whole.report().
    """

    plan: Plan
    decided: StepOut | None
    replayed: bool
    groups: list[RequestGroup]
    reports: Tensor | None


@dataclass(slots=True)
class Decision:
    """What a step decided for each live block of a request; None if some of its logits were not finite."""

    request: Request[DecodeConfig]
    blocks: list[Decided] | None


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

    def __call__(self, hidden: Tensor, ids: Tensor, table: Tensor, count: int, groups: Sequence[Group] = ()) -> StepOut:
        """As decide()."""
        head, exchange = self.model.head, self.model.exchange
        shape: dict[str, Any] = {"block_size": self.block_size, "tokens": self.tokens}
        return decide(hidden, ids, table, count, head=head, exchange=exchange, groups=groups, **shape)

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
        # The host's eager runner would copy each step into buffers sized for max_running_requests rows.
        envs.SGLANG_EAGER_INPUT_NO_COPY.set(True)

    @torch.inference_mode()
    def launch(self, plan: Plan, slots: list[int], of_ranks: list[int] | None = None) -> InFlight:
        """Enqueue a plan's forward and decode step.

        Args:
            plan: its rows; none on a rank that takes part for the sake of the others' experts.
            slots: for each row, its request's row in the host's req_to_token table.
            of_ranks: under DP attention, the rows of each of its ranks in this forward.
        """
        starts = [row.start for row in plan.rows]
        ids, slot, start, table, count = self._to_device(plan, slots)
        batch = self.forward_batch(ids, start, slot, starts, slots, of_ranks)
        batch.step_table = table  # for the graph runner
        output = self.runner.forward(batch)
        asking = self._groups(plan)
        groups = [each.group for each in asking]
        hidden = output.logits_output.hidden_states
        if count is None:
            decided = None
        elif output.can_run_graph and not any(group.chooses for group in groups):
            decided = output.logits_output.decided
        else:
            decided = self.decide(hidden[: len(ids)], ids, table, count, groups)
        blocks, unmoved = ids.view(-1, self.block_size), self.offsets.expand(len(plan.rows), -1)
        after = (blocks, unmoved) if decided is None else (decided.ids, decided.origin)
        reports = self.decide.report(hidden, groups, *after) if groups else None
        return InFlight(plan, decided, output.can_run_graph, asking, reports)

    def read(self, launched: InFlight) -> list[Decision]:
        """Wait for a step and bring its decisions to the host: the step's one device-to-host read."""
        reports = self._read_reports(launched)
        if launched.decided is None:
            return []
        T, rows = self.block_size, launched.plan.rows
        trace = any(noted(row.request) for row in rows)
        decisions: list[Decision] = []
        for (request, _, _, block), read in zip(rows, pack(launched.decided, trace=trace).tolist(), strict=False):
            if block is None:
                continue
            if not decisions or decisions[-1].request is not request:
                decisions.append(Decision(request, []))
            end = T + 2 + len(request.fresh)
            said = notes(block, read[end:], reports.get(request.rid, {})) if trace and noted(request) else None
            decided = Decided(read[:T], read[T], bool(read[T + 1]), read[T + 2 : end], said)
            if read[0] < 0:
                decisions[-1].blocks = None
            elif decisions[-1].blocks is not None:
                decisions[-1].blocks.append(decided)
        return decisions

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

    def _to_device(self, plan: Plan, slots: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, int | None]:
        """Tokens [R * T], req_to_token rows [R], starts [R] and records [R, columns], through one copy.

        And how many positions may change; None if there are no DENOISE rows.
        """
        flat: list[int] = []
        count: int | None = None
        for (request, _, start, block), slot in zip(plan.rows, slots, strict=True):
            if block is None:
                flat += request.tokens_at(start)
                flat += (slot, start)
                flat += self.decide.idle
            else:
                flat += block.tokens
                flat += (slot, start)
                may_edit = editable(request, block)
                count = (count or 0) + (block.open | may_edit).bit_count()
                flat += record(block.open, may_edit, request.numbers, block.state)
        T = self.block_size
        # Many times faster than torch.tensor(flat); a rank without rows of its own has nothing to share memory with.
        packed = torch.frombuffer(array("q", flat), dtype=torch.int64) if flat else torch.empty(0, dtype=torch.int64)
        rows = packed.view(-1, T + 2 + len(self.decide.idle)).to(self.device, non_blocking=True)
        return rows[:, :T].flatten(), rows[:, T], rows[:, T + 1], rows[:, T + 2 :], count

    def _groups(self, plan: Plan) -> list[RequestGroup]:
        """Requests with more to them than their best tokens, in the order that a step needs."""
        found = {}
        asked: list[RequestGroup] = []
        for r, row in enumerate(plan.rows):
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

    def forward_batch(
        self,
        ids: Tensor,
        start: Tensor,
        slot: Tensor,
        starts: list[int],
        slots: list[int],
        of_ranks: list[int] | None = None,
    ) -> ForwardBatch:
        """The host's batch of rows: ids [R * T]; start [R] and slot [R], on the device and as lists."""
        T, R = self.block_size, len(starts)
        positions = start[:, None] + self.offsets  # [R, T]
        batch = ForwardBatch(
            forward_mode=ForwardMode.DLLM_EXTEND if R else ForwardMode.IDLE,
            batch_size=R,
            input_ids=ids,
            req_pool_indices=slot,
            seq_lens=start + T,
            out_cache_loc=self.req_to_token[slot[:, None], positions].flatten().long(),
            seq_lens_sum=sum(starts) + R * T,
            seq_lens_cpu=torch.tensor(starts) + T,
            req_pool_indices_cpu=torch.tensor(slots),
            positions=positions.flatten(),
            capture_hidden_mode=CaptureHiddenMode.NULL,
            spec_algorithm=SpeculativeAlgorithm.NONE,
            extend_num_tokens=R * T,
            extend_seq_lens=torch.full((R,), T, dtype=torch.int32, device=self.device),
            extend_prefix_lens=start.int(),
            extend_start_loc=torch.arange(0, R * T, T, dtype=torch.int32, device=self.device),
            extend_seq_lens_cpu=[T] * R,
            extend_prefix_lens_cpu=starts,
            extend_logprob_start_lens_cpu=[T] * R,
        )
        if of_ranks is not None:
            tokens = [rows * T for rows in of_ranks]
            batch.is_extend_in_batch = True
            batch.can_run_decode_cuda_graph = True
            batch.original_global_num_tokens_cpu = of_ranks  # which graph to replay is asked in rows
            batch.global_num_tokens_cpu = batch.global_num_tokens_for_logprob_cpu = tokens
            batch.global_num_tokens_gpu = torch.tensor(tokens, device=self.device)
            batch.global_num_tokens_for_logprob_gpu = batch.global_num_tokens_gpu.clone()
        self.runner.kv_index_translator.bind_own_plan(batch)
        batch._init_num_token_non_padded(device=self.device, is_draft_worker=False)
        return batch


def tokens_of(facts: CheckpointFacts) -> Tokens:
    """The checkpoint's tokens as steps know them."""
    if facts.delete_id is None or facts.split_id is None:
        return Tokens(facts.mask_id)
    return Tokens(facts.mask_id, facts.delete_id, facts.split_id)


def noted(request: Request[DecodeConfig]) -> bool:
    """Whether there must be notes on its tokens."""
    return request.params.trace or request.params.report is not None


def notes(block: Block, trace: list[int], reports: dict[int, list[float]]) -> list[Note | None]:
    """Of each position, after a step with this trace, what is to be said of its token; `reports` by position."""
    T = len(block.notes)
    written, origin, prob = trace[:T], trace[T : 2 * T], trace[2 * T :]
    return [
        Note(block.steps + 1, number(prob[i]), reports.get(block.start + origin[i]))
        if written[i]
        else block.notes[origin[i]]
        if origin[i] >= 0
        else None
        for i in range(T)
    ]


def free_positions(request: Request[DecodeConfig]) -> list[int]:
    """Positions of its live blocks of which tokens may change."""
    T = request.block_size
    sets = [(block.start, block.open | editable(request, block)) for block in request.blocks]
    return [start + i for start, positions in sets for i in range(T) if positions >> i & 1]


def editable(request: Request[DecodeConfig], block: Block) -> int:
    """The set of positions of a live block that a step may edit."""
    if not request.rules.edits or (block.done and request.rules.reopens):
        return 0
    return (1 << request.block_size) - (1 << block.given) & ~block.open
