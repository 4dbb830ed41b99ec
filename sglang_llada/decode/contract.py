"""The step contract: what every algorithm is given and gives back.

`step(block, scores, state, params) -> StepOut` has tensors with a leading row dimension in and new tensors out. It
changes no argument, treats rows independently of each other, reads nothing back to the host, and decides at least one
open position of every row that has one. Fixed positions keep their token, also when that token is the mask id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockRows:
    """The live blocks of a step.

    ids: int64 [R, T], the mask id at open positions.
    open: bool [R, T], positions that may be decided. The others are fixed here: given or decided.
    """

    ids: Tensor
    open: Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """What the network says of each position; only open positions mean anything.

    token: int64 [R, T], the best token that is not the mask (of equals the lowest id).
    prob: fp32 [R, T], its softmax probability over the full vocabulary.
    """

    token: Tensor
    prob: Tensor


@dataclass(frozen=True, slots=True)
class State:
    """What an algorithm carries from step to step of a block; step: int64 [R], steps made so far."""

    step: Tensor


@dataclass(frozen=True, slots=True)
class Params:
    """Per-row parameters; threshold: fp32 [R]; steps: int64 [R], steps that a block may take at most."""

    threshold: Tensor
    steps: Tensor


@dataclass(frozen=True, slots=True)
class StepOut:
    """ids int64 [R, T] and open bool [R, T] after the step; state for the next one; done bool [R]: nothing open."""

    ids: Tensor
    open: Tensor
    state: State
    done: Tensor


Step = Callable[[BlockRows, Scores, State, Params], StepOut]


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A registered algorithm: its step and the report that defines it."""

    step: Step
    source: str
