"""Selection and sampling over the shards of real ranks: the same answer on each, for a few bytes per position."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_llada.decode.head import Exchange, Head
from sglang_llada.decode.sampling import draw
from sglang_llada.decode.select import select
from tests.decode import distribution as dist

RANKS, POSITIONS, MASK, SAMPLES = 2, 64, 3, 5000

Task = Callable[[int, Exchange, int], Any]  # of a rank, what joins it to the others, and the vocabulary


def inputs(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Hidden states and head, the same in every process; products add up without rounding."""
    torch.manual_seed(0)
    return torch.randint(-8, 9, (POSITIONS, 16)) / 8, torch.randint(-8, 9, (vocabulary, 16)) / 8


def shard(weight: Tensor, rank: int) -> Head:
    size = len(weight) // RANKS
    return Head(weight[rank * size : (rank + 1) * size], rank * size, size, len(weight))


def selected(rank: int, exchange: Exchange, vocabulary: int) -> tuple[Tensor, Tensor]:
    hidden, weight = inputs(vocabulary)
    best = select(hidden, shard(weight, rank), MASK, exchange=exchange)
    return best.token, best.prob


def logits_of_draws(vocabulary: int) -> Tensor:
    """The same in every process."""
    torch.manual_seed(1)
    return torch.randn(vocabulary) * 2


def drawn(rank: int, exchange: Exchange | None, vocabulary: int) -> tuple[Tensor, Tensor]:
    """The tokens [way, sample] that every way of drawing draws, and their probabilities; all of one distribution."""
    weight = logits_of_draws(vocabulary)[:, None]
    ways = [dist.sampling(**options) for options in dist.WAYS.values() for _ in range(SAMPLES)]
    how = dist.draws(ways, dist.keys(SAMPLES).repeat(len(dist.WAYS)))
    head = Head(weight) if exchange is None else shard(weight, rank)
    found = draw(torch.ones(len(ways), 1), head, dist.MASK, how, exchange)
    return found.token.view(-1, SAMPLES), found.prob.view(-1, SAMPLES)


def run_rank(rank: int, folder: Path, task: Task, vocabulary: int) -> None:
    """One rank: writes down what the task gives, and the bytes that it sent and received."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    moved = 0

    def exchange(mine: Tensor) -> list[Tensor]:
        nonlocal moved
        everyones = torch.empty(RANKS, *mine.shape)
        torch.distributed.all_gather(list(everyones), mine)
        moved += everyones.nbytes  # its own sent, the other's received
        return list(everyones)

    torch.save((task(rank, exchange, vocabulary), moved), folder / f"rank{rank}")
    torch.distributed.destroy_process_group()


def run_ranks(task: Task, vocabulary: int, folder: Path) -> list[Any]:
    """What the task gives on each rank, with the bytes that it moved."""
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=run_rank, args=(rank, folder, task, vocabulary)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * RANKS
    return [torch.load(folder / f"rank{rank}") for rank in range(RANKS)]


@pytest.mark.parametrize("vocabulary", [400, 157_184])
def test_ranks_agree_and_exchange_a_few_bytes(
    vocabulary: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden, weight = inputs(vocabulary)
    want = select(hidden, Head(weight), MASK)
    for (token, prob), moved in run_ranks(selected, vocabulary, tmp_path):
        assert torch.equal(token, want.token)
        torch.testing.assert_close(prob, want.prob, rtol=1e-6, atol=0)
        per_position = moved / POSITIONS
    with capsys.disabled():
        print(f"\nvocabulary {vocabulary}: {per_position:.0f} bytes per position and rank, {4 * vocabulary} of logits")
    assert per_position <= 64


def test_ranks_draw_the_same_tokens_and_follow_the_distribution(tmp_path: Path) -> None:
    """Five thousand of each way to draw, from logits of which each rank has half."""
    alone = drawn(0, None, dist.V)
    logits = logits_of_draws(dist.V)
    for (token, prob), _ in run_ranks(drawn, dist.V, tmp_path):
        assert torch.equal(token, alone[0])
        torch.testing.assert_close(prob, alone[1], rtol=1e-6, atol=0)
        for mine, (name, options) in zip(token, dist.WAYS.items(), strict=True):
            assert dist.fit(mine, dist.share(logits, dist.sampling(**options))) > 0.001, name
