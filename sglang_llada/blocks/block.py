"""One live block, what a step makes of it, and what a request's decode may do with its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(slots=True)
class Block:
    """A live block: tokens at [start, start + T), the mask id where open; the first `given` are the prompt's.

    `fixed` are the positions that no step may change: those of the prompt, and what a canvas gives. Sets of positions
    are numbers, with bit i for position i, because every step asks about them.
    """

    start: int
    given: int
    fixed: int
    tokens: list[int]
    open: int
    state: Sequence[int]  # what the decode carries from step to step; only kept here
    notes: list[Any]  # of each position what the decode says of its token; only kept here, empty where not `noted`
    steps: int = 0  # decode steps made on it, edits of a done block included
    done: bool = False  # only edits from now on


class Decided(NamedTuple):
    """What a step made of a live block; `done`: no step follows but edits."""

    tokens: list[int]
    open: int
    done: bool
    state: Sequence[int] = ()
    notes: list[Any] | None = None  # None: as they were


@dataclass(frozen=True, slots=True)
class Rules:
    """What a request's decode may do with its blocks.

    Attributes:
        edits: whether what is decided may change until its block is done, or gone where that comes later.
        reopens: whether it may even become open again.
        whole_blocks: whether nothing of a block is committed before it is gone, as it must be where there are edits.
        most_steps: the decode's bound on steps of a block; None: one for each position.
        max_nfe: decode steps after which the request ends as it is; 0: no bound.
        window, live_blocks, next_block_share: see request.py.
        reads_prompt: whether the first live block runs once even if no token is asked for.
    """

    edits: bool = False
    reopens: bool = False
    whole_blocks: bool = False
    most_steps: int | None = None
    max_nfe: int = 0
    window: int = 1
    live_blocks: int = 1
    next_block_share: float = 0.0
    reads_prompt: bool = False
