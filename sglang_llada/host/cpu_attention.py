"""Attention over rows on the CPU.

A row is `extend_seq_lens[i]` queries of one request that end at `seq_lens[i]`. The KV of the whole step is written to
the pool before any row reads, so rows of one request may share a forward. Layers that are not causal (block diffusion)
let each query see [0, seq_lens[i]); causal layers let it see up to its own position.

Rows are joined into *spans* when the next row continues the same request: a prompt's blocks are gathered once and run
as one attention with a block-causal mask, not block by block. Spans of one query count and one KV length run as one
batch. Nothing is padded, so a row's result does not depend on its neighbours beyond the order of summation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from sglang_llada.host.platform import ATTENTION_BACKEND


def register() -> None:
    """Make `--attention-backend llada_rows` resolve."""
    register_attention_backend(ATTENTION_BACKEND)(RowAttention)


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows of one request: queries [start, start + count) of the forward, row lengths, KV [0, length)."""

    slot: int
    start: int
    rows: tuple[int, ...]
    length: int

    @property
    def count(self) -> int:
        return sum(self.rows)


@dataclass(frozen=True, slots=True)
class Group:
    """Spans of one shape, run as a batch of S.

    queries: int64 [S, Q], positions in the forward. kv: int64 [S, L], slots of the KV pool.
    ends: int64 [Q], for each query how far its row sees; causal_ends the same for causal layers.
    """

    queries: Tensor
    kv: Tensor
    ends: Tensor
    causal_ends: Tensor


class RowAttention(AttentionBackend):
    """The host's attention interface over groups of spans, planned once per forward and shared by its layers."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        self.device = model_runner.device
        self.req_to_token: Tensor = model_runner.req_to_token_pool.req_to_token
        self.pool = model_runner.token_to_kv_pool
        self.groups: list[Group] = []

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan the spans of a forward."""
        slots = forward_batch.req_pool_indices.tolist()
        lengths = (
            forward_batch.seq_lens if forward_batch.seq_lens_cpu is None else forward_batch.seq_lens_cpu
        ).tolist()
        if forward_batch.forward_mode.is_decode_or_idle():
            counts = [1] * len(slots)
        elif forward_batch.extend_seq_lens_cpu is not None:
            counts = list(forward_batch.extend_seq_lens_cpu)
        else:
            counts = forward_batch.extend_seq_lens.tolist()
        self.groups = [self._group(spans) for spans in same_shape(join_rows(slots, counts, lengths))]

    def _group(self, spans: list[Span]) -> Group:
        first = spans[0]
        begin = first.length - first.count
        row_ends = torch.tensor(first.rows).cumsum(0) + begin
        starts = torch.tensor([span.start for span in spans])
        slots = torch.tensor([span.slot for span in spans])
        return Group(
            queries=starts[:, None] + torch.arange(first.count),
            kv=self.req_to_token[slots, : first.length].long(),
            ends=row_ends.repeat_interleave(torch.tensor(first.rows)),
            causal_ends=torch.arange(begin + 1, first.length + 1),
        )

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **_: Any
    ) -> Tensor:
        """Write the step's KV, then attend; q [N, heads x D], result [N, heads x Dv]."""
        if save_kv_cache and k is not None:
            self.pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        keys, values = self.pool.get_key_buffer(layer.layer_id), self.pool.get_value_buffer(layer.layer_id)
        query = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = query.new_empty(query.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        causal = layer.attn_type != AttentionType.ENCODER_ONLY and not layer.is_cross_attention
        for group in self.groups:
            length = group.kv.shape[1]
            ends = group.causal_ends if causal else group.ends
            mask = None if int(ends[0]) == length else torch.arange(length) < ends[:, None]  # [Q, L]
            attended = F.scaled_dot_product_attention(
                query[group.queries].transpose(1, 2),  # [S, heads, Q, D]
                keys[group.kv].to(q.dtype).transpose(1, 2),  # [S, kv heads, L, D]
                values[group.kv].to(q.dtype).transpose(1, 2),
                attn_mask=mask,
                scale=layer.scaling,
                enable_gqa=layer.tp_q_head_num != layer.tp_k_head_num,
            )
            out[group.queries] = attended.transpose(1, 2)
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **_: Any
    ) -> Tensor:
        """Rows of one query."""
        return self.forward_extend(q, k, v, layer, forward_batch, save_kv_cache)

    # --- what a graph runner and DP attention ask -------------------------------------------------------------------

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """KV length of a padded row: at least one block, so that no attention is over nothing."""
        return 1

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing to keep: a replay plans its spans anew."""

    def support_triton(self) -> bool:
        """No kernel of ours is Triton's."""
        return False


def join_rows(slots: list[int], counts: list[int], lengths: list[int]) -> list[Span]:
    """Rows as spans: a row joins the one before if it is of the same request and starts where that one ends."""
    spans: list[Span] = []
    start = 0
    for slot, count, length in zip(slots, counts, lengths, strict=True):
        last = spans[-1] if spans else None
        if last is not None and last.slot == slot and length - count == last.length:
            spans[-1] = Span(slot, last.start, (*last.rows, count), length)
        elif count:
            spans.append(Span(slot, start, (count,), length))
        start += count
    return spans


def same_shape(spans: list[Span]) -> list[list[Span]]:
    """Spans grouped by row lengths and KV length."""
    groups: dict[tuple[tuple[int, ...], int], list[Span]] = {}
    for span in spans:
        groups.setdefault((span.rows, span.length), []).append(span)
    return list(groups.values())
