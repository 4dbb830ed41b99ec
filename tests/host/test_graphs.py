"""The strict replay of captured steps: what it refuses, planted violation by planted violation, and what it serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_llada.blocks import Request, next_step
from sglang_llada.config import DecodeConfig
from sglang_llada.decode.contract import StepOut, Tokens
from sglang_llada.decode.decide import decide
from sglang_llada.decode.head import Head
from sglang_llada.decode.layout import fresh, idle, layout_of, numbers
from sglang_llada.errors import IntegrityError
from sglang_llada.host.engine import executor as executor_module
from sglang_llada.host.engine.executor import Executor
from sglang_llada.host.operations import kernel
from sglang_llada.host.replay.backend import ReplayBackend
from sglang_llada.host.replay.recording import no_host_reads, recording

pytestmark = pytest.mark.host

T, WIDTH, SIZE = 4, 8, 3  # block, hidden width, rows of the captured size


@dataclass
class Output:
    """As the host's record."""

    hidden_states: Tensor


class Toy:
    """A runner of one captured size whose forward is an embedding and whatever a test plants after it."""

    def __init__(self, after: Callable[[Toy, Tensor], Tensor]) -> None:
        torch.manual_seed(0)
        self.after = after
        self.embedding = nn.Embedding(50, WIDTH)
        self.buffers = SimpleNamespace(input_ids=torch.zeros(SIZE * T, dtype=torch.int64))
        self.packed = torch.zeros(SIZE, layout_of(T, Tokens(9)).width, dtype=torch.int64)
        self.decider = SimpleNamespace(layout=layout_of(T, Tokens(9)))
        self.bs = SIZE
        self.factor = torch.full((), 2.0)
        self.model_runner = SimpleNamespace(
            model=SimpleNamespace(model=SimpleNamespace(word_embeddings=self.embedding))
        )
        self.backend = ReplayBackend(self)  # type: ignore[arg-type]  # a stand-in
        self.backend.capture_one("size", self.forward)

    def forward(self) -> Output:
        hidden = self.after(self, self.embedding(self.buffers.input_ids))
        return Output(hidden)

    def replay(self, ids: list[int]) -> Tensor:
        """Hidden states of the rows that `ids` fill."""
        self.buffers.input_ids[: len(ids)] = torch.tensor(ids)
        rows = len(ids) // T
        out: Tensor = self.backend.replay("size", SimpleNamespace(batch_size=rows)).hidden_states
        return out[: len(ids)]


def by_row(toy: Toy, x: Tensor) -> Tensor:
    """What a model may do: rows do not see each other."""
    rows = x.view(SIZE, T, WIDTH)
    return (rows - rows.mean(1, keepdim=True)).flatten(0, 1) * toy.factor


@torch.no_grad()
def test_a_replay_gives_what_a_run_of_the_same_rows_gives() -> None:
    toy = Toy(by_row)
    full = list(range(SIZE * T))
    want = toy.replay(full).clone()
    assert want.isfinite().all() and want.abs().max() > 0
    assert torch.equal(toy.replay(full[:T]), want[:T])  # beside padded rows
    toy.factor.fill_(3.0)  # written in place, so a graph would see it
    assert torch.equal(toy.replay(full), want * 1.5)


@torch.no_grad()
def test_results_lie_where_the_captured_ones_do() -> None:
    toy = Toy(by_row)
    first = toy.replay(list(range(T)))
    kept = first.clone()
    second = toy.replay(list(range(T, 2 * T)))
    assert torch.equal(first, second) and not torch.equal(first, kept)


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "int": lambda x: int(x.sum()),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.detach().numpy(),
    "cpu": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("read", READS)
@torch.no_grad()
def test_planted_read_on_the_host(read: str) -> None:
    with pytest.raises(IntegrityError, match="on the host within a captured step"):
        Toy(lambda toy, x: (READS[read](x), x)[1])


@torch.no_grad()
def test_planted_copy_from_the_host() -> None:
    with pytest.raises(IntegrityError, match="made from host memory"):
        Toy(lambda toy, x: x * torch.tensor([2.0]))


SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
}


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_planted_shape_that_depends_on_data(shape: str) -> None:
    with pytest.raises(IntegrityError, match="depends on data"):
        Toy(lambda toy, x: (SHAPES[shape](x), x)[1])


