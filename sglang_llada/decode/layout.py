"""Rows as numbers: where everything stands in what a step is told of its rows, and in what it gives back.

What a step must know of each row stands in one int64 table, so that one copy takes it to the device and a graph reads
it in one place. A row's record is the set of its open positions (bit i for position i), the state of its block, the set
of positions that may be edited once they are decided, its algorithm, its parameters and its first position; floats are
kept as the bits of a float64. What a step gives back of a row begins with its tokens and the first two of these, so
that its next record begins where the last one ended. Rows that decide nothing (FILL, SEAL, padding) have the idle
record.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_llada.config import DecodeConfig, Sampling
from sglang_llada.decode import ALGORITHMS, levenshtein
from sglang_llada.decode.contract import BlockRows, Draws, Params, State, StepOut, Tokens
from sglang_llada.decode.head import Lowered
from sglang_llada.decode.noise import hashed

CODES = {name: code for code, name in enumerate(ALGORITHMS)}
# Of a record: the set of open positions and the state, which change from step to step, then what stays as it is.
OPEN_COLUMN = 0
COUNTS = ("step", "edits")  # of a state, before the memory
NUMBERS = ("steps", "max_post_edit_steps", "cumulative_budget")
FLOATS = ("threshold", "edit_threshold")
DRAWS = ("temperature", "top_k", "top_p", "least")  # floats, see contract.Draws
STAYS = ("editable", "algorithm", *NUMBERS, *FLOATS, "penalty_lambda", "seed", *DRAWS, "start")
EDITABLE_COLUMN, ALGORITHM_COLUMN = (STAYS.index(name) - len(STAYS) for name in ("editable", "algorithm"))
PLACE = ("slot", "source")  # of a row of a forward, behind its record

MOST_TOP_K = 1 << 24  # no vocabulary has more ids: fp32 counts them exactly


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where what stands, for blocks of T positions and states of S numbers.

        a row of a forward       tokens | open | state | editable | algorithm | parameters | start | slot | source
        what a step made of it   tokens | open | state | done | trace: written | origin | prob

    Both begin with what goes on from step to step, `kept`. The record is what stands between tokens and slot.
    """

    block_size: int
    state_size: int

    @property
    def tokens(self) -> slice:
        """T columns."""
        return slice(0, self.block_size)

    @property
    def open(self) -> int:
        """The set of open positions."""
        return self.block_size + OPEN_COLUMN

    @property
    def state(self) -> slice:
        """S columns."""
        return slice(self.block_size + 1, self.kept.stop)

    @property
    def kept(self) -> slice:
        """Tokens, open and state."""
        return slice(0, self.block_size + 1 + self.state_size)

    @property
    def record(self) -> slice:
        """From `open` to `start`."""
        return slice(self.block_size, self.kept.stop + len(STAYS))

    @property
    def stays(self) -> slice:
        """What of a record no step changes."""
        return slice(self.kept.stop, self.record.stop)

    @property
    def editable(self) -> int:
        """The set of positions that may be edited."""
        return self.record.stop + EDITABLE_COLUMN

    @property
    def algorithm(self) -> int:
        """The code of an algorithm."""
        return self.record.stop + ALGORITHM_COLUMN

    @property
    def temperature(self) -> int:
        """0 as a float, and so as an integer, where nothing is drawn."""
        return self.record.stop + STAYS.index("temperature") - len(STAYS)

    @property
    def place(self) -> slice:
        """Start, slot and source."""
        return slice(self.start, self.width)

    @property
    def start(self) -> int:
        """The first position."""
        return self.record.stop - 1

    @property
    def slot(self) -> int:
        """Where the request stands in req_to_token."""
        return self.record.stop

    @property
    def source(self) -> int:
        """The row of the last step that this one goes on from, on the device; -1: it is written out."""
        return self.record.stop + 1

    @property
    def width(self) -> int:
        """Columns of a row of a forward."""
        return self.record.stop + len(PLACE)

    @property
    def done(self) -> int:
        """Of what a step made: 0 or 1."""
        return self.kept.stop

    @property
    def trace(self) -> slice:
        """Of what a step made, if it was told to give it: 3 T columns."""
        return slice(self.made, self.made + 3 * self.block_size)

    @property
    def made(self) -> int:
        """Columns of what a step made, without a trace."""
        return self.done + 1


def layout_of(block_size: int, tokens: Tokens) -> RowLayout:
    """The layout for a checkpoint."""
    return RowLayout(block_size, len(fresh(block_size, tokens)))


def fresh(block_size: int, tokens: Tokens) -> list[int]:
    """The state of a block that no step has seen, as it goes through records and comes back from steps."""
    return [0] * len(COUNTS) + [-1] * (levenshtein.memory_size(block_size) if tokens.indel else 0)


