"""One request as blocks: what is known, which block is live, how far the KV is final, and the moves between phases.

Positions count from the start of the prompt. Blocks are aligned to absolute positions, so the prompt's tail (its length
modulo the block size) is the given part of the first live block. Mostly one block is live; several are while earlier
ones may still be edited (`window`) or later ones are begun early (`live_blocks`), and all of them are rows of every
step. Positions [0, filled) have final KV; all positions before the first live block are known for good; the live
blocks' KV is written by every step and counts for nothing until a FILL or SEAL row writes it again.

A live block is done when its decode says so; it leaves, in order of position, when it and the `window` - 1 blocks after
it are done. Done but not gone, it takes edits only, and none where it might open again. The next block is opened, at
most one a step, when fewer than `live_blocks` are live from the first one that is not done on, and the last of them has
fewer than `next_block_share` of its positions open; but not with a stop token among their tokens, nor past the last
allowed token.

A canvas is an answer of which some tokens are given, anywhere. Given positions are fixed, and stop tokens count from
the last of them on. A block that is given as a whole is done when it begins, without a step: the next one may begin in
the same move, and its KV is filled as a prompt's, for which the request goes back to FILLING where it is much.

        admit                    load                  caught up            decided, ended ...
WAITING -----> (LOADING) -----------> FILLING -----------> DECODING -----------> DONE
   ^  |            |                     |                    |                   ^
   |  +--- end ----|-------- end --------|-------- end -------|-------- end ------+
   +--------------------------------- retract ----------------+

| move      | from                       | to                                                       |
|-----------|----------------------------|----------------------------------------------------------|
| admit     | WAITING                    | LOADING if cached KV is still on its way, else as load   |
| load      | LOADING                    | FILLING, or as after fill when nothing is left to fill   |
| fill      | FILLING, DECODING (a SEAL) | DECODING once all before the live blocks is filled, or   |
|           |                            | DONE if no token was asked for                           |
| decide    | DECODING                   | the same, or DONE when the answer is complete, or FILLING |
|           |                            | when more given blocks follow than decode rows may seal   |
| retract   | LOADING, FILLING, DECODING | WAITING; the live blocks keep what they have decided      |
| end       | any but DONE               | DONE                                                     |

This file knows nothing of KV pages: the host's pools are told by the scheduler, which checks that both agree.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from sglang_llada.blocks.block import Block, Decided, Rules
from sglang_llada.errors import IntegrityError

P = TypeVar("P")


class Phase(enum.Enum):
    """Where a request stands; see the table above."""

    WAITING = enum.auto()
    LOADING = enum.auto()
    FILLING = enum.auto()
    DECODING = enum.auto()
    DONE = enum.auto()


class Ending(enum.Enum):
    """Why the blocks of a request ended. STOP and LENGTH come from its own tokens, the others from outside."""

    STOP = enum.auto()
    LENGTH = enum.auto()
    OUTSIDE = enum.auto()


@dataclass(slots=True, eq=False)  # a request is itself, whatever another one has
class Request(Generic[P]):
    """A request's blocks. `P` is whatever the decode wants to know per request; it is only kept here."""

    rid: str
    prompt: Sequence[int]
    max_new_tokens: int
    stop_ids: frozenset[int]
    params: P
    block_size: int
    mask_id: int
    canvas: Sequence[int | None] = ()  # the answer as far as it is given, None where open; then max_new_tokens long
    fresh: Sequence[int] = ()  # the state of a block that no step has seen
    numbers: Sequence[int] = ()  # what a step must be told of `params`; only kept here
    shaping: Any = None  # what it does to its logits, if anything; only kept here
    plain: bool = True  # whether a step need not look at `params` and `shaping`; only kept here
    needs_host: bool = False  # whether the host has something to do with its logits between two of its steps
    noted: bool = False  # whether notes are kept on its tokens
    rare_stops: bool = False  # whether it has stop ids that most requests do not have; only kept here
    prefixes: Sequence[int] = ()  # of filling.prefixes(); only kept here
    adapter: str | None = None  # whose additions to the weights its rows run with; only kept here
    shown: list[Any] = field(default_factory=list)  # what is to be shown of its steps; only kept here
    told: Any = None  # what traces were told of it; only kept here
    # Whether the next step's rows are known before a step's decisions are taken, unless those finish the live block or
    # hold a stop token: there is just the one, and it does not hold the last allowed token. Written by _open_block().
    can_defer: bool = False
    ahead: Block | None = None  # what the next block will be; written by block_after()
    pace: int = 0  # positions that its last step decided
    slot: int = -1  # where the host keeps its KV; written by the scheduler, only kept here
    room: int = 0  # positions that have a place for KV there; the same
    rules: Rules = Rules()
    phase: Phase = Phase.WAITING
    ending: Ending | None = None  # written by end() and decide()
    # Positions whose token is given or committed: written by _commit beside `output`, as every step asks several times.
    known: int = 0
    output: list[int] = field(default_factory=list)  # committed tokens: everything before them is decided
    notes: list[Any] = field(default_factory=list)  # on each of them, where `noted`; None on what is given
    prompt_notes: dict[int, Any] = field(default_factory=dict)  # by position; only kept here
    filled: int = 0  # positions with final KV, a multiple of the block size; written by admit, fill, retract
    blocks: list[Block] = field(default_factory=list)  # the live ones, in order of position
    forwards: int = 0  # NFE: forwards the request took part in
    steps: int = 0  # decode steps
    steps_per_block: list[int] = field(default_factory=list)  # decode steps of each block that is gone
    notes_reported: int = 0
    stops_from: int = 0  # the position from which stop tokens count; written by __post_init__

    def __post_init__(self) -> None:
        self.known = len(self.prompt)
        last_given = max((i for i, token in enumerate(self.canvas) if token is not None), default=0)
        self.stops_from = self.known + last_given
        self._open_block(self.known // self.block_size * self.block_size)
        if self.blocks[0].done:
            self._advance([], spent=False)

    # --- moves, in the order of a request's life -------------------------------------------------------------------

    def admit(self, cached: int, *, loading: bool = False) -> None:
        """Take part in steps; the KV of [0, cached) is final already (whole blocks, at most up to the live one).

        With `loading` it will be: no step has rows of the request until load() says that it is there.
        """
        self._expect("admit", Phase.WAITING)
        if cached % self.block_size or not 0 <= cached <= self.live_from:
            raise IntegrityError(f"{self.rid}: {cached} cached positions before a live block at {self.live_from}")
        self.filled = cached
        self.phase = Phase.LOADING
        if not loading:
            self.load()

    def load(self) -> None:
        """Note that the KV of [0, filled) is there."""
        self._expect("load", Phase.LOADING)
        self.phase = Phase.FILLING
        self._catch_up()

    def take_part(self, fills: int) -> None:
        """Note that a forward with rows of it is launched; `fills` of them write the final KV of its next blocks."""
        self.forwards += 1
        if fills:
            self.fill(fills)

    def fill(self, blocks: int) -> None:
        """Note that a launched forward writes the final KV of the next `blocks` blocks."""
        self._expect("fill", Phase.FILLING, Phase.DECODING)
        self.filled += blocks * self.block_size
        if self.filled > self.live_from:
            raise IntegrityError(f"{self.rid}: filled to {self.filled}, past the live block at {self.live_from}")
        self._catch_up()

    def decide(self, news: Sequence[Decided]) -> int:
        """Take a step's decisions, one for each live block; returns how many tokens they committed.

        Commits what cannot change any more. A stop token or the last allowed token in what would be the answer now
        completes it (DONE), and so does the last step of max_nfe. Blocks that leave and that the step did not change
        have their final KV from that step's forward, if all before them do.

        Raises:
            IntegrityError: the step changed a fixed position, decided nothing, or was one too many.
        """
        if self.phase is not Phase.DECODING:
            self._expect("decide", Phase.DECODING)
        if len(news) != len(self.blocks):
            raise IntegrityError(f"{self.rid}: decisions for {len(news)} blocks, of which {len(self.blocks)} are live")
        same, before = list(map(self._take, self.blocks, news)), len(self.output)
        self.steps += 1
        if self.max_new_tokens == 0:
            self.end(Ending.LENGTH)
            return 0
        self._advance(same, spent=self.steps == self.rules.max_nfe)
        if self.canvas and self.phase is Phase.DECODING and self.unfilled >= self.rules.window + self.rules.live_blocks:
            self.phase = Phase.FILLING
        return len(self.output) - before

    def block_after(self) -> Block | None:
        """The block that follows the only live one, to be begun early; None if, as far as is known, none takes steps.

        Not live before the live one has left; what a step decides of it until then counts for nothing.
        """
        (last,) = self.blocks
        start = last.start + self.block_size
        if not self._goes_on_behind(last):
            return None
        if self.ahead is None or self.ahead.start != start:
            self.ahead = self._new_block(start)
        return None if self.ahead.done else self.ahead

    def retract(self) -> None:
        """Give up all KV. The live blocks stay as they are, and the output goes on as if nothing had happened."""
        self._expect("retract", Phase.LOADING, Phase.FILLING, Phase.DECODING)
        self.blocks = [replace(block) for block in self.blocks]  # others: whoever keeps rows of these has a lost place
        self.filled = 0
        self.phase = Phase.WAITING

    def end(self, ending: Ending) -> None:
        """Take no further part."""
        if self.phase is Phase.DONE:
            raise IntegrityError(f"{self.rid}: ended twice ({self.ending}, then {ending})")
        self.phase, self.ending = Phase.DONE, ending

    def abandon(self) -> None:
        """Take no further part, whatever a move that failed has left; it may have ended already."""
        if self.phase is not Phase.DONE:
            self.phase, self.ending = Phase.DONE, Ending.OUTSIDE

    def report_notes(self, upto: int) -> list[Any]:
        """Notes on the tokens since the last call, of the first `upto` tokens."""
        news = self.notes[self.notes_reported : upto]
        self.notes_reported += len(news)
        return news

    def standing(self) -> list[int | None]:
        """What stands behind the committed tokens in the live blocks: tokens that may change, None where open."""
        return [None if block.open >> i & 1 else block.tokens[i] for block, i in self._standing()]

    def standing_notes(self) -> list[Any]:
        """The notes on these, where `noted`; None where open, and on what is given."""
        return [None if block.open >> i & 1 else block.notes[i] for block, i in self._standing()]

    def _standing(self) -> list[tuple[Block, int]]:
        """The positions behind the committed tokens, as live blocks and places in them; none once all is DONE."""
        if self.phase is Phase.DONE:
            return []
        T = self.block_size
        return [(block, i) for block in self.blocks for i in range(max(self.known - block.start, 0), T)]

    # --- queries ----------------------------------------------------------------------------------------------------

    @property
    def steps_of_blocks(self) -> list[int]:
        """Decode steps of each block so far, live ones included."""
        return self.steps_per_block + [block.steps for block in self.blocks if block.steps]

    @property
    def single(self) -> bool:
        """Whether all that a step must be told of its rows is what the step before made of its one live block."""
        return not self.needs_host and self.rules.window == self.rules.live_blocks == 1 and self.rules.max_nfe == 0

    @property
    def may_finish_block(self) -> bool:
        """Whether the next step will probably finish the one live block, going by the pace of the last one."""
        is_open = self.blocks[0].open
        return is_open == 0 if self.rules.edits else is_open.bit_count() <= self.pace

    @property
    def live_from(self) -> int:
        """Where the first live block starts; everything before it is known."""
        return self.blocks[0].start

    @property
    def live_to(self) -> int:
        """Where the last live block ends."""
        return self.blocks[-1].start + self.block_size

    @property
    def unfilled(self) -> int:
        """Blocks before the live ones whose final KV is not written yet."""
        return (self.live_from - self.filled) // self.block_size

    @property
    def wants_decode(self) -> bool:
        """Whether its live block runs at all: a request for 0 tokens mostly only fills."""
        return self.max_new_tokens > 0 or self.rules.reads_prompt

    def block_at(self, position: int) -> Block:
        """The live block that holds the position."""
        return self.blocks[(position - self.live_from) // self.block_size]

    def tokens_at(self, start: int) -> list[int]:
        """The block's tokens at `start`: known ones, or a live block as it stands."""
        if start >= self.live_from:
            return self.block_at(start).tokens
        stop, n = start + self.block_size, len(self.prompt)
        if start >= n:
            return self.output[start - n : stop - n]
        if stop <= n:
            return list(self.prompt[start:stop])
        return list(self.prompt[start:n]) + self.output[: stop - n]

    def contradictions(self) -> list[str]:
        """What in its fields contradicts the rest."""
        if not self.blocks:
            return ["no block is live"]
        T, first, rules = self.block_size, self.live_from, self.rules
        ahead = len(self.blocks) - self._leading_done()
        facts = [
            (
                all(
                    b.start == first + i * T and len(b.tokens) == T and 0 <= b.open < 1 << T
                    for i, b in enumerate(self.blocks)
                ),
                "the live blocks are misshapen",
            ),
            (self.known == len(self.prompt) + len(self.output), f"{self.known} known positions"),
            (first % T == 0 and self.filled % T == 0 and 0 <= self.filled <= first, f"filled {self.filled} of {first}"),
            (self.phase is not Phase.WAITING or self.filled == 0, "waiting, yet holds KV"),
            (
                self.phase is not Phase.DECODING or self.unfilled < rules.window + rules.live_blocks,
                f"decoding with {self.unfilled} unfilled blocks",
            ),
            (
                self.phase is Phase.DONE or first <= self.known <= first + T,
                f"{self.known} known positions and a live block at {first}",
            ),
            (
                self.phase is Phase.DONE
                or (len(self.blocks) - ahead < rules.window and 1 <= ahead <= rules.live_blocks),
                f"{len(self.blocks)} live blocks, of which the first {len(self.blocks) - ahead} are done",
            ),
            (len(self.output) <= max(self.max_new_tokens, 0), f"{len(self.output)} tokens of {self.max_new_tokens}"),
            ((self.phase is Phase.DONE) == (self.ending is not None), f"{self.phase} with ending {self.ending}"),
        ]
        return [text for holds, text in facts if not holds]

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        if self.filled == self.live_from:
            self.phase = Phase.DECODING
            if not self.wants_decode:
                self.end(Ending.LENGTH)

    def _advance(self, same: Sequence[bool], *, spent: bool) -> None:
        """Commit what is final, end if that completes the answer, let blocks leave, and open the next one.

        Again while that is given as a whole.

        Args:
            same: of the first live blocks, whether the step left them as they were.
            spent: whether no further step is allowed.
        """
        rules, T = self.rules, self.block_size
        while True:
            answer = self._answer(spent)
            if self._ends_with(answer):
                return
            if spent:
                self._commit(len(answer))
                return self.end(Ending.LENGTH)
            done = self._leading_done() if self.blocks[0].done else 0
            leave = max(done - rules.window + 1, 0) if done else 0
            if rules.whole_blocks:
                answer = answer[: max(self.live_from + leave * T - self.known, 0)] if leave else []
            if answer:
                self._commit(len(answer))
            for i in range(leave):
                if i < len(same) and same[i] and self.filled == self.live_from:
                    self.filled += T
                self.steps_per_block.append(self.blocks.pop(0).steps)
            same = same[leave:]
            if len(self.blocks) - (done - leave) >= rules.live_blocks or not self._open_next():
                return

    def _ends_with(self, answer: list[int]) -> bool:
        """Whether the next tokens complete the answer, which is then committed and ended."""
        before, counts_from = len(self.output), self.stops_from - self.known
        if before + len(answer) >= self.max_new_tokens or not self.stop_ids.isdisjoint(answer):
            for i, token in enumerate(answer):
                stopped = token in self.stop_ids and i >= counts_from
                if stopped or before + i + 1 == self.max_new_tokens:
                    self._commit(i + 1)
                    self.end(Ending.STOP if stopped else Ending.LENGTH)
                    return True
        return False

    def _leading_done(self) -> int:
        """How many of the live blocks are done before the first that is not."""
        count = 0
        for block in self.blocks:
            if not block.done:
                break
            count += 1
        return count

    def _answer(self, spent: bool) -> list[int]:
        """What would follow the known tokens if nothing changed any more, up to the first open position.

        Where only whole blocks count, of the first blocks that are done; of all, if no further step is allowed.
        """
        out: list[int] = []
        known, T = self.known, self.block_size
        for block in self.blocks:
            if self.rules.whole_blocks and not block.done and not spent:
                break
            at = known - block.start if known > block.start else 0
            holes = block.open >> at
            if holes:
                out += block.tokens[at : at + (holes & -holes).bit_length() - 1]  # up to its lowest bit
                break
            out += block.tokens[at:T]
        return out

    def _commit(self, count: int) -> None:
        """Take the next tokens and their notes from the live blocks."""
        for block in self.blocks:
            at = self.known - block.start
            tokens = block.tokens[at : at + count]
            self.output += tokens
            if self.noted:
                self.notes += block.notes[at : at + count]
            taken = len(tokens)
            self.known += taken
            if taken == count:
                return
            count -= taken

    def _open_next(self) -> bool:
        """Open the block after the live ones if it is time (see the module); whether it is given as a whole."""
        if not self.blocks:
            self._open_block(self.known)
            return self.blocks[-1].done
        last, T = self.blocks[-1], self.block_size
        ready = last.done or last.open.bit_count() < self.rules.next_block_share * T
        if not ready or not self._goes_on_behind(last):
            return False
        self._open_block(last.start + T)
        return self.blocks[-1].done

    def _goes_on_behind(self, last: Block) -> bool:
        """Whether more is allowed behind the last live block, and no stop token stands in one."""
        T = self.block_size
        if last.start + T >= len(self.prompt) + self.max_new_tokens:
            return False
        counting = ((b, i) for b in self.blocks for i in range(max(self.stops_from - b.start, 0), T))
        return self.stop_ids.isdisjoint(b.tokens[i] for b, i in counting if not b.open >> i & 1)

    def _open_block(self, start: int) -> None:
        begun, self.ahead = self.ahead, None
        self.blocks.append(begun if begun is not None and begun.start == start else self._new_block(start))
        self.can_defer = self.single and start + self.block_size < len(self.prompt) + self.max_new_tokens

    def _new_block(self, start: int) -> Block:
        T, n = self.block_size, len(self.prompt)
        tokens = list(self.prompt[start:])
        given = len(tokens)
        fixed = (1 << given) - 1
        for i, token in enumerate(self.canvas[max(start - n, 0) : max(start + T - n, 0)], given):
            tokens.append(self.mask_id if token is None else token)
            fixed |= (token is not None) << i
        tokens += [self.mask_id] * (T - len(tokens))
        is_open = (1 << T) - 1 ^ fixed
        notes = [None] * T if self.noted else []
        return Block(start, given, fixed, tokens, is_open, self.fresh, notes, done=not is_open)

    def _take(self, block: Block, new: Decided) -> bool:
        """A step's decisions for one block; whether they changed nothing.

        Raises:
            IntegrityError: they are another block's, or break the rules. What a step may edit it answers for itself.
        """
        tokens, now, done, state, notes = new
        rules, was, before = self.rules, block.open, block.tokens
        fixed = block.given
        if not rules.whole_blocks and self.known > block.start:
            fixed = self.known - block.start
        same = tokens[:fixed] == before[:fixed] and not now & ((1 << fixed) - 1 | block.fixed)
        if self.canvas:
            same = same and all(tokens[i] == before[i] for i in range(self.block_size) if block.fixed >> i & 1)
        if not same:
            raise IntegrityError(f"{self.rid}: a step changed a fixed position of the block at {block.start}")
        if not rules.reopens:
            if now & ~was:
                raise IntegrityError(f"{self.rid}: a step opened a position of the block at {block.start}")
            if was and now == was:
                raise IntegrityError(f"{self.rid}: a step decided nothing in the block at {block.start}")
        if now and (done or block.done):
            raise IntegrityError(f"{self.rid}: the block at {block.start} is done with open positions")
        block.tokens, block.open = tokens, now
        if notes is not None:
            block.notes = notes
        block.steps += 1
        self.pace = was.bit_count() - now.bit_count()
        if not block.done:
            bound = self.block_size if rules.most_steps is None else rules.most_steps
            if block.steps + (not done) > bound:
                raise IntegrityError(f"{self.rid}: more than {bound} steps on the block at {block.start}")
            block.done = done
            # What a decode counts, it counts until then: edits that come later are another matter.
            block.state = self.fresh if done else state
        return now == was and tokens == before

    def _expect(self, move: str, *phases: Phase) -> None:
        if self.phase not in phases:
            raise IntegrityError(f"{self.rid}: cannot {move} while {self.phase.name}")
