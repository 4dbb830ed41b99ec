"""Rows on the CPU equal a loop over rows, whoever else is in the forward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType
from torch import Tensor

from sglang_llada.host.attention.cpu import RowAttention, Span, join_rows, same_shape

pytestmark = pytest.mark.host

HEADS, KV_HEADS, DIM, SLOTS, LONGEST = 4, 2, 8, 4, 96


class FakePool:
    """KV buffers that remember the order of writes and reads."""

    def __init__(self) -> None:
        self.keys, self.values = (torch.zeros(SLOTS * LONGEST, KV_HEADS, DIM) for _ in range(2))
        self.calls: list[str] = []

    def set_kv_buffer(self, layer: Any, where: Any, k: Tensor, v: Tensor) -> None:
        self.calls.append("write")
        loc = where[0] if isinstance(where, tuple) else where.loc
        self.keys[loc], self.values[loc] = k.view(-1, KV_HEADS, DIM), v.view(-1, KV_HEADS, DIM)

    def get_key_buffer(self, layer_id: int) -> Tensor:
        self.calls.append("read")
        return self.keys

    def get_value_buffer(self, layer_id: int) -> Tensor:
        self.calls.append("read")
        return self.values


class Bench:
    """A backend on fakes, with a context of random KV for every request."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self.pool = FakePool()
        self.pool.keys.normal_(generator=random)
        self.pool.values.normal_(generator=random)
        self.slots = torch.randperm(SLOTS * LONGEST, generator=random).view(SLOTS, LONGEST).int()
        self.q = torch.randn(SLOTS, LONGEST, HEADS, DIM, generator=random)  # by request and position
        self.k, self.v = (torch.randn(SLOTS, LONGEST, KV_HEADS, DIM, generator=random) for _ in range(2))
        self.backend = RowAttention(
            SimpleNamespace(
                device="cpu",
                req_to_token_pool=SimpleNamespace(req_to_token=self.slots),
                token_to_kv_pool=self.pool,
            )
        )

    def run(self, rows: list[tuple[int, int, int]], causal: bool = False) -> list[Tensor]:
        """Results [T, heads x D] of rows (request, first position, end)."""
        at = [(slot, p) for slot, begin, end in rows for p in range(begin, end)]
        slot, position = (torch.tensor([pair[i] for pair in at], dtype=torch.long) for i in range(2))
        counts = [end - begin for _, begin, end in rows]
        forward = SimpleNamespace(
            req_pool_indices=torch.tensor([row[0] for row in rows], dtype=torch.long),
            seq_lens=torch.tensor([row[2] for row in rows], dtype=torch.long),
            seq_lens_cpu=None,
            extend_seq_lens_cpu=counts,
            forward_mode=SimpleNamespace(is_decode_or_idle=lambda: False),
            out_cache_loc=self.slots[slot, position].long(),
        )
        layer = SimpleNamespace(
            tp_q_head_num=HEADS,
            tp_k_head_num=KV_HEADS,
            qk_head_dim=DIM,
            v_head_dim=DIM,
            layer_id=0,
            scaling=DIM**-0.5,
            k_scale=None,
            is_cross_attention=False,
            attn_type=AttentionType.DECODER if causal else AttentionType.ENCODER_ONLY,
        )
        self.backend.init_forward_metadata(forward)
        out = self.backend.forward_extend(
            self.q[slot, position].flatten(1), self.k[slot, position], self.v[slot, position], layer, forward
        )
        return list(out.split(counts))

    def naive(self, slot: int, begin: int, end: int, causal: bool = False) -> Tensor:
        """The row by itself, query by query and head by head, from the pool as it is now."""
        out = torch.zeros(end - begin, HEADS, DIM)
        for i, p in enumerate(range(begin, end)):
            seen = self.slots[slot, : p + 1 if causal else end].long()
            for h in range(HEADS):
                kv = h // (HEADS // KV_HEADS)
                weights = (self.pool.keys[seen, kv] @ self.q[slot, p, h] * DIM**-0.5).softmax(0)
                out[i, h] = weights @ self.pool.values[seen, kv]
        return out.flatten(1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "rows",
    [
        [(0, 0, 4)],
        [(0, 0, 4), (0, 4, 8), (0, 8, 12)],
        [(0, 0, 4), (0, 4, 7)],
        [(0, 4, 8), (1, 4, 8), (2, 4, 8)],
        [(0, 4, 8), (1, 0, 4), (2, 12, 14)],
        [(0, 8, 12), (1, 0, 4), (0, 12, 16)],  # not next to each other
        [(0, 12, 16), (0, 8, 12)],  # later block first
        [(3, 0, 32), (3, 32, 63), (1, 32, 64)],
        [(0, 5, 6), (1, 63, 64)],
        [(2, begin, begin + 1) for begin in range(63)],  # a prompt of 63 rows
    ],
)
def test_rows_equal_a_loop_over_rows(rows: list[tuple[int, int, int]], causal: bool) -> None:
    bench = Bench()
    for got, row in zip(bench.run(rows, causal), rows, strict=True):
        torch.testing.assert_close(got, bench.naive(*row, causal=causal))


def test_a_row_does_not_depend_on_the_others() -> None:
    row = (1, 4, 8)
    alone = Bench().run([row])[0]
    for others in ([(0, 4, 8)], [(0, 0, 4), (2, 8, 12)], [(1, 8, 12)]):
        torch.testing.assert_close(Bench().run([*others, row])[-1], alone)
        torch.testing.assert_close(Bench().run([row, *others])[0], alone)


def test_no_rows_give_no_results() -> None:
    backend = Bench().backend
    backend.init_forward_metadata(
        SimpleNamespace(
            req_pool_indices=torch.tensor([], dtype=torch.long),
            seq_lens=torch.tensor([], dtype=torch.long),
            seq_lens_cpu=None,
            extend_seq_lens_cpu=[],
            forward_mode=SimpleNamespace(is_decode_or_idle=lambda: False),
        )
    )
    assert backend.groups == []


def test_the_whole_steps_kv_is_written_before_a_row_reads() -> None:
    bench = Bench()
    bench.run([(0, 0, 4), (1, 0, 4), (0, 4, 8)])
    assert bench.pool.calls == ["write", "read", "read"]


def test_rows_join_where_one_continues_the_other() -> None:
    assert join_rows([0, 0], [4, 4], [4, 8]) == [Span(0, 0, (4, 4), 8)]
    assert join_rows([0, 0], [4, 4], [4, 12]) == [Span(0, 0, (4,), 4), Span(0, 4, (4,), 12)]
    assert join_rows([0, 1], [4, 4], [4, 8]) == [Span(0, 0, (4,), 4), Span(1, 4, (4,), 8)]
    assert join_rows([0, 1], [0, 4], [4, 8]) == [Span(1, 0, (4,), 8)]
    assert join_rows([], [], []) == []


def test_spans_of_one_shape_are_one_group() -> None:
    a, b, other_rows, longer = Span(0, 0, (4, 4), 8), Span(1, 8, (4, 4), 8), Span(2, 16, (8,), 8), Span(3, 24, (8,), 9)
    assert same_shape([a, other_rows, b, longer]) == [[a, b], [other_rows], [longer]]
