"""Attention over rows on the CPU.

A row is `extend_seq_lens[i]` queries of one request that end at `seq_lens[i]`. The KV of the whole step is written to
the pool before any row reads, so rows of one request may share a forward. Layers that are not causal (block diffusion)
let each query see [0, seq_lens[i]); causal layers let it see up to its own position.

Rows are joined into *spans* when the next row continues the same request: the KV of a prompt is gathered once, and each
of its rows attends to a slice of it. Spans of one query count and one KV length run as one batch. Nothing is padded and
rows need no mask, so a row's result does not depend on its neighbours beyond the order of summation. (One attention
over a whole span with a block-causal mask was more than twice as slow: it computes what the mask then hides.)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from sglang_llada.host.operations import kernel

CAUSAL_CHUNK = 256  # queries that share a mask; a whole prompt's mask would be length x length


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

    queries: int64 [S, Q], positions in the forward. kv: int64 [S, L], slots of the KV pool. edges: where rows begin and
    end among the queries, [rows + 1]. prefix: KV before the first query.
    """

    queries: Tensor
    kv: Tensor
    edges: tuple[int, ...]
    prefix: int

    def pieces(self, causal: bool) -> list[Piece]:
        """The queries as attentions to run: a row each, or for causal layers a chunk of queries under a mask."""
        if not causal:
            return [Piece(a, b, self.prefix + b, None) for a, b in pairwise(self.edges)]
        count = self.edges[-1]
        cuts = [*range(0, count, CAUSAL_CHUNK), count]
        return [Piece(a, b, max(self.prefix + b, 1), self._causal_mask(a, b)) for a, b in pairwise(cuts)]

    def _causal_mask(self, begin: int, end: int) -> Tensor | None:
        """bool [end - begin, prefix + end], True where a query may attend; None for a single query, which sees all."""
        if end - begin == 1:
            return None
        # A graph runner's padding has more queries than KV; those must see something, or they give NaN.
        last = (torch.arange(begin, end) + self.prefix).clamp(min=0)
        return torch.arange(max(self.prefix + end, 1)) <= last[:, None]


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries [begin, end) of each span of a group, over KV [0, length), under a mask [end - begin, length] or none."""

    begin: int
    end: int
    length: int
    mask: Tensor | None


class RowAttention(AttentionBackend):
    """The host's attention interface over groups of spans, planned once per forward and shared by its layers."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        self.device = model_runner.device
        self.req_to_token: Tensor = model_runner.req_to_token_pool.req_to_token
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.groups: list[Group] = []
        self.pieces: dict[bool, list[list[Piece]]] = {}  # by causality, made when the first such layer asks

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Plan the spans of a forward; the host's eager init_forward_metadata comes here too."""
        slots = forward_batch.req_pool_indices.tolist()
        lengths = (
            forward_batch.seq_lens if forward_batch.seq_lens_cpu is None else forward_batch.seq_lens_cpu
        ).tolist()
        counts = row_lengths(forward_batch, len(slots))
        self.groups = [self._group(spans) for spans in same_shape(join_rows(slots, counts, lengths))]
        self.pieces = {}

    def _group(self, spans: list[Span]) -> Group:
        first = spans[0]
        starts = torch.tensor([span.start for span in spans])
        slots = torch.tensor([span.slot for span in spans])
        return Group(
            queries=starts[:, None] + torch.arange(first.count),
            kv=self.req_to_token[slots, : first.length].long(),
            edges=tuple(accumulate(first.rows, initial=0)),
            prefix=first.length - first.count,
        )

    @kernel
    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **_: Any
    ) -> Tensor:
        """Write the step's KV, then attend; q [N, heads x D], result [N, heads x Dv]."""
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        keys, values = (
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
        )
        scaled = layer.k_scale is not None and keys.dtype.itemsize == 1  # the pool divided what it made 8 bits wide
        query = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        # Zeros, because tokens that pad a batch belong to no row and must not bring NaN into later layers.
        out = query.new_zeros(query.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        for group, pieces in zip(self.groups, self._pieces(layer), strict=True):
            queries = query[group.queries].transpose(1, 2)  # [S, heads, Q, D]
            key, value = keys[group.kv].to(q.dtype), values[group.kv].to(q.dtype)
            if scaled:
                key, value = key * layer.k_scale_float, value * layer.v_scale_float
            key, value = key.transpose(1, 2), value.transpose(1, 2)  # [S, kv heads, L, D]
            for piece in pieces:
                attended = F.scaled_dot_product_attention(
                    queries[:, :, piece.begin : piece.end],
                    key[:, :, : piece.length],
                    value[:, :, : piece.length],
                    attn_mask=piece.mask,
                    scale=layer.scaling,
                    enable_gqa=layer.tp_q_head_num != layer.tp_k_head_num,
                )
                out[group.queries[:, piece.begin : piece.end]] = attended.transpose(1, 2)
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _pieces(self, layer: Any) -> list[list[Piece]]:
        """For each group its pieces; the same for all layers of one causality."""
        causal = layer.attn_type != AttentionType.ENCODER_ONLY
        if causal not in self.pieces:
            self.pieces[causal] = [group.pieces(causal) for group in self.groups]
        return self.pieces[causal]

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **_: Any
    ) -> Tensor:
        """Rows of one query."""
        return self.forward_extend(q, k, v, layer, forward_batch, save_kv_cache)

    # --- what a graph runner and DP attention ask -------------------------------------------------------------------

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """KV length of a padded row, so that no attention is over nothing."""
        return 1

    # What DP attention's padding asks for on a CPU; no other backend of the host that we derive from has it.
    get_cpu_graph_seq_len_fill_value = get_cuda_graph_seq_len_fill_value

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing to keep: spans are planned before each replay, outside what is captured."""

    def support_triton(self) -> bool:
        """No kernel of ours is Triton's."""
        return False


def row_lengths(forward_batch: Any, rows: int) -> list[int]:
    """Queries of each row."""
    if forward_batch.forward_mode.is_decode_or_idle():
        return [1] * rows
    # A graph runner's view of a batch has neither field: its rows are all of one length.
    known, lengths = (getattr(forward_batch, name, None) for name in ("extend_seq_lens_cpu", "extend_seq_lens"))
    if known is not None:
        return list(known)
    return [forward_batch.input_ids.shape[0] // rows] * rows if lengths is None else lengths.tolist()


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
