"""Steps as CUDA graphs: the host's decode graph runner, with selection and decode step inside the captured forward.

A captured size is a number of rows, with and without draws. A step replays the smallest captured size that holds its
rows; one with more rows than the largest (a long prompt's FILL rows) runs eagerly. Sizes go up to two rows for each
request that may run, the SEAL and the DENOISE row of each, so that steps without prompts are replayed.

The host sizes the buffers of attention backends by the number of requests that may run, which is what a forward of its
own cannot exceed; ours can. Both are told the number of rows while they are built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from torch import Tensor

from sglang_llada.decode.contract import StepOut
from sglang_llada.decode.layout import pack
from sglang_llada.decode.transfer import copy_to
from sglang_llada.host.attention import backend as attention
from sglang_llada.host.attention.backend import KernelAttention
from sglang_llada.host.engine.executor import Decider, forward_rows
from sglang_llada.host.engine.rows import WRITTEN, Numbers, Rows, unfold
from sglang_llada.host.facts import is_ours

DRAWN = "drawn"  # the variant of a size for steps in which some row draws


@dataclass(kw_only=True)
class StepOutput(LogitsProcessorOutput):
    """The host's output record, whose fields survive a replay, the rows and what was decided, for each captured one."""

    next_token_logits: None = None
    rows: Rows
    decided: StepOut


class RowGraphRunner(DecodeCudaGraphRunner):
    """Captures and replays steps; a replay begins with `packed`, the numbers of its rows (rows.py)."""

    packed: Tensor
    padding: Tensor  # idle rows, as many

    def __init__(self, model_runner: Any, **options: Any) -> None:
        self.decider = Decider(model_runner)
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        # Of no size: the host would keep logits for all rows, captured positions x V in fp32, and nobody reads them.
        model_runner.graph_shared_output = GraphSharedOutput(device=model_runner.device, max_rows=0)
        with slots_for(model_runner, graph_rows(model_runner)):
            super().__init__(model_runner, **options)

    def _next_token_logits_buffer_capacity_rows(self, max_num_tokens: int) -> int:
        return 0

    def unfolds(self, rows: int) -> bool:
        """Whether a step of so many rows needs nothing but their numbers: its graph makes all other inputs of them."""
        planned = not isinstance(self.attn_backend, KernelAttention)
        return rows <= self.max_bs and not planned and not self.require_gathered_buffer

    def capture(self) -> None:
        """Called by the host's constructor, before the first size is captured."""
        self.idle = idle_row(self.decider)
        self.packed = torch.from_numpy(self.idle).repeat(self.max_bs, 1).to(self.device)
        self.padding = self.packed.clone()
        super().capture()

    def capture_one_shape(self, size: int, forward: Callable[..., Any], *labels: Any) -> None:
        """As the host, twice: for steps in which no row draws a token, and for those in which some does."""
        stream, _, attention = labels
        for variant in (None, DRAWN):
            super().capture_one_shape(size, self._step(size, forward, variant), stream, variant, attention)

    def _step(self, size: int, forward: Callable[..., Any], variant: str | None) -> Callable[..., Any]:
        """What is captured: the model's inputs from `packed`, its forward, and the rows' decisions."""
        packed, last = self.packed[:size], self.decider.last
        count = size * self.decider.block_size

        def step(input_ids: Tensor, positions: Tensor, batch: Any) -> StepOutput:
            rows = unfold(packed, last, self.req_to_token, self.decider.layout)
            for static, value in (
                (input_ids, rows.ids),
                (positions, rows.positions),
                (batch.out_cache_loc, rows.loc),
                (batch.req_pool_indices, rows.slot),
                (batch.seq_lens, rows.end),
            ):
                static.copy_(value)
            hidden = forward(input_ids, positions, batch).hidden_states
            decided = self.decider(hidden, rows.ids, rows.table, count, drawing=count if variant else 0)
            last[:size].copy_(pack(decided))
            return StepOutput(hidden_states=hidden, rows=rows, decided=decided)

        return step

    def _resolve_lora_variant(self, forward_batch: Any) -> str | None:
        """The host's hook for graphs of one size that differ; adapters, for which it is meant, are refused."""
        draws = forward_batch.written_rows[:, self.decider.layout.temperature].any()
        return DRAWN if draws else None

    def load_batch(self, forward_batch: Any, pp_proxy_tensors: Any = None) -> None:
        """The rows' numbers, padded with idle ones, in one copy; and what the host does where that is not enough."""
        rows = forward_batch.batch_size
        if self.unfolds(rows):
            self.bs, self.raw_bs = self._pad_to_bucket(rows, self.capture_bs), rows
            self.raw_num_token = rows * self.captured_req_width
            self._set_dp_real_num_tokens(self.raw_num_token)
            size = self._capture_graph_size(bs=self.bs, num_tokens=self.bs * self.captured_req_width)
            variant = self._resolve_lora_variant(forward_batch)
            self._replay_graph_key = self._make_graph_key(size, variant_label=variant)
        else:
            super().load_batch(forward_batch, pp_proxy_tensors)
        static = self.packed[: self.bs]
        if forward_batch.packed is None:
            written = np.concatenate((forward_batch.written_rows, self.idle.repeat(self.bs - rows, 0)))
            copy_to(static, torch.from_numpy(written))
        else:  # they have been unfolded on the device
            torch.cat((forward_batch.packed, self.padding[rows : self.bs]), out=static)


def idle_row(decide: Decider) -> Numbers:
    """A row that pads a captured size, [1, width]: decides nothing, in the slot that the host keeps for padding."""
    return np.array([[0] * decide.block_size + decide.idle + [0, WRITTEN]], np.int64)


def graph_runner_class(chosen: type, model_runner: Any) -> type:
    """The class of the runner that captures a model's decode steps, given the host's choice."""
    return RowGraphRunner if is_ours(model_runner.server_args) else chosen


def build_attention(original: Callable[..., None], model_runner: Any) -> None:
    """Build a model's attention backends, ours among those to choose from, with buffers for the rows of a forward."""
    attention.register()
    if not is_ours(model_runner.server_args):
        return original(model_runner)
    with slots_for(model_runner, forward_rows(model_runner)):
        return original(model_runner)


def graph_rows(model_runner: Any) -> int:
    """The most rows that a graph is captured for: what requests with one live block and without prompts need."""
    return min(2 * model_runner.req_to_token_pool.size, forward_rows(model_runner))


@contextmanager
def slots_for(model_runner: Any, rows: int) -> Iterator[None]:
    """Let the pool of requests seem to hold as many as there may be rows."""
    pool = model_runner.req_to_token_pool
    size, pool.size = pool.size, max(rows, pool.size)
    try:
        yield
    finally:
        pool.size = size
