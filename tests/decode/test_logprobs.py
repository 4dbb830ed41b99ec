"""Log-probabilities by chunk are those of whole logits: requests of every kind, and the head on several ranks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_llada.config import Report, Sampling
from sglang_llada.decode import logprobs
from sglang_llada.decode.head import Head, Lowered
from sglang_llada.decode.logprobs import report
from sglang_llada.decode.select import lower
from sglang_llada.decode.whole import Group

V, H, R, T, MASK = 50, 8, 6, 4, 9


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "VOCAB_CHUNK", 7)


def groups(rng: random.Random, *, shaped: bool = True) -> list[Group]:
    """Of every kind, over some of the positions."""
    found = []
    for r in range(R):
        sampling = Sampling(rng.choice([0.5, 1.0, 2.0]), 3, 0.9, 0.0, 7) if rng.random() < 0.5 else None
        shape = (lambda logits: logits * 3 - 1) if shaped and rng.random() < 0.5 else None
        ids = tuple(rng.sample(range(V), rng.randint(0, 3)))
        wanted = Report(top=rng.randint(0, 6), ids=ids, original=rng.random() < 0.5)
        at = [r * T + i for i in sorted(rng.sample(range(T), rng.randint(1, T)))]
        found.append(Group(at, sampling, shape, wanted if rng.random() < 0.9 else None))
    found.append(Group([0], report=Report(top=2)))
    return found


def expected(logits: Tensor, group: Group, chosen: Tensor, lowered: Lowered) -> Iterator[list[float]]:
    """Each position's row, from its whole logits."""
    assert group.report is not None
    x = logits[group.at].double()
    if not group.report.original:
        x = lower(x.float(), 0, lowered.at(torch.tensor(group.at))).double()
        x = x if group.shape is None else group.shape(x)
        if group.sampling is not None:
            x[:, MASK] = float("-inf")
            x = x / group.sampling.temperature
    for row, place in zip(x.log_softmax(-1), group.at, strict=True):
        ranked = [i for i in row.sort(descending=True, stable=True).indices.tolist() if i != MASK]
        best = ranked[: group.report.top]
        yield [float(row[chosen[place]]), *row[best].tolist(), *map(float, best), *row[list(group.report.ids)].tolist()]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_reports_are_those_of_whole_logits(seed: int, ranks: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    hidden, weight = torch.randn(R * T, H), torch.randn(V, H)
    ids, origin = torch.randint(0, V, (R, T)), torch.arange(T).repeat(R, 1)
    lowered = Lowered(torch.randint(0, V, (R * T,)), torch.rand(R * T) * 3)
    wanted = groups(rng, shaped=ranks == 1)
    heads = shards(weight, ranks)
    args = (hidden, wanted, ids, origin)
    packed = [list(records(args, head, lowered)) for head in heads] if ranks > 1 else []
    calls = iter(range(10))

    def exchange(mine: Tensor) -> list[Tensor]:
        call = next(calls)
        return [of_rank[call] for of_rank in packed]

    got = report(*args, heads[0], MASK, exchange if ranks > 1 else None, lowered)
    logits = hidden @ weight.T
    want = [
        x for g in wanted if g.report is not None for row in expected(logits, g, ids.flatten(), lowered) for x in row
    ]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=2e-5)


def shards(weight: Tensor, ranks: int) -> list[Head]:
    """A rank's part of the head each, of unequal sizes."""
    parts = weight.tensor_split([V // 2, V // 2 + 9]) if ranks > 1 else (weight,)
    firsts = [0, V // 2, V // 2 + 9]
    return [Head(part, first, V // 2, V) for part, first in zip(parts, firsts, strict=False)]


def records(args: Any, head: Head, lowered: Lowered) -> Iterator[Tensor]:
    """What a rank gives to the others, call by call."""
    given: list[Tensor] = []
    report(*args, head, MASK, lambda mine: (given.append(mine), [mine])[1], lowered)
    yield from given


def test_a_token_that_was_moved_is_reported_where_it_came_from() -> None:
    """After an insertion at position 1 the token that stood there is at 2."""
    hidden, head = torch.randn(T, H), Head(torch.randn(V, H))
    ids, origin = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[0, -1, 1, 2]])
    got = report(hidden, [Group([0, 1, 2], report=Report())], ids, origin, head, MASK, None)
    logprobs_of = (hidden @ head.weight.T).log_softmax(-1)
    want = torch.stack((logprobs_of[0, 3], logprobs_of[1, 5], logprobs_of[2, 6]))
    torch.testing.assert_close(got.float(), want, rtol=0, atol=1e-5)


def test_a_certain_token_has_no_more_than_all_the_probability() -> None:
    hidden, head = torch.full((T, 1), 60.0), Head(torch.linspace(-1, 1, V)[:, None])
    ids, origin = torch.full((1, T), V - 1), torch.arange(T)[None]
    got = report(hidden, [Group(list(range(T)), report=Report(top=1))], ids, origin, head, MASK, None)
    chosen, best, token = got.view(T, 3).unbind(-1)
    assert torch.equal(chosen, best) and (best <= 0).all() and (token == V - 1).all()


class Widest(TorchDispatchMode):
    """The most elements in a row of a result."""

    columns = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim() == 2 and result.shape[0] == R * T and result.is_floating_point():
            self.columns = max(self.columns, result.shape[1])
        return result


def test_whole_logits_are_never_made() -> None:
    hidden, head = torch.randn(R * T, H), Head(torch.randn(V, H))
    ids, origin = torch.randint(0, V, (R, T)), torch.arange(T).repeat(R, 1)
    group = Group(list(range(R * T)), Sampling(0.5, 3, 0.9, 0.0, 7), report=Report(top=2, ids=(1, 2)))
    with Widest() as widest:
        report(hidden, [group], ids, origin, head, MASK, None)
    assert widest.columns < V / 2
