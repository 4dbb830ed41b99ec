"""Norms, rotation and the write of keys and values in one kernel: against torch in the interpreter, and compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels import ARCHITECTURES, INTERPRETED, compiled, run_interpreted

if INTERPRETED:
    from sglang_llada.llada2.rotary_triton import rotate_and_store

    def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        return (x32 * (x32.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(x.dtype)

    def turned(x: Tensor, angles: Tensor) -> Tensor:
        """x [N, heads, D], angles [N, half]."""
        half = angles.shape[1]
        a, b, rest = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(x.dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("heads", "kv_heads", "width", "rotated"), [(6, 2, 32, 16), (4, 4, 16, 16), (3, 1, 24, 8)])
    def test_heads_and_pool(dtype: torch.dtype, heads: int, kv_heads: int, width: int, rotated: int) -> None:
        torch.manual_seed(heads)
        n, eps = 5, 1e-6
        qkv = torch.randn(n, (heads + 2 * kv_heads) * width).to(dtype)
        q_norm, k_norm = torch.rand(width).to(dtype), torch.rand(width).to(dtype)
        positions, places = torch.randint(0, 40, (n,)), torch.randperm(12)[:n]
        table = torch.arange(40)[:, None] / 10 ** torch.linspace(0, 2, rotated // 2)
        pools = torch.zeros(2, 12, kv_heads, width).to(dtype)
        cos_sin = torch.cat((table.cos(), table.sin()), dim=-1)
        q, k = rotate_and_store(qkv, positions, q_norm, k_norm, cos_sin, eps, pools[0], pools[1], places)
        q_in, k_in, v = (
            each.unflatten(-1, (-1, width))
            for each in qkv.split([heads * width, kv_heads * width, kv_heads * width], -1)
        )
        want_q = turned(normed(q_in, q_norm, eps), table[positions])
        want_k = turned(normed(k_in, k_norm, eps), table[positions])
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
        torch.testing.assert_close(q.view_as(want_q), want_q, **close)
        torch.testing.assert_close(k.view_as(want_k), want_k, **close)
        assert torch.equal(pools[0, places], k.view_as(want_k)) and torch.equal(pools[1, places], v)
        others = [place for place in range(12) if place not in places.tolist()]
        assert not pools[:, others].any()

else:

    def test_the_kernel_agrees_with_torch_in_the_interpreter() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_it_compiles(arch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """At the published shape: 16 and 4 heads of 128, of which 64 turn."""
        from sglang_llada.llada2 import rotary_triton

        bf16 = dict.fromkeys(("qkv", "q_norm", "k_norm", "k_pool", "v_pool", "q", "k"), "bf16")
        used = compiled(
            rotary_triton.kernel,
            bf16 | {"positions": "i64", "cos_sin": "fp32", "places": "i64"},
            ["qkv_stride", "k_stride", "v_stride"],
            rotary_triton.constants(16, 4, 128, 64),
            arch,
            tmp_path,
            floats=["eps"],
            num_warps=rotary_triton.WARPS,
        )
        with capsys.disabled():
            print(f"\nrotation sm_{arch}: {used}")
        assert used["STACK"] == 0, "registers are spilled"
