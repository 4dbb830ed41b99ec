"""Rows over paged KV, in pages of random order, and what attention over them gives in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Paged:
    """Requests of equal length in a pool; `rows` of a forward are pairs of a request and the end of what a row sees."""

    q: Tensor  # [R x T, Hq, D]
    keys: Tensor  # [slots, Hkv, D]
    values: Tensor
    table: Tensor  # int32 [requests, positions]
    requests: Tensor  # int64 [R]
    ends: Tensor
    block: int
    scale: float

    @classmethod
    def make(
        cls,
        rows: list[tuple[int, int]],
        *,
        length: int,
        block: int = 32,
        group: int = 4,
        kv_heads: int = 1,
        head_size: int = 32,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> Paged:
        """Random queries and KV; the first page of the pool belongs to nobody, as in the host's."""
        random = torch.Generator(device).manual_seed(len(rows) + length)
        requests = 1 + max(request for request, _ in rows)
        pages = 1 + torch.randperm(requests * length // block, generator=random, device=device)
        slots = pages[:, None] * block + torch.arange(block, device=device)
        many = (requests * length + block, kv_heads, head_size)
        return cls(
            torch.randn(len(rows) * block, kv_heads * group, head_size, generator=random, device=device).to(dtype),
            torch.randn(many, generator=random, device=device).to(dtype),
            torch.randn(many, generator=random, device=device).to(dtype),
            slots.view(requests, length).int(),
            torch.tensor([request for request, _ in rows], device=device),
            torch.tensor([end for _, end in rows], device=device),
            block,
            head_size**-0.5,
        )

    def attended(self) -> Tensor:
        """Row by row in fp64, [R x T, Hq, D]."""
        rows = []
        group = self.q.shape[1] // self.keys.shape[1]
        for q, request, end in zip(self.q.split(self.block), self.requests.tolist(), self.ends.tolist(), strict=True):
            slots = self.table[request, :end].long()
            key, value = (kv[slots].double().repeat_interleave(group, 1) for kv in (self.keys, self.values))
            weights = (torch.einsum("qhd,khd->hqk", q.double(), key) * self.scale).softmax(-1)
            rows.append(torch.einsum("hqk,khd->qhd", weights, value))
        return torch.cat(rows)
