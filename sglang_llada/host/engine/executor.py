"""Rows to forward to decisions: builds the host's ForwardBatch directly from a plan and reads back what a step decided.

One host-to-device copy in (everything that a step must know of its rows, as one table) and one device-to-host copy out
per step, both asynchronous: a step may be launched before the one before it is read, whose outcome its rows then take
from `Decider.last`. Logits exist only for open positions; FILL and SEAL rows run the layers and nothing else. A step
that fits a captured CUDA graph decides inside it (graphs.py), every other one right after its forward.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import compress, islice
from typing import Any

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

from sglang_llada.blocks import Plan, Request, Row, RowKind, most_rows
from sglang_llada.config import MOST_LIVE_BLOCKS, MOST_WINDOW, DecodeConfig
from sglang_llada.decode import transfer
from sglang_llada.decode.contract import StepOut, Tokens
from sglang_llada.decode.decide import decide
from sglang_llada.decode.layout import idle, layout_of, pack, repeated
from sglang_llada.decode.logprobs import report
from sglang_llada.decode.sampling import warm_up
from sglang_llada.decode.whole import Group, Shape
from sglang_llada.host.engine.rows import (
    Numbers,
    Outcome,
    Rows,
    Writer,
    algorithms,
    changeable,
    drawing,
    is_live,
    may_edit,
    offsets,
    unfold,
)
from sglang_llada.host.engine.step import InFlight, RequestGroup, StepResult, to_host
from sglang_llada.host.facts import facts_of, row_budget
from sglang_llada.llada2.checkpoint import CheckpointFacts


class Decider:
    """Decisions from a model's hidden states."""

    def __init__(self, model_runner: Any) -> None:
        args = model_runner.server_args
        facts = facts_of(args.model_path, args.revision)
        self.model = model_runner.model
        self.block_size = facts.block_size
        self.tokens = tokens_of(facts)
        self.idle = idle(self.block_size, self.tokens)
        self.layout = layout_of(self.block_size, self.tokens)
        # What the last step made of its rows, int64 [rows, made], as pack() gives it.
        rows, made = forward_rows(model_runner), self.layout.made
        self.last = torch.zeros(rows, made, dtype=torch.int64, device=model_runner.device)

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
        self.decider = decider
        self.block_size = decider.block_size
        self.device = model_runner.device
        self.req_to_token: Tensor = model_runner.req_to_token_pool.req_to_token
        self.graphs = model_runner.decode_cuda_graph_runner
        self.offsets = torch.arange(self.block_size, device=self.device)
        self.layout = decider.layout
        self.writer = Writer(self.layout, decider.idle)
        # Which tokens end a request that asks for nothing else, or stand for logits that are not finite (-1).
        self.stops = np.zeros(decider.model.config.vocab_size + 1, bool)
        self.stops[-1] = True
        self.counts_tokens = enable_num_token_non_padded()
        self.shapes: dict[int, ForwardBatch] = {}  # by number of rows
        # The host's eager runner would copy each step into buffers sized for max_running_requests rows.
        envs.SGLANG_EAGER_INPUT_NO_COPY.set(True)
        if torch.device(self.device).type == "cuda":  # captured graphs have compiled all else
            warm_up(decider.model.config.vocab_size, decider.tokens.mask, self.device)

    def launch(self, plan: Plan, of_ranks: list[int] | None = None) -> InFlight:
        """Enqueue a plan's forward and decode step. Called in inference mode.

        Args:
            plan: its rows; none on a rank that takes part for the sake of the others' experts.
            of_ranks: under DP attention, the rows of each of its ranks in this forward.
        """
        planned, T = plan.rows, self.block_size
        written = self.writer.write(plan)
        batch = self._batch(written, of_ranks)
        if self.graphs is None or not self.graphs.unfolds(len(planned)):
            self._unfold(batch)
        if self.runner.lora_manager is not None:
            batch.lora_ids = [row.request.adapter for row in planned]
            self.runner.lora_manager.prepare_lora_batch(batch)
        output = self.runner.forward(batch)
        # From here on the device works: what read() will want to know is worked out now.
        self.writer.follow(plan, written)
        special = [(r, row) for r, row in enumerate(planned) if not row.request.plain]
        failed: dict[str, Exception] = {}
        asking = self._groups(special, failed) if special else []
        groups = [each.group for each in asking]
        hidden = output.logits_output.hidden_states
        if output.can_run_graph:
            batch.rows = output.logits_output.rows.first(len(planned))
        begins = np.array([T if row.block is None else row.block.given for row in planned])
        deciding = begins < T
        can_defer = np.array([row.request.can_defer for row in planned], bool) & deciding
        decided = outcome = None
        trace = any(row.request.noted for _, row in special)
        if deciding.any() and output.can_run_graph and not any(group.chooses for group in groups):
            decided = output.logits_output.decided
            outcome = pack(decided, trace=True) if trace else self.decider.last[: len(planned)]
        elif deciding.any():
            rows = self._rows_of(batch)
            options: dict[str, Any] = {"groups": groups, "codes": algorithms(written, self.layout)}
            if output.can_run_graph:  # whose decisions stand but for the groups' positions
                options["found"] = output.logits_output.decided
            count, options["drawing"] = changeable(written, self.layout), drawing(written, self.layout)
            decided = self.decider(hidden[: len(planned) * T], rows.ids, rows.table, count, **options)
            outcome = pack(decided, trace=trace)
            self.decider.last[: len(planned)] = outcome[:, : self.layout.made]
        goes_on = (written[:, self.layout.source] >= 0).tolist()
        reports = None
        if groups:
            blocks, unmoved = self._rows_of(batch).ids.view(-1, T), self.offsets.expand(len(planned), -1)
            after = (blocks, unmoved) if decided is None else (decided.ids, decided.origin)
            reports = self.decider.report(hidden, groups, self._rows_of(batch), *after)
        coming, reported = to_host(outcome, reports)
        return InFlight(
            plan=plan,
            deciding=deciding,
            can_defer=can_defer,
            rare=np.array([row.request.rare_stops for row in planned], bool) & deciding,
            own=offsets(T) >= begins[:, None],
            outcome=coming,
            replayed=output.can_run_graph,
            groups=asking,
            reports=reported,
            failed=failed,
            taken_over=frozenset(id(row.block) for row in compress(planned, goes_on)),
        )

    def read(self, launched: InFlight) -> StepResult | None:
        """Wait for a step's outcome, the one time that the host waits for the device; None if no row decided."""
        reports = self._read_reports(launched)
        if launched.outcome is None:
            return None
        rows = launched.plan.rows
        numbers = launched.outcome.wait()[: len(rows)]
        outcome = Outcome(numbers, self.layout)
        deciding = launched.deciding & np.fromiter(map(is_live, rows), bool, len(rows))
        self.writer.keep(launched.plan, outcome, deciding)
        deferrable = launched.can_defer & deciding & (outcome.done == 0)
        # Most tokens that end anybody's answer end all: who has others, or does not stop at these, is asked itself.
        ends = (self.stops[outcome.ids] & launched.own).any(-1) | launched.rare
        for r in (deferrable & ends).nonzero()[0].tolist():
            tokens = outcome.ids[r][launched.own[r]].tolist()
            deferrable[r] = -1 not in tokens and rows[r].request.stop_ids.isdisjoint(tokens)
        return StepResult(rows, outcome, deciding ^ deferrable, deferrable, reports)

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _read_reports(self, launched: InFlight) -> dict[str, dict[int, list[float]]]:
        """Of requests that want log-probabilities, by id, the row of each position; prompts keep theirs."""
        if launched.reports is None:
            return {}
        flat = iter(launched.reports.wait().tolist())
        found: dict[str, dict[int, list[float]]] = {}
        for request, positions, group in launched.groups:
            if group.report is not None:
                width = 1 + 2 * group.report.top + len(group.report.ids)
                rows = {position: list(islice(flat, width)) for position in positions}
                request.prompt_notes.update({at: row for at, row in rows.items() if at < len(request.prompt)})
                found.setdefault(request.rid, {}).update(rows)
        return found

    def _groups(self, rows: list[tuple[int, Row]], failed: dict[str, Exception]) -> list[RequestGroup]:
        """Of numbered rows, their requests with more to them than their best tokens.

        `failed` gets what goes wrong with a request here, or when its logits are changed.
        """
        asked: list[RequestGroup] = []
        begun: set[str] = set()
        for r, row in rows:
            params, rid = row.request.params, row.request.rid
            if row.request.shaping is None and params.report is None:
                continue
            try:
                if (prompt := self._prompt_group(r, row)) is not None:
                    asked.append(prompt)
                if row.kind is RowKind.DENOISE and rid not in begun:  # the rows of its other live blocks follow
                    begun.add(rid)
                    asked.append(self._group(r, row, failed))
            except Exception as error:  # one request's, which ends for it
                failed[rid] = error
        return asked

    def _group(self, r: int, row: Row, failed: dict[str, Exception]) -> RequestGroup:
        """The request of row `r`, of all its positions that may change."""
        request, params = row.request, row.request.params
        positions, shape = free_positions(request), None
        if request.shaping is not None:
            shape = contained(request.shaping.of(request, positions), request.rid, failed)
        at = [r * self.block_size + position - row.start for position in positions]
        return RequestGroup(request, positions, Group(at, params.sampling, shape, params.report))

    def _prompt_group(self, r: int, row: Row) -> RequestGroup | None:
        """The prompt's tokens in row `r` of which the request wants log-probabilities and has none yet."""
        request, wanted = row.request, row.request.params.report
        if wanted is None or wanted.prompt_from is None or row.kind is RowKind.SEAL:
            return None
        mine = range(max(row.start, wanted.prompt_from), min(row.start + self.block_size, len(request.prompt)))
        positions = [position for position in mine if position not in request.prompt_notes]
        if wanted.only_open:
            positions = [position for position in positions if request.prompt[position] == request.mask_id]
        if not positions:
            return None
        at = [r * self.block_size + position - row.start for position in positions]
        return RequestGroup(request, positions, Group(at, report=replace(wanted, original=True)))

    def _batch(self, written: Numbers, of_ranks: list[int] | None = None) -> ForwardBatch:
        """The host's batch of rows, with what is known of it on the host; their numbers are in `written_rows`."""
        T, R = self.block_size, len(written)
        if R not in self.shapes:
            self.shapes[R] = self._batch_of(R)
        batch = object.__new__(ForwardBatch)  # a copy; its constructor goes through a hundred fields
        vars(batch).update(vars(self.shapes[R]))
        slots, starts = written[:, self.layout.slot].copy(), written[:, self.layout.start].copy()
        batch.written_rows, batch.packed, batch.rows = written, None, None
        batch.req_pool_indices_cpu, batch.seq_lens_cpu = torch.from_numpy(slots), torch.from_numpy(starts + T)
        batch.extend_prefix_lens_cpu = starts.tolist()
        batch.seq_lens_sum = int(starts.sum()) + R * T
        if of_ranks is not None:
            tokens = [each * T for each in of_ranks]
            batch.is_extend_in_batch = True
            batch.can_run_decode_cuda_graph = True
            batch.original_global_num_tokens_cpu = of_ranks  # which graph to replay is asked in rows
            batch.global_num_tokens_cpu = batch.global_num_tokens_for_logprob_cpu = tokens
            batch.global_num_tokens_gpu = transfer.to_device(torch.tensor(tokens), self.device)
            batch.global_num_tokens_for_logprob_gpu = batch.global_num_tokens_gpu.clone()
        # As the host's _init_num_token_non_padded, which asks anew each time.
        batch.global_num_token_non_padded_cpu = R * T
        if self.counts_tokens:
            batch.global_num_token_non_padded = transfer.to_device(torch.tensor(R * T, dtype=torch.int32), self.device)
        return batch

    def _unfold(self, batch: ForwardBatch) -> None:
        """Give a batch its tensors, where no graph makes them for itself."""
        rows = self._rows_of(batch)
        batch.input_ids, batch.positions, batch.out_cache_loc = rows.ids, rows.positions, rows.loc
        batch.req_pool_indices, batch.seq_lens = rows.slot, rows.end
        batch.extend_prefix_lens = rows.start.int()
        self.runner.kv_index_translator.bind_own_plan(batch)

    def _rows_of(self, batch: ForwardBatch) -> Rows:
        """The batch's rows on the device. Rows with a source are asked for before the forward, which replaces it."""
        if batch.rows is None:
            carries = bool((batch.written_rows[:, self.layout.source] >= 0).any())
            batch.packed = to_device(batch.written_rows, self.device)
            batch.rows = unfold(batch.packed, self.decider.last, self.req_to_token, self.layout, carries=carries)
        return batch.rows

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


