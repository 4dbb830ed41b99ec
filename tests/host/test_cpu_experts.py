"""Routed experts on the CPU equal a loop over tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_llada.host.cpu.experts import experts_forward

pytestmark = pytest.mark.host

E, K, H, I, N = 6, 3, 8, 5, 7
SCALE = 2.5


def tensors(tokens: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """w13, w2, x, weights and ids; expert 5 has no token."""
    random = torch.Generator().manual_seed(0)
    w13, w2 = torch.randn(E, 2 * I, H, generator=random), torch.randn(E, H, I, generator=random)
    x, weights = torch.randn(tokens, H, generator=random), torch.rand(tokens, K, generator=random)
    ids = torch.rand(tokens, E - 1, generator=random).argsort(-1)[:, :K].int()
    return w13, w2, x, weights, ids


def run(
    w13: Tensor, w2: Tensor, x: Tensor, weights: Tensor, ids: Tensor, *, fused: bool = True, **config: Any
) -> Tensor:
    layer = SimpleNamespace(w13_weight=w13, w2_weight=w2, should_fuse_routed_scaling_factor_in_topk=fused)
    runner = {"activation": "silu", "apply_router_weight_on_input": False, "routed_scaling_factor": SCALE} | config
    return experts_forward(layer, x, SimpleNamespace(topk_weights=weights, topk_ids=ids), SimpleNamespace(**runner))


def naive(w13: Tensor, w2: Tensor, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for n in range(x.shape[0]):
        for weight, e in zip(weights[n], ids[n].tolist(), strict=True):
            if e >= 0:
                gate, up = w13[e, :I] @ x[n], w13[e, I:] @ x[n]
                out[n] += weight * (w2[e] @ (F.silu(gate) * up))
    return out


def test_equals_a_loop_over_tokens() -> None:
    torch.testing.assert_close(run(*tensors()), naive(*tensors()))


def test_the_scaling_factor_is_applied_once() -> None:
    """By the router, whose weights then carry it, or here."""
    w13, w2, x, weights, ids = tensors()
    want = naive(w13, w2, x, weights * SCALE, ids)
    torch.testing.assert_close(run(w13, w2, x, weights * SCALE, ids, fused=True), want)
    torch.testing.assert_close(run(w13, w2, x, weights, ids, fused=False), want)


def test_no_scaling_factor_is_one() -> None:
    torch.testing.assert_close(run(*tensors(), fused=False, routed_scaling_factor=None), naive(*tensors()))


def test_experts_of_other_ranks_are_skipped() -> None:
    w13, w2, x, weights, ids = tensors()
    ids = ids.masked_fill(ids % 2 == 0, -1)
    ids[3] = -1
    got = run(w13, w2, x, weights, ids)
    torch.testing.assert_close(got, naive(w13, w2, x, weights, ids))
    assert not got[3].any()


def test_two_ranks_sum_to_the_whole() -> None:
    w13, w2, x, weights, ids = tensors()
    half = E // 2
    parts = [
        run(
            w13[own : own + half],
            w2[own : own + half],
            x,
            weights,
            local.masked_fill((local < 0) | (local >= half), -1),
        )
        for own, local in ((0, ids), (half, ids - half))
    ]
    torch.testing.assert_close(parts[0] + parts[1], run(w13, w2, x, weights, ids))


def test_no_tokens_give_no_results() -> None:
    assert run(*tensors(0)).shape == (0, H)


@pytest.mark.parametrize("config", [{"activation": "gelu"}, {"apply_router_weight_on_input": True}])
def test_other_experts_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError):
        run(*tensors(), **config)
