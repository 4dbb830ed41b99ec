"""The tensor part of a step, from hidden states to decisions: the same code eagerly and inside a CUDA graph.

What a step must know of each row stands in one int64 table, so that one copy takes it to the device and a graph reads
it in one place. A row's record is its open positions (T flags), the steps made on its block, and its parameters; floats
are kept as the bits of a float64. Rows that decide nothing (FILL, SEAL, padding) have the idle record.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from sglang_llada.config import DecodeConfig
from sglang_llada.decode import ALGORITHMS
from sglang_llada.decode.contract import BlockRows, Params, Scores, State, StepOut
from sglang_llada.decode.select import Exchange, Head, select

COLUMNS = ("step", "steps", "threshold")  # of a record, after its T flags


def record(is_open: Sequence[bool], step: int, params: DecodeConfig) -> list[int]:
    """The record of a DENOISE row."""
    return [*map(int, is_open), step, params.steps, bits(params.threshold)]


def idle(block_size: int) -> list[int]:
    """The record of a row that decides nothing."""
    return [0] * block_size + [0, 1, 0]


def unpack(ids: Tensor, table: Tensor) -> tuple[BlockRows, State, Params]:
    """A step's arguments: ids [R * T] of the forward, table [R, T + columns]."""
    T = table.shape[1] - len(COLUMNS)
    column = dict(zip(COLUMNS, table[:, T:].unbind(-1), strict=True))
    return (
        BlockRows(ids=ids.view(-1, T), open=table[:, :T] > 0),
        State(step=column["step"]),
        Params(threshold=column["threshold"].view(torch.float64).float(), steps=column["steps"]),
    )


def decide(
    hidden: Tensor,
    ids: Tensor,
    table: Tensor,
    count: int,
    *,
    head: Head,
    mask_id: int,
    algorithm: str,
    exchange: Exchange | None = None,
) -> StepOut:
    """Decisions for all rows of a forward.

    Args:
        hidden: normed hidden states, [R * T, H].
        ids: tokens of the forward, int64 [R * T].
        table: records of the rows, int64 [R, T + columns].
        count: at least as many positions as are open. A graph does not know and says R * T.
        head, mask_id, exchange: as for select.
        algorithm: a key of ALGORITHMS.
    """
    block, state, params = unpack(ids, table)
    is_open = block.open.flatten()
    open_first = is_open.to(torch.uint8).argsort(descending=True, stable=True)[:count]
    best = select(hidden[open_first], head, mask_id, exchange=exchange, wanted=is_open.sum())
    token = torch.zeros_like(ids).index_copy(0, open_first, best.token[:, 0])
    prob = torch.zeros_like(ids, dtype=torch.float32).index_copy(0, open_first, best.prob[:, 0])
    scores = Scores(token=token.view_as(block.ids), prob=prob.view_as(block.ids))
    return ALGORITHMS[algorithm].step(block, scores, state, params)


def bits(x: float) -> int:
    """A float64 as the integer of the same bits."""
    number: int = struct.unpack("<q", struct.pack("<d", x))[0]
    return number
