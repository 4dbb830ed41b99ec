"""Router math: which experts a token visits and with which weights (LLaDA2.0 report; DeepSeek-V3 style grouping).

Scores are sigmoids; the expert bias takes part in the choice only, never in the weights. Ties go to the lowest
expert id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """The chosen experts of each token: weights fp32 [N, K], already scaled, and ids int64 [N, K]."""

    weights: Tensor
    ids: Tensor


def route(
    logits: Tensor,
    expert_bias: Tensor,
    *,
    num_groups: int,
    top_groups: int,
    top_k: int,
    normalise: bool,
    scale: float,
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
    ids = first_largest(candidates, top_k)
    weights = scores.gather(-1, ids)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(weights * scale, ids)


def first_largest(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest along the last dimension, best first; of equals the lowest index.

    torch.topk leaves the order of equals open, which would make ranks and batch sizes disagree.
    """
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]