@torch.no_grad()
def test_planted_tensor_beside_the_static_ones() -> None:
    """A new tensor in each step: a graph would go on reading the one of the capture."""
    toy = Toy(by_row)
    toy.factor = torch.full((), 3.0)
    with pytest.raises(IntegrityError, match="captured was"):
        toy.replay(list(range(T)))


@torch.no_grad()
def test_planted_number_that_changes() -> None:
    counts = iter(range(100))
    toy = Toy(lambda toy, x: x + float(next(counts)))
    with pytest.raises(IntegrityError, match="captured was"):
        toy.replay(list(range(T)))


@torch.no_grad()
def test_planted_operation_that_comes_and_goes() -> None:
    counts = iter(range(100))
    toy = Toy(lambda toy, x: x if next(counts) < 2 else x + 1)
    with pytest.raises(IntegrityError, match="operations; captured were"):
        toy.replay(list(range(T)))


@torch.no_grad()
def test_planted_effect_of_padded_rows() -> None:
    toy = Toy(lambda toy, x: x - x.mean(0))
    toy.replay(list(range(SIZE * T)))  # no row is padded
    with pytest.raises(IntegrityError, match="padded rows"):
        toy.replay(list(range(T)))


class NoReads(TorchDispatchMode):
    """Refuses operations whose result is a value on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert torch.Tag.data_dependent_output not in func.tags, func
        return func(*args, **(kwargs or {}))


def test_a_step_reads_from_the_device_at_its_end_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that our code does for a step outside the host's forward; the forward itself is what graphs check."""
    monkeypatch.setattr(executor_module, "enable_num_token_non_padded", lambda: False)
    requests = [
        Request(
            f"r{n}",
            list(range(n)),
            8,
            frozenset(),
            DecodeConfig.defaults(T),
            block_size=T,
            mask_id=9,
            fresh=fresh(T, Tokens(9)),
            numbers=numbers(DecodeConfig.defaults(T)),
        )
        for n in (1, 9)
    ]
    for slot, request in enumerate(requests):
        request.slot = slot
        request.admit(0)
    head, tokens = Head(torch.randn(50, WIDTH)), Tokens(9)

    def forward(batch: ForwardBatch) -> Any:
        hidden = torch.randn(batch.input_ids.shape[0], WIDTH)
        return SimpleNamespace(can_run_graph=False, logits_output=Output(hidden))

    def decider(hidden: Tensor, ids: Tensor, table: Tensor, count: int, **_: Any) -> StepOut:
        return decide(hidden, ids, table, count, head=head, block_size=T, tokens=tokens)

    decider.block_size, decider.idle = T, idle(T, tokens)  # type: ignore[attr-defined]  # a stand-in
    decider.layout = layout_of(T, tokens)  # type: ignore[attr-defined]  # a stand-in
    decider.last = torch.zeros(9, T + 4, dtype=torch.int64)  # type: ignore[attr-defined]  # a stand-in
    decider.model = SimpleNamespace(config=SimpleNamespace(vocab_size=50))  # type: ignore[attr-defined]  # a stand-in
    runner = SimpleNamespace(
        device="cpu",
        decode_cuda_graph_runner=None,
        lora_manager=None,
        req_to_token_pool=SimpleNamespace(req_to_token=torch.arange(4 * T * 2).view(2, -1)),
        kv_index_translator=SimpleNamespace(bind_own_plan=lambda batch: None),
        forward=forward,
    )
    executor = Executor(runner, decider)  # type: ignore[arg-type]  # a stand-in
    plan = next_step(requests, 100)
    with no_host_reads(), NoReads():
        launched = executor.launch(plan)
        with pytest.raises(IntegrityError, match="on the host"):
            executor.read(launched)
    landed = executor.read(launched)
    assert landed is not None
    decisions = landed.decisions(landed.blocking | landed.deferrable)
    assert [decision.request for decision in decisions] == requests
    assert all([len(b.tokens) for b in decision.blocks or []] == [T] for decision in decisions)


def test_what_a_kernel_does_inside_is_its_own() -> None:
    @kernel
    def sums(x: Tensor) -> Tensor:
        return torch.tensor([sum(row) for row in x.tolist()])

    with recording() as first:
        sums(torch.ones(2, 2))
    with recording() as second:
        sums(torch.ones(2, 2))
    assert [name for name, _ in first.operations][-1].endswith("sums")
    second.must_equal(first)
    with recording() as other, pytest.raises(IntegrityError):
        sums(torch.ones(3, 2))
        other.must_equal(first)
