"""The step contract: what every algorithm is given and gives back.

`step(block, scores, state, params) -> StepOut` has tensors with a leading row dimension in and new tensors out. It
changes no argument, treats rows independently of each other, reads nothing back to the host, and keeps the bound on a
block's steps that its file proves. Fixed positions keep their token, also when that token is the mask id.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sglang_llada.decode.head import Best


@dataclass(frozen=True, slots=True)
class BlockRows:
    """The live blocks of a step.

    ids: int64 [R, T], the mask id at open positions.
    open: bool [R, T], positions that may be decided.
    editable: bool [R, T], positions decided in this block that may be replaced. All others are fixed.
    """

    ids: Tensor
    open: Tensor
    editable: Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """What the network says of each position; only open and editable positions mean anything.

    token: int64 [R, T], the best token that is not the mask (of equals the lowest id).
    prob: fp32 [R, T], its softmax probability over the full vocabulary.
    candidates: int64 [R, T, K], the best tokens, the mask included, best first; None where no algorithm asks for them.
    chances: fp32 [R, T, K], their probabilities.
    """

    token: Tensor
    prob: Tensor
    candidates: Tensor | None = None
    chances: Tensor | None = None


@dataclass(frozen=True, slots=True)
class State:
    """What is carried from step to step of a block.

    step: int64 [R], steps made so far. edits: int64 [R], the post-edit steps counted so far.
    memory: int64 [R, M], what an algorithm remembers in a layout of its own, -1 all over in a fresh block.
    """

    step: Tensor
    edits: Tensor
    memory: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """Ids that mean something to a step; delete and split are -1 where the checkpoint has none."""

    mask: int
    delete: int = -1
    split: int = -1

    @property
    def indel(self) -> bool:
        """Whether the checkpoint inserts and deletes."""
        return self.delete >= 0


@dataclass(frozen=True, slots=True)
class Params:
    """Per-row parameters, fp32, int64 and bool [R], as config.DecodeConfig has them; the checkpoint's tokens."""

    threshold: Tensor
    steps: Tensor
    edit_threshold: Tensor
    max_post_edit_steps: Tensor
    cumulative_budget: Tensor
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class StepOut:
    """What a step made of its rows.

    ids: int64 [R, T] and open: bool [R, T] after the step. state: for the next one. done: bool [R], no step follows.
    written: bool [R, T], where the step put a token. prob: fp32 [R, T], its probability there. origin: int64 [R, T],
    where tokens stood that it did not put there. packed: all of this as decide.pack gives it with a trace, where one
    kernel made both. best: of the open and editable positions, in order, the best token, where that was selected apart.
    """

    ids: Tensor
    open: Tensor
    state: State
    done: Tensor
    written: Tensor
    prob: Tensor
    origin: Tensor
    packed: Tensor | None = None
    best: Best | None = None
    place: Tensor | None = None


Step = Callable[[BlockRows, Scores, State, Params], StepOut]


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A registered algorithm: its step and the report that defines it; whether it needs DELETE and SPLIT."""

    step: Step
    source: str
    indel: bool = False


# The search for where a distribution is cut, see sampling.py.
RANGE, BOUNDS, PASSES = 32.0, 64, 4


class Draws(NamedTuple):
    """How each of P positions is drawn.

    key: int64 [P], what its noise is made of. temperature: fp32 [P], 0 where nothing is drawn. top_k, top_p, least:
    fp32 [P], where its distribution is cut, infinite where they cut nothing; least is the logarithm of min_p.
    """

    key: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    least: Tensor

    @property
    def drawn(self) -> Tensor:
        """Whether anything is, bool [P]."""
        return self.temperature > 0

    @property
    def cut(self) -> Tensor:
        """Whether not all tokens stay, bool [P]."""
        return (self.top_k < math.inf) | (self.top_p < math.inf) | (self.least > -math.inf)

    def at(self, positions: Tensor) -> Draws:
        """Those of some positions."""
        return Draws(*(each[positions] for each in self))
