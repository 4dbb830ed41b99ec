"""An answer step by step: which token came when, how sure the network was, and what was edited, inserted and deleted.

Made of what a server streams of a request with `trace` and `stream_mode` "denoise" (docs/decoding.md): each snapshot
has the tokens behind the committed ones. Positions count from the answer's first token; blocks from the one in which
the prompt ends, of which the first `given` positions are the prompt's.

Snapshots of a decode that deletes and inserts do not say what moved where; `aligned` finds the least that explains
them. Step and probability of a token stay the same while it is only moved, which mostly leaves one explanation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

# What each change of a block costs as an explanation: a hole that was written, a token that became another one or a
# hole, a position that went, a hole that came. What moves over the end, or fills it up, costs nothing.
WRITTEN, CHANGED, GONE, COME = 1, 3, 4, 4
NEVER = 10**6


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands at a position.

    Attributes:
        token: None where open.
        step: the step of its block, from 1, that put it there; None where open.
        confidence: its probability then; None where open.
        was: tokens that stood there before.
        inserted: whether a step made room for it.
    """

    token: int | None = None
    step: int | None = None
    confidence: float | None = None
    was: tuple[int, ...] = ()
    inserted: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """All that stood there, the last one now."""
        return self.was if self.token is None else (*self.was, self.token)

    def then(self, now: Cell) -> Cell:
        """What stands there now, with what is known of the place."""
        was = self.was if self.token in (None, now.token) else self.tokens
        return replace(now, was=was, inserted=self.inserted)


OPEN = Cell()
BLANK = asdict(OPEN)


@dataclass(frozen=True, slots=True)
class Deleted:
    """A position that a step took away: where it was, and its token; None where it was open."""

    at: int
    token: int | None


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands after a step.

    Attributes:
        step: its number among the request's, from 1; 0 before the first.
        forwards: those that the request took part in so far.
        committed: how many tokens are decided for good.
        first: the first position that the step could change.
        cells: from there on.
        deleted: what the step took away.
        steps: of each block that took part, its number and how many steps it has had.
    """

    step: int
    forwards: int
    committed: int
    first: int
    cells: tuple[Cell, ...]
    deleted: tuple[Deleted, ...] = ()
    steps: tuple[tuple[int, int], ...] = ()

    def json(self) -> dict[str, Any]:
        """As JSON; of cells only what an open one does not have."""
        cells = [{key: value for key, value in asdict(cell).items() if value != BLANK[key]} for cell in self.cells]
        return {**asdict(self), "cells": cells}

    def tokens(self) -> Iterator[int]:
        """All tokens that it shows, or that went."""
        for cell in self.cells:
            yield from cell.tokens
        yield from (each.token for each in self.deleted if each.token is not None)


class Trajectory:
    """The frames of one answer, made of a server's outputs as they come.

    Args:
        block_size: positions of a block.
        prompt_tokens: tokens before the answer.
        moves: whether the decode inserts and deletes.
    """

    def __init__(self, block_size: int, prompt_tokens: int, *, moves: bool) -> None:
        self.block_size, self.moves = block_size, moves
        self.given = prompt_tokens % block_size
        self.step = self.committed = 0
        self.cells = [OPEN] * (block_size - self.given)
        self.begun = {0: 1}  # of each block the first step that it took part in

    def begin(self) -> Frame:
        """What stands before the first step."""
        return Frame(0, 0, 0, 0, tuple(self.cells))

    def take(self, output: Mapping[str, Any]) -> Iterator[Frame]:
        """The frames that an output of the server brings: it holds all since the request began.

        A snapshot whose tokens are not there yet waits for the next output.
        """
        meta, tokens = output["meta_info"], output["output_ids"]
        decided = list(map(Cell, tokens, meta["step_maps"], meta["dllm_confidences"]))
        for snapshot in meta.get("dllm_snapshots", ())[self.step :]:
            if snapshot["committed"] > len(decided) and meta["finish_reason"] is None:
                return
            standing = map(Cell, snapshot["token_ids"], snapshot["steps"], snapshot["confidences"])
            first, self.step = self.committed, snapshot["step"]
            self.committed = min(snapshot["committed"], len(decided))
            # Forwards that decide nothing for the request come before those that do.
            yield self.after(
                first, [*decided[first : self.committed], *standing], meta["dllm_nfe"] - meta["dllm_steps"]
            )

    def after(self, first: int, now: Sequence[Cell], before: int) -> Frame:
        """The frame of a step that left `now` from the first position on; `before` forwards came before all steps."""
        cells, deleted, steps = self.cells[:first], list[Deleted](), list[tuple[int, int]]()
        for block in range((first + self.given) // self.block_size, self.block_of_last(self.cells) + 1):
            start, end = max(self.start_of(block), first), self.start_of(block + 1)
            stood, stands = self.cells[start:end], now[start - first : end - first]
            steps.append((block, self.step - self.begun[block] + 1))
            came, gone = aligned(stood, stands, steps[-1][1]) if self.moves else (stood[: len(stands)], [])
            cells += [was.then(cell) for was, cell in zip(came, stands, strict=True)]
            deleted += [Deleted(start + i, stood[i].token) for i in gone]
        cells += [OPEN] * (first + len(now) - len(cells))
        for block in range(self.block_of_last(self.cells) + 1, self.block_of_last(cells) + 1):
            self.begun[block] = self.step + 1
        self.cells = cells
        return Frame(
            self.step, before + self.step, self.committed, first, tuple(cells[first:]), tuple(deleted), tuple(steps)
        )

    def start_of(self, block: int) -> int:
        """The position at which a block's part of the answer begins."""
        return max(block * self.block_size - self.given, 0)

    def block_of_last(self, cells: Sequence[Cell]) -> int:
        """The block that holds the last of the answer's first positions."""
        return (len(cells) - 1 + self.given) // self.block_size


def aligned(stood: Sequence[Cell], stands: Sequence[Cell], step: int) -> tuple[list[Cell], list[int]]:
    """Of each position of a block after its step, what was there before; and which of the ones before are gone.

    The cheapest explanation; of equally cheap ones the one in which positions go as late as they may.
    """
    n, m = len(stood), len(stands)
    cost = [[0] * (m + 1) for _ in range(n + 1)]  # of what is left from i and j on; a cut end is free

    def keep(i: int, j: int) -> int:
        before, now = stood[i], stands[j]
        if now.step is not None and now.step < step:  # it only moved
            same = (now.token, now.step, now.confidence) == (before.token, before.step, before.confidence)
            return 0 if same else NEVER
        return (WRITTEN if now.token is not None else 0) if before.token is None else CHANGED

    def come(i: int, j: int) -> int:
        return NEVER if stands[j].token is not None else COME if i < n else 0

    for i in reversed(range(n + 1)):
        for j in reversed(range(m)):
            cost[i][j] = cost[i][j + 1] + come(i, j)
            if i < n:
                cost[i][j] = min(cost[i][j], cost[i + 1][j] + GONE, cost[i + 1][j + 1] + keep(i, j))
    cells, gone, i = list[Cell](), list[int](), 0
    for j in range(m):
        while i < n and cost[i][j] == cost[i + 1][j] + GONE < cost[i + 1][j + 1] + keep(i, j):
            gone.append(i)
            i += 1
        if i < n and cost[i][j] == cost[i + 1][j + 1] + keep(i, j):
            cells.append(stood[i])
            i += 1
        else:
            cells.append(replace(OPEN, inserted=True) if i < n else OPEN)
    return cells, gone
