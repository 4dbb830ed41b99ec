"""Which rows the next forward carries.

Decode rows go first and are never held back: every DECODING request gets its DENOISE row, preceded by the SEAL row of
the block it has just completed. FILL rows of newcomers take what is left of the row budget, oldest admission first,
and a newcomer whose last FILL rows fit decides its first block in the same forward. So a running request never waits
for somebody's prompt, and a prompt takes as few forwards as the budget allows.

When decode rows alone come near the budget, FILL rows still get `FILL_SHARE` of it (at least one row): newcomers slow
the others down a little rather than starve.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sglang_llada.blocks.request import Phase, Request

FILL_SHARE = 0.25


class RowKind(enum.Enum):
    """Why a row runs; only DENOISE needs a selection."""

    FILL = enum.auto()
    DENOISE = enum.auto()
    SEAL = enum.auto()


@dataclass(frozen=True, slots=True)
class Row:
    """One block of one request in a forward: positions [start, start + T)."""

    request: Request[Any]
    kind: RowKind
    start: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows of a step, rows of one request in order of position."""

    rows: list[Row]

    def of(self, kind: RowKind) -> list[Row]:
        """The rows of one kind, in order."""
        return [row for row in self.rows if row.kind is kind]


def next_step(requests: Iterable[Request[Any]], budget: int) -> Plan:
    """Rows of the next forward.

    Args:
        requests: the admitted requests in order of admission; those that are not FILLING or DECODING are passed over.
        budget: rows that a forward should have at most; exceeded only by decode rows and the share of FILL rows.
    """
    rows: list[Row] = []
    newcomers: list[Request[Any]] = []
    for request in requests:
        if request.phase is Phase.FILLING:
            newcomers.append(request)
        elif request.phase is Phase.DECODING:
            rows += [Row(request, RowKind.SEAL, start) for start in _unfilled(request, request.unfilled)]
            rows.append(Row(request, RowKind.DENOISE, request.block.start))
    room = max(budget - len(rows), int(budget * FILL_SHARE), 1)
    for request in newcomers:
        count = min(room, request.unfilled)
        rows += [Row(request, RowKind.FILL, start) for start in _unfilled(request, count)]
        room -= count
        if room > 0 and count == request.unfilled and request.wants_decode:
            rows.append(Row(request, RowKind.DENOISE, request.block.start))
            room -= 1
        if room <= 0:
            break
    return Plan(rows)


def most_rows(running: int, budget: int) -> int:
    """The most rows that next_step() plans for so many admitted requests."""
    return max(budget, 2 * running + max(int(budget * FILL_SHARE), 1))


def _unfilled(request: Request[Any], count: int) -> range:
    return range(request.filled, request.filled + count * request.block_size, request.block_size)
