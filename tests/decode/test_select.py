"""Best tokens and probabilities of a position, over a vocabulary in chunks and shards."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sglang_llada.decode import select as selection
from sglang_llada.decode.head import Best, Head, Lowered, Partial
from sglang_llada.decode.select import best, select

MASK = 3
ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks even of a small vocabulary, the last one partial."""
    monkeypatch.setattr(selection, "VOCAB_CHUNK", 7)


def by_sorting(logits: Tensor, mask_id: int, count: int) -> Best:
    """The definition, from whole logits."""
    candidates = logits.clone()
    candidates[:, mask_id] = float("-inf")
    token = candidates.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return Best(token, logits.double().softmax(-1).gather(-1, token).float())


def exact(*shape: int) -> Tensor:
    """Numbers whose products add up without rounding, so that logits do not depend on the order of sums."""
    return torch.randint(-8, 9, shape) / 8


def exchange_of(hidden: Tensor, heads: list[Head], count: int) -> selection.Exchange:
    """What an all-gather of every shard's record gives."""
    return lambda mine: [selection.reduce(hidden, head, MASK, count).pack() for head in heads]


def shards(weight: Tensor, sizes: list[int]) -> list[Head]:
    """A head split over ranks."""
    parts = weight.split(sizes)
    return [Head(part, sum(sizes[:rank])) for rank, part in enumerate(parts)]


def test_probability_counts_the_mask_but_never_chooses_it() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 50.0]])
    out = best(logits, MASK)
    assert out.token.tolist() == [[2]]
    assert torch.allclose(out.prob, logits.softmax(-1)[:, 2:3])


def test_of_equal_logits_the_lowest_id_wins() -> None:
    assert best(torch.tensor([[1.0, 5.0, 5.0, 0.0]]), MASK, 3).token.tolist() == [[1, 2, 0]]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("count", [1, 2, 4])
def test_of_equal_logits_the_lowest_id_wins_over_chunks_and_shards(count: int) -> None:
    weight = torch.zeros(40, 4)
    weight[[2, 9, 10, 22, 39], 0] = 1.0  # equal in several chunks and shards
    hidden = torch.eye(4)[:1].expand(5, 4)
    heads = shards(weight, [11, 20, 9])
    want = [2, 9, 10, 22][:count]
    assert select(hidden, Head(weight), MASK, count).token.tolist() == [want] * 5
    out = select(hidden, heads[1], MASK, count, exchange_of(hidden, heads, count))
    assert out.token.tolist() == [want] * 5


def lowered_for(positions: int, vocabulary: int) -> Lowered:
    """A penalty for a token of each position: for the best one of some, for one that does not exist of others."""
    return Lowered(torch.randint(-1, vocabulary + 1, (positions,)), torch.randint(0, 17, (positions,)) / 4)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("count", [1, 3])
def test_lowered_logits_are_lowered_before_all_else(count: int) -> None:
    torch.manual_seed(count)
    hidden, weight, lowered = exact(200, 8), exact(50, 8), lowered_for(200, 50)
    logits = hidden @ weight.T
    for position, (token, by) in enumerate(zip(lowered.token.tolist(), lowered.by.tolist(), strict=True)):
        if 0 <= token < 50:
            logits[position, token] -= by
    want, plain = by_sorting(logits, MASK, count), select(hidden, Head(weight), MASK, count)
    heads = shards(weight, [11, 20, 19])
    everyone = [selection.reduce(hidden, head, MASK, count, lowered=lowered).pack() for head in heads]
    for out in (
        select(hidden, Head(weight), MASK, count, lowered=lowered),
        select(hidden, heads[1], MASK, count, lambda mine: everyone, lowered=lowered),
    ):
        assert torch.equal(out.token, want.token)
        torch.testing.assert_close(out.prob, want.prob, rtol=1e-6, atol=0)
    assert not torch.equal(plain.token, want.token)
    nothing = Lowered(lowered.token, torch.zeros(200))
    assert torch.equal(select(hidden, Head(weight), MASK, count, lowered=nothing).prob, plain.prob)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("vocabulary", [5, 7, 8, 50])
