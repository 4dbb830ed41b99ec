"""The output embedding, and what selection makes of it; select.py says how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Head:
    """Rows of the output embedding, [v, H]: those of the token ids from `first` on.

    Where they are a shard: slots, what the largest shard has; vocabulary, what all have together. invariant: what is
    said of a position must not depend, to the last bit, on how many others are asked about.
    """

    weight: Tensor
    first: int = 0
    slots: int = 0
    vocabulary: int = 0
    invariant: bool = False


@dataclass(frozen=True, slots=True)
class Partial:
    """Of each position over part of the vocabulary; minus infinity where there are fewer than k candidates.

    logit: fp32 [P, k], the largest logits, falling. token: int64 [P, k], their ids.
    peak: fp32 [P], the largest logit, the mask's included. total: fp32 [P], sum of exp(logit - peak).
    """

    logit: Tensor
    token: Tensor
    peak: Tensor
    total: Tensor

    def pack(self) -> Tensor:
        """All of it as fp32 [P, 2k + 2]; ids below 2**24 survive exactly."""
        return torch.cat((self.logit, self.token.float(), self.peak[:, None], self.total[:, None]), dim=-1)

    @staticmethod
    def unpack(packed: Tensor) -> Partial:
        """The inverse of pack."""
        k = packed.shape[-1] // 2 - 1
        return Partial(packed[:, :k], packed[:, k : 2 * k].long(), packed[:, -2], packed[:, -1])


@dataclass(frozen=True, slots=True)
class Best:
    """Of each position the k best tokens, int64 [P, k], best first, and their probabilities, fp32 [P, k].

    A position whose logits hold a NaN or plus infinity, or only minus infinity, has tokens -1 and probabilities 0.
    """

    token: Tensor
    prob: Tensor


class Lowered(NamedTuple):
    """Of each position one token whose logit counts as lower: its id, int64 [P], and by how much, fp32 [P]."""

    token: Tensor
    by: Tensor

    def at(self, positions: Tensor) -> Lowered:
        """Those of some positions."""
        return Lowered(self.token[positions], self.by[positions])


# Given this rank's tensor, every rank's, in order of rank.
Exchange = Callable[[Tensor], Sequence[Tensor]]
