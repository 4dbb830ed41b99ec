"""Routed experts on our CPU platform, in place of the host's torch loop.

The host's loop forgets `routed_scaling_factor` and indexes expert -1, which marks experts of other ranks under expert
parallelism. Both are put right here, for our model class of LLaDA2 and for the host's. Other models keep the host's
loop: many of them (DeepSeek, GLM) multiply by the factor themselves where there is no CUDA, and would apply it twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import Tensor

from sglang_llada.host.operations import kernel
from sglang_llada.llada2.config import ARCHITECTURE

TARGET = "sglang.srt.layers.moe.fused_moe_native.moe_forward_native"


ADOPTED: WeakSet[torch.nn.Module] = WeakSet()  # expert layers of LLaDA2 models; written by adopt()


def install() -> None:
    """Hook the host's function."""
    HookRegistry.register(TARGET, forward_adopted, HookType.AROUND)


def adopt(model: torch.nn.Module) -> None:
    """From now on run a loaded model's expert layers here, if it is LLaDA2: our class and the host's share the name."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE  # only the processes that load a model need it

    if type(model).__name__ == ARCHITECTURE:
        ADOPTED.update(module for module in model.modules() if isinstance(module, FusedMoE))


def forward_adopted(
    original: Callable[..., Tensor], layer: Any, x: Tensor, topk_output: Any, moe_runner_config: Any
) -> Tensor:
    """Adopted layers run here, others as the host has it."""
    forward = experts_forward if layer in ADOPTED else original
    return forward(layer, x, topk_output, moe_runner_config)


@kernel
def experts_forward(layer: Any, x: Tensor, topk_output: Any, moe_runner_config: Any, added: Any = None) -> Tensor:
    """Sum over a token's experts of weight x SwiGLU expert.

    Args:
        layer: has w13_weight [E, 2 I, H] (gate above up) and w2_weight [E, H, I] of this rank's experts.
        x: [N, H].
        topk_output: weights [N, K] and ids [N, K], the latter -1 for experts of other ranks.
        added: what adapters add to the experts (adapters.py), if there are any.
    """
    if moe_runner_config.activation != "silu" or moe_runner_config.apply_router_weight_on_input:
        raise NotImplementedError("only SwiGLU experts weighted on their output are implemented on this platform")
    weights, ids = topk_output.topk_weights, topk_output.topk_ids.long()
    if not layer.should_fuse_routed_scaling_factor_in_topk and moe_runner_config.routed_scaling_factor is not None:
        weights = weights * moe_runner_config.routed_scaling_factor
    experts, top_k = layer.w13_weight.shape[0], ids.shape[1]
    order = ids.flatten().argsort(stable=True)  # slots by expert, those of other ranks first
    counts = (ids.flatten() + 1).bincount(minlength=experts + 1).tolist()
    slots = order[counts[0] :]
    outs = [
        swiglu(x[tokens], layer.w13_weight[e], layer.w2_weight[e], () if added is None else list(added.of(e, tokens)))
        for e, tokens in enumerate((slots // top_k).split(counts[1 : experts + 1]))
        if len(tokens)
    ]
    by_slot = x.new_zeros(ids.numel(), x.shape[1])
    if outs:
        by_slot[slots] = torch.cat(outs)
    # Summed in the weights' fp32: adding in bf16 would round once per expert.
    return torch.einsum("nk,nkh->nh", weights, by_slot.view(*ids.shape, x.shape[1]).to(weights.dtype)).to(x.dtype)


def swiglu(x: Tensor, w13: Tensor, w2: Tensor, added: Sequence[tuple[Tensor, ...]] = ()) -> Tensor:
    """One expert; x [n, H].

    Args:
        added: of each adapter the rows of x that have it, and A and B of both products, of gate and up one below the
            other.
    """
    gate_up = F.linear(x, w13)
    for rows, a13, b13, _, _ in added:
        halves = zip(F.linear(x[rows], a13).chunk(2, dim=-1), b13.chunk(2), strict=True)
        gate_up[rows] += torch.cat([F.linear(part, b) for part, b in halves], dim=-1)
    gate, up = gate_up.chunk(2, dim=-1)
    inner = F.silu(gate) * up
    out = F.linear(inner, w2)
    for rows, _, _, a2, b2 in added:
        out[rows] += F.linear(F.linear(inner[rows], a2), b2)
    return out
