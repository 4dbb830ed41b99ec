"""What ranks of DP attention, each with requests of its own, tell one another of the next forward."""

from __future__ import annotations

import time

import torch
from sglang.srt.runtime_context import get_parallel

IDLE_SECONDS = 0.001  # between questions to the others where nobody has rows; nothing wakes a rank but an answer


def rows_of_ranks(mine: int, attention_ranks: int) -> list[int]:
    """Rows that each rank has for the next forward: all take part, or none does."""
    if attention_ranks == 1:
        return [mine]
    parallel = get_parallel()
    everyones = torch.empty(parallel.tp_size, dtype=torch.int64)
    torch.distributed.all_gather_single(everyones, torch.tensor([mine]), group=parallel.tp_group.cpu_group)
    rows: list[int] = everyones[:: parallel.attn_tp_size].tolist()
    if not any(rows):
        time.sleep(IDLE_SECONDS)
    return rows
