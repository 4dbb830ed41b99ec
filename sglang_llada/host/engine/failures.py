"""An error while something is done for one request ends that request, and nothing else.

The scheduler notes errors here wherever it handles requests one by one, and goes on with the next one. Once a turn it
takes what was noted and answers those requests: with HTTP 400 where the error is theirs to mend (ConfigError), else
with HTTP 500, and a traceback in the log.

All ranks of a tensor-parallel group have to end the same requests in the same turn. Most errors happen on all of them
alike. Those that may not, because somebody else's code or a clock decides (custom processors, grammars, regular
expressions), are exchanged while such a request runs.

Commands of operators that fail before they change anything are answered, too. What is not one request's own is not
contained: an error of the device or of a collective ends the server.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import torch
from sglang.srt.managers.io_struct import (
    ExpertDistributionReq,
    ExpertDistributionReqOutput,
    ReleaseMemoryOccupationReqInput,
    ReleaseMemoryOccupationReqOutput,
    ResumeMemoryOccupationReqInput,
    ResumeMemoryOccupationReqOutput,
)
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from sglang_llada.errors import ConfigError

logger = logging.getLogger(__name__)

# Of torch: the accelerator is in an unknown state; a rank or a store is lost.
FATAL = (torch.AcceleratorError, torch.distributed.DistError)

# Commands that look whether they can be carried out before they begin, by asserting it, and the answers that end the
# wait for them. These have no place for a reason, which the log has.
ASSERTING = {
    ExpertDistributionReq: ExpertDistributionReqOutput,  # without --expert-distribution-recorder-mode
    ReleaseMemoryOccupationReqInput: ReleaseMemoryOccupationReqOutput,  # while requests run
    ResumeMemoryOccupationReqInput: ResumeMemoryOccupationReqOutput,  # of what was not released
}


def carried_out(dispatch: Callable[[Any], Any], command: Any) -> Any:
    """What the host's dispatcher makes of a request or command; one of ASSERTING may fail."""
    try:
        return dispatch(command)
    except Exception as error:
        if type(command) not in ASSERTING or isinstance(error, FATAL):
            raise
        logger.exception("%s is not carried out", type(command).__name__)
        return ASSERTING[type(command)]()


class Failures:
    """What went wrong, by request id, until it is taken."""

    def __init__(self, count: Callable[[], None]) -> None:
        """`count` is called for each request that fails."""
        self.reasons: dict[str, FINISH_ABORT] = {}
        self.count = count

    def __contains__(self, rid: str) -> bool:
        return rid in self.reasons

    def note(self, rid: str, error: Exception) -> None:
        """Note the first error of a request; one that is not a request's own is raised again."""
        if rid not in self.reasons:
            self.reasons[rid] = self.reason(rid, error)

    def reason(self, rid: str, error: Exception) -> FINISH_ABORT:
        """What a request that fails is told; the log has the error in full."""
        self.count()
        if isinstance(error, ConfigError):
            return FINISH_ABORT(str(error), HTTPStatus.BAD_REQUEST, "BadRequestError")
        log(rid, error)
        what = f"this request failed: {type(error).__name__}: {error}"
        return FINISH_ABORT(what, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")

    def take(self, group: Any = None) -> dict[str, FINISH_ABORT]:
        """What was noted since the last time; with a process group, on any of its ranks, each of which must call."""
        mine, self.reasons = self.reasons, {}
        if group is None:
            return mine
        some = torch.tensor(bool(mine))
        torch.distributed.all_reduce(some, torch.distributed.ReduceOp.MAX, group=group)
        if not some:
            return mine
        everyones: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(everyones, mine, group=group)
        return {rid: reason for each in everyones for rid, reason in each.items()}


def log(rid: str, error: Exception) -> None:
    """Show an error that is ours to mend; one that is not a request's own is raised again."""
    if isinstance(error, FATAL):
        raise error
    logger.error("request %s: an error, of which the others go on", rid, exc_info=error)
