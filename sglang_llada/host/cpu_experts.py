"""Routed experts on our CPU platform, in place of the host's torch loop.

The host's loop forgets `routed_scaling_factor` and indexes expert -1, which marks experts of other ranks under expert
parallelism. Both are put right here, for our model class and for the host's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import Tensor

TARGET = "sglang.srt.layers.moe.fused_moe_native.moe_forward_native"


def install() -> None:
    """Replace the host's function."""
    HookRegistry.register(TARGET, experts_forward, HookType.REPLACE)


def experts_forward(layer: Any, x: Tensor, topk_output: Any, moe_runner_config: Any) -> Tensor:
    """Sum over a token's experts of weight x SwiGLU expert.

    Args:
        layer: has w13_weight [E, 2 I, H] (gate above up) and w2_weight [E, H, I] of this rank's experts.
        x: [N, H].
        topk_output: weights [N, K] and ids [N, K], the latter -1 for experts of other ranks.
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
    token = slots // top_k
    outs = [
        swiglu(part, layer.w13_weight[e], layer.w2_weight[e])
        for e, part in enumerate(x[token].split(counts[1 : experts + 1]))
        if part.shape[0]
    ]
    out = torch.zeros_like(x)
    if outs:
        out.index_add_(0, token, torch.cat(outs) * weights.flatten()[slots, None].to(x.dtype))
    return out


def swiglu(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """One expert; x [n, H]."""
    gate, up = F.linear(x, w13).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w2)
