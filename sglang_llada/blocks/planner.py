"""Which rows the next forward carries.

Decode rows go first and are never held back: every DECODING request gets a DENOISE row for each of its live blocks,
preceded by SEAL rows of the blocks that have just left. FILL rows of newcomers take what is left of the row budget,
oldest admission first, and a newcomer whose last FILL rows and live blocks fit decides in the same forward. So a
running request never waits for somebody's prompt, and a prompt takes as few forwards as the budget allows.

When decode rows alone come near the budget, FILL rows still get `FILL_SHARE` of it (at least one row): newcomers slow
the others down a little rather than starve.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

from sglang_llada.blocks.block import Block
from sglang_llada.blocks.request import Phase, Request

FILL_SHARE = 0.25


class RowKind(enum.Enum):
    """Why a row runs; only DENOISE needs a selection."""

    FILL = enum.auto()
    DENOISE = enum.auto()
    SEAL = enum.auto()


class Row(NamedTuple):
    """One block of one request in a forward: positions [start, start + T)."""

    request: Request[Any]
    kind: RowKind
    start: int
    block: Block | None = None  # the live one, of a DENOISE row


REQUEST, BLOCK = itemgetter(0), itemgetter(3)  # of a row, faster than by name


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows of a step, rows of one request in order of position."""

    rows: list[Row]

    def fills(self) -> dict[Request[Any], int]:
        """Of each request, how many of its rows write final KV."""
        found: dict[Request[Any], int] = {}
        for request, kind, *_ in self.rows:
            found[request] = found.get(request, 0) + (kind is not RowKind.DENOISE)
        return found

    def of(self, kind: RowKind) -> list[Row]:
        """The rows of one kind, in order."""
        return [row for row in self.rows if row.kind is kind]


def next_step(requests: Iterable[Request[Any]], budget: int, carried: Sequence[Row] = ()) -> Plan:
    """Rows of the next forward.

    Args:
        requests: the admitted requests in order of admission; those that are not FILLING or DECODING are passed over.
        budget: rows that a forward should have at most; exceeded only by decode rows and the share of FILL rows.
        carried: the only rows of some requests, known from the last step; they come first.
    """
    rows = list(carried)
    planned = set(map(id, map(REQUEST, rows)))
    newcomers: list[Request[Any]] = []
    for request in [each for each in requests if id(each) not in planned]:
        if request.phase is Phase.FILLING:
            newcomers.append(request)
        elif request.phase is Phase.DECODING:
            if request.filled != request.blocks[0].start:
                for start in _unfilled(request, request.unfilled):
                    rows.append(Row(request, RowKind.SEAL, start))
            for block in request.blocks:
                rows.append(Row(request, RowKind.DENOISE, block.start, block))
    room = max(budget - len(rows), int(budget * FILL_SHARE), 1)
    for request in newcomers:
        count = min(room, request.unfilled)
        rows += [Row(request, RowKind.FILL, start) for start in _unfilled(request, count)]
        room -= count
        if room >= len(request.blocks) and count == request.unfilled and request.wants_decode:
            rows += [Row(request, RowKind.DENOISE, block.start, block) for block in request.blocks]
            room -= len(request.blocks)
        if room <= 0:
            break
    return Plan(rows)


def most_rows(running: int, budget: int, each: int = 2) -> int:
    """The most rows that next_step() plans for so many admitted requests.

    Args:
        each: SEAL and DENOISE rows that one of them may have: its window and live_blocks added up.
    """
    return max(budget, each * running + max(int(budget * FILL_SHARE), 1))


def _unfilled(request: Request[Any], count: int) -> range:
    return range(request.filled, request.filled + count * request.block_size, request.block_size)