@pytest.mark.parametrize("count", [1, 3])
def test_chunks_and_shards_give_what_whole_logits_give(vocabulary: int, count: int) -> None:
    torch.manual_seed(vocabulary)
    hidden, weight = exact(33, 8), exact(vocabulary, 8)
    want = by_sorting(hidden @ weight.T, MASK, count)
    heads = shards(weight, [2, vocabulary - 2])
    for out in (
        select(hidden, Head(weight), MASK, count),
        select(hidden, heads[0], MASK, count, exchange_of(hidden, heads, count)),
    ):
        assert torch.equal(out.token, want.token)
        torch.testing.assert_close(out.prob, want.prob, rtol=1e-6, atol=0)


def test_half_precision_weights_give_logits_that_are_not_rounded() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 64).bfloat16(), torch.randn(300, 64).bfloat16()
    want = by_sorting(hidden.float() @ weight.float().T, MASK, 2)
    out = select(hidden, Head(weight), MASK, 2)
    assert torch.equal(out.token, want.token)
    torch.testing.assert_close(out.prob, want.prob, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_reported_for_their_position_only(bad: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    out = best(logits, MASK)
    assert out.token.tolist() == [[0], [-1], [0]]
    assert out.prob[1] == 0


def test_a_fault_of_one_shard_reaches_all() -> None:
    sound, unsound = (selection.reduce_logits(torch.full((2, 4), value), 4, MASK, 1) for value in (0.0, float("nan")))
    assert select_of([sound, unsound]).token.tolist() == select_of([unsound, sound]).token.tolist() == [[-1], [-1]]


def test_a_shard_of_minus_infinity_adds_nothing() -> None:
    nothing = selection.reduce_logits(torch.full((1, 4), float("-inf")), 0, 9, 1)
    something = selection.reduce_logits(torch.tensor([[1.0, 1.0]]), 4, 9, 1)
    out = select_of([nothing, something])
    assert out.token.tolist() == [[4]]
    assert out.prob.item() == 0.5
    assert select_of([nothing, nothing]).token.tolist() == [[-1]]


def select_of(parts: list[Partial]) -> Best:
    return selection.finish(selection.merge(parts))


def test_logits_are_left_as_they_are() -> None:
    logits = torch.randn(2, 5)
    before = logits.clone()
    best(logits, MASK)
    assert torch.equal(logits, before)


def test_packing_keeps_every_id_of_a_real_vocabulary() -> None:
    part = Partial(torch.randn(2, 2), torch.tensor([[157_183, 0], [2**24 - 1, 156_895]]), torch.randn(2), torch.rand(2))
    back = Partial.unpack(part.pack())
    for name in ("logit", "token", "peak", "total"):
        assert torch.equal(getattr(back, name), getattr(part, name))


def test_no_positions_give_no_scores() -> None:
    out = select(torch.zeros(0, 8), Head(torch.zeros(50, 8)), MASK, 2)
    assert out.token.shape == out.prob.shape == (0, 2)


@pytest.mark.slow
def test_memory_of_a_step_is_a_chunk_of_logits_and_not_the_vocabulary(capsys: pytest.CaptureFixture[str]) -> None:
    """1,024 open positions of the published vocabulary and hidden size, in a process of their own each."""
    with ThreadPoolExecutor(2) as pool:
        whole, chunked = pool.map(peak_of, ("whole", "chunked"))
    bound = 1024 * selection.VOCAB_CHUNK * 4
    with capsys.disabled():
        print(
            f"\nextra memory of selection: {chunked / 2**20:.0f} MiB in chunks, {whole / 2**20:.0f} MiB of whole logits"
        )
    # the logits of a chunk, its candidates, the terms of its softmax; 64 MiB for what torch and its allocator keep
    assert chunked <= 4 * bound + 64 * 2**20
    assert whole > 1024 * 157_184 * 4


PEAK = """
import resource, sys, torch
from sglang_llada.decode.select import Head, best, select
torch.set_num_threads(1)
hidden, weight = torch.full((1024, 2048), 0.01), torch.full((157_184, 2048), 0.01)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.inference_mode():
    select(hidden, Head(weight), 3) if sys.argv[1] == "chunked" else best(hidden @ weight.T, 3)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def peak_of(how: str) -> int:
    """Bytes by which a process grew beyond hidden states and weights; what it frees goes back to the system at once."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.check_output([sys.executable, "-c", PEAK, how], cwd=ROOT, env=env, text=True))
