"""Selection over the shards of real ranks: the same answer on each, for a few bytes per position."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sglang_llada.decode.select import Head, select

RANKS, POSITIONS, MASK = 2, 64, 3


def inputs(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Hidden states and head, the same in every process; products add up without rounding."""
    torch.manual_seed(0)
    return torch.randint(-8, 9, (POSITIONS, 16)) / 8, torch.randint(-8, 9, (vocabulary, 16)) / 8


def run_rank(rank: int, folder: Path, vocabulary: int) -> None:
    """One rank: selects over its shard, and writes down the result and the bytes that it sent and received."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    moved = 0

    def exchange(mine: Tensor) -> list[Tensor]:
        nonlocal moved
        everyones = torch.empty(RANKS, *mine.shape)
        torch.distributed.all_gather(list(everyones), mine)
        moved += everyones.nbytes  # its own sent, the other's received
        return list(everyones)

    hidden, weight = inputs(vocabulary)
    size = vocabulary // RANKS
    head = Head(weight[rank * size : (rank + 1) * size], rank * size)
    best = select(hidden, head, MASK, exchange=exchange)
    torch.save((best.token, best.prob, moved), folder / f"rank{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("vocabulary", [400, 157_184])
def test_ranks_agree_and_exchange_a_few_bytes(
    vocabulary: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=run_rank, args=(rank, tmp_path, vocabulary)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * RANKS
    hidden, weight = inputs(vocabulary)
    want = select(hidden, Head(weight), MASK)
    for rank in range(RANKS):
        token, prob, moved = torch.load(tmp_path / f"rank{rank}")
        assert torch.equal(token, want.token)
        torch.testing.assert_close(prob, want.prob, rtol=1e-6, atol=0)
    per_position = moved / POSITIONS
    with capsys.disabled():
        print(f"\nvocabulary {vocabulary}: {per_position:.0f} bytes per position and rank, {4 * vocabulary} of logits")
    assert per_position <= 64
