"""A step's kernels: in Triton's interpreter against decide.py on random rows, and compiled."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from sglang_llada.config import RUN, DecodeConfig, Sampling
from sglang_llada.decode.contract import Tokens
from sglang_llada.decode.decide import decide
from sglang_llada.decode.head import Head
from sglang_llada.decode.layout import fresh, idle, numbers, pack, record, unpack
from sglang_llada.decode.whole import Group
from tests.kernels import ARCHITECTURES, INTERPRETED, compiled, run_interpreted

MASK, V, WIDTH = 9, 40, 8
TOKENS = Tokens(MASK)

if INTERPRETED:
    from sglang_llada.decode import decide_triton, sampling, sampling_triton, select_triton
    from sglang_llada.decode.select_triton import Form

    @pytest.fixture(autouse=True)
    def small(monkeypatch: pytest.MonkeyPatch) -> None:
        """Sizes at which the interpreter is quick and loops are not over at once."""
        form = Form(64, 64, 16, warps=4, stages=2, programs=1)
        monkeypatch.setattr(select_triton, "form_of", lambda hidden, invariant: form)
        for module in (sampling, sampling_triton):  # more passes of fewer bounds
            monkeypatch.setattr(module, "BOUNDS", 16)
            monkeypatch.setattr(module, "PASSES", 6)
        monkeypatch.setattr(decide_triton, "ROWS", tl.constexpr(4))  # counted in several rounds

    def a_record(rng: random.Random, T: int) -> list[int]:
        """Of a row in any state, or of one that decides nothing."""
        if rng.random() < 0.2:
            return idle(T, TOKENS)
        name = rng.choice(["threshold", "joint_threshold", RUN])
        params = DecodeConfig.defaults(T).from_left_to_right if name == RUN else DecodeConfig.defaults(T, name)
        how = {"threshold": rng.choice([0.05, 0.1, 0.95]), "steps": rng.randint(1, T)}
        if params.edits:
            how |= {"edit_threshold": rng.choice([0.05, 0.3]), "max_post_edit_steps": rng.randint(0, 3)}
            how["penalty_lambda"] = rng.choice([0.0, 0.5, 3.0])
        cut = rng.choice([(1 << 30, 1.0, 0.0), (5, 1.0, 0.0), (1 << 30, 0.8, 0.0), (9, 0.9, 0.1)])
        sampling = Sampling(rng.choice([0.5, 1.5]), *cut, rng.randrange(-(2**63), 2**63))
        params = replace(params, **how, sampling=sampling if rng.random() < 0.5 else None)
        is_open = rng.choice([0, (1 << T) - 1, rng.randrange(1 << T), rng.randrange(1 << T) & rng.randrange(1 << T)])
        state = [rng.randint(0, T - 1), rng.randint(0, 3)]
        # As bits of an int64.
        sets = [each - (1 << 64) if each >> 63 else each for each in (is_open, rng.randrange(1 << T))]
        return record(sets[0], sets[1] if params.edits else 0, numbers(params), state, rng.randrange(99) * T)

    def both(hidden: Tensor, ids: Tensor, table: Tensor, head: Head, T: int, count: int) -> tuple[Tensor, Tensor]:
        """What the kernels say and what torch says, packed; that they say it unpacked too is checked."""
        want = decide(hidden, ids, table, count, head=head, block_size=T, tokens=TOKENS, drawing=count)
        got = decide_triton.decide(hidden, ids, table, count, head, T, MASK, drawing=count)
        for name in ("ids", "open", "done", "written", "origin"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        assert torch.equal(got.state.step, want.state.step) and torch.equal(got.state.edits, want.state.edits)
        assert got.state.memory is not None and got.state.memory.shape == (len(table), 0)
        packed, again = pack(got, trace=True), pack(replace(got, packed=None), trace=True)
        assert torch.equal(packed, again) and torch.equal(pack(got), pack(replace(got, packed=None)))
        return packed, pack(want, trace=True)

    @pytest.mark.parametrize(("T", "rows"), [(1, 3), (6, 1), (6, 9), (32, 5), (64, 2)])
    @pytest.mark.parametrize("seed", range(2))
    def test_rows_of_all_kinds(T: int, rows: int, seed: int) -> None:
        rng = random.Random(100 * T + seed)
        torch.manual_seed(seed)
        table = torch.tensor([a_record(rng, T) for _ in range(rows)])
        # Few values, so that equal probabilities are many; some rows have nothing but the mask among their tokens.
        hidden, head = torch.randint(-2, 3, (rows * T, WIDTH)) / 2, Head(torch.randint(-2, 3, (V, WIDTH)) / 2)
        ids = torch.where(torch.rand(rows * T) < 0.5, MASK, torch.randint(0, V, (rows * T,)))
        block, *_ = unpack(ids, table, T, TOKENS)
        wanted = block.open | block.editable
        got, want = both(hidden, ids, table, head, T, int(wanted.sum()) if seed else rows * T)
        assert torch.equal(got[:, :-T], want[:, :-T])
        prob, expected = (each[:, -T:].contiguous().view(torch.float64)[wanted] for each in (got, want))
        torch.testing.assert_close(prob, expected, rtol=1e-6, atol=0)

    def test_a_row_whose_logits_are_not_finite_says_so() -> None:
        T = 6
        table = torch.tensor([record(2**T - 1, 0, numbers(DecodeConfig.defaults(T)), fresh(T, TOKENS))] * 3)
        hidden = torch.rand(3 * T, WIDTH)
        hidden[T + 2] = float("nan")
        got, want = both(hidden, torch.full((3 * T,), MASK), table, Head(torch.rand(V, WIDTH)), T, 3 * T)
        assert torch.equal(got[:, : T + 1], want[:, : T + 1]) and (got[1, :T] == -1).all()

    def test_positions_that_choose_for_themselves_are_put_among_what_was_selected() -> None:
        """As requests with a bias do, beside others; selected anew, or taken from a step over the same rows."""
        T, rng = 6, random.Random(3)
        torch.manual_seed(3)
        table = torch.tensor([a_record(rng, T) for _ in range(9)])
        hidden, head = torch.randn(9 * T, WIDTH), Head(torch.randn(V, WIDTH))
        ids = torch.full((9 * T,), MASK)
        block, *_ = unpack(ids, table, T, TOKENS)
        wanted = (block.open | block.editable).flatten().nonzero()[:, 0].tolist()
        favoured = torch.arange(V) % 7 * 5.0
        groups = [
            Group(wanted[1:4], shape=lambda x: x + favoured),
            Group(wanted[7:], Sampling(1.0, 1 << 30, 1.0, 0.0, 0), shape=lambda x: x - favoured),
        ]
        options: dict[str, Any] = {"head": head, "block_size": T, "tokens": TOKENS, "drawing": 9 * T}
        want = pack(decide(hidden, ids, table, 9 * T, groups=groups, **options))
        plain = decide_triton.decide(hidden, ids, table, 9 * T, head, T, MASK, drawing=9 * T)
        assert not torch.equal(pack(plain), want)
        for found in (None, plain):
            got = decide_triton.decide(hidden, ids, table, 9 * T, head, T, MASK, None, groups, 9 * T, found)
            assert torch.equal(pack(got), want)

    def test_the_table_may_be_part_of_a_wider_one() -> None:
        T, rng = 6, random.Random(0)
        wide = torch.tensor([[*range(4), *a_record(rng, T)] for _ in range(4)])
        hidden, ids, head = torch.rand(4 * T, WIDTH), torch.full((4 * T,), MASK), Head(torch.rand(V, WIDTH))
        got, _ = both(hidden, ids, wide[:, 4:], head, T, 4 * T)
        want, _ = both(hidden, ids, wide[:, 4:].contiguous(), head, T, 4 * T)
        assert torch.equal(got[:, : T + 4], want[:, : T + 4])

else:
    from sglang_llada.decode import decide_triton

    def test_the_kernels_agree_with_torch_in_the_interpreter() -> None:
        run_interpreted(__file__)

    def test_a_step_is_four_launches() -> None:
        """Operators seen under fake tensors: ours, each of which is one launch, and nothing else."""
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.utils._python_dispatch import TorchDispatchMode

        seen: list[str] = []

        class Seen(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                seen.append(func.name())
                return func(*args, **(kwargs or {}))

        T = 32
        with FakeTensorMode(), Seen():
            hidden, ids = torch.empty(4 * T, 16), torch.empty(4 * T, dtype=torch.int64)
            table, head = torch.empty(4, decide_triton.RECORD, dtype=torch.int64), Head(torch.empty(V, 16))
            seen.clear()
            out = pack(decide_triton.decide(hidden, ids, table, 4 * T, head, T, MASK))
        assert out.shape == (4, T + len(fresh(T, TOKENS)) + 2)
        ours = ("gather_wanted", "reduce_slices", "finish_records", "decide_rows")
        launches = [name for name in seen if not name.startswith("prim::") and name not in VIEWS]
        assert launches == [f"sglang_llada::{name}" for name in ours]

    VIEWS = {"aten::slice.Tensor", "aten::select.int"}

    KERNELS = {
        decide_triton.gather_kernel: (
            {"hidden": "bf16", "ids": "i64", "table": "i64", "gathered": "bf16", "spans": "i32", "place": "i32"}
            | {"less": "i64", "by": "fp32", "key": "i64", "how": "fp32"},
            ["stride", "count"],
            {"HIDDEN": 2048},
        ),
        decide_triton.rows_kernel: (
            dict.fromkeys(("ids", "table", "token", "packed"), "i64")
            | {
                "place": "i32",
                "prob": "fp32",
                "prob_out": "fp32",
                "open_out": "u8",
                "done_out": "u8",
                "written_out": "u8",
            },
            ["stride"],
            {},
        ),
    }

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    @pytest.mark.parametrize("kernel", KERNELS, ids=["gather", "rows"])
    def test_they_compile(kernel: object, arch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arrays, integers, constants = KERNELS[kernel]
        shape = {"BLOCK": 32, "PADDED": 32, "RECORD": decide_triton.RECORD}
        warps = 4 if kernel is decide_triton.gather_kernel else 1
        constants = constants | shape
        used = compiled(kernel, arrays, integers, constants, arch, tmp_path, multiples=list(arrays), num_warps=warps)
        with capsys.disabled():
            print(f"\n{list(KERNELS).index(kernel)} sm_{arch}: {used}")
        assert used["STACK"] == 0, "registers are spilled"
