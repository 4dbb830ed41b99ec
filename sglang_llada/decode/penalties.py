"""What requests may do to the logits of their positions before tokens are chosen, as functions of logits fp32 [p, V].

A position's own token, where it may still be edited, does not count against itself; tokens that are decided in the same
step do not count against each other.
"""

from __future__ import annotations

import torch
from torch import Tensor


def penalise(logits: Tensor, counts: Tensor, repetition: float, frequency: float, presence: float) -> Tensor:
    """Logits less `frequency` for each time and `presence` for the fact that a token was used, then scaled.

    Those of used tokens are divided by `repetition` if positive and multiplied by it if negative. counts: [p, V].
    """
    used = counts > 0
    logits = logits - frequency * counts - presence * used
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
    return torch.where(used, scaled, logits)


def counted(tokens: Tensor, own: Tensor, vocabulary: int) -> Tensor:
    """How often each token was used beside a position's own, fp32 [p, V].

    Args:
        tokens: all that were used, [n]; own: of each position its token, which is one of them, or -1, [p].
    """
    counts = torch.zeros(vocabulary, device=own.device).index_add(0, tokens, torch.ones_like(tokens, dtype=torch.float))
    has_own = (own >= 0).float()[:, None]
    return counts.repeat(len(own), 1).scatter_add(-1, own.clamp(min=0)[:, None], -has_own)


def add(logits: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
    """Logits with `values` [n] added at the token ids `tokens` [n]."""
    return logits.index_add(-1, tokens, values.expand(len(logits), -1))


def ban(logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """Logits where the token ids `tokens` [n] are impossible at positions `rows`, bool [p]."""
    listed = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device).index_fill(0, tokens, True)
    return logits.masked_fill(rows[:, None] & listed, float("-inf"))
