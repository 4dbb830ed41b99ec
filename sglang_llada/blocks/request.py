"""One request as blocks: what is known, which block is live, how far the KV is final, and the moves between phases.

Positions count from the start of the prompt. Blocks are aligned to absolute positions, so the prompt's tail (its length
modulo the block size) is the given part of the first live block. Positions [0, filled) have final KV; all positions
before the live block are known; the live block's KV is written by every step and counts for nothing until a FILL or
SEAL row writes it again.

        admit            caught up            decided, ended ...
WAITING -----> FILLING -----------> DECODING -----------> DONE
   ^  |           |                    |                   ^
   |  +-- end ----|------- end --------|-------- end ------+
   +------------- retract -------------+

| move      | from                       | to                                                       |
|-----------|----------------------------|----------------------------------------------------------|
| admit     | WAITING                    | FILLING, or as after fill when nothing is left to fill   |
| fill      | FILLING, DECODING (a SEAL) | DECODING once all before the live block is filled, or    |
|           |                            | DONE if no token was asked for                           |
| decide    | DECODING                   | the same, or DONE when the answer is complete             |
| retract   | FILLING, DECODING          | WAITING; the live block keeps what it has decided         |
| end       | any but DONE               | DONE                                                     |

This file knows nothing of KV pages: the host's pools are told by the scheduler, which checks that both agree.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from sglang_llada.errors import IntegrityError

P = TypeVar("P")


class Phase(enum.Enum):
    """Where a request stands; see the table above."""

    WAITING = enum.auto()
    FILLING = enum.auto()
    DECODING = enum.auto()
    DONE = enum.auto()


class Ending(enum.Enum):
    """Why the blocks of a request ended. STOP and LENGTH come from its own tokens, the others from outside."""

    STOP = enum.auto()
    LENGTH = enum.auto()
    OUTSIDE = enum.auto()


@dataclass(slots=True)
class Block:
    """The live block: tokens at [start, start + T), the mask id where open; the first `given` are the prompt's."""

    start: int
    given: int
    tokens: list[int]
    open: list[bool]
    state: Sequence[int]  # what the decode carries from step to step; only kept here
    steps: int = 0  # decode steps made on it