def numbers(params: DecodeConfig) -> tuple[int, ...]:
    """What a record says of a request's parameters, the same for all of its rows."""
    integers = (int(getattr(params, name)) for name in NUMBERS)
    floats = (bits(getattr(params, name)) for name in (*FLOATS, "penalty_lambda"))
    return (CODES[params.algorithm], *integers, *floats, *drawing(params.sampling))


def drawing(how: Sampling | None) -> tuple[int, ...]:
    """The seed and DRAWS; what cuts nothing is infinite, so that a step need not know the size of the vocabulary."""
    if how is None:
        return (0, *map(bits, (0.0, math.inf, math.inf, -math.inf)))
    top_k = float(how.top_k) if how.top_k < MOST_TOP_K else math.inf
    top_p = how.top_p if how.top_p < 1 else math.inf
    least = math.log(how.min_p) if how.min_p > 0 else -math.inf
    return (how.seed, *map(bits, (how.temperature, top_k, top_p, least)))


def record(is_open: int, editable: int, numbers: Sequence[int], state: Sequence[int], start: int = 0) -> list[int]:
    """The record of a DENOISE row; a position that is in both sets is open."""
    return [is_open, *state, editable, *numbers, start]


def idle(block_size: int, tokens: Tokens) -> list[int]:
    """The record of a row that decides nothing."""
    return record(0, 0, numbers(DecodeConfig.defaults(block_size)), fresh(block_size, tokens))


def unpack(ids: Tensor, table: Tensor, block_size: int, tokens: Tokens) -> tuple[BlockRows, State, Params, Tensor]:
    """A step's arguments and each row's algorithm [R]: ids [R * T] of the forward, table [R, width of a record]."""
    positions = torch.arange(block_size, device=table.device)
    step, edits = table[:, 1 : 1 + len(COUNTS)].unbind(-1)
    column = dict(zip(STAYS, table[:, -len(STAYS) :].unbind(-1), strict=True))
    is_open, editable = (sets[:, None] >> positions & 1 == 1 for sets in (table[:, OPEN_COLUMN], column["editable"]))
    floats = {name: column[name].view(torch.float64).float() for name in FLOATS}
    integers = {name: column[name] for name in NUMBERS}
    integers["cumulative_budget"] = integers["cumulative_budget"].bool()
    return (
        BlockRows(ids=ids.view(-1, block_size), open=is_open, editable=editable & ~is_open),
        State(step=step, edits=edits, memory=table[:, 1 + len(COUNTS) : -len(STAYS)]),
        Params(**integers, **floats, tokens=tokens),
        column["algorithm"],
    )


def repeated(ids: Tensor, table: Tensor, block_size: int) -> Lowered:
    """Of each position [R * T] the token to its left, as it stands in its block, and the row's penalty for it.

    The host's rule: the first position of a block has no such token, and to the right of an open one it is the mask.
    """
    has_left = torch.arange(block_size, device=table.device) > 0
    penalty = table[:, STAYS.index("penalty_lambda") - len(STAYS), None]
    by = penalty.view(torch.float64).float() * has_left  # [R, T]
    return Lowered(ids.roll(1), by.flatten())


def draws_of(table: Tensor, block_size: int) -> Draws:
    """How each position [R * T] is drawn: its noise is made of seed, position and the number of its block's step."""
    column = dict(zip(STAYS, table[:, -len(STAYS) :].unbind(-1), strict=True))
    position = column["start"][:, None] + torch.arange(block_size, device=table.device)
    key = hashed(column["seed"][:, None], position, table[:, 1, None])
    floats = (column[name].view(torch.float64).float()[:, None].expand(position.shape) for name in DRAWS)
    return Draws(key.flatten(), *(each.flatten() for each in floats))


def pack(out: StepOut, *, trace: bool = False) -> Tensor:
    """All that the host reads of a step, int64 [R, RowLayout.made], as RowLayout has it.

    With `trace` [R, 3 T] more; prob as the bits of a float64.
    """
    if out.packed is not None:
        return out.packed if trace else out.packed[:, : -3 * out.ids.shape[1]]
    assert out.state.memory is not None
    is_open = (out.open.long() << torch.arange(out.ids.shape[1], device=out.ids.device)).sum(-1)
    counts = [getattr(out.state, name)[:, None] for name in COUNTS]
    more = (out.written.long(), out.origin, out.prob.double().view(torch.int64)) if trace else ()
    return torch.cat((out.ids, is_open[:, None], *counts, out.state.memory, out.done.long()[:, None], *more), dim=-1)


def number(bits: int) -> float:
    """The float64 of an integer's bits."""
    x: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return x


def bits(x: float) -> int:
    """A float64 as the integer of the same bits."""
    number: int = struct.unpack("<q", struct.pack("<d", x))[0]
    return number
