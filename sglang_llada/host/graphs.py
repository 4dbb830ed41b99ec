"""Steps as CUDA graphs: the host's decode graph runner, with selection and decode step inside the captured forward.

A captured size is a number of rows. A step replays the smallest captured size that holds its rows; one with more rows
than the largest (a long prompt's FILL rows) runs eagerly. Sizes go up to two rows for each request that may run, the
SEAL and the DENOISE row of each, so that steps without prompts are replayed.

The host sizes the buffers of attention backends by the number of requests that may run, which is what a forward of its
own cannot exceed; ours can. Both are told the number of rows while they are built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from torch import Tensor

from sglang_llada.blocks import most_rows
from sglang_llada.config import MOST_LIVE_BLOCKS, MOST_WINDOW
from sglang_llada.decode.contract import StepOut
from sglang_llada.host.arguments import facts_of, is_ours, row_budget
from sglang_llada.host.executor import Decider


@dataclass(kw_only=True)
class StepOutput(LogitsProcessorOutput):
    """The host's output record, whose fields survive a replay, and what was decided: a row for each captured one."""

    next_token_logits: None = None
    decided: StepOut


class RowGraphRunner(DecodeCudaGraphRunner):
    """Captures and replays steps; `table` is where a replay reads the records of its rows (decode/decide.py)."""

    table: Tensor

    def __init__(self, model_runner: Any, **options: Any) -> None:
        self.decide = Decider(model_runner)
        # Of no size: the host would keep logits for all rows, captured positions x V in fp32, and nobody reads them.
        model_runner.graph_shared_output = GraphSharedOutput(device=model_runner.device, max_rows=0)
        with slots_for(model_runner, graph_rows(model_runner)):
            super().__init__(model_runner, **options)

    def _next_token_logits_buffer_capacity_rows(self, max_num_tokens: int) -> int:
        return 0

    def capture(self) -> None:
        """Called by the host's constructor, before the first size is captured."""
        self.idle = torch.tensor(self.decide.idle, device=self.device)
        self.table = self.idle.repeat(self.max_bs, 1)
        super().capture()

    def capture_one_shape(self, size: int, forward: Callable[..., Any], *labels: Any) -> None:
        """As the host, with the decisions of `size` rows after the model's forward."""
        table = self.table[:size]

        def step(input_ids: Tensor, positions: Tensor, forward_batch: Any) -> StepOutput:
            hidden = forward(input_ids, positions, forward_batch).hidden_states
            decided = self.decide(hidden, input_ids, table, input_ids.shape[0])
            return StepOutput(hidden_states=hidden, decided=decided)

        super().capture_one_shape(size, step, *labels)

    def load_batch(self, forward_batch: Any, pp_proxy_tensors: Any = None) -> None:
        """As the host; and the records of the batch's rows, the rest of the size idle."""
        super().load_batch(forward_batch, pp_proxy_tensors)
        rows = forward_batch.batch_size
        self.table[:rows].copy_(forward_batch.step_table)
        self.table[rows : self.bs] = self.idle


def graph_runner_class(chosen: type, model_runner: Any) -> type:
    """The class of the runner that captures a model's decode steps, given the host's choice."""
    return RowGraphRunner if is_ours(model_runner.server_args) else chosen


def build_attention(original: Callable[..., None], model_runner: Any) -> None:
    """Build a model's attention backends with buffers for the rows of a forward."""
    if not is_ours(model_runner.server_args):
        return original(model_runner)
    with slots_for(model_runner, forward_rows(model_runner)):
        return original(model_runner)


def forward_rows(model_runner: Any) -> int:
    """The most rows that a forward of this model may have."""
    args = model_runner.server_args
    block_size = facts_of(args.model_path, args.revision).block_size
    each = MOST_WINDOW + MOST_LIVE_BLOCKS
    return most_rows(model_runner.req_to_token_pool.size, row_budget(args.chunked_prefill_size, block_size), each)


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
