"""Router math: which experts a token visits and with which weights.

LLaDA2.0 and 2.1 choose for each token within its best groups of experts (route, DeepSeek-V3 style); LLaDA2.2 chooses
within a pool that the block's tokens share (route_blocks). Scores are sigmoids; the expert bias takes part in the
choice only, never in the weights. Ties go to the lowest expert id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sglang_llada.llada2.config import Llada2Config


@dataclass(frozen=True, slots=True)
class Routing:
    """The chosen experts of each token: weights fp32 [N, K], and ids int64 [N, K]."""

    weights: Tensor
    ids: Tensor


def router_of(c: Llada2Config) -> Callable[[Tensor, Tensor], Routing]:
    """The routing that a configuration asks for, as a function of logits fp32 [N, E] and expert bias fp32 [E].

    The weights are normalised if the configuration says so, and not scaled.
    """
    if c.expert_capacity is None:
        how = partial(route, num_groups=c.n_group, top_groups=c.topk_group)
    else:
        how = partial(route_blocks, block_size=c.block_size, capacity=c.expert_capacity)
    return partial(how, top_k=c.num_experts_per_tok, normalise=c.norm_topk_prob)


def route(
    logits: Tensor,
    expert_bias: Tensor,
    *,
    num_groups: int,
    top_groups: int,
    top_k: int,
    normalise: bool,
) -> Routing:
    """Group-limited top-k.

    Args:
        logits: router logits, fp32 [N, E].
        expert_bias: added to the scores for selection only, fp32 [E].
    """
    scores = logits.float().sigmoid()  # [N, E]
    biased = scores + expert_bias
    groups = biased.unflatten(-1, (num_groups, -1))  # [N, G, E / G]
    # score(group) = sum of its two best biased scores
    group_scores = groups.topk(2, dim=-1).values.sum(-1)  # [N, G]
    best_groups = first_largest(group_scores, top_groups)
    allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, best_groups, True)
    candidates = groups.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(-2)
    return weigh(scores, first_largest(candidates, top_k), normalise)


def route_blocks(
    logits: Tensor, expert_bias: Tensor, *, block_size: int, capacity: int, top_k: int, normalise: bool
) -> Routing:
    """Top-k within the `capacity` experts that score best for any token of the block.

    Args:
        logits: router logits of whole blocks of `block_size` tokens, fp32 [B * T, E].
        expert_bias: added to the scores for selection only, fp32 [E].
    """
    if logits.is_cuda:
        from sglang_llada.llada2 import router_triton

        return Routing(*router_triton.route_blocks(logits, expert_bias, block_size, capacity, top_k, normalise))
    scores = logits.float().sigmoid()
    biased = (scores + expert_bias).unflatten(0, (-1, block_size))  # [B, T, E]
    best = biased.amax(1)  # [B, E]
    pool = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, first_largest(best, capacity), True)
    candidates = biased.masked_fill(~pool[:, None], float("-inf")).flatten(0, 1)
    return weigh(scores, first_largest(candidates, top_k), normalise)


PARTS = 3  # numbers of bf16 that sum to one of fp32


def split(weight: Tensor) -> Tensor:
    """A router's weight fp32 [E, H] as PARTS parts in bf16 one above the other, [3 E, H].

    Each holds what the ones before it left of 24 bits, so that they sum to the weight (if it is not below 2**-110).
    Products of bf16 are exact in fp32: three of them on tensor cores, summed there in fp32, are what a router in fp32
    asks for, at a fraction of what a product of fp32 costs.
    """
    parts, rest = [], weight.float()
    for _ in range(PARTS):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].float()
    return torch.cat(parts)


def products(x: Tensor, parts: Tensor) -> Tensor:
    """Router logits fp32 [N, 3 E] of x bf16 [N, H] by part; their sum over the parts is the logits."""
    if x.is_cuda:
        return torch.mm(x, parts.T, out_dtype=torch.float32)
    return x.float() @ parts.float().T


def summed(by_part: Tensor) -> Tensor:
    """The logits fp32 [N, E], the small parts first."""
    first, second, third = by_part.unflatten(-1, (PARTS, -1)).unbind(1)
    return first + (second + third)


def weigh(scores: Tensor, ids: Tensor, normalise: bool) -> Routing:
    """The unbiased scores of the chosen experts as their weights."""
    weights = scores.gather(-1, ids)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(weights, ids)


def first_largest(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest along the last dimension, best first; of equals the lowest index.

    torch.topk leaves the order of equals open, which would make ranks and batch sizes disagree.
    """
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]
