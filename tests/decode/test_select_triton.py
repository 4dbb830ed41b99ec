"""The selection kernel: in Triton's interpreter against torch, and compiled for the devices that it is meant for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sglang_llada.decode import select as selection
from sglang_llada.decode.select import Best, Head, Lowered
from tests.kernels import ARCHITECTURES, INTERPRETED, compiled, run_interpreted

MASK = 3

if INTERPRETED:
    from sglang_llada.decode import select_triton

    def agree(hidden: Tensor, head: Head, count: int, lowered: Lowered | None = None) -> Best:
        """The kernel's answer, once it is known to be torch's."""
        want = selection.finish(selection.reduce(hidden, head, MASK, count, lowered=lowered))
        out = selection.finish(select_triton.reduce(hidden, head, MASK, count, lowered=lowered))
        sure = want.prob > 0  # of candidates that are not there any id will do
        assert torch.equal(out.token.where(sure, -1), want.token.where(sure, -1))
        torch.testing.assert_close(out.prob, want.prob, rtol=1e-6, atol=0)
        return out

    def exact(*shape: int) -> Tensor:
        """Numbers whose products add up without rounding, in half precision too; ties are many."""
        return torch.randint(-4, 5, shape) / 4

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("positions", "vocabulary", "width"), [(1, 130, 16), (65, 257, 40), (64, 128, 64)])
    def test_shapes_and_dtypes(dtype: torch.dtype, positions: int, vocabulary: int, width: int) -> None:
        torch.manual_seed(positions)
        hidden, weight = exact(positions, width).to(dtype), exact(vocabulary, width).to(dtype)
        agree(hidden, Head(weight), 1)

    @pytest.mark.parametrize("count", [1, 2, 3, 4])
    def test_runners_up_with_ties_over_tiles_and_slices(count: int) -> None:
        weight = torch.zeros(700, 16)
        weight[[3, 130, 131, 400, 699], 0] = 1.0
        out = agree(torch.eye(16)[:2], Head(weight, first=0), count)
        assert out.token[0].tolist() == [130, 131, 400, 699][:count]
        assert out.token[1].tolist() == [0, 1, 2, 4][:count]

    def test_a_shard_names_its_own_ids_and_may_hold_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(select_triton, "SLICES", 2)
        assert agree(exact(5, 16), Head(exact(300, 16), first=1000), 2).token.min() >= 1000

    def test_fewer_candidates_than_asked_for() -> None:
        agree(exact(3, 16), Head(exact(2, 16), first=2), 3)

    @pytest.mark.parametrize("first", [0, 1000])
    def test_lowered_logits(first: int) -> None:
        hidden, head = exact(130, 16), Head(exact(200, 16), first)
        plain = agree(hidden, head, 2)
        tokens = torch.randint(first - 1, first + 201, (130,)).where(torch.arange(130) % 3 > 0, plain.token[:, 0])
        out = agree(hidden, head, 2, Lowered(tokens, torch.randint(0, 17, (130,)) / 4))
        assert not torch.equal(out.token, plain.token)

    def test_what_is_not_finite_spoils_its_position_only() -> None:
        hidden = exact(4, 16)
        hidden[2, 5] = float("nan")
        out = selection.finish(select_triton.reduce(hidden, Head(exact(200, 16)), MASK, 1))
        assert (out.token[:, 0] == -1).tolist() == [False, False, True, False]

    @pytest.mark.parametrize("wanted", [0, 1, 64, 65, 130])
    def test_positions_that_nobody_wants_are_left_alone(wanted: int) -> None:
        hidden, head = exact(130, 16), Head(exact(200, 16))
        whole = selection.finish(select_triton.reduce(hidden, head, MASK, 2))
        some = selection.finish(select_triton.reduce(hidden, head, MASK, 2, torch.tensor(wanted)))
        assert torch.equal(some.token[:wanted], whole.token[:wanted])
        assert torch.equal(some.prob[:wanted], whole.prob[:wanted])

    def test_no_positions() -> None:
        assert select_triton.reduce(torch.zeros(0, 16), Head(exact(200, 16)), MASK, 2).logit.shape == (0, 2)

else:

    def test_the_kernel_agrees_with_torch_in_the_interpreter() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    @pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
    def test_it_compiles(arch: int, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from sglang_llada.decode import select_triton as kernels

        used = compiled(
            kernels.kernel,
            {"hidden": dtype, "weight": dtype, "logit": "fp32", "token": "i32", "peak": "fp32", "total": "fp32"}
            | {"wanted": "i64", "lowered": "i64", "lowered_by": "fp32"},
            ["positions", "vocabulary", "width", "first", "mask_id", "per_slice"],
            {
                "BOUNDED": True,
                "LOWERED": True,
                "COUNT": 1,
                "PADDED": 1,
                "POSITIONS": kernels.POSITIONS,
                "IDS": kernels.IDS,
                "WIDTH": kernels.WIDTH[4 if dtype == "fp32" else 2],
                "UPCAST": False,
            },
            arch,
            tmp_path,
            num_warps=kernels.WARPS,
            num_stages=kernels.STAGES,
        )
        with capsys.disabled():
            print(f"\nselect sm_{arch} {dtype}: {used}")
        assert used["STACK"] <= (64 if dtype == "fp32" else 0), "registers are spilled"
        assert used["shared"] <= 163 * 1024  # of an A100, the smallest of them
