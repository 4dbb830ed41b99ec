"""The requests that the scheduler knows, by id, in the order they were admitted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang_llada.blocks.planner import Plan, RowKind
from sglang_llada.blocks.request import Ending, Phase, Request
from sglang_llada.errors import IntegrityError


class Table:
    """Owns every live Request; the one place that adds, finds and forgets them."""

    def __init__(self) -> None:
        self._requests: dict[str, Request[Any]] = {}

    def add(self, request: Request[Any]) -> None:
        """Take in a new request."""
        if request.rid in self._requests:
            raise IntegrityError(f"{request.rid}: added twice")
        self._requests[request.rid] = request

    def readmit(self, rid: str, cached: int) -> None:
        """Admit a waiting request, behind all that run."""
        request = self._requests.pop(rid)
        self._requests[rid] = request
        request.admit(cached)

    def advance(self, plan: Plan) -> None:
        """Book a launched forward: its FILL and SEAL rows write final KV, and everybody in it has one more forward."""
        last: Request[Any] | None = None
        for row in plan.rows:
            request = row.request
            if request is not last:  # rows of one request stand together
                request.forwards += 1
                last = request
            if row.kind is not RowKind.DENOISE:
                request.fill(1)

    def drop(self, rid: str) -> None:
        """End a request from outside (abort, error) and drop it; unknown ids are fine, they never got here."""
        request = self._requests.pop(rid, None)
        if request is not None and request.phase is not Phase.DONE:
            request.end(Ending.OUTSIDE)

    def get(self, rid: str) -> Request[Any] | None:
        """The request, if it is known."""
        return self._requests.get(rid)

    def __getitem__(self, rid: str) -> Request[Any]:
        return self._requests[rid]

    def __iter__(self) -> Iterator[Request[Any]]:
        return iter(self._requests.values())

    def __len__(self) -> int:
        return len(self._requests)

    def check_integrity(self, held: dict[str, int]) -> None:
        """Compare with what the pools say is held.

        Args:
            held: per request id, the positions it has KV pages for.

        Raises:
            IntegrityError: a request contradicts itself, holds pages while it must not, or lacks pages it needs.
        """
        for request in self:
            request.check()
            pages = held.get(request.rid, 0)
            ahead = 0 if request.ahead is None else request.block_size
            at_most = 0 if request.phase is Phase.WAITING else request.live_to + ahead
            if not request.filled <= pages <= at_most and request.phase is not Phase.DONE:
                raise IntegrityError(
                    f"{request.rid}: {request.phase.name}, filled {request.filled}, holds {pages} positions, "
                    f"may hold {at_most}"
                )
        strangers = held.keys() - self._requests.keys()
        if strangers:
            raise IntegrityError(f"KV is held for unknown requests: {sorted(strangers)}")