def forward_rows(model_runner: Any) -> int:
    """The most rows that a forward of this model may have."""
    args = model_runner.server_args
    block_size = facts_of(args.model_path, args.revision).block_size
    each = MOST_WINDOW + MOST_LIVE_BLOCKS
    return most_rows(model_runner.req_to_token_pool.size, row_budget(args.chunked_prefill_size, block_size), each)


def to_device(numbers: Numbers, device: Any) -> Tensor:
    """The numbers on the device, without waiting for it."""
    return transfer.to_device(torch.from_numpy(numbers), device)


def tokens_of(facts: CheckpointFacts) -> Tokens:
    """The checkpoint's tokens as steps know them."""
    if facts.delete_id is None or facts.split_id is None:
        return Tokens(facts.mask_id)
    return Tokens(facts.mask_id, facts.delete_id, facts.split_id)


def contained(shape: Shape, rid: str, failed: dict[str, Exception]) -> Shape:
    """What changes a request's logits; where that fails, they stay as they are and `failed` says why."""

    def safe(logits: Tensor) -> Tensor:
        try:
            return shape(logits)
        except Exception as error:  # one request's, which ends for it
            failed.setdefault(rid, error)
            return logits

    return safe


def free_positions(request: Request[DecodeConfig]) -> list[int]:
    """Positions of its live blocks of which tokens may change."""
    T = request.block_size
    sets = [(block.start, block.open | may_edit(request, block)) for block in request.blocks]
    return [start + i for start, positions in sets for i in range(T) if positions >> i & 1]
