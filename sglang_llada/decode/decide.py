"""The tensor part of a step, from hidden states to decisions: the same code eagerly and inside a CUDA graph.

What a step must know of each row stands in one int64 table, so that one copy takes it to the device and a graph reads
it in one place. A row's record is a mark per position (FIXED, OPEN or EDITABLE), its algorithm, the state of its block
and its parameters; floats are kept as the bits of a float64. Rows that decide nothing (FILL, SEAL, padding) have the
idle record. Every algorithm steps over all rows, and each row takes what its own says: no row waits for another's kind.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sglang_llada.config import DecodeConfig
from sglang_llada.decode import ALGORITHMS
from sglang_llada.decode.contract import BlockRows, Params, Scores, State, StepOut
from sglang_llada.decode.select import Exchange, Head, select

FIXED, OPEN, EDITABLE = range(3)
CODES = {name: code for code, name in enumerate(ALGORITHMS)}

# Of a record, after its T marks.
STATE = ("step", "edits")
NUMBERS = ("steps", "max_post_edit_steps")
FLOATS = ("threshold", "edit_threshold")
COLUMNS = ("algorithm", *STATE, *NUMBERS, *FLOATS)


def record(marks: Sequence[int], step: int, edits: int, params: DecodeConfig) -> list[int]:
    """The record of a DENOISE row."""
    numbers = [getattr(params, name) for name in NUMBERS]
    return [*marks, CODES[params.algorithm], step, edits, *numbers, *(bits(getattr(params, name)) for name in FLOATS)]


def idle(block_size: int) -> list[int]:
    """The record of a row that decides nothing."""
    return record([FIXED] * block_size, 0, 0, DecodeConfig.defaults(block_size))


def unpack(ids: Tensor, table: Tensor) -> tuple[BlockRows, State, Params, Tensor]:
    """A step's arguments and each row's algorithm [R]: ids [R * T] of the forward, table [R, T + columns]."""
    T = table.shape[1] - len(COLUMNS)
    marks, column = table[:, :T], dict(zip(COLUMNS, table[:, T:].unbind(-1), strict=True))
    floats = {name: column[name].view(torch.float64).float() for name in FLOATS}
    return (
        BlockRows(ids=ids.view(-1, T), open=marks == OPEN, editable=marks == EDITABLE),
        State(**{name: column[name] for name in STATE}),
        Params(**{name: column[name] for name in NUMBERS}, **floats),
        column["algorithm"],
    )


def decide(
    hidden: Tensor,
    ids: Tensor,
    table: Tensor,
    count: int,
    *,
    head: Head,
    mask_id: int,
    exchange: Exchange | None = None,
) -> StepOut:
    """Decisions for all rows of a forward.

    Args:
        hidden: normed hidden states, [R * T, H].
        ids: tokens of the forward, int64 [R * T].
        table: records of the rows, int64 [R, T + columns].
        count: at least as many positions as are open or editable. A graph does not know and says R * T.
        head, mask_id, exchange: as for select.

    Returns:
        The rows' decisions; all ids of a row are -1 if one of its logits that matter was not finite.
    """
    block, state, params, algorithm = unpack(ids, table)
    wanted = (block.open | block.editable).flatten()
    wanted_first = wanted.to(torch.uint8).argsort(descending=True, stable=True)[:count]
    best = select(hidden[wanted_first], head, mask_id, exchange=exchange, wanted=wanted.sum())
    token = torch.zeros_like(ids).index_copy(0, wanted_first, best.token[:, 0])
    prob = torch.zeros_like(ids, dtype=torch.float32).index_copy(0, wanted_first, best.prob[:, 0])
    scores = Scores(token=token.view_as(block.ids), prob=prob.view_as(block.ids))
    steps = [each.step(block, scores, state, params) for each in ALGORITHMS.values()]
    out = steps[0]
    for code, other in enumerate(steps[1:], start=1):
        out = where(algorithm == code, other, out)
    unsound = ((token < 0) & wanted).view_as(block.ids).any(-1, keepdim=True)
    return replace(out, ids=out.ids.masked_fill(unsound, -1))


def where(rows: Tensor, a: StepOut, b: StepOut) -> StepOut:
    """For each row what a says if `rows` [R] is true, else what b says."""
    pick = rows[:, None]
    return StepOut(
        ids=torch.where(pick, a.ids, b.ids),
        open=torch.where(pick, a.open, b.open),
        state=State(*(torch.where(rows, getattr(a.state, name), getattr(b.state, name)) for name in STATE)),
        done=torch.where(rows, a.done, b.done),
    )


def bits(x: float) -> int:
    """A float64 as the integer of the same bits."""
    number: int = struct.unpack("<q", struct.pack("<d", x))[0]
    return number
