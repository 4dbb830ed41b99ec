"""Profiles: the host records them in its scheduler, which an activity or a folder that is not to be had would end.

Hooks around what the scheduler calls. A recording that fails is given up, and whoever asked for it is told why.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import HTTPException
from sglang.srt.managers.io_struct import ProfileReqOutput, ProfileReqType

from sglang_llada.host.requests.bounds import shown

logger = logging.getLogger(__name__)

# Of each kind of device, what the host's profiler can record there; the host asks for the first two unless it is told.
ACTIVITIES = {"cpu": ("CPU", "GPU"), "cuda": ("CPU", "GPU", "MEM", "CUDA_PROFILER")}


def on_request(profile: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Around the host's start and end of a recording that somebody asks for."""
    from sglang.srt.platforms import current_platform

    if request.req_type is ProfileReqType.START_PROFILE:
        known = ACTIVITIES[current_platform.device_type]
        unknown = [each for each in request.activities or () if each not in known]
        reasons = {
            f"activities holds {shown(unknown[:1])[1:-1]}; allowed: {', '.join(known)}": unknown,
            "profile_by_stage is true; allowed: with num_steps of 1 or more": (
                request.profile_by_stage and (request.num_steps or 0) < 1
            ),
            "a profile is being recorded; /stop_profile ends it": manager.profile_in_progress,
        }
        for reason, holds in reasons.items():
            if holds:
                return ProfileReqOutput(success=False, message=reason)
    try:
        return profile(manager, request)
    except Exception as error:  # of torch, of the file system, or of a module that is not there
        return give_up(manager, error)


def on_step(predicate: Callable[..., None], manager: Any, batch: Any) -> None:
    """Around the host's look, before each step, whether a recording begins or ends with it."""
    try:
        predicate(manager, batch)
    except Exception as error:  # as above; nobody waits for an answer
        give_up(manager, error)


def give_up(manager: Any, error: Exception) -> ProfileReqOutput:
    """Forget a recording that failed, so that another one may begin."""
    logger.warning("the profile is given up: %r", error)
    manager.torch_profiler = manager.rpd_profiler = None
    manager.profile_in_progress = manager.profile_by_stage = False
    manager.profiler_start_forward_ct = manager.profiler_target_forward_ct = None
    return ProfileReqOutput(success=False, message=f"the profile is given up: {error!r}")


async def answer(execute: Callable[..., Awaitable[Any]], manager: Any, request: Any) -> Any:
    """Around the host's wait for its scheduler: why there is no profile is an answer, where it was an error of ours."""
    try:
        return await execute(manager, request)
    except RuntimeError as error:
        raise HTTPException(400, str(error)) from None
