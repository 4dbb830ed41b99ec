"""The requests that the scheduler knows, by id, in the order they were admitted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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

    def readmit(self, rid: str, cached: int, *, loading: bool = False) -> None:
        """Admit a waiting request, behind all that run; as Request.admit()."""
        request = self._requests.pop(rid)
        self._requests[rid] = request
        request.admit(cached, loading=loading)

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

    def contradictions(self, held: dict[str, int]) -> dict[str, str]:
        """What is wrong with which request, by id: it contradicts itself, or what the pools say is held.

        Args:
            held: per request id, the positions it has KV pages for.
        """
        found = dict.fromkeys(held.keys() - self._requests.keys(), "KV is held for a request that is not known")
        for request in self:
            if request.ending is Ending.OUTSIDE:
                continue  # perhaps for what was wrong with it
            wrong = request.contradictions()
            pages = held.get(request.rid, 0)
            if not wrong and request.phase is not Phase.DONE:
                ahead = 0 if request.ahead is None else request.block_size
                at_most = 0 if request.phase is Phase.WAITING else request.live_to + ahead
                if not request.filled <= pages <= at_most:
                    wrong = [f"filled {request.filled}, holds {pages} positions, may hold {at_most}"]
            if wrong:
                found[request.rid] = f"{request.phase.name}: " + "; ".join(wrong)
        return found

    def check_integrity(self, held: dict[str, int]) -> None:
        """Raise IntegrityError if there are contradictions."""
        if found := self.contradictions(held):
            raise IntegrityError("; ".join(f"{rid}: {what}" for rid, what in found.items()))
