"""Rows to forward to decisions: builds the host's ForwardBatch directly from a plan and reads back what a step decided.

One host-to-device copy in (tokens and positions of all rows, packed) and one device-to-host read out per step. Logits
exist only for open positions; FILL and SEAL rows run the layers and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from torch import Tensor

from sglang_llada.blocks import Plan, Request, RowKind
from sglang_llada.config import DecodeConfig
from sglang_llada.decode import ALGORITHMS
from sglang_llada.decode.contract import BlockRows, Params, Scores, State, StepOut
from sglang_llada.decode.select import select


@dataclass(frozen=True, slots=True)
class InFlight:
    """A launched step: its plan and, if it has DENOISE rows, what they decided (still on the device)."""

    plan: Plan
    decided: StepOut | None


@dataclass(frozen=True, slots=True)
class Decision:
    """What one DENOISE row decided; `tokens` is None if its logits were not finite."""

    request: Request[DecodeConfig]
    tokens: list[int] | None
    open: list[bool]


class Executor:
    """Runs plans on the host's model runner."""

    def __init__(self, model_runner: Any, block_size: int, mask_id: int) -> None:
        self.runner = model_runner
        self.block_size = block_size
        self.mask_id = mask_id
        self.device = model_runner.device
        self.req_to_token: Tensor = model_runner.req_to_token_pool.req_to_token
        self.offsets = torch.arange(block_size, device=self.device)

    @torch.inference_mode()
    def launch(self, plan: Plan, slots: list[int], of_ranks: list[int] | None = None) -> InFlight:
        """Enqueue a plan's forward and decode step.

        Args:
            plan: its rows; none on a rank that takes part for the sake of the others' experts.
            slots: for each row, its request's row in the host's req_to_token table.
            of_ranks: under DP attention, the tokens of each of its ranks in this forward.
        """
        T = self.block_size
        denoise = [i for i, row in enumerate(plan.rows) if row.kind is RowKind.DENOISE]
        holes = [(i, j) for i in denoise for j, is_open in enumerate(plan.rows[i].request.block.open) if is_open]
        starts = [row.start for row in plan.rows]
        tokens = [token for row in plan.rows for token in row.request.tokens_at(row.start)]
        open_at = [i * T + j for i, j in holes]
        steps = [plan.rows[i].request.block.steps for i in denoise]
        ids, start, slot, open_index, rows, step = self._to_device(tokens, starts, slots, open_at, denoise, steps)

        hidden = self._forward(ids, start, slot, starts, slots, of_ranks)  # [R * T, H]
        if not denoise:
            return InFlight(plan, None)
        model = self.runner.model
        best = select(hidden[open_index], model.head, self.mask_id, exchange=model.exchange)
        token = torch.zeros_like(ids).index_copy(0, open_index, best.token[:, 0]).view(-1, T)[rows]
        prob = torch.zeros(ids.shape, device=self.device).index_copy(0, open_index, best.prob[:, 0]).view(-1, T)[rows]
        is_open = torch.zeros_like(ids, dtype=torch.bool).index_fill(0, open_index, True).view(-1, T)[rows]
        params = [plan.rows[i].request.params for i in denoise]
        decided = ALGORITHMS[params[0].algorithm].step(
            BlockRows(ids=ids.view(-1, T)[rows], open=is_open),
            Scores(token=token, prob=prob),
            State(step=step),
            Params(
                threshold=torch.tensor([p.threshold for p in params], device=self.device),
                steps=torch.tensor([p.steps for p in params], device=self.device),
            ),
        )
        return InFlight(plan, decided)

    def read(self, launched: InFlight) -> list[Decision]:
        """Wait for a step and bring its decisions to the host: the step's one device-to-host read."""
        if launched.decided is None:
            return []
        out = launched.decided
        ids, still_open = torch.stack((out.ids, out.open.long())).tolist()
        rows = launched.plan.of(RowKind.DENOISE)
        return [
            Decision(row.request, None if min(tokens) < 0 else tokens, [bool(o) for o in opens])
            for row, tokens, opens in zip(rows, ids, still_open, strict=True)
        ]

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _to_device(self, *lists: list[int]) -> tuple[Tensor, ...]:
        """int64 tensors of the lists on the device, through one copy."""
        packed = torch.tensor([x for part in lists for x in part], dtype=torch.int64)
        return packed.to(self.device, non_blocking=True).split([len(part) for part in lists])

    def _forward(
        self,
        ids: Tensor,
        start: Tensor,
        slot: Tensor,
        starts: list[int],
        slots: list[int],
        of_ranks: list[int] | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, [R * T, H], of rows given as ids [R * T], start [R] and slot [R]."""
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
            batch.is_extend_in_batch = True
            batch.original_global_num_tokens_cpu = batch.global_num_tokens_cpu = of_ranks
            batch.global_num_tokens_gpu = torch.tensor(of_ranks, device=self.device)
            batch.global_num_tokens_for_logprob_cpu = of_ranks
            batch.global_num_tokens_for_logprob_gpu = batch.global_num_tokens_gpu.clone()
        self.runner.kv_index_translator.bind_own_plan(batch)
        batch._init_num_token_non_padded(device=self.device, is_draft_worker=False)
        output = self.runner.forward(batch)
        hidden: Tensor = output.logits_output.hidden_states
        return hidden
