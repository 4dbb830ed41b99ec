"""The selection kernels: in Triton's interpreter against torch, and compiled for the devices they are meant for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_llada.decode import select as selection
from sglang_llada.decode.head import Best, Head, Lowered, Partial
from tests.kernels import ARCHITECTURES, INTERPRETED, compiled, occupancy, run_interpreted

MASK = 3

if INTERPRETED:
    from sglang_llada.decode import select_triton
    from sglang_llada.decode.select_triton import Form

    def agree(hidden: Tensor, head: Head, count: int, lowered: Lowered | None = None) -> Best:
        """The kernels' answer, once it is known to be torch's."""
        want = selection.select(hidden, head, MASK, count, lowered=lowered)
        out = select_triton.select(hidden, head, MASK, count, None, None, lowered)
        sure = want.prob > 0  # of candidates that are not there any id will do
        assert torch.equal(out.token.where(sure, -1), want.token.where(sure, -1))
        torch.testing.assert_close(out.prob, want.prob, rtol=1e-6, atol=0)
        return out

    def exact(*shape: int) -> Tensor:
        """Numbers whose products add up without rounding, in half precision too; ties are many."""
        return torch.randint(-4, 5, shape) / 4

    def use(monkeypatch: pytest.MonkeyPatch, form: Form) -> None:
        """Run everything in one form."""
        monkeypatch.setattr(select_triton, "form_of", lambda hidden, invariant: form)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        ("positions", "vocabulary", "width"), [(1, 130, 16), (65, 257, 40), (64, 128, 64), (33, 900, 20), (129, 300, 8)]
    )
    def test_shapes_and_dtypes(dtype: torch.dtype, positions: int, vocabulary: int, width: int) -> None:
        torch.manual_seed(positions)
        hidden, weight = exact(positions, width).to(dtype), exact(vocabulary, width).to(dtype)
        agree(hidden, Head(weight), 1)

    @pytest.mark.parametrize("upright", [False, True])
    @pytest.mark.parametrize(("positions", "vocabulary"), [(1, 20), (20, 140), (70, 40)])
    def test_forms(upright: bool, positions: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Fewer tiles than slices and more, tiles that are not full, more blocks than programs."""
        use(monkeypatch, Form(16, 32, 16, warps=4, stages=2, programs=1, upright=upright))
        agree(exact(positions, 24).bfloat16(), Head(exact(vocabulary, 24).bfloat16()), 2)

    @pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
    def test_runners_up_with_ties_over_tiles_and_slices(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = torch.zeros(700, 16)
        weight[[3, 130, 131, 400, 699], 0] = 1.0
        use(monkeypatch, Form(16, 32, 16, warps=4, stages=2, programs=1))
        monkeypatch.setattr(select_triton, "FOLD_RECORDS", 2)  # folded in several rounds
        out = agree(torch.eye(16)[:2], Head(weight, first=0), count)
        assert out.token[0].tolist() == [130, 131, 400, 699, 0][:count]
        assert out.token[1].tolist() == [0, 1, 2, 4, 5][:count]

    @pytest.mark.parametrize("first", [0, 1000])
    def test_lowered_logits(first: int) -> None:
        hidden, head = exact(130, 16), Head(exact(200, 16), first)
        plain = agree(hidden, head, 2)
        tokens = torch.randint(first - 1, first + 201, (130,)).where(torch.arange(130) % 3 > 0, plain.token[:, 0])
        out = agree(hidden, head, 2, Lowered(tokens, torch.randint(0, 17, (130,)) / 4))
        assert not torch.equal(out.token, plain.token)

    def test_a_shard_names_its_own_ids_and_may_hold_no_mask() -> None:
        assert agree(exact(5, 16), Head(exact(300, 16), first=1000), 2).token.min() >= 1000

    @pytest.mark.parametrize("wanted", [None, 3])
    @pytest.mark.parametrize("count", [1, 3])
    def test_shards_are_put_together_as_torch_does(count: int, wanted: int | None) -> None:
        hidden, weight = exact(7, 16), exact(600, 16)
        shards = [Head(part, 200 * rank) for rank, part in enumerate(weight.split(200))]
        number = None if wanted is None else torch.tensor(wanted)

        def records(reduce: Any, *more: Any) -> list[Tensor]:
            return [reduce(hidden, shard, MASK, count, *more).pack() for shard in shards]

        want = selection.select(hidden, shards[0], MASK, count, lambda mine: records(selection.reduce))
        out = select_triton.select(
            hidden, shards[1], MASK, count, lambda mine: records(select_triton.reduce, number), number
        )
        assert torch.equal(out.token[:wanted], want.token[:wanted])
        torch.testing.assert_close(out.prob[:wanted], want.prob[:wanted], rtol=1e-6, atol=0)

    def test_a_record_is_that_of_torch() -> None:
        hidden, head = exact(5, 16), Head(exact(300, 16))
        want, out = selection.reduce(hidden, head, MASK, 3), select_triton.reduce(hidden, head, MASK, 3)
        assert isinstance(out, Partial)
        assert torch.equal(out.logit, want.logit) and torch.equal(out.token, want.token)
        assert torch.equal(out.peak, want.peak)
        torch.testing.assert_close(out.total, want.total, rtol=1e-6, atol=0)

    def test_fewer_candidates_than_asked_for() -> None:
        agree(exact(3, 16), Head(exact(2, 16), first=2), 3)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_not_finite_spoils_its_position_only(bad: float) -> None:
        hidden = exact(4, 16)
        hidden[2, 5] = bad
        out = select_triton.select(hidden, Head(exact(200, 16)), MASK, 2, None, None)
        assert (out.token == -1).tolist() == [[False] * 2, [False] * 2, [True] * 2, [False] * 2]
        assert (out.prob[2] == 0).all()

    @pytest.mark.parametrize("wanted", [0, 1, 16, 17, 33])
    def test_positions_that_nobody_wants_are_left_alone(wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
        use(monkeypatch, Form(16, 32, 16, warps=4, stages=2, programs=1))
        hidden, head = exact(33, 16), Head(exact(70, 16))
        whole = select_triton.select(hidden, head, MASK, 2, None, None)
        some = select_triton.select(hidden, head, MASK, 2, None, torch.tensor(wanted))
        assert torch.equal(some.token[:wanted], whole.token[:wanted])
        torch.testing.assert_close(some.prob[:wanted], whole.prob[:wanted], rtol=1e-6, atol=0)

    def test_an_invariant_head_says_the_same_of_a_position_whatever_is_beside_it(
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """To the last bit, of any number of positions; a position's place in its tile is the device's to ignore."""
        monkeypatch.setattr(select_triton, "INVARIANT_SLICES", 3)
        torch.manual_seed(0)
        agree(exact(140, 16).half(), Head(exact(300, 16).half(), invariant=True), 2)
        hidden, head = torch.randn(140, 16).half(), Head(torch.randn(300, 16).half(), invariant=True)
        together = select_triton.select(hidden, head, MASK, 2, None, None)
        for some in (slice(0, 1), slice(0, 40), slice(128, 140)):
            alone = select_triton.select(hidden[some], head, MASK, 2, None, torch.tensor(1000))
            assert torch.equal(alone.token, together.token[some]) and torch.equal(alone.prob, together.prob[some])

    def test_no_positions() -> None:
        assert select_triton.reduce(torch.zeros(0, 16), Head(exact(200, 16)), MASK, 2).logit.shape == (0, 2)

else:
    from sglang_llada.decode import select_triton as kernels

    def test_the_kernels_agree_with_torch_in_the_interpreter() -> None:
        run_interpreted(__file__)

    def test_operators_tell_their_shapes_without_running() -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            hidden, weight = torch.empty(40, 16), torch.empty(300, 16)
            best = kernels.select(hidden, Head(weight), MASK, 2, lambda mine: [mine, mine], None)
        assert best.token.shape == best.prob.shape == (40, 2) and best.token.dtype == torch.int64

    CASES = [
        *(("bf16", form, 80, False) for form in kernels.HALF.values()),  # not fetched by tile
        *(("bf16", form, 90, True) for form in kernels.HOPPER.values()),
        *(("bf16", form, 100, True) for form in kernels.HALF.values()),
        *(("fp32", form, arch, False) for form in kernels.SINGLE.values() for arch in ARCHITECTURES),
    ]

    @pytest.mark.parametrize(("dtype", "form", "arch", "by_tile"), CASES)
    def test_it_compiles(
        dtype: str, form: kernels.Form, arch: int, by_tile: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """For a hidden size of 2048; fetched by tile where the device has a unit for that."""
        kinds = {
            name: f"tensordesc<{dtype}[{rows}, {form.width}]>" if by_tile else f"{dtype}"
            for name, rows in (("hidden", form.positions), ("weight", form.ids))
        }
        used = compiled(
            kernels.kernel,
            kinds | {"records": "fp32", "wanted": "i64", "less": "i64", "by": "fp32"},
            ["positions", "vocabulary", "first", "mask_id"],
            kernels.constants(form, 2048, 1) | {"BOUNDED": True, "LOWERED": True, "BY_TILE": by_tile, "UPCAST": False},
            arch,
            tmp_path,
            multiples=() if by_tile else ("hidden", "weight"),
            num_warps=form.warps,
            num_stages=form.stages,
        )
        with capsys.disabled():
            print(f"\nselect sm_{arch} {dtype} {form}: {used}, {occupancy(used, form.warps)} programs a multiprocessor")
        assert used["STACK"] <= (64 if dtype == "fp32" else 0), "registers are spilled"

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_the_fold_compiles(arch: int, tmp_path: Path) -> None:
        used = compiled(
            kernels.fold_kernel,
            {"records": "fp32", "token": "i64", "prob": "fp32", "wanted": "i64"},
            ["part_stride", "field_stride", "position_stride", "parts", "positions", "block"],
            {
                "BOUNDED": True,
                "FINAL": True,
                "COUNT": 5,
                "PADDED": 8,
                "POSITIONS": kernels.FOLD_POSITIONS,
                "RECORDS": kernels.FOLD_RECORDS,
            },
            arch,
            tmp_path,
            num_warps=kernels.FOLD_WARPS,
        )
        assert used["STACK"] == 0, "registers are spilled"
