"""What ranks of DP attention tell one another of the next forward, and what is said when a rank is lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from sglang.srt.runtime_context import get_parallel

logger = logging.getLogger(__name__)

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


@contextmanager
def naming_a_loss() -> Iterator[None]:
    """Say in one line that another rank is gone, where this one would end with its library's traceback alone."""
    try:
        yield
    except RuntimeError as error:  # of torch's own kinds gloo raises none
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            logger.error("another rank of this server, or its node, is lost, so this one ends too: %s", error)
        raise
