"""Scores of prompts, as /v1/score asks for them: reads of the position behind each one (host/requests/canvas.py).

The host checks what it is asked, makes one request of the items, and makes scores of what comes back. In between its
request becomes one of reads, and their probabilities become the log-probabilities that it looks for: of a position with
nothing decided behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from sglang_llada.config import CANVAS, CHOICES
from sglang_llada.host.facts import is_ours
from sglang_llada.host.requests import meta_info

scoring: ContextVar[bool] = ContextVar("scoring", default=False)  # whether what the host generates now are scores


async def score(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the host's scores of prompts."""
    token = scoring.set(is_ours(manager.server_args))
    try:
        return await original(manager, *args, **kwargs)
    finally:
        scoring.reset(token)


def as_reads(obj: Any) -> None:
    """Make reads of the host's request for scores; each of its prompts has labels of its own."""
    obj.return_logprob, labels, obj.token_ids_logprob = False, obj.token_ids_logprob, None
    obj.sampling_params = [{"custom_params": {CANVAS: [None], CHOICES: each}} for each in labels]


def from_reads(
    process: Callable[..., Any], manager: Any, results: list[dict[str, Any]], labels: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around the host's way from results to scores: what was read stands where it looks for it."""
    for result, tokens in zip(results, labels if scoring.get() else (), strict=False):
        [read] = result["meta_info"][meta_info.CHOICES]
        found = [(math.log(p) if p else -math.inf, token, None) for p, token in zip(read, tokens, strict=True)]
        result["meta_info"]["output_token_ids_logprobs"] = [found]
    return process(manager, results, labels, *args, **kwargs)
