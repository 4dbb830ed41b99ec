"""The block routing kernel: in Triton's interpreter against torch, and compiled for the devices it is meant for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_llada.llada2.router import PARTS, products, route, route_blocks, split, summed
from tests.kernels import ARCHITECTURES, INTERPRETED, compiled, run_interpreted

if INTERPRETED:
    from sglang_llada.llada2 import router_triton

    @pytest.mark.parametrize("ties", [False, True])
    @pytest.mark.parametrize("normalise", [False, True])
    @pytest.mark.parametrize(
        ("blocks", "block_size", "experts", "capacity", "top_k"),
        [(1, 32, 16, 6, 4), (3, 32, 256, 48, 8), (2, 5, 12, 7, 3), (2, 8, 8, 8, 8), (0, 32, 16, 6, 4)],
    )
    def test_shapes_and_ties(
        ties: bool, normalise: bool, blocks: int, block_size: int, experts: int, capacity: int, top_k: int
    ) -> None:
        random = torch.Generator().manual_seed(experts)
        logits = torch.randn(blocks * block_size, experts, generator=random)
        bias = torch.randn(experts, generator=random) * 0.1
        if ties:
            logits, bias = torch.where(logits < 0, 0.0, 100.0), torch.randint(3, (experts,), generator=random) / 4
        want = route_blocks(logits, bias, block_size=block_size, capacity=capacity, top_k=top_k, normalise=normalise)
        weights, ids = router_triton.route_blocks(logits, bias, block_size, capacity, top_k, normalise)
        assert torch.equal(ids, want.ids)
        torch.testing.assert_close(weights, want.weights, rtol=1e-6, atol=0)

    @pytest.mark.parametrize(("ties", "shared"), [(False, 0.4), (True, 0.0)])
    @pytest.mark.parametrize(
        ("tokens", "experts", "groups", "top_groups", "top_k"),
        [(0, 16, 4, 2, 4), (5, 256, 8, 4, 8), (6, 16, 4, 2, 4), (5, 8, 1, 1, 3)],
    )
    def test_tokens_and_the_shared_expert(
        shared: float, ties: bool, tokens: int, experts: int, groups: int, top_groups: int, top_k: int
    ) -> None:
        random = torch.Generator().manual_seed(experts + tokens)
        x, weight = torch.randn(tokens, 24, generator=random).bfloat16(), torch.randn(experts, 24, generator=random)
        bias = torch.randn(experts, generator=random) * 0.1
        if ties:
            x, bias = x * 0, torch.randint(3, (experts,), generator=random) / 4
        by_part = products(x, split(weight))
        shape = {"num_groups": groups, "top_groups": top_groups, "top_k": top_k, "normalise": not ties}
        want = route(summed(by_part), bias, **shape)
        weights, ids = router_triton.route(by_part, bias, groups, top_groups, top_k, not ties, 2.5, shared)
        assert torch.equal(ids[:, :top_k].long(), want.ids)
        torch.testing.assert_close(weights[:, :top_k], 2.5 * want.weights, rtol=1e-6, atol=0)
        assert ids.shape[1] == top_k + (shared > 0)
        assert (ids[:, top_k:] == experts).all() and torch.allclose(weights[:, top_k:], torch.tensor(shared))

else:

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_the_routing_of_tokens_compiles(arch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """At the published shape: 8 of 256 experts, 4 of 8 groups, the shared one beside them."""
        from sglang_llada.llada2 import router_triton

        used = compiled(
            router_triton.route_kernel,
            {"by_part": "fp32", "expert_bias": "fp32", "weights": "fp32", "ids": "i32"},
            ["tokens"],
            router_triton.route_constants(PARTS, 256, 8, 4, 8, True, 0.4),
            arch,
            tmp_path,
            floats=["scale", "shared"],
            num_warps=router_triton.TOKENS,
        )
        with capsys.disabled():
            print(f"\nrouting of tokens sm_{arch}: {used}")
        assert used["STACK"] == 0, "registers are spilled"

    def test_the_kernel_agrees_with_torch_in_the_interpreter() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_it_compiles(arch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """At the published shape: 256 experts, 8 of a pool of 48, blocks of 32."""
        from sglang_llada.llada2 import router_triton

        used = compiled(
            router_triton.kernel,
            {"logits": "fp32", "expert_bias": "fp32", "weights": "fp32", "ids": "i64"},
            [],
            {
                "EXPERTS": 256,
                "BLOCK": 32,
                "CAPACITY": 48,
                "TOP_K": 8,
                "NORMALISE": True,
                "EXPERTS_PADDED": 256,
                "BLOCK_PADDED": 32,
                "TOP_K_PADDED": 8,
            },
            arch,
            tmp_path,
            num_warps=router_triton.WARPS,
        )
        with capsys.disabled():
            print(f"\nblock routing sm_{arch}: {used}")
        assert used["STACK"] == 0, "registers are spilled"
