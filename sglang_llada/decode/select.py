"""From logits to scores: the best token of a position and its probability, nothing else of the vocabulary kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 256  # positions whose logits exist at once: memory is CHUNK x V, whatever the step's size


@dataclass(frozen=True, slots=True)
class Best:
    """Of each position: token int64 [P] and its probability fp32 [P].

    A position whose logits hold a NaN or only minus infinity has token -1 and probability 0.
    """

    token: Tensor
    prob: Tensor


def select(hidden: Tensor, head: Callable[[Tensor], Tensor], mask_id: int) -> Best:
    """Best token of each position and its probability.

    Args:
        hidden: normed hidden states of the positions, [P, H].
        head: gives logits [p, V] of hidden states [p, H].
        mask_id: never a candidate; it counts in the probability.
    """
    parts = [best(head(chunk).float(), mask_id) for chunk in hidden.split(CHUNK)]
    return Best(torch.cat([p.token for p in parts]), torch.cat([p.prob for p in parts]))


def best(logits: Tensor, mask_id: int) -> Best:
    """As select, of logits fp32 [P, V]; of equal logits the lowest id."""
    norm = logits.logsumexp(-1)
    candidates = logits.clone()
    candidates[:, mask_id] = float("-inf")
    token = candidates.argmax(-1)  # the first of equals, as torch documents
    prob = (candidates.gather(-1, token[:, None]).squeeze(-1) - norm).exp()
    sound = prob.isfinite() & norm.isfinite()
    return Best(token.where(sound, -1), prob.where(sound, 0.0))
