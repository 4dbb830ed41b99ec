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
    """

    token: Tensor
    prob: Tensor


@dataclass(frozen=True, slots=True)
class State:
    """What is carried from step to step of a block, int64 [R]: steps made so far, those of them with nothing open."""

    step: Tensor
    edits: Tensor


@dataclass(frozen=True, slots=True)
class Params:
    """Per-row parameters, fp32 and int64 [R], as config.DecodeConfig has them."""

    threshold: Tensor
    steps: Tensor
    edit_threshold: Tensor
    max_post_edit_steps: Tensor


@dataclass(frozen=True, slots=True)
class StepOut:
    """ids int64 [R, T] and open bool [R, T] after the step; state for the next one; done bool [R]: no step follows."""

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