@dataclass(slots=True)
class Request(Generic[P]):
    """A request's blocks. `P` is whatever the decode wants to know per request; it is only carried here."""

    rid: str
    prompt: Sequence[int]
    max_new_tokens: int
    stop_ids: frozenset[int]
    params: P
    block_size: int
    mask_id: int
    fresh: Sequence[int] = ()  # the state of a block that no step has seen
    edits: bool = False  # whether what is decided may change until its block is done
    reopens: bool = False  # whether it may even become open again
    most_steps: int | None = None  # the decode's bound on steps of a block; None: one for each position
    phase: Phase = Phase.WAITING
    ending: Ending | None = None  # written by end() and decide()
    output: list[int] = field(default_factory=list)  # committed tokens: everything before them is decided
    filled: int = 0  # positions with final KV, a multiple of the block size; written by admit, fill, retract
    block: Block = field(init=False)
    forwards: int = 0  # NFE: forwards the request took part in
    steps_per_block: list[int] = field(default_factory=list)  # decode steps of each decided block, the live one last
    blocks_reported: int = 0  # how many of those report_steps() has given out

    def __post_init__(self) -> None:
        self._open_block()

    # --- moves, in the order of a request's life -------------------------------------------------------------------

    def admit(self, cached: int) -> None:
        """Take part in steps; the KV of [0, cached) is final already (whole blocks, at most up to the live one)."""
        self._expect("admit", Phase.WAITING)
        if cached % self.block_size or not 0 <= cached <= self.block.start:
            raise IntegrityError(f"{self.rid}: {cached} cached positions before a live block at {self.block.start}")
        self.filled = cached
        self.phase = Phase.FILLING
        self._catch_up()

    def fill(self, blocks: int) -> None:
        """Note that a launched forward writes the final KV of the next `blocks` blocks."""
        self._expect("fill", Phase.FILLING, Phase.DECODING)
        self.filled += blocks * self.block_size
        if self.filled > self.block.start:
            raise IntegrityError(f"{self.rid}: filled to {self.filled}, past the live block at {self.block.start}")
        self._catch_up()

    def decide(self, tokens: list[int], still_open: list[bool], done: bool, state: Sequence[int] = ()) -> int:
        """Take a step's decisions for the live block; returns how many tokens it committed.

        Commits the decided run after the tokens known so far; where that may still change, nothing before the block is
        done. A stop token or the last allowed token in that run completes the answer (DONE). A block that is done makes
        way for the next one. If its last step changed nothing, that step's forward has written its final KV.

        Raises:
            IntegrityError: the step changed a fixed position, decided nothing, or was one too many.
        """
        self._expect("decide", Phase.DECODING)
        block = self.block
        self._check_step(tokens, still_open, done)
        unchanged = tokens == block.tokens and still_open == block.open
        block.tokens, block.open, block.state = tokens, still_open, state
        block.steps += 1
        self.steps_per_block[-1] = block.steps
        if self.edits and not done:
            return 0
        before = len(self.output)
        for i in range(self.known - block.start, self.block_size):
            if still_open[i]:
                return len(self.output) - before
            self.output.append(tokens[i])
            if tokens[i] in self.stop_ids:
                self.end(Ending.STOP)
                return len(self.output) - before
            if len(self.output) == self.max_new_tokens:
                self.end(Ending.LENGTH)
                return len(self.output) - before
        self._open_block()
        if unchanged:
            self.filled = self.block.start
        return len(self.output) - before

    def retract(self) -> None:
        """Give up all KV. The live block keeps its decisions, so that the output goes on as if nothing had happened."""
        self._expect("retract", Phase.FILLING, Phase.DECODING)
        self.filled = 0
        self.phase = Phase.WAITING

    def end(self, ending: Ending) -> None:
        """Take no further part."""
        if self.phase is Phase.DONE:
            raise IntegrityError(f"{self.rid}: ended twice ({self.ending}, then {ending})")
        self.phase, self.ending = Phase.DONE, ending

    def report_steps(self, *, ended: bool) -> list[int]:
        """Decode steps of the blocks decided since the last call; with `ended`, of the live one too."""
        upto = len(self.steps_per_block) - (0 if ended else 1)
        news = [steps for steps in self.steps_per_block[self.blocks_reported : upto] if steps]
        self.blocks_reported = max(self.blocks_reported, upto)
        return news

    # --- queries ----------------------------------------------------------------------------------------------------

    @property
    def known(self) -> int:
        """Positions whose token is given or committed."""
        return len(self.prompt) + len(self.output)

    @property
    def unfilled(self) -> int:
        """Blocks before the live one whose final KV is not written yet."""
        return (self.block.start - self.filled) // self.block_size

    @property
    def wants_decode(self) -> bool:
        """Whether it has a live block to decide at all: a request for 0 tokens only fills."""
        return self.max_new_tokens > 0

    def tokens_at(self, start: int) -> list[int]:
        """The block's tokens at `start`: known ones, or the live block as it stands."""
        if start == self.block.start:
            return self.block.tokens
        stop, n = start + self.block_size, len(self.prompt)
        if stop <= n:
            return list(self.prompt[start:stop])
        return list(self.prompt[start:n]) + self.output[max(start - n, 0) : stop - n]

    def check(self) -> None:
        """Raise IntegrityError if the fields contradict one another."""
        b, T = self.block, self.block_size
        facts = [
            (b.start % T == 0 and len(b.tokens) == T and len(b.open) == T, "the live block is misshapen"),
            (self.filled % T == 0 and 0 <= self.filled <= b.start, f"filled {self.filled} of {b.start}"),
            (self.phase is not Phase.WAITING or self.filled == 0, "waiting, yet holds KV"),
            (self.phase is not Phase.DECODING or self.unfilled <= 1, f"decoding with {self.unfilled} unfilled blocks"),
            (
                self.phase is Phase.DONE or b.start <= self.known <= b.start + T,
                f"{self.known} known positions and a live block at {b.start}",
            ),
            (len(self.output) <= max(self.max_new_tokens, 0), f"{len(self.output)} tokens of {self.max_new_tokens}"),
            ((self.phase is Phase.DONE) == (self.ending is not None), f"{self.phase} with ending {self.ending}"),
        ]
        wrong = [text for holds, text in facts if not holds]
        if wrong:
            raise IntegrityError(f"{self.rid}: " + "; ".join(wrong))

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        if self.filled == self.block.start:
            self.phase = Phase.DECODING
            if self.max_new_tokens == 0:
                self.end(Ending.LENGTH)

    def _open_block(self) -> None:
        start = self.known // self.block_size * self.block_size
        given = list(self.prompt[start:]) if start < len(self.prompt) else []
        holes = self.block_size - len(given)
        tokens, is_open = given + [self.mask_id] * holes, [False] * len(given) + [True] * holes
        self.block = Block(start, len(given), tokens, is_open, self.fresh)
        self.steps_per_block.append(0)

    def _check_step(self, tokens: list[int], still_open: list[bool], done: bool) -> None:
        was = self.block.open
        changed = [i for i, (t, old) in enumerate(zip(tokens, self.block.tokens, strict=True)) if t != old]
        kept = all(was[i] or (self.edits and i >= self.block.given) for i in changed)
        closed_only = all(before or not now for now, before in zip(still_open, was, strict=True))
        if not kept or not (closed_only or (self.reopens and not any(still_open[: self.block.given]))):
            raise IntegrityError(f"{self.rid}: a step changed a fixed position of the block at {self.block.start}")
        if any(was) and sum(still_open) == sum(was) and not self.reopens:
            raise IntegrityError(f"{self.rid}: a step decided nothing in the block at {self.block.start}")
        if done and any(still_open):
            raise IntegrityError(f"{self.rid}: the block at {self.block.start} is done with open positions")
        bound = self.block_size if self.most_steps is None else self.most_steps
        if self.block.steps + 1 + (not done) > bound:
            raise IntegrityError(f"{self.rid}: more than {bound} steps on the block at {self.block.start}")

    def _expect(self, move: str, *phases: Phase) -> None:
        if self.phase not in phases:
            raise IntegrityError(f"{self.rid}: cannot {move} while {self.phase.name}")
